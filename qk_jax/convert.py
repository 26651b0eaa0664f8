"""PyTorch <-> qk_jax: public weights in, trained models out, and the proof that they are the same.

    python -m qk_jax.convert from-pytorch --model DIR_OR_HUB_ID --out DIR [--dtype bfloat16]
    python -m qk_jax.convert to-pytorch --checkpoint W/stage3 --out DIR [--lora separate]
    python -m qk_jax.convert verify --checkpoint W/stage3 --pytorch DIR
    python -m qk_jax.convert bench [--shape 3b]

from-pytorch checks Qwen2.5-VL, Qwen-Image transformers, both autoencoders, whole pipelines of
diffusers and LoRA files, and writes them as safetensors folders in the published form, which
`config.init` of the trainer takes as it takes the model itself. to-pytorch writes a folder that
diffusers loads and paints with, without JAX. verify loads both and prints the largest differences
of weights, states, velocities and pictures, with exit status 1 when one is beyond rounding. bench
measures from-pytorch on a large model: memory, speed against `cp`, equality.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from qk_jax.base import cli
from qk_jax.base.errors import InputError, exits


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.convert", description=__doc__)
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    take = verbs.add_parser("from-pytorch", help="check public weights and write them again")
    take.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="owner/name[@rev]")
    take.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    take.add_argument(
        "--ignore", action="append", default=[], metavar="REGEX", help="tensors to leave out"
    )
    take.add_argument("--base", metavar="DIR_OR_HUB_ID", help="what a LoRA file adapts")
    give = verbs.add_parser("to-pytorch", help="write a folder for diffusers")
    give.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    give.add_argument(
        "--lora", choices=("merged", "separate"), default="merged", help="stage 3's adapter"
    )
    give.add_argument(
        "--max-shard-size", type=size, default="5GB", metavar="SIZE", help="default 5GB"
    )
    check = verbs.add_parser("verify", help="compare a checkpoint with its export")
    check.add_argument("--pytorch", required=True, metavar="DIR", help="folder of to-pytorch")
    for verb in (take, give):
        verb.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as they are"
        )
    for verb in (give, check):
        verb.add_argument("--checkpoint", required=True, metavar="DIR", help="such as W/stage3")
        verb.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
        verb.add_argument(
            "--ema",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="the moving average of the weights where there is one, or the last weights",
        )
    measure = verbs.add_parser("bench", help="measure from-pytorch")
    measure.add_argument("--shape", choices=("tiny", "3b", "7b"), default="3b", help="default 3b")
    measure.add_argument("--dir", metavar="DIR", help="where its files go (default: a new folder)")
    return out


def size(text: str) -> int:
    """'5GB' -> bytes, with KB, MB and GB as powers of 1000 (as in save_pretrained)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text.upper())
    if not match or not float(match[1]):
        raise InputError(f"the size {text!r} is not of the form 5GB or 500MB")
    return int(float(match[1]) * 1000 ** (" KMG".index(match[2])))


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    from qk_jax.base import buckets, runtime

    buckets.check(vars(args).values())
    runtime.quiet()
    runtime.skip_absent_tpu()
    VERBS[args.verb](args)


# The verbs import what they need when the arguments are known to be good: it takes seconds.


def from_pytorch(args: argparse.Namespace) -> None:
    """Public weights -> a checked folder of them."""
    from qk_jax.weights import from_pytorch as lib

    for pattern in args.ignore:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"--ignore {pattern!r} is no regular expression: {error}") from None
    lib.convert(args.model, args.out, dtype=args.dtype, ignore=args.ignore, base=args.base)
    print(args.out)


def to_pytorch(args: argparse.Namespace) -> None:
    """A trained stage -> a folder for PyTorch."""
    from qk_jax.export import folder

    folder.export_pipeline(
        _load(args), args.out, args.dtype, max_shard_bytes=args.max_shard_size, lora=args.lora
    )
    print(args.out)


def verify(args: argparse.Namespace) -> None:
    """Exit status 1 when an export differs."""
    from qk_jax.export import verify as lib

    if not lib.verify(_load(args), args.pytorch):
        raise SystemExit(1)


def bench(args: argparse.Namespace) -> None:
    """Memory, speed and equality."""
    from qk_jax.bench import conversion as lib

    lib.run(args.shape, args.dir)


VERBS = {"from-pytorch": from_pytorch, "to-pytorch": to_pytorch, "verify": verify, "bench": bench}


def _load(args: argparse.Namespace) -> Any:
    """The trained model of a stage folder."""
    from qk_jax.checkpoints import run_folder
    from qk_jax.weights import read

    read.refuse_old(args.checkpoint)
    return run_folder.load(args.checkpoint, step=args.step, ema=args.ema)


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
