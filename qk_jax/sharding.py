"""Mesh, checked sharding rules and the shardings of parameters and batches.

Parameters carry logical axes (`layers.LOGICAL_AXES`); a table per tower says over which mesh axes
each of them is split. Linen replicates whatever it does not understand without a word; here a
misspelt axis, two dimensions on one mesh axis, a dimension that does not divide and too many
replicated bytes are errors that name the parameter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qk_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# Towers by the prefix of a parameter's name; the first that fits decides.
TOWERS = (
    ("vlm/visual/", "vision"),
    ("vlm/", "text"),
    ("mmdit/", "mmdit"),
    ("vae/", "vae"),
    ("", "connector"),
)
# Axes worth splitting; convolutions, patches and norms are too small or too oddly sized.
SHARDABLE = frozenset({"embed", "mlp", "heads", "kv_heads", "vocab", "modulation"})


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis of one tower; () replicates."""

    embed: tuple[str, ...] = ("fsdp",)
    mlp: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    modulation: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    conv_in: tuple[str, ...] = ()
    conv_out: tuple[str, ...] = ()
    patch: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for axis in getattr(self, field.name):
                if axis not in MESH_AXES:
                    raise InputError(
                        f"sharding rule {field.name!r} names the mesh axis {axis!r}; "
                        f"the mesh axes are {', '.join(MESH_AXES)}"
                    )


@dataclasses.dataclass(frozen=True)
class Activations:
    """Mesh axes of each logical axis of one tower's activations; () is whole on every device.

    `sequence` is where residual streams and queries are cut; keys and values come together.
    """

    batch: tuple[str, ...] = BATCH_AXES
    sequence: tuple[str, ...] = ("context",)
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)


def constrain(x: jax.Array, places: Activations, *axes: str | None) -> jax.Array:
    """x with its dimensions laid over the mesh of jax.set_mesh; without a mesh, x itself.

    Args:
      x: array with one entry of `axes` per dimension; None leaves that dimension to the compiler.
      places: the tower's row.
      axes: names of fields of `Activations`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    free = PartitionSpec.UNCONSTRAINED
    entries = [free if axis is None else (getattr(places, axis) or None) for axis in axes]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


Tables = dict[str, Rules]


def tables(config: Mapping[str, Mapping[str, Sequence[str]]]) -> Tables:
    """One `Rules` per tower from {tower: {logical axis: mesh axes}}.

    Raises:
      InputError: a tower or an axis that does not exist, or a tower without a table.
    """
    known = sorted({tower for _, tower in TOWERS})
    if sorted(config) != known:
        raise InputError(f"sharding tables are given for {sorted(config)}; need exactly {known}")
    axes = {field.name for field in dataclasses.fields(Rules)}
    out = {}
    for tower, table in config.items():
        unknown = sorted(set(table) - axes)
        if unknown:
            raise InputError(
                f"sharding table {tower!r} has the unknown logical axes {unknown}; "
                f"known are {', '.join(sorted(axes))}"
            )
        out[tower] = Rules(**{axis: tuple(value) for axis, value in table.items()})
    return out


def _filled(shape: Mapping[str, int], devices: int) -> list[int]:
    """Sizes in the order of MESH_AXES with the one -1 filled in."""
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise InputError(f"mesh axes {unknown} are unknown; known are {', '.join(MESH_AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh {dict(shape)} needs positive sizes and at most one -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        asked = _text(dict(zip(MESH_AXES, sizes, strict=True)))
        near = "; or ".join(_text(found) for found in nearest(shape, devices))
        raise InputError(
            f"mesh {asked} is {math.prod(sizes)} devices, there are {devices}; the nearest that "
            f"fit: {near}"
        )
    return sizes


def _text(shape: Mapping[str, int]) -> str:
    """A mesh as it is given on a command line, without axes of one device."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "data=1"


def parse(text: str) -> dict[str, int]:
    """'fsdp=8,tensor=2' -> {'fsdp': 8, 'tensor': 2}; axes are checked where the mesh is built.

    Raises:
      InputError: another form.
    """
    try:
        return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise InputError(f"the mesh {text!r} is not of the form fsdp=8,tensor=2") from None


def nearest(shape: Mapping[str, int], devices: int, count: int = 3) -> list[dict[str, int]]:
    """Meshes of exactly `devices` over the axes of `shape` and fsdp, the most similar first."""
    axes = [axis for axis in MESH_AXES if axis == "fsdp" or shape.get(axis, 1) != 1]
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    fits = [
        dict(zip(axes, sizes, strict=True))
        for sizes in itertools.product(divisors, repeat=len(axes))
        if math.prod(sizes) == devices
    ]

    def distance(found: Mapping[str, int]) -> float:
        wanted = {axis: max(1, shape.get(axis, 1)) for axis in axes}
        return sum(abs(math.log2(found[axis] / wanted[axis])) for axis in axes)

    return sorted(fits, key=distance)[:count]


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of as many devices as `shape` asks for, whether they are here or not.

    Raises:
      InputError: an unknown axis, or a size that is not positive.
    """
    if -1 in shape.values():
        raise InputError("a mesh of devices that are not here needs every size; give no -1")
    sizes = _filled(shape, math.prod(shape.values()))
    return AbstractMesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def build_mesh(
    shape: Mapping[str, int],
    devices: Sequence[Any] | None = None,
    slices: Mapping[str, int] | None = None,
) -> Mesh:
    """The mesh ('data', 'fsdp', 'context', 'tensor') over `devices` (default: all).

    Args:
      shape: size of each axis within a slice; one may be -1, absent ones are 1.
      devices: default jax.devices().
      slices: size of each axis across slices (DCN); only 'data' and 'fsdp' may exceed 1.

    Raises:
      InputError: sizes that do not multiply to the number of devices; it names some that do.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = {axis: int(size) for axis, size in (slices or {}).items() if int(size) != 1}
    if set(slices) - set(BATCH_AXES):
        raise InputError(f"only {BATCH_AXES} may span slices, not {sorted(slices)}")
    count = math.prod(slices.values())
    if count < 1 or len(devices) % count:
        raise InputError(f"{len(devices)} devices do not make {count} slices ({slices})")
    inner = _filled(shape, len(devices) // count)
    if count > 1:
        outer = [slices.get(axis, 1) for axis in MESH_AXES]
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    else:
        array = mesh_utils.create_device_mesh(inner, devices)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def tower(name: str) -> str:
    """The table that a parameter belongs to; an adapter belongs to what it adapts."""
    name = name.removeprefix("lora/")
    return next(table for prefix, table in TOWERS if name.startswith(prefix))


def spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """PartitionSpec of one parameter.

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
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
    return PartitionSpec(*entries)


def leaves(boxed: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str | None, ...], Any]]:
    """(name, logical axes, array or ShapeDtypeStruct) of every leaf of a boxed tree.

    Raises:
      InputError: a parameter without logical axes.
    """
    for name, leaf in traverse_util.flatten_dict(boxed, sep="/").items():
        if not isinstance(leaf, meta.AxisMetadata):
            raise InputError(f"parameter {name} carries no logical axes")
        yield name, tuple(leaf.names), leaf.value


def specs(boxed: Mapping[str, Any], rules: Tables, mesh: Mesh) -> dict[str, Any]:
    """The tree of PartitionSpecs of a boxed (abstract) parameter tree."""
    flat = {
        name: spec(name, value.shape, axes, rules[tower(name)], mesh)
        for name, axes, value in leaves(boxed)
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def shardings(boxed: Mapping[str, Any], rules: Tables, mesh: Mesh) -> dict[str, Any]:
    """The tree of NamedShardings of a boxed (abstract) parameter tree."""
    return jax.tree.map(lambda p: NamedSharding(mesh, p), specs(boxed, rules, mesh))


def check_sharded(
    boxed: Mapping[str, Any], rules: Tables, mesh: Mesh, limit: float = 0.02
) -> float:
    """The share of shardable parameter bytes that stay replicated.

    A leaf could be sharded when a logical axis of SHARDABLE divides by a mesh axis of parameters.

    Raises:
      InputError: the share is above `limit`; names the largest offender.
    """
    sizes = [mesh.shape[a] for a in ("fsdp", "context", "tensor") if mesh.shape[a] > 1]
    could, loose = 0, {}
    for name, axes, value in leaves(boxed):
        dims = [n for axis, n in zip(axes, value.shape, strict=True) if axis in SHARDABLE]
        if len(value.shape) < 2 or not any(n % size == 0 for n in dims for size in sizes):
            continue
        count = math.prod(value.shape) * np.dtype(value.dtype).itemsize
        could += count
        used = jax.tree.leaves(tuple(spec(name, value.shape, axes, rules[tower(name)], mesh)))
        if math.prod(mesh.shape[axis] for axis in used) == 1:
            loose[name] = count
    share = sum(loose.values()) / could if could else 0.0
    if share > limit:
        worst = max(loose, key=loose.get)
        raise InputError(
            f"{share:.1%} of the parameter bytes that could be sharded are replicated (limit "
            f"{limit:.1%}), most of all {worst}; change sharding.{tower(worst)} or raise "
            "sharding_limit"
        )
    return share


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp); every leaf of a batch has rows first."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, mesh: Mesh) -> None:
    """Raises InputError when `rows` do not divide over the batch axes."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % parts:
        raise InputError(
            f"a batch of {rows} rows does not divide over data x fsdp = {parts} devices; "
            "change data.batch, optimizer.accumulation or the mesh"
        )


def gathered(shardings_tree: Any) -> Any:
    """The same shardings without 'fsdp': what ZeRO-2 computes with, gathered once per step."""

    def drop(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(axis for axis in entry if axis != "fsdp") or None
        return None if entry == "fsdp" else entry

    return jax.tree.map(
        lambda s: NamedSharding(s.mesh, PartitionSpec(*(drop(e) for e in s.spec))), shardings_tree
    )
