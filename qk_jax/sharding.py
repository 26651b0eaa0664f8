"""Mesh, checked sharding rules and the shardings of parameters and batches.

Parameters carry logical axes (`layers.LOGICAL_AXES`). A row per tower says over which mesh axes
each of them is split, in a column of its own for the weights of the step, the gradients, the
optimizer state and the activations, so that ZeRO-1, 2 and 3, tensor and context parallelism are
rows of a table (`ROWS`). Linen replicates whatever it does not understand without a word; here a
misspelt axis, two dimensions on one mesh axis, a dimension that does not divide and too many
replicated bytes are errors that name the parameter.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qk_jax.errors import InputError

log = logging.getLogger(__name__)
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
SHARDABLE = frozenset({
    "embed", "mlp", "mlp_in", "heads", "heads_in", "kv_heads", "vocab", "modulation", "adapter",
})  # fmt: skip


def _check_mesh_axes(row: Any) -> None:
    """Raises InputError where a field of `row` names a mesh axis that does not exist."""
    for field in dataclasses.fields(row):
        for axis in getattr(row, field.name):
            if axis not in MESH_AXES:
                raise InputError(
                    f"{field.name!r} is laid over the mesh axis {axis!r}; "
                    f"the mesh axes are {', '.join(MESH_AXES)}"
                )


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis of one tower's arrays; () is whole on every device.

    'context' splits weights as 'fsdp' does: its devices hold other tokens of the same rows, so
    that their gradients are partial sums too. `mlp_in` and `heads_in` are the same features where
    a product sums over them: what comes together is cut along the outer axis of every kernel, as
    TPUs gather without a transposing copy.
    """

    embed: tuple[str, ...] = ("fsdp", "context")
    mlp: tuple[str, ...] = ("tensor",)
    mlp_in: tuple[str, ...] = ("tensor", "fsdp", "context")
    heads: tuple[str, ...] = ("tensor",)
    heads_in: tuple[str, ...] = ("tensor", "fsdp", "context")
    kv_heads: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    modulation: tuple[str, ...] = ("tensor", "fsdp", "context")
    # LoRA factors without "embed"; not over "tensor" too: on data, fsdp and tensor the partitioner
    # of jax 0.10.2 then gives wrong gradients (tests/training/test_sharded_step.py).
    adapter: tuple[str, ...] = ("fsdp", "context")
    layers: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    conv_in: tuple[str, ...] = ()
    conv_out: tuple[str, ...] = ()
    patch: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()

    def __post_init__(self):
        _check_mesh_axes(self)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Mesh axes of each logical axis of one tower's activations; () is whole on every device.

    `sequence` is where residual streams are cut; for attention tokens come together and heads part.
    `modulation` and `modulation_batch` are of what a timestep becomes in each block, one row per
    picture. Its weights are a third of an MMDiT and their product is tiny, so they stay where they
    lie: every device computes its features for the rows of all others, and the results change
    places instead of the weights.
    """

    batch: tuple[str, ...] = BATCH_AXES
    sequence: tuple[str, ...] = ("context",)
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    modulation: tuple[str, ...] = ("tensor", "fsdp", "context")
    modulation_batch: tuple[str, ...] = ("data",)

    def __post_init__(self):
        _check_mesh_axes(self)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where everything of one tower lies: its row of the table.

    Attributes:
      params: the weights that a step computes with. Where they lie otherwise than the optimizer
        state, trained weights are brought here once per step, in the compute dtype; frozen ones
        always lie here.
      gradients: of the whole batch, and their sums over micro-batches.
      optimizer: float32 weights, moments and moving average, between steps.
      activations: of the forward pass.
    """

    params: Rules = Rules()
    gradients: Rules = Rules()
    optimizer: Rules = Rules()
    activations: Activations = Activations()


COLUMNS = ("params", "gradients", "optimizer")  # of arrays that are shaped like parameters
_TENSOR_ONLY = dict.fromkeys(("adapter", "modulation", "mlp_in", "heads_in"), ("tensor",))
_NO_FSDP = Rules(embed=(), **_TENSOR_ONLY)
_WHOLE_ROWS = Activations(modulation=("tensor",), modulation_batch=BATCH_AXES)
_NO_TENSOR = dict.fromkeys(("mlp", "heads", "kv_heads", "vocab"), ())
_OVER_ALL = ("tensor", "fsdp", "context")
_FLAT = Rules(embed=_OVER_ALL, adapter=_OVER_ALL, **_NO_TENSOR)
_WHOLE = Rules(embed=(), **_NO_TENSOR, **dict.fromkeys(_TENSOR_ONLY, ()))
_FLAT_ROWS = (*BATCH_AXES, "tensor")
# The rows that a config may name. In all but the last, 'tensor' splits heads, MLP, vocabulary and
# modulation (Megatron), and in all of them 'context' splits the tokens; a mesh without these axes
# is plain ZeRO.
ROWS = {
    # ZeRO (arXiv 1910.02054): 1 splits the optimizer state over fsdp, 2 the gradients too
    "zero1": Columns(params=_NO_FSDP, gradients=_NO_FSDP, activations=_WHOLE_ROWS),
    "zero2": Columns(params=_NO_FSDP, activations=_WHOLE_ROWS),
    # ZeRO-3: the weights too, which come together block by block
    "fsdp": Columns(),
    # nothing is split over fsdp
    "tensor": Columns(_NO_FSDP, _NO_FSDP, _NO_FSDP, _WHOLE_ROWS),
    # ZeRO-2 of a tower that takes 'tensor' for more rows, beside one that is split over it
    "zero2_flat": Columns(
        params=_WHOLE,
        gradients=_FLAT,
        optimizer=_FLAT,
        activations=Activations(
            batch=_FLAT_ROWS,
            heads=(),
            kv_heads=(),
            mlp=(),
            modulation=(),
            modulation_batch=_FLAT_ROWS,
        ),
    ),
}


def target() -> tuple[str, str]:
    """(platform, kind) of the devices that are computed for: those of jax.set_mesh, which need not
    be here, or jax's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        device = jax.devices()[0]
    return device.platform, device.device_kind


def single() -> bool:
    """Whether no mesh of several devices is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def size(axes: Iterable[str]) -> int:
    """Devices along `axes` of the mesh of jax.set_mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def fitting(axes: Sequence[str], length: int) -> tuple[str, ...]:
    """The first of `axes` with several devices, for as long as their product divides `length`."""
    found: tuple[str, ...] = ()
    for axis in axes:
        if size((axis,)) > 1:
            if length % size((*found, axis)):
                break
            found += (axis,)
    return found


def constrain(x: jax.Array, places: Activations | None, *axes: str | None) -> jax.Array:
    """x with its dimensions laid over the mesh of jax.set_mesh; without a mesh, x itself.

    A dimension that the mesh does not divide, such as an odd number of text tokens over 'context',
    is split as far as it divides.

    Args:
      x: array with one entry of `axes` per dimension; None leaves that dimension to the compiler.
      places: the tower's row; None leaves everything to the compiler.
      axes: names of fields of `Activations`.
    """
    if places is None or single():
        return x
    free = PartitionSpec.UNCONSTRAINED
    entries = [
        free if axis is None else (fitting(getattr(places, axis), length) or None)
        for axis, length in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


Tables = dict[str, Columns]  # by tower


def row(name: str) -> Columns:
    """The row of ROWS called `name`.

    Raises:
      InputError: there is none.
    """
    if name not in ROWS:
        raise InputError(f"sharding row {name!r} is unknown; give one of {', '.join(ROWS)}")
    return ROWS[name]


def tables(config: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]) -> Tables:
    """One row per tower from {tower: {column: {logical axis: mesh axes}}}.

    Raises:
      InputError: a tower, a column or an axis that does not exist, or a tower without a row.
    """
    known = sorted({tower for _, tower in TOWERS})
    if sorted(config) != known:
        raise InputError(f"sharding tables are given for {sorted(config)}; need exactly {known}")
    kinds = dict.fromkeys(COLUMNS, Rules) | {"activations": Activations}
    out = {}
    for tower, columns in config.items():
        _check_names(f"sharding.{tower}", "columns", columns, kinds)
        filled = {}
        for column, table in columns.items():
            axes = [field.name for field in dataclasses.fields(kinds[column])]
            _check_names(f"sharding.{tower}.{column}", "logical axes", table, axes)
            try:
                filled[column] = kinds[column](**{axis: tuple(v) for axis, v in table.items()})
            except InputError as error:
                raise InputError(f"sharding.{tower}.{column}: {error}") from None
        out[tower] = Columns(**filled)
    return out


def _check_names(where: str, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises InputError when something given is not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"{where} has the unknown {what} {unknown}; known are {', '.join(sorted(known))}"
        )


def column(rows: Tables, name: str) -> dict[str, Rules]:
    """The column 'params', 'gradients' or 'optimizer' of every tower."""
    return {tower: getattr(columns, name) for tower, columns in rows.items()}


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
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if count > 1 and found != count:
        raise InputError(f"config.slices asks for {count} slices, the devices lie in {found}")
    inner = _filled(shape, len(devices) // count)
    outer = [slices.get(axis, 1) for axis in MESH_AXES]
    array = _ordered(inner, outer, devices)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _ordered(inner: list[int], outer: list[int], devices: list[Any]) -> np.ndarray:
    """Devices in the order in which neighbours of the mesh are neighbours of the torus.

    Where no mesh axis fits on whole axes of the torus, one of the torus is split over two of the
    mesh; where even that fails, devices stay in their own order.
    """

    def order(split: bool) -> np.ndarray:
        if math.prod(outer) > 1:
            return mesh_utils.create_hybrid_device_mesh(
                inner, outer, devices, allow_split_physical_axes=split
            )
        return mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=split)

    for split in (False, True):
        try:
            return order(split)
        except (NotImplementedError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            log.info("device order (split physical axes: %s): %s", split, reason)
    log.warning("mesh_utils finds no device order for %s x %s; using jax's own", outer, inner)
    return _row_major(inner, outer, devices)


def _row_major(inner: list[int], outer: list[int], devices: list[Any]) -> np.ndarray:
    """Devices as jax lists them, slice by slice; axes across slices are the outer part of each."""
    by_slice = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    blocks = np.array(by_slice, dtype=object).reshape(*outer, *inner)
    count = len(inner)
    pairs = [axis for i in range(count) for axis in (i, count + i)]
    return blocks.transpose(pairs).reshape([o * i for o, i in zip(outer, inner, strict=True)])


def tower(name: str) -> str:
    """The table that a parameter belongs to; an adapter belongs to what it adapts."""
    name = name.removeprefix("lora/")
    return next(table for prefix, table in TOWERS if name.startswith(prefix))


def spec(
    name: str, shape: Sequence[int], axes: Sequence[str | None], rules: Rules, mesh: Mesh
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


def leaves(boxed: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str | None, ...], Any]]:
    """(name, logical axes, array or ShapeDtypeStruct) of every leaf of a boxed tree.

    Raises:
      InputError: a parameter without logical axes.
    """
    for name, leaf in traverse_util.flatten_dict(boxed, sep="/").items():
        if not isinstance(leaf, meta.AxisMetadata):
            raise InputError(f"parameter {name} carries no logical axes")
        yield name, tuple(leaf.names), leaf.value


def specs(boxed: Mapping[str, Any], rules: Mapping[str, Rules], mesh: Mesh) -> dict[str, Any]:
    """The tree of PartitionSpecs of a boxed (abstract) parameter tree, by one column."""
    flat = {
        name: spec(name, value.shape, axes, rules[tower(name)], mesh)
        for name, axes, value in leaves(boxed)
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def shardings(boxed: Mapping[str, Any], rules: Mapping[str, Rules], mesh: Mesh) -> dict[str, Any]:
    """The tree of NamedShardings of a boxed (abstract) parameter tree, by one column."""
    return jax.tree.map(lambda p: NamedSharding(mesh, p), specs(boxed, rules, mesh))


def check_sharded(
    boxed: Mapping[str, Any], rows: Tables, column: str, mesh: Mesh, limit: float = 0.02
) -> float:
    """The share of shardable bytes that stay whole on every device in one column.

    A leaf could be sharded when a logical axis of SHARDABLE divides by one of the mesh axes that
    are judged. These are the axes that the column uses; a column that uses none is whole on
    purpose where another column of the tower is split, and an oversight where none is.

    Raises:
      InputError: the share is above `limit`; names the largest offender.
    """
    could, loose = 0, {}
    for name, axes, value in leaves(boxed):
        sizes = [mesh.shape[axis] for axis in _judged(rows[tower(name)], column, mesh)]
        dims = [n for axis, n in zip(axes, value.shape, strict=True) if axis in SHARDABLE]
        if len(value.shape) < 2 or not any(n % size == 0 for n in dims for size in sizes):
            continue
        count = math.prod(value.shape) * np.dtype(value.dtype).itemsize
        could += count
        rules = getattr(rows[tower(name)], column)
        if all(mesh.shape[a] == 1 for axis in axes if axis for a in getattr(rules, axis)):
            loose[name] = count
    share = sum(loose.values()) / could if could else 0.0
    if share > limit:
        worst = max(loose, key=loose.get)
        raise InputError(
            f"{share:.1%} of the bytes that could be sharded are whole on every device (column "
            f"{column!r}, limit {limit:.1%}), most of all {worst} with "
            f"{loose[worst] / 2**20:,.1f} MiB; change sharding.{tower(worst)}.{column} or the "
            "mesh, or raise sharding_limit"
        )
    return share


def _judged(columns: Columns, column: str, mesh: Mesh) -> set[str]:
    """The mesh axes by which `check_sharded` judges a column of one tower."""
    splitting = {axis for axis in ("fsdp", "context", "tensor") if mesh.shape[axis] > 1}

    def used(name: str) -> set[str]:
        rules = getattr(columns, name)
        return splitting & {a for axis in SHARDABLE for a in getattr(rules, axis)}

    if not any(used(name) for name in COLUMNS):
        return splitting
    return used(column)


def platform(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu'; of devices that need not be here."""
    return mesh.devices.flat[0].platform


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp); every leaf of a batch has rows first."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(rows: int, mesh: Mesh, towers: Tables) -> None:
    """Raises InputError when `rows` do not divide over the batch axes, or over those of a tower."""
    over = {"the batch": BATCH_AXES}
    over |= {f"sharding.{tower}": columns.activations.batch for tower, columns in towers.items()}
    for what, axes in over.items():
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if rows % parts:
            raise InputError(
                f"a batch of {rows} rows does not divide over {' x '.join(axes)} = {parts} "
                f"devices ({what}); change data.batch, optimizer.accumulation or the mesh"
            )
