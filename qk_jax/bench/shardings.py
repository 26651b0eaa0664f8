"""The verb `shardings`: how every parameter of a config is sharded over a mesh, and its bytes.

The devices of the mesh need not be here.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.bench import cost
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan


class Parameter(NamedTuple):
    """One parameter; bytes are of one device.

    Attributes:
      name: 'a/b/c'.
      fate: 'train' or 'freeze'.
      shape: of the whole.
      params: its spec as a weight of the step.
      optimizer: its spec between steps; for a frozen one that of `params`.
      held: bytes between steps: a frozen parameter once, a trained one with its moments and,
        where it is on, its average.
      gathered: bytes of the copy that a step makes of it; 0 where it computes with what is held.
      gradient: bytes of its float32 gradient.
    """

    name: str
    fate: str
    shape: tuple[int, ...]
    params: PartitionSpec
    optimizer: PartitionSpec
    held: int
    gathered: int
    gradient: int


def parameters(config: ConfigDict, mesh: sharding.AnyMesh) -> list[Parameter]:
    """Every parameter of the config's stage, by name.

    Raises:
      InputError: the tables do not fit the shapes (`sharding`), or replicate too much.
    """
    plan = Plan.build(config, mesh, check=False)
    _ = plan.replicated_share  # which raises
    weights, gradients = trees.flatten(plan.weights), trees.flatten(plan.gradients)
    copies, compute = cost.copies(plan), jnp.dtype(plan.model.dtype).itemsize

    def trained(name: str, leaf: jax.ShapeDtypeStruct) -> Parameter:
        here, used = leaf.sharding, weights[name]
        return Parameter(
            name, "train", leaf.shape, used.spec, here.spec,
            held=copies * nbytes(leaf.shape, here, leaf.dtype.itemsize),
            gathered=0 if used.spec == here.spec else nbytes(leaf.shape, used, compute),
            gradient=nbytes(leaf.shape, gradients[name], 4),
        )  # fmt: skip

    def frozen(name: str, leaf: jax.ShapeDtypeStruct) -> Parameter:
        spec = leaf.sharding.spec
        held = nbytes(leaf.shape, leaf.sharding, leaf.dtype.itemsize)
        return Parameter(name, "freeze", leaf.shape, spec, spec, held, 0, 0)

    return sorted(
        [trained(*item) for item in trees.flatten(plan.params).items()]
        + [frozen(*item) for item in trees.flatten(plan.frozen).items()]
    )


def nbytes(shape: tuple[int, ...], where: NamedSharding, itemsize: int) -> int:
    """Bytes of an array on each device."""
    return math.prod(where.shard_shape(shape)) * itemsize


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Prints the table of the config's parameters over a mesh."""
    config = config_lib.load(args.config, overrides)
    shape = sharding.parse(args.mesh) if args.mesh else config.mesh.to_dict()
    for line in table(parameters(config, sharding.abstract_mesh(shape))):
        print(line)


def table(found: Sequence[Parameter]) -> Iterator[str]:
    """Lines of a table of parameters, and of one of the sums of each tower."""
    width = max(len(one.name) for one in found)
    heads = f"{'held':>10} {'gathered':>10} {'gradient':>10}"
    yield "MiB on each device; = same as params"
    yield (
        f"{'parameter':<{width}} {'fate':<6} {'shape':<18} {'params':<22} {'optimizer':<22} {heads}"
    )
    for one in found:
        shape = "x".join(map(str, one.shape)) or "scalar"
        optimizer = "=" if one.params == one.optimizer else _axes(one.optimizer)
        yield (
            f"{one.name:<{width}} {one.fate:<6} {shape:<18} {_axes(one.params):<22} "
            f"{optimizer:<22} {_mib([one])}"
        )
    yield ""
    yield f"{'tower':<12} {'parameters':>16} {heads} {'all':>10}"
    for tower in [*dict.fromkeys(sharding.tower(one.name) for one in found), "all"]:
        part = [one for one in found if tower in ("all", sharding.tower(one.name))]
        count = sum(math.prod(one.shape) for one in part)
        whole = sum(one.held + one.gathered + one.gradient for one in part) / 2**20
        yield f"{tower:<12} {count:>16,} {_mib(part)} {whole:>10.2f}"


def _mib(part: Sequence[Parameter]) -> str:
    """The three columns of bytes, summed; a point for none."""
    sums = [sum(getattr(one, name) for one in part) for name in ("held", "gathered", "gradient")]
    return " ".join(f"{n / 2**20:>10.2f}" if n else f"{'.':>10}" for n in sums)


def _axes(spec: PartitionSpec) -> str:
    """The mesh axes of each dimension, a point for none."""
    parts = ["+".join((entry,) if isinstance(entry, str) else entry or ".") for entry in spec]
    return ", ".join(parts) or "."
