"""What a config costs, how it lies over a mesh, and how fast it runs here.

    python -m qk_jax.bench cost --config configs/stage2.py:20b
    python -m qk_jax.bench cost --config configs/stage3.py:tiny --measure 10 --rows 32
    python -m qk_jax.bench shardings --config configs/stage2.py:20b --mesh fsdp=64,tensor=4
    python -m qk_jax.bench peer --size small --device cpu
    python -m qk_jax.bench layouts --config configs/stage3.py:20b --slice v5p-128 --search --out D

`cost` prints parameters, state bytes and model FLOPs for the config's target sizes with 0 to
`--pictures` condition pictures, on any machine. With --measure N the real train step also runs N
times per shape on the devices at hand, from random parameters and synthetic rows, and the median
step time, pictures/s, model FLOP/s and MFU are printed. `shardings` prints every parameter with
its shape, its axes as weights of a step and as optimizer state, and its bytes on each device of a
mesh that need not be here. `peer` times a training and a sampling step of the MMDiT against
diffusers' in PyTorch, on a CPU or one GPU. `layouts` compiles the train step ahead of time for TPU
slices that need not be here, and says of every layout whether it fits, how long the compiler thinks
a step takes and where the time goes; with --measure it also runs on the devices at hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import jax

from qk_jax import sharding
from qk_jax.base import cli
from qk_jax.base.errors import InputError, exits
from qk_jax.bench import cost, layouts, peer, shardings
from qk_jax.bench.compile import compiled
from qk_jax.bench.measure import measure
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import flops


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The verb's options, and the overrides --config.FIELD=VALUE of the verb `layouts`."""
    parser = cli.Parser(prog="python -m qk_jax.bench", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    price = verbs.add_parser("cost", help="parameters, bytes, FLOPs; measured steps")
    price.add_argument("--pictures", type=int, default=2, help="most condition pictures (2)")
    price.add_argument("--sizes", type=int, default=1, help="target sizes of the config (1)")
    price.add_argument("--rows", type=int, default=0, help="batch; 0 is the config's")
    price.add_argument("--measure", type=int, default=0, help="steps to time; 0 only counts")
    places = verbs.add_parser("shardings", help="where every parameter lies")
    places.add_argument("--mesh", metavar="AXIS=N,..", help="fsdp=64,tensor=4 (the config's)")
    peer.add_arguments(verbs.add_parser("peer", help="step time against PyTorch"))
    table = verbs.add_parser("layouts", help="what fits a TPU slice, and how fast it would be")
    layouts.add_arguments(table)
    for verb in (price, places, table):
        verb.add_argument("--config", required=True, help="FILE.py:SIZE")
    args, overrides = cli.parse_with_overrides(parser, argv)
    if args.verb == "peer" and overrides:
        parser.error("peer has no config")
    return args, overrides


def print_parts(plan: Plan) -> None:
    """The table of parameters and of what is held between steps."""
    parts = cost.parts(plan)
    print(f"{'part':<12}{'trained':>16}{'frozen':>16}{'held, GiB':>12}")
    for part in [*parts, cost.Part("all", *(sum(p[i] for p in parts) for i in (1, 2, 3)))]:
        gib = part.state_bytes / 2**30
        print(f"{part.name:<12}{part.trained:>16,}{part.frozen:>16,}{gib:>12.3f}")


@exits
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args, overrides = arguments(argv)
    if args.verb == "peer":
        peer.command(args)
    else:
        verbs = {"layouts": layouts.command, "cost": print_cost, "shardings": print_shardings}
        verbs[args.verb](args, overrides)


def print_shardings(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """The table of parameters over the mesh."""
    config = config_lib.load(args.config, overrides)
    shape = sharding.parse(args.mesh) if args.mesh else config.mesh.to_dict()
    mesh = sharding.abstract_mesh(shape)
    for line in shardings.table(shardings.rows(config, mesh)):
        print(line)


def print_cost(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Parameters and the costs of each shape, measured where that is asked for."""
    if args.pictures < 0 or args.sizes < 1 or args.rows < 0 or args.measure < 0:
        raise InputError("--pictures, --rows and --measure are at least 0, --sizes at least 1")
    config = config_lib.load(args.config, overrides)
    rows = config.data.batch = args.rows or config.data.batch
    plan = Plan.build(config, check=bool(args.measure))
    with jax.set_mesh(plan.mesh):
        print(f"{args.config} on {jax.device_count()} x {jax.devices()[0].device_kind}\n")
        print_parts(plan)
        print(f"\n{'target':<10}{'pictures':>9}{'TFLOP/row':>12}{'TFLOP/step':>12}", end="")
        print(f"{'s/step':>9}{'pictures/s':>12}{'TFLOP/s':>10}{'MFU':>7}" if args.measure else "")
        peak = flops.peak(jax.devices()[0])
        for size in config.data.sizes[: args.sizes]:
            for count in range(args.pictures + 1):
                square = (config.data.reference_size,) * 2
                shapes = cost.batch_shapes(config, tuple(size), [square] * count, rows)
                per_row = flops.of_step(plan, shapes) / rows
                name = f"{size[0]}x{size[1]}"
                print(
                    f"{name:<10}{count:>9}{per_row / 1e12:>12.4f}{rows * per_row / 1e12:>12.2f}",
                    end="", flush=True,
                )  # fmt: skip
                if args.measure:
                    executables = compiled(plan, shapes)
                    seconds = measure(plan, shapes, executables, args.measure).seconds
                    rate = rows * per_row / seconds / jax.device_count()
                    mfu = f"{rate / peak:>7.1%}" if peak else f"{'-':>7}"
                    print(
                        f"{seconds:>9.3f}{rows / seconds:>12.1f}{rate / 1e12:>10.3f}{mfu}", end=""
                    )
                print()


def run() -> None:
    """Entry point of the console script."""
    main()


if __name__ == "__main__":
    run()
