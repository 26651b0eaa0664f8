"""The mesh over the devices at hand, or over devices that need not be here."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qk_jax.base.errors import InputError

log = logging.getLogger(__name__)
MESH_AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
AnyMesh = Mesh | AbstractMesh  # an abstract one serves wherever nothing is put on devices


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


def filled(shape: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of every mesh axis; absent ones are 1, one -1 becomes the rest of `devices`.

    Raises:
      InputError: an unknown axis, or sizes that do not multiply to `devices`; it names some that
        do.
    """
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise InputError(f"mesh axes {unknown} are unknown; known are {', '.join(MESH_AXES)}")
    sizes = {axis: int(shape.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh {dict(shape)} needs positive sizes and at most one -1")
    for axis in free:
        sizes[axis] = max(1, devices // -math.prod(sizes.values()))
    if math.prod(sizes.values()) != devices:
        near = "; or ".join(map(format_mesh, nearest(shape, devices)))
        raise InputError(
            f"mesh {format_mesh(sizes)} is {math.prod(sizes.values())} devices, there are "
            f"{devices}; the nearest that fit: {near}"
        )
    return sizes


def format_mesh(shape: Mapping[str, int]) -> str:
    """{'fsdp': 8, 'tensor': 1} -> 'fsdp=8', the inverse of `parse` without axes of one device."""
    sizes = {axis: shape.get(axis, 1) for axis in MESH_AXES}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


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
    sizes = filled(shape, math.prod(shape.values()))
    return AbstractMesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


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
        raise InputError(f"config.slices asks for {count} slices, the devices are in {found}")
    inner = list(filled(shape, len(devices) // count).values())
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


def platform(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu'; of devices that need not be here."""
    return mesh.devices.flat[0].platform


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Sharded over (data, fsdp) along the first dimension, as every leaf of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
