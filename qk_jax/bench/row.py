"""The process that compiles one table row for a slice, and runs it if that is the slice at hand.

    python -m qk_jax.bench.row REQUEST.json ANSWER.json

It is a process of its own, so that a crash of the compiler ends one table row and no other. A
request is {'case': fields of a `Case`, 'hlo': a file for the compiled program or None}, answered
by fields of `table.FIELDS`; or {'probe': arguments of `probe`}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qk_jax import sharding
from qk_jax.base import files, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.base.types import Batch
from qk_jax.bench import batches
from qk_jax.bench.cases import Case, Target, config_of, slice_of
from qk_jax.bench.compile import compiled, memory, out_of_memory
from qk_jax.bench.measure import Measured, measure
from qk_jax.bench.schedule import estimates, topologies, walk
from qk_jax.bench.schedule.estimates import Estimate
from qk_jax.bench.schedule.topologies import GIB
from qk_jax.experiment.plan import Plan
from qk_jax.pictures.sizes import parse_size
from qk_jax.training import flops

LISTED = 10  # the most expensive ops


def answers(case: Case, text: files.Path | None = None) -> Iterator[dict[str, Any]]:
    """Fields of a table row, each time with more of them.

    Args:
      case: what to compile.
      text: file for the compiled program.

    Raises:
      InputError: the case makes no program.
      JaxRuntimeError: the compiler fails otherwise than for lack of memory.
    """
    if case.here:
        devices, target = jax.devices(), Target.here()
        where = slice_of(devices)
    else:
        where = topologies.parse(case.slice)
        devices, target = topologies.devices(where), Target.of(where)
    config = config_of(case, target)
    mesh = sharding.build_mesh(config.mesh, devices, config.slices)
    plan = Plan.build(config, mesh)
    size = parse_size(case.size, "the size of a case")
    pictures = batches.condition_sizes(config, size, case.pictures)
    batch = batches.abstract(config, size, pictures, config.data.batch)
    found = work(plan, batch)
    yield found
    start = time.perf_counter()
    try:
        executables = compiled(plan, batch)
    except jax.errors.JaxRuntimeError as error:
        yield found | out_of_memory(error) | {"compile_s": time.perf_counter() - start}
        return
    found |= {"compile_s": time.perf_counter() - start} | memory(executables)
    found["fits"] = target.hbm_bytes is None or found["hbm_peak_gib"] * GIB <= target.hbm_bytes
    yield found
    texts = [one.as_text() for one in executables.every()] if where or text else []
    if text is not None:
        text.write_text("\n\n".join(dict.fromkeys(texts)))
    if where is not None:
        parts = [walk.estimate(one, mesh, where) for one in texts]
        found |= estimated(estimates.together(parts), found, target)
        yield found
    if case.measure:
        yield found | measured(measure(plan, batch, executables, case.measure), found, target)


def work(plan: Plan, batch: Batch) -> dict[str, Any]:
    """The fields of what a step computes."""
    config = plan.config
    by_tower = {tower: n / 1e12 for tower, n in flops.by_tower_of_step(plan, batch).items()}
    return {
        "mesh": dict(plan.mesh.shape),
        "rows": config.data.batch,
        "accumulation": config.optimizer.accumulation,
        "dtype": config.dtype.compute,
        "model_tflops_per_step": sum(by_tower.values()),
        "model_tflops": by_tower,
    }


def estimated(guess: Estimate, found: dict[str, Any], target: Target) -> dict[str, Any]:
    """The fields of the estimate; `found` has those of `work`."""
    seconds = guess.step_time_s
    return dataclasses.asdict(guess) | {
        "pictures_per_s": found["rows"] / seconds,
        "pictures_per_s_per_chip": found["rows"] / seconds / target.chips,
        "mfu": mfu(found, seconds, target),
        "ops": [dataclasses.asdict(op) for op in guess.ops[:LISTED]],
    }


def measured(found: Measured, worked: dict[str, Any], target: Target) -> dict[str, Any]:
    """The measured fields; `worked` has those of `work`."""
    return {
        "measured_step_s": found.seconds,
        "measured_pictures_per_s": worked["rows"] / found.seconds,
        "measured_mfu": mfu(worked, found.seconds, target),
        "loss": found.loss,
        "grad_norm": found.grad_norm,
    }


def mfu(found: dict[str, Any], seconds: float, target: Target) -> float | None:
    """Model FLOPs over what the devices could do in that time; None where that is unknown."""
    if target.peak_flops is None:
        return None
    return found["model_tflops_per_step"] * 1e12 / (seconds * target.devices * target.peak_flops)


def probe(slices: Sequence[str], here: bool, flags: Sequence[str]) -> dict[str, Any]:
    """Checks compiler options, and describes the devices at hand if asked.

    Args:
      slices: to compile for; libtpu must be installed.
      here: whether the devices at hand are to be described.
      flags: NAME=VALUE for each of the slices.

    Raises:
      InputError: libtpu is missing, or its compiler refuses an option.
    """
    devices = [topologies.devices(topologies.parse(name))[0] for name in slices]
    if here and jax.default_backend() == "tpu":
        devices.append(jax.devices()[0])
    for flag in flags:
        for device in devices:
            check_flag(flag, device)
    return dataclasses.asdict(Target.here()) if here else {}


def check_flag(flag: str, device: Any) -> None:
    """Raises InputError if the compiler for `device` does not take NAME=VALUE."""
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
    """Answers a request; a table row as far as it is known whenever there is more of it."""
    asked, written = map(files.Path, argv)
    request = json.loads(asked.read_text())
    if "probe" in request:
        found: Iterable[dict[str, Any]] = [probe(**request["probe"])]
    else:
        fields, text = request["case"], request["hlo"]
        case = Case(**fields | {"flags": tuple(fields["flags"])})
        found = answers(case, files.Path(text) if text else None)
    for one in found:
        files.write_text(written, json.dumps(one))


if __name__ == "__main__":
    main(sys.argv[1:])
