"""The two programs of a train step, compiled ahead of time for devices that need not be here."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from qk_jax.base.types import Batch
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
      JaxRuntimeError: the compiler fails, for want of memory or otherwise.
    """
    encoder, train_step = step_lib.make_encoder(plan), step_lib.make_train_step(plan)
    with jax.set_mesh(plan.mesh):
        encode = encoder.trace(plan.frozen, batch)
        step = train_step.trace(plan.state, plan.frozen, batch | encode.out_info)
        large = step.lower().compile()  # first: it is what may not fit
        return Executables(encode.lower().compile(), large)
