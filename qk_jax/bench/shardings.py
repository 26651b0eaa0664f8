"""How every parameter of a config lies over a mesh, of devices that need not be here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.bench import cost
from qk_jax.experiment.plan import Plan


class Row(NamedTuple):
    """One parameter; bytes are of one device's share.

    Attributes:
      name: 'a/b/c'.
      fate: 'train' or 'freeze'.
      shape: of the whole.
      params: mesh axes of each dimension where a step computes with it.
      optimizer: the same between steps; that of `params` for a frozen one.
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


def rows(config: ConfigDict, mesh: AbstractMesh) -> list[Row]:
    """Every parameter of the config's stage, by name.

    Raises:
      InputError: the tables do not fit the shapes (`sharding`), or leave too much unsharded.
    """
    plan = Plan.build(config, mesh, check=False)
    _ = plan.replicated_share
    weights, gradients = trees.flatten(plan.weights), trees.flatten(plan.gradients)
    copies, compute = cost.copies(plan), jnp.dtype(plan.model.dtype).itemsize

    def trained(name: str, leaf: jax.ShapeDtypeStruct) -> Row:
        here, used = leaf.sharding, weights[name]
        return Row(
            name, "train", leaf.shape, used.spec, here.spec,
            held=copies * share(leaf.shape, here, leaf.dtype.itemsize),
            gathered=0 if used.spec == here.spec else share(leaf.shape, used, compute),
            gradient=share(leaf.shape, gradients[name], 4),
        )  # fmt: skip

    def frozen(name: str, leaf: jax.ShapeDtypeStruct) -> Row:
        spec = leaf.sharding.spec
        held = share(leaf.shape, leaf.sharding, leaf.dtype.itemsize)
        return Row(name, "freeze", leaf.shape, spec, spec, held, 0, 0)

    return sorted(
        [trained(*item) for item in trees.flatten(plan.params).items()]
        + [frozen(*item) for item in trees.flatten(plan.frozen).items()]
    )


def share(shape: tuple[int, ...], place: NamedSharding, itemsize: int) -> int:
    """Bytes of an array on each device."""
    return math.prod(place.shard_shape(shape)) * itemsize


def table(found: list[Row]) -> Iterator[str]:
    """Lines of a table of parameters, and of one of the sums of each tower."""
    name_width = max(len(row.name) for row in found)
    heads = f"{'held':>10} {'gathered':>10} {'gradient':>10}"
    yield "MiB on each device; = lies as params"
    yield (
        f"{'parameter':<{name_width}} {'fate':<6} {'shape':<18} {'params':<22} {'optimizer':<22} "
        f"{heads}"
    )
    for row in found:
        shape = "x".join(map(str, row.shape)) or "scalar"
        optimizer = "=" if row.params == row.optimizer else _axes(row.optimizer)
        yield (
            f"{row.name:<{name_width}} {row.fate:<6} {shape:<18} {_axes(row.params):<22} "
            f"{optimizer:<22} {_mib([row])}"
        )
    yield ""
    yield f"{'tower':<12} {'parameters':>16} {heads} {'all':>10}"
    for tower in [*dict.fromkeys(sharding.tower(row.name) for row in found), "all"]:
        part = [row for row in found if tower in ("all", sharding.tower(row.name))]
        count = sum(math.prod(row.shape) for row in part)
        whole = sum(row.held + row.gathered + row.gradient for row in part) / 2**20
        yield f"{tower:<12} {count:>16,} {_mib(part)} {whole:>10.2f}"


def _mib(part: list[Row]) -> str:
    """The three columns of bytes, summed over rows; a point where there are none."""
    sums = [sum(getattr(row, name) for row in part) for name in ("held", "gathered", "gradient")]
    return " ".join(f"{n / 2**20:>10.2f}" if n else f"{'.':>10}" for n in sums)


def _axes(spec: PartitionSpec) -> str:
    """A spec: the mesh axes of each dimension, a point for one that is whole."""
    parts = ["+".join((entry,) if isinstance(entry, str) else entry or ".") for entry in spec]
    return ", ".join(parts) or "."
