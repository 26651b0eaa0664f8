from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench.schedule import topologies
from qk_jax.experiment import config as config_lib
from qk_jax.training import flops

GIB = 2**30
OWN = "*"  # for the row of a tower whose cells are the config's own
NO_REMAT = "none"


@dataclasses.dataclass(frozen=True)
class Place:
    """Devices that a step is compiled for.

    Attributes:
      name: Google's name of the slice, or '8x cpu' of devices at hand.
      devices: of all slices.
      slices: how many, joined over the data-centre network.
      chips: under the devices.
      peak_flops: bfloat16 FLOP/s of one device; None when not known.
      hbm_bytes: of one device; None when not known.
    """

    name: str
    devices: int
    slices: int
    chips: int
    peak_flops: float | None
    hbm_bytes: int | None

    @classmethod
    def of(cls, where: topologies.Slice) -> Place:
        """A slice that need not be here."""
        spec = where.spec
        return cls(
            str(where), where.total_devices, where.count, where.total_chips,
            spec.peak_flops, spec.hbm_bytes,
        )  # fmt: skip

    @classmethod
    def here(cls) -> Place:
        """The devices at hand."""
        devices = jax.devices()
        where = slice_of(devices)
        if where is not None:
            return cls.of(where)
        kind, count = devices[0].device_kind, len(devices)
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        return cls(f"{count}x {kind}", count, 1, count, flops.peak(devices[0]), memory)


def slice_of(devices: Sequence[Any]) -> topologies.Slice | None:
    """The TPU slice that these devices are; None for other devices."""
    for name, spec in topologies.GENERATIONS.items():
        if spec.device_kind == devices[0].device_kind:
            count = len({getattr(device, "slice_index", 0) for device in devices})
            return topologies.Slice(name, len(devices) // spec.chip_devices // count, count)
    return None


@dataclasses.dataclass(frozen=True)
class Row:
    """What defines a row.

    Attributes:
      config: FILE.py:SIZE[@RECIPE].
      overrides: {field of the config: text}.
      slice: name of the place.
      here: whether that is the devices at hand.
      layout: mesh within a slice, and rows of the sharding table (`lay_out`).
      remat: config.model.remat, or NO_REMAT.
      per_chip_batch: rows of a micro-batch over devices.
      size: (H, W) of the target.
      pictures: condition pictures of every row.
      flags: compiler options of the train step, besides the config's.
      measure: steps to time on the devices at hand; 0 compiles only.
    """

    config: str
    overrides: Mapping[str, str]
    slice: str
    here: bool
    layout: str
    remat: str
    per_chip_batch: float
    size: tuple[int, int]
    pictures: int
    flags: tuple[str, ...]
    measure: int


def lay_out(config: ConfigDict, layout: str, at: Place) -> None:
    """Lays a config out by a text 'fsdp=16,tensor=4/text=tensor,mmdit=zero2_flat'.

    Args:
      config: its mesh, slices and sharding are set.
      layout: the mesh within one slice, in which one size may be -1; after a '/' a row of
        `sharding.ROWS` for some towers, or one for all. What is not given stays the config's.
      at: where; slices are joined by 'data' where config.slices does not say otherwise.

    Raises:
      InputError: another form, a mesh of other devices, a tower or a row that does not exist.
    """
    mesh, _, rows = layout.partition("/")
    if mesh:
        config.mesh.update(dict.fromkeys(sharding.MESH_AXES, 1))
        for axis, size in sharding.parse(mesh).items():
            if axis not in config.mesh:
                known = ", ".join(sharding.MESH_AXES)
                raise InputError(f"the mesh axis {axis!r} is not of {known}")
            config.mesh[axis] = size
    if rows and "=" not in rows:
        rows = ",".join(f"{tower}={rows}" for tower in config.sharding)
    for part in filter(None, rows.split(",")):
        tower, _, row = part.partition("=")
        if tower not in config.sharding:
            known = ", ".join(config.sharding)
            raise InputError(f"the tower {tower!r} is not of {known}")
        if row != OWN:
            config_lib.override(config, f"sharding.{tower}", row)
    if math.prod(config.slices.values()) == 1:
        config.slices.data = at.slices
    if math.prod(config.slices.values()) != at.slices:
        raise InputError(
            f"config.slices {config.slices.to_dict()} are not the {at.slices} of {at.name}"
        )
    fill(config.mesh, at.devices // at.slices, at.name)


def fill(mesh: ConfigDict, devices: int, name: str) -> None:
    """Puts the number that makes up the devices of one slice in the place of a -1.

    Raises:
      InputError: the mesh is of other devices; it names some that fit.
    """
    known = math.prod(size for size in mesh.values() if size != -1)
    for axis, size in mesh.items():
        if size == -1 and known > 0:
            mesh[axis] = max(1, devices // known)
    sizes = sharding.abstract_mesh(mesh).shape
    if math.prod(sizes.values()) != devices:
        near = "; or ".join(mesh_text(shape) for shape in sharding.nearest(sizes, devices))
        raise InputError(
            f"the mesh {mesh_text(sizes)} is {math.prod(sizes.values())} devices, a slice of "
            f"{name} has {devices}; the nearest that fit: {near}"
        )


def mesh_text(shape: Mapping[str, int]) -> str:
    """'fsdp=16,tensor=4': a mesh without the axes of one device."""
    sizes = {axis: shape.get(axis, 1) for axis in sharding.MESH_AXES}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def describe(config: ConfigDict) -> str:
    """The layout of a config that is laid out as a text for `lay_out`: its mesh, and the rows of
    towers that are not 'fsdp'."""
    mesh = mesh_text(config.mesh)
    known = {name: dataclasses.asdict(row) for name, row in sharding.ROWS.items()}
    rows = {}
    for tower, given in config.sharding.items():
        cells = {name: dict(table) for name, table in given.items()}
        rows[tower] = next((name for name, table in known.items() if table == cells), OWN)
    if len(set(rows.values())) == 1 and OWN not in rows.values():
        row = next(iter(rows.values()))
        return mesh if row == "fsdp" else f"{mesh}/{row}"
    words = ",".join(f"{tower}={row}" for tower, row in rows.items() if row != "fsdp")
    return f"{mesh}/{words}" if words else mesh


def configured(row: Row, at: Place) -> ConfigDict:
    """The config of a row, with its layout, remat, flags and batch.

    The batch is that of the config in micro-batches of `per_chip_batch` rows per device, at least
    one: so a larger slice trains a larger batch.

    Raises:
      InputError: the batch is not a whole number of rows, or something does not exist.
    """
    config = config_lib.load(row.config, row.overrides)
    lay_out(config, row.layout, at)
    config.model.remat = "" if row.remat == NO_REMAT else row.remat
    config.compiler.tpu_step = (*config.compiler.tpu_step, *row.flags)
    micro = micro_batch(at, row.per_chip_batch)
    config.optimizer.accumulation = max(1, config.data.batch // micro)
    config.data.batch = config.optimizer.accumulation * micro
    return config


def micro_batch(at: Place, per_chip_batch: float) -> int:
    """Rows of a micro-batch over all devices.

    Raises:
      InputError: they are no whole number.
    """
    micro = at.devices * per_chip_batch
    if micro < 1 or micro != int(micro):
        raise InputError(
            f"{per_chip_batch:g} rows per device on the {at.devices} of {at.name} are no whole "
            "number; give another --per-chip-batch"
        )
    return int(micro)
