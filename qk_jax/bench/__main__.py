"""What a config costs, how it is sharded over a mesh, and how fast it runs.

    python -m qk_jax.bench cost --config stage2:20b
    python -m qk_jax.bench cost --config stage3:tiny --measure 10 --rows 32
    python -m qk_jax.bench shardings --config stage2:20b --mesh fsdp=64,tensor=4
    python -m qk_jax.bench peer --size small --device cpu
    python -m qk_jax.bench layouts --config stage3:20b --slice v5p-128 --search --out D
    python -m qk_jax.bench precompile --config stage3:20b@v5p-128 --slice v5p-128 --out D
    python -m qk_jax.bench checkpoints --gigabytes 4 --out gs://BUCKET/measured
    python -m qk_jax.bench checkpoints --config stage2:20b@v5p-128 --slice v5p-128

`cost` prints parameters, state bytes and model FLOPs for the config's target sizes with 0 to
`--pictures` condition pictures, on any machine. With --measure N the real train step also runs N
times per shape on the devices at hand, from random parameters and synthetic examples, and the
median step time, pictures/s, model FLOP/s and MFU are printed. `shardings` prints every parameter
with its shape, its sharding as a weight of the step and as optimizer state, and its bytes on each
device of a mesh that need not be here. `peer` times a training and a sampling step of the MMDiT
against diffusers' in PyTorch, on a CPU or one GPU. `layouts` compiles the train step ahead of time
for TPU slices that need not be here, and says of every layout whether it fits, how long the
compiler thinks a step takes and where the time goes; with --measure it also runs on the devices at
hand. `precompile` compiles all programs of a stage for a slice that need not be here, or for the
devices at hand, and keeps them for runs. `checkpoints` times saves and restores on a disk or a
bucket, or estimates the digests of a run's state on a slice. A config is a shipped one's name, or
the path of a file (mine.py:tiny); any field of it can be given as --config.FIELD=VALUE.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qk_jax.base import cli, runtime
from qk_jax.base.errors import exits
from qk_jax.bench import checkpoints, cost, layouts, peer, precompile, shardings


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.bench", description=__doc__)
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    price = verbs.add_parser("cost", help="parameters, bytes, FLOPs; measured steps")
    price.add_argument("--pictures", type=int, default=2, help="most condition pictures (2)")
    price.add_argument("--sizes", type=int, default=1, help="target sizes of the config (1)")
    price.add_argument("--rows", type=int, default=0, help="examples of a batch; 0: the config's")
    price.add_argument("--measure", type=int, default=0, help="steps to time; 0 only counts")
    spread = verbs.add_parser("shardings", help="how every parameter is sharded")
    spread.add_argument("--mesh", metavar="AXIS=N,..", help="fsdp=64,tensor=4 (the config's)")
    peer.add_arguments(verbs.add_parser("peer", help="step time against PyTorch"))
    checkpoints.add_arguments(verbs.add_parser("checkpoints", help="speed of saves and restores"))
    table = verbs.add_parser("layouts", help="what fits a TPU slice, and how fast it would be")
    layouts.add_arguments(table)
    programs = verbs.add_parser("precompile", help="a stage's programs, kept for its runs")
    precompile.add_arguments(programs)
    for verb in (price, spread, table, programs):
        verb.add_argument("--config", required=True, help="NAME:SIZE, or FILE.py:SIZE")
    return out


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The verb's options, and the overrides --config.FIELD=VALUE."""
    args, overrides = cli.parse_with_overrides(parser(), argv)
    if overrides and not getattr(args, "config", None):
        parser().error(f"{args.verb} has no config")
    return args, overrides


@exits
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args, overrides = arguments(argv)
    runtime.skip_absent_tpu()
    modules = (checkpoints, cost, layouts, peer, precompile, shardings)
    verbs = {module.__name__.rpartition(".")[2]: module for module in modules}
    verbs[args.verb].command(args, overrides)


def run() -> None:
    """Entry point of the console script."""
    main()


if __name__ == "__main__":
    run()
