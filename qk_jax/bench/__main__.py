"""What a config costs, how it lies over a mesh, and how fast it runs here.

    python -m qk_jax.bench cost --config configs/stage2.py:20b
    python -m qk_jax.bench cost --config configs/stage3.py:tiny --measure 10 --rows 32
    python -m qk_jax.bench shardings --config configs/stage2.py:20b --mesh fsdp=64,tensor=4
    python -m qk_jax.bench peer --size small --device cpu

`cost` prints parameters, state bytes and model FLOPs for the config's target sizes with 0 to
`--pictures` condition pictures, on any machine. With --measure N the real train step also runs N
times per shape on the devices at hand, from random parameters and synthetic rows, and the median
step time, pictures/s, model FLOP/s and MFU are printed. `shardings` prints every parameter with
its shape, its axes as weights of a step and as optimizer state, and its bytes on each device of a
mesh that need not be here. `peer` times a training and a sampling step of the MMDiT against
diffusers' in PyTorch, on a CPU or one GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qk_jax import sharding
from qk_jax.bench import cost, peer, shardings
from qk_jax.errors import InputError, exits
from qk_jax.training import config as config_lib
from qk_jax.training import flops, initial, stages
from qk_jax.training import state as state_lib
from qk_jax.training import step as step_lib


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qk-bench", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    price = verbs.add_parser("cost", help="parameters, bytes, FLOPs; measured steps")
    price.add_argument("--pictures", type=int, default=2, help="most condition pictures (2)")
    price.add_argument("--sizes", type=int, default=1, help="target sizes of the config (1)")
    price.add_argument("--rows", type=int, default=0, help="batch; 0 is the config's")
    price.add_argument("--measure", type=int, default=0, help="steps to time; 0 only counts")
    places = verbs.add_parser("shardings", help="where every parameter lies")
    places.add_argument("--mesh", metavar="AXIS=N,..", help="fsdp=64,tensor=4 (the config's)")
    peer.add_arguments(verbs.add_parser("peer", help="step time against PyTorch"))
    for verb in (price, places):
        verb.add_argument("--config", required=True, help="FILE.py:SIZE")
    return parser.parse_args(argv)


def print_parts(layout: state_lib.Layout, config: Mapping[str, Any]) -> None:
    """The table of parameters and of what is held between steps."""
    rows = cost.parts(layout, config)
    print(f"{'part':<12}{'trained':>16}{'frozen':>16}{'held, GiB':>12}")
    for row in [*rows, cost.Part("all", *(sum(r[i] for r in rows) for i in (1, 2, 3)))]:
        gib = row.state_bytes / 2**30
        print(f"{row.name:<12}{row.trained:>16,}{row.frozen:>16,}{gib:>12.3f}")


def measure(
    config: Mapping[str, Any], layout: state_lib.Layout, shapes: dict[str, Any], steps: int
) -> float:
    """Median seconds of one train step on the devices at hand, compilation excluded."""
    model = state_lib.build_model(config)
    adam = state_lib.build_optimizer(config, layout)
    params = initial.random_parameters(model, config, layout, jax.random.key(0))
    trained, frozen = stages.split(params, state_lib.stage_rules(config))
    state = state_lib.create(trained, adam.tx, layout.state(config, adam.tx))
    step = step_lib.make_train_step(model, config, layout, adam)
    batch = jax.device_put(
        cost.synthetic_batch(shapes, model.config.vlm.image_token_id),
        sharding.batch_sharding(layout.mesh),
    )
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


@exits
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = arguments(argv)
    {"cost": print_cost, "shardings": print_shardings, "peer": peer.command}[args.verb](args)


def print_shardings(args: argparse.Namespace) -> None:
    """The table of parameters over the mesh."""
    config = config_lib.load(args.config)
    shape = sharding.parse(args.mesh) if args.mesh else config.mesh.to_dict()
    mesh = sharding.abstract_mesh(shape)
    for line in shardings.table(shardings.rows(config, mesh)):
        print(line)


def print_cost(args: argparse.Namespace) -> None:
    """Parameters and the costs of each shape, measured where that is asked for."""
    if args.pictures < 0 or args.sizes < 1 or args.rows < 0 or args.measure < 0:
        raise InputError("--pictures, --rows and --measure are at least 0, --sizes at least 1")
    config = config_lib.load(args.config)
    rows = args.rows or config.data.batch
    mesh = sharding.build_mesh(config.mesh, slices=config.slices)
    with jax.set_mesh(mesh):
        layout = state_lib.Layout(state_lib.build_model(config), config, mesh)
        print(f"{args.config} on {jax.device_count()} x {jax.devices()[0].device_kind}\n")
        print_parts(layout, config)
        print(f"\n{'target':<10}{'pictures':>9}{'TFLOP/row':>12}{'TFLOP/step':>12}", end="")
        print(f"{'s/step':>9}{'pictures/s':>12}{'TFLOP/s':>10}{'MFU':>7}" if args.measure else "")
        peak = flops.peak(jax.devices()[0])
        for size in config.data.sizes[: args.sizes]:
            for count in range(args.pictures + 1):
                square = (config.data.reference_size,) * 2
                shapes = cost.batch_shapes(config, tuple(size), [square] * count, rows)
                per_row = cost.flops_per_row(config, layout, shapes)
                name = f"{size[0]}x{size[1]}"
                print(
                    f"{name:<10}{count:>9}{per_row / 1e12:>12.4f}{rows * per_row / 1e12:>12.2f}",
                    end="", flush=True,
                )  # fmt: skip
                if args.measure:
                    seconds = measure(config, layout, shapes, args.measure)
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
