"""The two programs of a train step, compiled ahead of time, and the memory that they take."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from qk_jax.base.types import Batch
from qk_jax.bench.schedule.topologies import GIB
from qk_jax.experiment.plan import Plan
from qk_jax.training import step as step_lib


class Executables(NamedTuple):
    """The compiled encoder and step, which run one after the other."""

    encode: Any
    step: Any


def compiled(plan: Plan, batch: Batch) -> Executables:
    """Compiles the train step of a plan for an abstract batch.

    Raises:
      InputError: the plan trains the autoencoder.
      JaxRuntimeError: the compiler fails, for lack of memory or otherwise.
    """
    encoder, train_step = step_lib.make_encoder(plan), step_lib.make_train_step(plan)
    with jax.set_mesh(plan.mesh):
        encode = encoder.trace(plan.frozen, batch)
        step = train_step.trace(plan.state, plan.frozen, batch | encode.out_info)
        large = step.lower().compile()  # first: it is the one that may not fit
        return Executables(encode.lower().compile(), large)


def memory(executables: Executables) -> dict[str, float]:
    """Fields of a table row: GiB of one device while each program runs beside what the other holds.

    The autoencoder is an argument of the first alone; everything else that lasts, of the second.
    """
    encode, step = both = [one.memory_analysis() for one in executables]
    arguments = [one.argument_size_in_bytes for one in both]
    nbytes = {
        "hbm_peak": max(
            encode.peak_memory_in_bytes + arguments[1], step.peak_memory_in_bytes + arguments[0]
        ),
        "argument": sum(arguments),
        "temp": max(one.temp_size_in_bytes for one in both),
        "output": step.output_size_in_bytes - step.alias_size_in_bytes,
        "code": sum(one.generated_code_size_in_bytes for one in both),
        "host": max(one.host_argument_size_in_bytes + one.host_temp_size_in_bytes for one in both),
    }
    return {f"{name}_gib": size / GIB for name, size in nbytes.items()}


UNITS = {"": 2**-30, "K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
OUT_OF_MEMORY = (
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)


def out_of_memory(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
    """Fields of a table row: what the compiler says of a program that does not fit into HBM.

    Raises:
      JaxRuntimeError: `error`, if it is about something else.
    """
    for pattern in OUT_OF_MEMORY:
        match = re.search(pattern, str(error))
        if match:
            used, unit, limit, limit_unit = match.groups()
            return {
                "fits": False,
                "hbm_peak_gib": float(used) * UNITS[unit],
                "hbm_limit_gib": float(limit) * UNITS[limit_unit],
            }
    raise error
