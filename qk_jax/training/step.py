"""One training step and one validation step, as pure functions of state, frozen tree and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import PaddedBatch, Pictures, StepBatch, Tree
from qk_jax.data.example import TASKS
from qk_jax.diffusion import flow
from qk_jax.experiment import optimizer
from qk_jax.experiment.plan import Plan
from qk_jax.experiment.train_state import TrainState
from qk_jax.training.gradients import gatherer, gradients, micro_batches, one_batch
from qk_jax.training.objectives.flow_matching import loss_fn
from qk_jax.training.padding import Padding

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


class Encoder:
    """(frozen, padded batch) -> what a step reads: the pictures through the frozen autoencoder.

    Programs of their own beside the train step, one for each size of a picture. The step therefore
    has no convolutions: the compiler for v6e, when it may use the VMEM that makes large matrix
    products fast, never finishes compiling those. As many examples are encoded at a time as a
    micro-batch has.

    Attributes:
      program: the compiled (frozen, pictures [B, H, W, 3], tokens) -> mean and deviation of their
        latents, of `QueryKontext.posterior_tokens`.
    """

    def __init__(self, plan: Plan):
        """Compiles nothing yet.

        Raises:
          InputError: the autoencoder is trained.
        """
        if "vae" in plan.params:
            raise InputError(
                "config.rules train the autoencoder, whose latents the loss is made of; freeze "
                "vae/.*"
            )
        model, accumulation = plan.model, plan.config.optimizer.accumulation
        self._padding = Padding.from_config(plan.config)
        self._reads_conditions = model.config.condition_latents

        def encode(frozen: Tree, pictures: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
            if accumulation == 1:
                return model.posterior_tokens(frozen, pictures, tokens)
            parts = micro_batches(pictures, accumulation)
            found = jax.lax.map(lambda part: model.posterior_tokens(frozen, part, tokens), parts)
            return one_batch(found)

        self.program = jax.jit(
            encode,
            static_argnums=2,
            in_shardings=(trees.shardings(plan.frozen), plan.batch_sharding),
            out_shardings=plan.batch_sharding,
            compiler_options=plan.compiler_options(),
        )

    def pictures(self, batch: PaddedBatch) -> list[tuple[Any, int]]:
        """What the program is called with: the target, then the condition pictures that reach the
        generator, each with the tokens that it is padded to. Nothing where a cache has them."""
        if "posterior" in batch:
            return []
        conditions = batch["conditions"] if self._reads_conditions else ()
        tokens = self._padding.tokens(batch)
        return list(zip((batch["target"], *conditions), tokens, strict=False))

    def __call__(self, frozen: Tree, batch: PaddedBatch) -> StepBatch:
        """The batch with latents instead of pixels."""
        return step_batch(batch, [self.program(frozen, *one) for one in self.pictures(batch)])


def step_batch(batch: PaddedBatch, encoded: Sequence[tuple[Any, Any]]) -> StepBatch:
    """What a step reads of a batch, with what `Encoder.program` made of each of its pictures."""
    rest: Any = {name: x for name, x in batch.items() if name not in Pictures.__annotations__}
    if "posterior" in rest:
        return rest
    posterior, *conditions = encoded
    return rest | {"posterior": posterior, "latents": tuple(mean for mean, _ in conditions)}


def make_train_step(plan: Plan) -> jax.stages.Wrapped:
    """The compiled (state, frozen, batch) -> (state, metrics); it consumes the state.

    Every random number comes from fold_in(key(seed), step), so the step number alone decides them.
    A batch of new shapes, as with another number of condition pictures, compiles anew. Metrics are
    device arrays; reading them waits.

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

    def step(state: TrainState, frozen: Tree, batch: StepBatch) -> tuple[TrainState, Metrics]:
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


def make_eval_step(plan: Plan) -> jax.stages.Wrapped:
    """The compiled (params, frozen, batch, index) -> summaries, with noise fixed by the index.

    The same index draws the same t and noise at every step and stage, so that values compare.
    """
    loss, bins, seed = loss_fn(plan), plan.config.log.t_bins, plan.config.validation.seed

    def step(params: Tree, frozen: Tree, batch: StepBatch, index: jax.Array) -> Metrics:
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
