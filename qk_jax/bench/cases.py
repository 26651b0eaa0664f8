"""What a table row is of: a case, the devices it is compiled for, and the config of the two.

A layout is a text 'MESH[/ROWS]', such as 'fsdp=16,tensor=4/text=tensor,mmdit=zero2_flat': the mesh
within one slice, in which one size may be -1, and names of `sharding.ROWS` for some towers, or one
for all. What is not given is the config's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench.batches import examples_of
from qk_jax.bench.schedule import topologies
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.sizes import parse_size
from qk_jax.training import flops

NO_REMAT = "none"


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices that a step is compiled for.

    Attributes:
      name: Google's name of the slice, or '8x cpu' for other devices at hand.
      devices: of all slices.
      slices: how many, joined over the data-centre network.
      chips: under the devices.
      peak_flops: bfloat16 FLOP/s of one device; None if unknown.
      hbm_bytes: of one device; None if unknown.
    """

    name: str
    devices: int
    slices: int
    chips: int
    peak_flops: float | None
    hbm_bytes: int | None

    @classmethod
    def of(cls, where: topologies.Slice) -> Target:
        """A slice that need not be here."""
        spec = where.spec
        return cls(
            str(where), where.total_devices, where.count, where.total_chips,
            spec.peak_flops, spec.hbm_bytes,
        )  # fmt: skip

    @classmethod
    def here(cls) -> Target:
        """The devices at hand."""
        devices = jax.devices()
        where = slice_of(devices)
        if where is not None:
            return cls.of(where)
        kind, count = devices[0].device_kind, len(devices)
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        return cls(f"{count}x {kind}", count, 1, count, flops.peak(devices[0]), memory)

    @property
    def slice_devices(self) -> int:
        """Devices of one slice."""
        return self.devices // self.slices


def slice_of(devices: Sequence[Any]) -> topologies.Slice | None:
    """The TPU slice that these devices are; None for other devices."""
    for name, spec in topologies.GENERATIONS.items():
        if spec.device_kind == devices[0].device_kind:
            count = len({getattr(device, "slice_index", 0) for device in devices})
            return topologies.Slice(name, len(devices) // spec.chip_devices // count, count)
    return None


@dataclasses.dataclass(frozen=True)
class Case:
    """What defines a table row.

    Attributes:
      config: NAME:SIZE[@RECIPE], or FILE.py:SIZE[@RECIPE].
      overrides: {field of the config: text}.
      slice: name of the target.
      here: whether that is the devices at hand.
      layout: MESH[/ROWS].
      remat: config.model.remat, or NO_REMAT.
      per_chip_batch: examples of a micro-batch per device.
      size: of the target picture, width x height, such as '80x48'.
      pictures: condition pictures of every example.
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
    size: str
    pictures: int
    flags: tuple[str, ...]
    measure: int


def set_layout(config: ConfigDict, layout: str, target: Target) -> None:
    """Sets mesh, slices and sharding of a config; 'data' joins slices unless it says otherwise.

    Raises:
      InputError: another form, a mesh of other devices, a tower or a row that does not exist.
    """
    mesh, _, rows = layout.partition("/")
    for tower, row in sharding.parse_rows(rows, config.sharding).items():
        config_lib.override(config, f"sharding.{tower}", row)
    if math.prod(config.slices.values()) == 1:
        config.slices.data = target.slices
    if math.prod(config.slices.values()) != target.slices:
        raise InputError(
            f"config.slices {config.slices.to_dict()} are not the {target.slices} of {target.name}"
        )
    shape = sharding.parse(mesh) if mesh else config.mesh
    config.mesh.update(sharding.filled(shape, target.slice_devices))


def layout_of(config: ConfigDict) -> str:
    """The layout that `set_layout` would set in full."""
    rows = sharding.format_rows(config.sharding)
    return sharding.format_mesh(config.mesh) + (rows and f"/{rows}")


def config_of(case: Case, target: Target) -> ConfigDict:
    """The config of a case, with its layout, remat, flags and batch.

    The batch is that of the config in micro-batches of `per_chip_batch` examples per device, at
    least one: a larger slice trains a larger batch.

    Raises:
      InputError: the batch is no whole number of examples, or something does not exist.
    """
    config = config_lib.load(case.config, case.overrides)
    set_layout(config, case.layout, target)
    size = parse_size(case.size, "the size of a case")
    config.data.batch, config.data.tokens = examples_of(config, size, case.pictures), 0
    config.model.remat = "" if case.remat == NO_REMAT else case.remat
    config.compiler.tpu_step = (*config.compiler.tpu_step, *case.flags)
    micro = micro_batch(target, case.per_chip_batch)
    config.optimizer.accumulation = max(1, config.data.batch // micro)
    config.data.batch = config.optimizer.accumulation * micro
    return config


def micro_batch(target: Target, per_chip_batch: float) -> int:
    """Examples of a micro-batch over all devices.

    Raises:
      InputError: they are no whole number.
    """
    micro = target.devices * per_chip_batch
    if micro < 1 or micro != int(micro):
        raise InputError(
            f"{per_chip_batch:g} examples per device on the {target.devices} of {target.name} are "
            "no whole number; give another --per-chip-batch"
        )
    return int(micro)
