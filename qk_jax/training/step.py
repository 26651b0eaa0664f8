"""One training step and one validation step, as pure functions of state, frozen tree and batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Batch, Encoded, EncodedBatch, Tree
from qk_jax.data.example import TASKS
from qk_jax.diffusion import flow
from qk_jax.experiment import optimizer
from qk_jax.experiment.plan import Plan
from qk_jax.experiment.train_state import TrainState
from qk_jax.training import flops
from qk_jax.training.gradients import gatherer, gradients, micro_batches, one_batch
from qk_jax.training.objectives.flow_matching import loss_fn

Metrics = dict[str, jax.Array]


def summaries(values: Mapping[str, jax.Array], bins: int) -> Metrics:
    """Sums and counts of the flow loss per task [6] and per t-bin [bins], and plain means.

    'loss' is that of flow matching, with or without an alignment term, which has its own value.

    Args:
      values: of each example [B]: 'flow', 't', 'task' and, where it is on, 'alignment'.
      bins: equal parts of t in [0, 1].
    """
    tasks = jax.nn.one_hot(values["task"], len(TASKS), dtype=jnp.float32)
    times = jax.nn.one_hot(flow.t_bin(values["t"], bins), bins, dtype=jnp.float32)
    out = {
        "loss": jnp.mean(values["flow"]),
        "task_sum": values["flow"] @ tasks,
        "task_count": jnp.sum(tasks, axis=0),
        "t_sum": values["flow"] @ times,
        "t_count": jnp.sum(times, axis=0),
    }
    if "alignment" in values:
        out["alignment"] = jnp.mean(values["alignment"])
    return out


def make_encoder(plan: Plan) -> jax.stages.Wrapped:
    """The compiled (frozen, batch) -> what `QueryKontext.encode` makes of the pictures.

    A program of its own beside the train step, which therefore has no convolutions: the compiler
    for v6e, when it may use the VMEM that makes large matrix products fast, never finishes
    compiling those. As many examples are encoded at a time as a micro-batch has.

    Raises:
      InputError: the autoencoder is trained.
    """
    if "vae" in plan.params:
        raise InputError(
            "config.rules train the autoencoder, whose latents the loss is made of; freeze vae/.*"
        )
    model, accumulation = plan.model, plan.config.optimizer.accumulation

    def encode(frozen: Tree, batch: Batch) -> Encoded:
        if accumulation == 1:
            return model.encode(frozen, batch)
        parts = micro_batches(
            {"target": batch["target"], "conditions": batch["conditions"]}, accumulation
        )
        return one_batch(jax.lax.map(lambda part: model.encode(frozen, part), parts))

    return jax.jit(
        encode,
        in_shardings=(trees.shardings(plan.frozen), plan.batch_sharding),
        out_shardings=plan.batch_sharding,
        compiler_options=plan.compiler_options(),
    )


def make_train_step(plan: Plan) -> jax.stages.Wrapped:
    """The compiled (state, frozen, batch) -> (state, metrics); it consumes the state.

    The batch may hold what `make_encoder` makes of its pictures; otherwise they are encoded here.
    Every random number comes from fold_in(key(seed), step), so the step number alone decides them.
    A batch of new shapes compiles anew. Metrics are device arrays; reading them waits.

    An update whose gradient or loss is not finite is not applied ('applied' in the metrics), on all
    devices alike; 'finite' [B] tells the examples apart.
    """
    loss, tx, rate = loss_fn(plan), plan.optimizer.tx, plan.optimizer.rate
    section, bins, seed = plan.config.optimizer, plan.config.log.t_bins, plan.config.seed
    between = trees.shardings(plan.state)
    gather = gatherer(plan)

    def moved(state: TrainState, kind: str) -> TrainState:
        """With optimizer.offload, all leaves on the device, or where they are between steps."""
        if not section.offload:
            return state
        near = jax.tree.map(lambda x: x.with_memory_kind("device"), between)
        return jax.tree.map(jax.device_put, state, near if kind == "device" else between)

    def constrain(grads: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(grads, plan.gradients)

    def step(state: TrainState, frozen: Tree, batch: EncodedBatch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        state = moved(state, "device")
        weights = gather(state.params)
        grads, values = gradients(
            loss, weights, frozen, batch, rng, section.accumulation, constrain
        )
        grads = jax.lax.with_sharding_constraint(grads, between.params)
        norm, loss_is_finite = optax.tree.norm(grads), jnp.isfinite(values["flow"])
        # The square of a finite norm is finite, so moments and averages stay so too.
        finite = jnp.isfinite(norm) & jnp.all(loss_is_finite)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        opt_state = optimizer.where_finite(finite, opt_state, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        params = optimizer.where_finite(finite, params, state.params)
        ema = state.ema
        if section.ema:
            ema = optimizer.ema_update(ema, params, state.step, section.ema)
            ema = optimizer.where_finite(finite, ema, state.ema)
        metrics = summaries(values, bins) | {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "lr": rate(state.step),
            "applied": finite,
            "finite": loss_is_finite,
        }
        return moved(TrainState(state.step + 1, params, opt_state, ema), "between"), metrics

    return jax.jit(
        step,
        in_shardings=(between, trees.shardings(plan.frozen), plan.batch_sharding),
        out_shardings=(between, plan.replicated),
        donate_argnums=0,
        compiler_options=plan.compiler_options(step=True),
    )


class Compiled:
    """Encoder and train step, compiled once per batch shape, with the model FLOPs of each shape."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._encode, self._step = make_encoder(plan), make_train_step(plan)
        self._known: dict[Any, tuple[Any, Any, int]] = {}

    def is_new(self, batch: Batch) -> bool:
        """Whether a batch has to be compiled for."""
        return self._key(batch) not in self._known

    def __call__(
        self, state: TrainState, frozen: Tree, batch: Batch
    ) -> tuple[TrainState, Metrics, int]:
        """(state, metrics, FLOPs of this step)."""
        key = self._key(batch)
        if key not in self._known:
            self._known[key] = self._compiled(state, frozen, batch)
        encode, step, work = self._known[key]
        state, values = step(state, frozen, batch | encode(frozen, batch))
        return state, values, work

    @staticmethod
    def _key(batch: Batch) -> tuple[Any, ...]:
        return tuple((name, x.shape) for name, x in trees.named(batch).items())

    def _compiled(self, state: TrainState, frozen: Tree, batch: Batch) -> tuple[Any, Any, int]:
        """Encoder, step and FLOPs for batches of these shapes."""
        encode = self._encode.trace(frozen, batch)
        step = self._step.lower(state, frozen, batch | encode.out_info)
        work = flops.of_step(self._plan, batch)
        return encode.lower().compile(), step.compile(), work


def make_eval_step(plan: Plan) -> jax.stages.Wrapped:
    """The compiled (params, frozen, batch, index) -> summaries, with noise fixed by the index.

    The same index draws the same t and noise at every step and stage, so that values compare.
    """
    loss, bins, seed = loss_fn(plan), plan.config.log.t_bins, plan.config.validation.seed

    def step(params: Tree, frozen: Tree, batch: Batch, index: jax.Array) -> Metrics:
        rng = jax.random.fold_in(jax.random.key(seed), index)
        _, aux = loss(trees.join(params, frozen), batch, rng)
        return summaries({"task": batch["task"], **aux}, bins)

    return jax.jit(
        step,
        in_shardings=(
            trees.shardings(plan.params),
            trees.shardings(plan.frozen),
            plan.batch_sharding,
            plan.replicated,
        ),
        out_shardings=plan.replicated,
        compiler_options=plan.compiler_options(),
    )
