"""Converts trained models to PyTorch and proves that they stay the same.

    python -m qk_jax.convert to-pytorch --checkpoint W/stage3 --out DIR [--dtype bfloat16]
    python -m qk_jax.convert verify --checkpoint W/stage3 --pytorch DIR

The first writes a folder that diffusers loads and paints with, without JAX; the second loads both
and prints the largest differences of weights, states and pictures, with exit status 1 when one is
beyond rounding. The other way needs no command: `config.init.vlm`, `init.mmdit` and `init.vae` of
the trainer take folders of transformers and diffusers as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from qk_jax import errors
from qk_jax.errors import InputError

GIGABYTE = 10**9


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports like the rest of the program."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the arguments")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = _Parser(
        prog="python -m qk_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    export = verbs.add_parser("to-pytorch", help="write a folder for diffusers")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: what the model was trained to compute in)",
    )
    export.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="split above it (default 5)"
    )
    check = verbs.add_parser("verify", help="compare a checkpoint with its export")
    check.add_argument("--pytorch", required=True, metavar="DIR", help="folder of to-pytorch")
    for verb in (export, check):
        verb.add_argument("--checkpoint", required=True, metavar="DIR", help="such as W/stage3")
        verb.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
        verb.add_argument(
            "--no-ema", action="store_true", help="the last weights, not their average"
        )
    return out


@errors.exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    # After the arguments are known to be good: these take seconds to import.
    from qk_jax import painting
    from qk_jax.convert import torch_folder, verify
    from qk_jax.training import initial

    loaded = initial.load(args.checkpoint, step=args.step, ema=not args.no_ema)
    name = f"{loaded.config['stage']}-{loaded.config['size']}-{loaded.step}"
    painter = painting.of_params(
        loaded.model.config, loaded.params, loaded.config, batch=1, name=name
    )
    if args.verb == "verify":
        if not verify.verify(painter, args.pytorch):
            raise SystemExit(1)
        return
    if not args.max_shard_size > 0:
        raise InputError(f"--max-shard-size is {args.max_shard_size}; give a positive number")
    limit = int(args.max_shard_size * GIGABYTE)
    torch_folder.export_pipeline(
        painter, args.out, loaded.config, loaded.step, args.dtype, max_shard_bytes=limit
    )
    print(args.out)


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
