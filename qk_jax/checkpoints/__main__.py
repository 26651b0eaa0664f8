"""Looks at the checkpoints of a stage, verifies, copies, averages and deletes them.

    python -m qk_jax.checkpoints ls W/stage3
    python -m qk_jax.checkpoints verify W/stage3 [--step 800]
    python -m qk_jax.checkpoints inspect W/stage3 [--step 800] [--norms] [--config]
    python -m qk_jax.checkpoints prune W/stage3 --keep 2 [--keep-every 1000] [--dry-run]
    python -m qk_jax.checkpoints average W/stage3 --steps 600,700,800 --out W2/stage3 [--ema]
    python -m qk_jax.checkpoints copy W/stage3 --out W2/stage3 [--step 800]

verify reads every leaf of every step, and the frozen parameters, compares their digests and ends
with status 1 when one differs; it sets nothing aside. average writes a stage folder that
`config.init.checkpoint`, sample and convert take. copy verifies what it has written; the same
command again copies only what is missing or damaged. No verb needs an accelerator, nor memory for
more than a few leaves (average: for one copy of the parameters in float32).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import jax

from qk_jax.base import buckets, cli, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.checkpoints import copying, tools


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.checkpoints", description=__doc__)
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    show = verbs.add_parser("ls", help="steps: time, size, stage, items")
    check = verbs.add_parser("verify", help="compare the digest of every leaf")
    look = verbs.add_parser("inspect", help="metadata and leaves of a step")
    thin = verbs.add_parser("prune", help="delete steps")
    mean = verbs.add_parser("average", help="the mean of several steps as a new folder")
    take = verbs.add_parser("copy", help="copy a stage folder, or one step")
    for verb in (show, check, look, thin, mean, take):
        verb.add_argument("folder", metavar="DIR", help="folder of a stage, such as W/stage3")
    check.add_argument("--step", type=int, help="only this one (default: all)")
    look.add_argument("--step", type=int, help="default: the newest")
    look.add_argument("--norms", action="store_true", help="read the leaves: L2 norm of each")
    look.add_argument("--config", action="store_true", help="the config that it was trained with")
    thin.add_argument("--keep", type=int, required=True, metavar="N", help="the newest N stay")
    thin.add_argument(
        "--keep-every", type=int, default=0, metavar="K", help="so do steps divisible by K"
    )
    thin.add_argument("--dry-run", action="store_true", help="only tell what would be deleted")
    mean.add_argument("--steps", type=numbers, required=True, metavar="A,B,..", help="two or more")
    mean.add_argument("--ema", action="store_true", help="of the moving averages of the weights")
    take.add_argument("--step", type=int, help="this step with what it needs (default: everything)")
    for verb in (mean, take):
        verb.add_argument("--out", required=True, metavar="DIR", help="stage folder to write")
    return out


def numbers(text: str) -> list[int]:
    """'600,800' -> [600, 800]. Raises InputError for anything else."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError(f"--steps is {text!r}, expected step numbers such as 600,700,800")
    return [int(part) for part in text.split(",")]


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    runtime.start_logging()
    buckets.check(vars(args).values())
    jax.config.update("jax_platforms", "cpu")  # a TPU may be at work on the run itself
    good = True
    verify = args.verb == "verify"
    for whole, line in tools.verify(args.folder, args.step) if verify else told(args):
        good = good and whole
        print(line, flush=True)
    if not good:
        raise SystemExit(1)


def told(args: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """The lines of the other verbs, which end well or with an error."""
    match args.verb:
        case "ls":
            found = tools.listing(args.folder)
        case "inspect":
            found = tools.description(args.folder, args.step, norms=args.norms, config=args.config)
        case "prune":
            found = tools.prune(args.folder, args.keep, args.keep_every, dry_run=args.dry_run)
        case "average":
            item = "ema" if args.ema else "params"
            found = tools.average(args.folder, args.steps, args.out, item)
        case _:
            found = copying.copy(args.folder, args.out, args.step)
    return ((True, line) for line in found)


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
