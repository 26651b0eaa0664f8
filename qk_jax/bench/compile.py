"""The programs of a train step, compiled ahead of time, and the memory that they take."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from qk_jax.base.types import Batch, PaddedBatch
from qk_jax.bench.schedule.topologies import GIB
from qk_jax.experiment.plan import Plan
from qk_jax.training import programs
from qk_jax.training import step as step_lib
from qk_jax.training.padding import Padding


class Executables(NamedTuple):
    """The compiled programs of a step, which run one after the other.

    Attributes:
      encoders: of the target and of each condition picture that reaches the generator; pictures of
        one size share theirs.
      step: of the padded batch.
    """

    encoders: tuple[Any, ...]
    step: Any

    def __call__(self, state: Any, frozen: Any, batch: PaddedBatch) -> tuple[Any, Any]:
        """(state, metrics) after a step that consumes the state."""
        pictures = (batch["target"], *batch["conditions"])
        encoded = [one(frozen, x) for one, x in zip(self.encoders, pictures, strict=False)]
        return self.step(state, frozen, step_lib.step_batch(batch, encoded))

    def every(self) -> tuple[Any, ...]:
        """All in their order, a program as often as it runs."""
        return (*self.encoders, self.step)


def compiled(plan: Plan, batch: Batch) -> Executables:
    """Compiles the train step of a plan for an abstract batch, which is padded as in training.

    Raises:
      InputError: the plan trains the autoencoder.
      JaxRuntimeError: the compiler fails, for lack of memory or otherwise.
    """
    stage = programs.Programs(plan)
    padded = Padding.from_config(plan.config).abstract(batch)
    with jax.set_mesh(plan.mesh):
        *encoders, step = stage.traced(padded).items()
        large = step[1].traced.lower().compile()  # first: it is the one that may not fit
        small = {key: one.traced.lower().compile() for key, one in encoders}
        return Executables(tuple(small[key] for key in stage.encoder_keys(padded)), large)


def memory(executables: Executables) -> dict[str, float]:
    """Fields of a table row: GiB of one device while each program runs beside what others hold.

    The autoencoder is an argument of the encoders alone; everything else that lasts, of the step.
    """
    encoders = [one.memory_analysis() for one in set(executables.encoders)]
    step = executables.step.memory_analysis()
    encode = max(one.argument_size_in_bytes for one in encoders)
    every = [*encoders, step]
    nbytes = {
        "hbm_peak": max(
            *(one.peak_memory_in_bytes + step.argument_size_in_bytes for one in encoders),
            step.peak_memory_in_bytes + encode,
        ),
        "argument": encode + step.argument_size_in_bytes,
        "temp": max(one.temp_size_in_bytes for one in every),
        "output": step.output_size_in_bytes - step.alias_size_in_bytes,
        "code": sum(one.generated_code_size_in_bytes for one in every),
        "host": max(one.host_argument_size_in_bytes + one.host_temp_size_in_bytes for one in every),
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
