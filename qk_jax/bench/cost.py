"""The verb `cost`: parameters, bytes and FLOPs of a config's train step, from shapes alone.

Nothing is allocated unless steps are to be measured, so the real sizes are priced on any machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import NamedTuple

import jax

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Batch
from qk_jax.bench import batches
from qk_jax.bench.compile import compiled
from qk_jax.bench.measure import measure
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.pictures.sizes import format_size, parse_sizes
from qk_jax.training import flops


class Part(NamedTuple):
    """One top-level part of the parameter tree; bytes over all devices."""

    name: str
    trained: int
    frozen: int
    state_bytes: int


def copies(plan: Plan) -> int:
    """Copies of a trained parameter: itself, two moments and, where it is on, the average."""
    return 3 + bool(plan.config.optimizer.ema)


def parts(plan: Plan) -> list[Part]:
    """Parameters of each part, and the bytes held for it between steps.

    A trained parameter is held in float32, in `copies`; a frozen one in its own dtype, once.
    """
    found: dict[str, list[int]] = {}
    for tree, trained in ((plan.params, True), (plan.frozen, False)):
        for name, leaf in trees.named(tree).items():
            words = name.split("/")
            sums = found.setdefault("/".join(words[: 2 if words[0] == "lora" else 1]), [0, 0, 0])
            sums[0 if trained else 1] += leaf.size
            sums[2] += leaf.size * leaf.dtype.itemsize * (copies(plan) if trained else 1)
    return [Part(name, *sums) for name, sums in sorted(found.items())]


def print_parts(plan: Plan) -> None:
    """The table of parameters and of what is held between steps."""
    found = parts(plan)
    print(f"{'part':<12}{'trained':>16}{'frozen':>16}{'held, GiB':>12}")
    _, *columns = zip(*found, strict=True)
    for part in [*found, Part("all", *map(sum, columns))]:
        gib = part.state_bytes / 2**30
        print(f"{part.name:<12}{part.trained:>16,}{part.frozen:>16,}{gib:>12.3f}")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Prints parameters and the costs of each shape, measured if asked for.

    Raises:
      InputError: an option is out of range, or the config does not fit.
    """
    if args.pictures < 0 or args.sizes < 1 or args.rows < 0 or args.measure < 0:
        raise InputError("--pictures, --rows and --measure are at least 0, --sizes at least 1")
    config = config_lib.load(args.config, overrides)
    if args.rows:
        config.data.batch, config.data.tokens = args.rows, 0
    plan = Plan.build(config, check=bool(args.measure))
    with jax.set_mesh(plan.mesh):
        print(f"{args.config} on {jax.device_count()} x {jax.devices()[0].device_kind}\n")
        print_parts(plan)
        print(f"\n{'target':<10}{'pictures':>9}{'TFLOP each':>12}{'TFLOP/step':>12}", end="")
        print(f"{'s/step':>9}{'pictures/s':>12}{'TFLOP/s':>10}{'MFU':>7}" if args.measure else "")
        sizes = parse_sizes(config.data.sizes, "config.data.sizes")
        for size in sizes[: args.sizes]:
            for count in range(args.pictures + 1):
                pictures = batches.condition_sizes(config, size, count)
                examples = batches.examples_of(config, size, count)
                shapes = batches.abstract(config, size, pictures, examples)
                work = flops.of_step(plan, shapes) / 1e12
                costs = f"{work / examples:>12.4f}{work:>12.2f}"
                print(f"{format_size(size):<10}{count:>9}{costs}", end="", flush=True)
                print(measured(plan, shapes, work, args.measure) if args.measure else "")


def measured(plan: Plan, shapes: Batch, work: float, steps: int) -> str:
    """The measured columns of a shape whose step has `work` model TFLOPs."""
    seconds = measure(plan, shapes, compiled(plan, shapes), steps).seconds
    rate = work / seconds / jax.device_count()
    peak = flops.peak(jax.devices()[0])
    mfu = f"{rate * 1e12 / peak:.1%}" if peak else "-"
    return f"{seconds:>9.3f}{len(shapes['task']) / seconds:>12.1f}{rate:>10.3f}{mfu:>7}"
