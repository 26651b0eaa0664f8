"""One row of the table of layouts: a train step compiled for a slice, and run where there is one.

    python -m qk_jax.bench.row ROW.json ANSWER.json

is a process of its own, so that a crash of the compiler ends one row and no other. What it answers
are fields of `layouts.FIELDS`; `layouts` starts it, waits for it and writes them down.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base import files, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.base.types import Batch
from qk_jax.bench import cost
from qk_jax.bench.compile import compiled
from qk_jax.bench.measure import Measured, measure
from qk_jax.bench.schedule import estimates, topologies, walk
from qk_jax.bench.slices import GIB, Place, Row, configured, slice_of
from qk_jax.experiment.plan import Plan
from qk_jax.training import flops

DEAREST = 10  # ops that are listed


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
    plan, batch = Plan.build(config, mesh), shapes_of(row, config)
    found = work(plan, batch)
    yield found
    start = time.perf_counter()
    try:
        executables = compiled(plan, batch)
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
            parts = [walk.estimate(one, mesh, where) for one in texts]
            found |= estimated(estimates.together(parts), found, at)
            yield found
    if row.measure:
        yield found | run_here(measure(plan, batch, executables, row.measure), found, at)


def work(plan: Plan, batch: Batch) -> dict[str, Any]:
    """Examples and model TFLOPs of a step."""
    config = plan.config
    rows = config.data.batch
    by_tower = {tower: n / 1e12 for tower, n in flops.by_tower_of_step(plan, batch).items()}
    return {
        "mesh": dict(plan.mesh.shape),
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
    options = runtime.compiler_options({"tpu": (flag,)}, "tpu")
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
        files.write_text(written, json.dumps(one))


if __name__ == "__main__":
    main(sys.argv[1:])
