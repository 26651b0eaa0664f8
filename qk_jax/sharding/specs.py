"""From rules to PartitionSpecs and NamedShardings, and the checks that Linen does not make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import LogicallyPartitioned
from jax.sharding import NamedSharding, PartitionSpec

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.sharding.mesh import BATCH_AXES, AnyMesh, fitting, single
from qk_jax.sharding.rules import (
    COLUMNS,
    SHARDABLE,
    Activations,
    Columns,
    Rules,
    Tables,
    tower,
)


def constrain(x: jax.Array, activations: Activations | None, *axes: str | None) -> jax.Array:
    """x sharded over the mesh of jax.set_mesh; without a mesh, x itself.

    A dimension that the mesh does not divide, such as an odd number of text tokens over 'context',
    is sharded as far as it divides.

    Args:
      x: array with one entry of `axes` per dimension; None leaves that dimension to the compiler.
      activations: the rules of the tower; None leaves everything to the compiler.
      axes: names of fields of `Activations`.
    """
    if activations is None or single():
        return x
    free = PartitionSpec.UNCONSTRAINED
    entries = [
        free if axis is None else (fitting(getattr(activations, axis), length) or None)
        for axis, length in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], rules: Rules, mesh: AnyMesh
) -> PartitionSpec:
    """PartitionSpec of one parameter; it names only axes of the mesh that have several devices.

    Raises:
      InputError: an unknown logical axis, two dimensions on one mesh axis, or a dimension that
        the mesh does not divide; the message names the parameter.
    """
    if len(axes) != len(shape):
        raise InputError(f"parameter {name} has shape {tuple(shape)} but logical axes {axes}")
    entries: list[Any] = []
    taken: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and not hasattr(rules, axis):
            raise InputError(f"parameter {name} has the unknown logical axis {axis!r}")
        mesh_axes = () if axis is None else getattr(rules, axis)
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise InputError(
                    f"parameter {name}: logical axes {taken[mesh_axis]!r} and {axis!r} both use "
                    f"the mesh axis {mesh_axis!r}; give one of them another in sharding."
                    f"{tower(name)}"
                )
            taken[mesh_axis] = str(axis)
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % parts:
            raise InputError(
                f"parameter {name}: dimension {axis!r} of size {size} does not divide by {parts} "
                f"({' x '.join(mesh_axes)}); change the mesh or sharding.{tower(name)}.{axis}"
            )
        used = tuple(mesh_axis for mesh_axis in mesh_axes if mesh.shape[mesh_axis] > 1)
        entries.append(used[0] if len(used) == 1 else (used or None))
    return PartitionSpec(*entries)


def leaves(boxed: Tree) -> Iterator[tuple[str, tuple[str | None, ...], Any]]:
    """(name, logical axes, array or ShapeDtypeStruct) of every leaf of a boxed tree.

    Raises:
      InputError: a parameter without logical axes.
    """
    for name, leaf in trees.flatten(boxed).items():
        if not isinstance(leaf, LogicallyPartitioned):
            raise InputError(f"parameter {name} carries no logical axes")
        yield name, tuple(leaf.names), leaf.value


def shardings(boxed: Tree, rules: Mapping[str, Rules], mesh: AnyMesh) -> Tree:
    """The tree of NamedShardings of a boxed (abstract) parameter tree, by one column.

    Raises:
      InputError: as `spec`, or a parameter without logical axes.
    """
    return trees.unflatten({
        name: NamedSharding(mesh, spec(name, value.shape, axes, rules[tower(name)], mesh))
        for name, axes, value in leaves(boxed)
    })  # fmt: skip


def check_sharded(
    boxed: Tree, tables: Tables, column: str, mesh: AnyMesh, limit: float = 0.02
) -> float:
    """The share of shardable bytes that one column replicates on every device.

    A leaf could be sharded when a logical axis of SHARDABLE divides by one of the mesh axes that
    are judged. These are the axes that the column uses; a column that uses none replicates on
    purpose where another column of the tower is sharded, and by oversight where none is.

    Raises:
      InputError: the share is above `limit`; names the largest offender.
    """
    could, loose = 0, dict[str, int]()
    for name, axes, value in leaves(boxed):
        sizes = [mesh.shape[axis] for axis in _judged(tables[tower(name)], column, mesh)]
        dims = [n for axis, n in zip(axes, value.shape, strict=True) if axis in SHARDABLE]
        if len(value.shape) < 2 or not any(n % size == 0 for n in dims for size in sizes):
            continue
        count = math.prod(value.shape) * np.dtype(value.dtype).itemsize
        could += count
        rules = getattr(tables[tower(name)], column)
        if all(mesh.shape[a] == 1 for axis in axes if axis for a in getattr(rules, axis)):
            loose[name] = count
    share = sum(loose.values()) / could if could else 0.0
    if share > limit:
        worst = max(loose, key=lambda name: loose[name])
        raise InputError(
            f"{share:.1%} of the bytes that could be sharded are replicated on every device "
            f"(column {column!r}, limit {limit:.1%}), most of all {worst} with "
            f"{loose[worst] / 2**20:,.1f} MiB; change sharding.{tower(worst)}.{column} or the "
            "mesh, or raise sharding_limit"
        )
    return share


def _judged(columns: Columns, column: str, mesh: AnyMesh) -> set[str]:
    """The mesh axes by which `check_sharded` judges a column of one tower."""
    splitting = {axis for axis in ("fsdp", "context", "tensor") if mesh.shape[axis] > 1}

    def used(name: str) -> set[str]:
        rules = getattr(columns, name)
        return splitting & {a for axis in SHARDABLE for a in getattr(rules, axis)}

    if not any(used(name) for name in COLUMNS):
        return splitting
    return used(column)


def _batch_axes(towers: Tables) -> dict[str, tuple[str, ...]]:
    """The mesh axes of the batch: between the towers, and in each of them."""
    over: dict[str, tuple[str, ...]] = {"the batch": BATCH_AXES}
    return over | {f"sharding.{name}": table.activations.batch for name, table in towers.items()}


def fitting_batch(examples: int, mesh: AnyMesh, towers: Tables) -> int:
    """The least number of slots for so many examples that divides over every tower's batch axes."""
    shares = (math.prod(mesh.shape[axis] for axis in axes) for axes in _batch_axes(towers).values())
    parts = math.lcm(*shares)
    return -(-examples // parts) * parts


def check_batch(examples: int, mesh: AnyMesh, towers: Tables) -> None:
    """Raises InputError when so many examples do not divide over the batch axes of a tower."""
    for what, axes in _batch_axes(towers).items():
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if examples % parts:
            raise InputError(
                f"a batch of {examples} examples does not divide over {' x '.join(axes)} = {parts} "
                f"devices ({what}); change data.batch, data.tokens, "
                "optimizer.accumulation or the mesh"
            )
