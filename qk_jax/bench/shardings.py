"""How every parameter of a config lies over a mesh, of devices that need not be here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from qk_jax import sharding
from qk_jax.training import checkpoint, state


class Row(NamedTuple):
    """One parameter.

    Attributes:
      name: 'a/b/c'.
      fate: 'train' or 'freeze'.
      shape: of the whole.
      dtype: in which it is held.
      spec: the mesh axes of each dimension.
      device_bytes: of one device's share, without optimizer state.
    """

    name: str
    fate: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    device_bytes: int


def rows(config: Mapping[str, Any], mesh: AbstractMesh) -> list[Row]:
    """Every parameter of the config's stage, in the order of the tree.

    Raises:
      InputError: the tables do not fit the shapes (`sharding`), or leave too much unsharded.
    """
    layout = state.Layout(state.build_model(config), config, mesh)
    return sorted(
        Row(name, fate, leaf.shape, str(leaf.dtype), leaf.sharding.spec, share(leaf))
        for tree, fate in ((layout.params, "train"), (layout.frozen, "freeze"))
        for name, leaf in checkpoint.named(tree).items()
    )


def share(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of a leaf on each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def table(found: list[Row], copies: int) -> Iterator[str]:
    """Lines of a table of parameters, and the sums of each tower.

    Args:
      found: of `rows`.
      copies: of a trained parameter with its optimizer state, in units of itself.
    """
    width = max(len(row.name) for row in found)
    yield f"{'parameter':<{width}} {'':<6} {'shape':<22} {'spec':<28} {'MiB/device':>11}"
    for row in found:
        shape = "x".join(map(str, row.shape)) or "scalar"
        spec = ", ".join(_axes(entry) for entry in row.spec) or "-"
        mib = row.device_bytes / 2**20
        yield f"{row.name:<{width}} {row.fate:<6} {shape:<22} {spec:<28} {mib:>11.2f}"
    yield ""
    yield f"{'tower':<12} {'parameters':>16} {'MiB/device':>11} {'with optimizer':>15}"
    for tower in [*dict.fromkeys(sharding.tower(row.name) for row in found), "all"]:
        part = [row for row in found if tower in ("all", sharding.tower(row.name))]
        count = sum(math.prod(row.shape) for row in part)
        mib = sum(row.device_bytes for row in part) / 2**20
        times = {"train": copies, "freeze": 1}
        state_mib = sum(times[row.fate] * row.device_bytes for row in part) / 2**20
        yield f"{tower:<12} {count:>16,} {mib:>11.1f} {state_mib:>15.1f}"


def _axes(entry: str | tuple[str, ...] | None) -> str:
    """One dimension of a spec: its mesh axes, or a point."""
    if entry is None:
        return "."
    return entry if isinstance(entry, str) else " x ".join(entry)
