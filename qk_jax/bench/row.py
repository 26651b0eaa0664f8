"""One row of the table of layouts: a train step compiled for a slice, and run where there is one.

    python -m qk_jax.bench.row ROW.json ANSWER.json

is a process of its own, so that a crash of the compiler ends one row and no other. What it answers
are fields of `layouts.FIELDS`; `layouts` starts it, waits for it and writes them down.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.bench import cost, estimates, hlo, topologies
from qk_jax.errors import InputError, exits
from qk_jax.training import checkpoint, flops
from qk_jax.training import config as config_lib
from qk_jax.training import state as state_lib
from qk_jax.training import step as step_lib

GIB = 2**30
OWN = "*"  # for the row of a tower whose cells are the config's own
NO_REMAT = "none"
DEAREST = 10  # ops that are listed


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


class Program(NamedTuple):
    """One train step over a mesh, the encoder of its pictures apart, before they are compiled; all
    trees are abstract."""

    model: Any
    config: ConfigDict
    layout: state_lib.Layout
    adam: Any
    encode: Any
    step: Any
    batch: dict[str, Any]


class Executables(NamedTuple):
    """The two compiled programs of a train step, which run one after the other."""

    encode: Any
    step: Any


def program(config: ConfigDict, mesh: jax.sharding.Mesh, batch: dict[str, Any]) -> Program:
    """The train step of a config for batches of these shapes.

    Raises:
      InputError: batch or parameters do not divide over the mesh.
    """
    rows = batch["input_ids"].shape[0] // config.optimizer.accumulation
    sharding.check_batch(rows, mesh, sharding.tables(config.sharding))
    model = state_lib.build_model(config)
    layout = state_lib.Layout(model, config, mesh)
    adam = state_lib.build_optimizer(config, layout)
    encode = step_lib.make_encoder(model, config, layout)
    step = step_lib.make_train_step(model, config, layout, adam)
    return Program(model, config, layout, adam, encode, step, batch)


def compiled(given: Program) -> Executables:
    """The executables of a program."""
    state, frozen = given.layout.state(given.config, given.adam.tx), given.layout.frozen
    with jax.set_mesh(given.layout.mesh):
        encode = given.encode.trace(frozen, given.batch)
        step = given.step.trace(state, frozen, given.batch | encode.out_info)
        large = step.lower().compile()  # first: it is what may not fit
        return Executables(encode.lower().compile(), large)


class Measured(NamedTuple):
    """Of steps on the devices at hand: median seconds of one; loss and norm of the gradient of the
    first, before anything has changed."""

    seconds: float
    loss: float
    grad_norm: float


def measure(given: Program, executables: Executables, steps: int) -> Measured:
    """Times `steps` steps after one that warms up, from random parameters and synthetic rows.

    Parameters and rows do not depend on the layout.
    """
    mesh = given.layout.mesh
    with jax.set_mesh(mesh):
        trained, frozen = (
            random_leaves(given, tree) for tree in (given.layout.params, given.layout.frozen)
        )
        target = given.layout.state(given.config, given.adam.tx)
        state = state_lib.create(trained, given.adam.tx, target)
        rows = cost.synthetic_batch(given.batch, given.model.config.vlm.image_token_id)
        batch = jax.device_put(rows, sharding.batch_sharding(mesh))
        seconds, first = [], None
        for _ in range(steps + 1):
            start = time.perf_counter()
            whole = batch | executables.encode(frozen, batch)
            state, values = jax.block_until_ready(executables.step(state, frozen, whole))
            seconds.append(time.perf_counter() - start)
            first = first or values
    return Measured(float(np.median(seconds[1:])), float(first["loss"]), float(first["grad_norm"]))


def random_leaves(given: Program, tree: Any) -> Any:
    """Values for an abstract tree of parameters, by name and index alone: the same on every mesh.

    Kernels keep the scale of what they are given, norms' scales are near 1 and the rest near 0;
    fresh parameters would not do, with which a generator paints nothing, whatever comes in.
    """
    axes = {name: axes for name, axes, _ in sharding.leaves(given.layout.boxed)}
    flat = checkpoint.named(tree)

    def one(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = math.prod(
            size for axis, size in zip(axes[name][:-1], leaf.shape, strict=False)
            if axis != "layers"
        )  # fmt: skip
        spread = (3 / fan_in) ** 0.5 if name.endswith(("kernel", "lora_a", "lora_b")) else 0.05
        middle = float(name.endswith("scale"))
        noise = uniform(leaf.shape, zlib.crc32(name.encode()))
        return (middle + spread * noise).astype(leaf.dtype)

    def make() -> list[jax.Array]:
        return [one(name, leaf) for name, leaf in flat.items()]

    options = step_lib.compiler_options(given.config, sharding.platform(given.layout.mesh))
    places = [leaf.sharding for leaf in flat.values()]
    values = jax.jit(make, out_shardings=places, compiler_options=options)()
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def uniform(shape: tuple[int, ...], seed: int) -> jax.Array:
    """float32 in [-1, 1) by a hash of each element's index, cheap to compile and to compute."""
    bits = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        bits = (bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        bits ^= bits >> 15
    bits *= jnp.uint32(0x85EBCA6B)
    return (bits >> 8).astype(jnp.float32) / 2**23 - 1


def shapes_of(row: Row, config: ConfigDict) -> dict[str, Any]:
    """The abstract batch of a row."""
    picture = (config.data.reference_size,) * 2
    return cost.batch_shapes(config, row.size, [picture] * row.pictures, config.data.batch)


def answers(row: Row, text: pathlib.Path | None = None) -> Iterator[dict[str, Any]]:
    """What is found of a row, fields of the table: each time with more of them.

    Args:
      row: what to compile.
      text: file for the compiled program.

    Raises:
      InputError: the row makes no program.
      JaxRuntimeError: the compiler fails otherwise than for want of memory.
    """
    where = None if row.here else topologies.parse(row.slice)
    devices = jax.devices() if row.here else topologies.devices(where)
    at = Place.here() if row.here else Place.of(where)
    where = slice_of(devices) if row.here else where
    config = configured(row, at)
    mesh = sharding.build_mesh(config.mesh, devices, config.slices)
    given = program(config, mesh, shapes_of(row, config))
    found = work(config, given)
    yield found
    start = time.perf_counter()
    try:
        executables = compiled(given)
    except jax.errors.JaxRuntimeError as error:
        yield found | no_room(error) | {"compile_s": time.perf_counter() - start}
        return
    found |= {"compile_s": time.perf_counter() - start}
    found |= memory(*(one.memory_analysis() for one in executables))
    found["fits"] = at.hbm_bytes is None or found["hbm_peak_gib"] * GIB <= at.hbm_bytes
    yield found
    if where is not None or text is not None:
        texts = [one.as_text() for one in executables]
        if text is not None:
            text.write_text("\n\n".join(texts), encoding="utf-8")
        if where is not None:
            parts = [hlo.estimate(one, mesh, where) for one in texts]
            found |= estimated(estimates.together(parts), found, at)
            yield found
    if row.measure:
        yield found | run_here(measure(given, executables, row.measure), found, at)


def work(config: ConfigDict, given: Program) -> dict[str, Any]:
    """Rows and model TFLOPs of a step."""
    rows = config.data.batch
    towers = cost.flops_by_tower(config, given.layout, given.batch)
    by_tower = {tower: rows * count / 1e12 for tower, count in towers.items()}
    return {
        "mesh": dict(given.layout.mesh.shape),
        "rows": rows,
        "accumulation": config.optimizer.accumulation,
        "dtype": config.dtype.compute,
        "model_tflops_per_step": sum(by_tower.values()),
        "model_tflops": by_tower,
    }


def memory(encode: Any, step: Any) -> dict[str, Any]:
    """HBM of one device while the two programs of a step run, each beside what the other takes.

    The autoencoder is an argument of the first alone, everything else that lasts of the second.
    """
    both = (encode, step)
    peaks = [
        one.peak_memory_in_bytes + other.argument_size_in_bytes
        for one, other in zip(both, both[::-1], strict=True)
    ]
    outputs = step.output_size_in_bytes - step.alias_size_in_bytes
    hosts = [one.host_argument_size_in_bytes + one.host_temp_size_in_bytes for one in both]
    return {
        "hbm_peak_gib": max(peaks) / GIB,
        "argument_gib": sum(one.argument_size_in_bytes for one in both) / GIB,
        "temp_gib": max(one.temp_size_in_bytes for one in both) / GIB,
        "output_gib": outputs / GIB,
        "code_gib": sum(one.generated_code_size_in_bytes for one in both) / GIB,
        "host_gib": max(hosts) / GIB,
    }


UNITS = {"": 2**-30, "K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
NO_ROOM = (
    r"Used (?P<used>[\d.]+)(?P<unit>[KMGT]?) of (?P<limit>[\d.]+)(?P<limit_unit>[KMGT]?) hbm",
    r"\((?P<used>[\d.]+)(?P<unit>[KMGT]?)\) exceeds available HBM "
    r"\((?P<limit>[\d.]+)(?P<limit_unit>[KMGT]?)\)",
)


def no_room(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
    """What the compiler says of a program that does not fit into HBM.

    Raises:
      JaxRuntimeError: `error`, where it is about something else.
    """
    for pattern in NO_ROOM:
        match = re.search(pattern, str(error))
        if match:
            used, limit = (
                float(match[size]) * UNITS[match[unit]]
                for size, unit in (("used", "unit"), ("limit", "limit_unit"))
            )
            return {"fits": False, "hbm_peak_gib": used, "hbm_limit_gib": limit}
    raise error


def estimated(guess: estimates.Estimate, found: dict[str, Any], at: Place) -> dict[str, Any]:
    """The estimate's fields; `found` has rows and model_tflops_per_step."""
    seconds = guess.step_time_s
    dearest = sorted(guess.ops, key=lambda op: op.seconds, reverse=True)[:DEAREST]
    return {
        "compute_s": guess.compute_s,
        "attention_s": guess.attention_s,
        "comm_s": guess.comm_s,
        "exposed_comm_s": guess.exposed_comm_s,
        "step_time_s": seconds,
        "pictures_per_s": found["rows"] / seconds,
        "pictures_per_s_per_chip": found["rows"] / seconds / at.chips,
        "mfu": mfu(found, seconds, at),
        "collectives": [dataclasses.asdict(one) for one in guess.collectives],
        "ops": [dataclasses.asdict(op) for op in dearest],
        "unpriced": list(guess.unpriced),
    }


def run_here(measured: Measured, found: dict[str, Any], at: Place) -> dict[str, Any]:
    """The measured fields."""
    return {
        "measured_step_s": measured.seconds,
        "measured_pictures_per_s": found["rows"] / measured.seconds,
        "measured_mfu": mfu(found, measured.seconds, at),
        "loss": measured.loss,
        "grad_norm": measured.grad_norm,
    }


def mfu(found: dict[str, Any], seconds: float, at: Place) -> float | None:
    """Model FLOPs over what the devices could do in that time; None where that is not known."""
    if at.peak_flops is None:
        return None
    return found["model_tflops_per_step"] * 1e12 / (seconds * at.devices * at.peak_flops)


def probe(slices: Sequence[str], here: bool, flags: Sequence[str]) -> dict[str, Any]:
    """The devices at hand where they are asked for, after the compiler options are checked.

    Args:
      slices: to compile for; libtpu must be here.
      here: whether the devices at hand are to be described.
      flags: NAME=VALUE for each of the slices.

    Raises:
      InputError: libtpu is missing, or its compiler refuses an option.
    """
    wanted = [topologies.devices(topologies.parse(name))[0] for name in slices]
    if here and jax.default_backend() == "tpu":
        wanted.append(jax.devices()[0])
    for flag in flags if wanted else ():
        for device in wanted:
            check_flag(flag, device)
    return dataclasses.asdict(Place.here()) if here else {}


def check_flag(flag: str, device: Any) -> None:
    """Raises InputError when the compiler for `device` does not take NAME=VALUE."""
    options = step_lib.compiler_options({"compiler": {"tpu": (flag,)}}, "tpu")
    single = jax.sharding.SingleDeviceSharding(device)
    program = jax.jit(lambda: jnp.zeros(()), out_shardings=single)
    try:
        program.trace().lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the compiler for {device.device_kind} refuses the option {flag!r}: {reason}"
        ) from None


@exits
def main(argv: Sequence[str]) -> None:
    """Reads a request {'row': ...} or {'probe': ...} and writes the answer, a row's as far as it is
    known whenever there is more."""
    asked, written = map(pathlib.Path, argv)
    request = json.loads(asked.read_text(encoding="utf-8"))
    if "probe" in request:
        found: Iterable[dict[str, Any]] = [probe(**request["probe"])]
    else:
        fields = request["row"]
        row = Row(**fields | {name: tuple(fields[name]) for name in ("size", "flags")})
        text = request["hlo"]
        found = answers(row, pathlib.Path(text) if text else None)
    for one in found:
        partial = written.with_suffix(".partial")
        partial.write_text(json.dumps(one), encoding="utf-8")
        partial.replace(written)


if __name__ == "__main__":
    main(sys.argv[1:])
