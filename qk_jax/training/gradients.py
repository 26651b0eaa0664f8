"""Gradients of the mean loss over micro-batches, and the weights that a step computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import StepBatch, Tree
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training.objectives.flow_matching import LossFn

Values = dict[str, jax.Array]  # of each example, [B] each
Part = TypeVar("Part")


def micro_batches(batch: Part, count: int) -> Part:
    """Leaves [B, ...] -> [count, B / count, ...]; micro-batch i has the slots i, i + count, ...

    Striding keeps every slot on its device when a batch is sharded in contiguous parts.
    """

    def part(x: jax.Array) -> jax.Array:
        slots = x.reshape(x.shape[0] // count, count, *x.shape[1:])
        return jnp.swapaxes(slots, 0, 1)

    return jax.tree.map(part, batch)


def one_batch(parts: Part) -> Part:
    """Leaves [count, B / count, ...] -> [B, ...], the inverse of `micro_batches`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def gradients(
    loss: LossFn,
    params: Tree,
    frozen: Tree,
    batch: StepBatch,
    rng: jax.Array,
    accumulation: int,
    constrain: Callable[[Tree], Tree] = lambda tree: tree,
) -> tuple[Tree, Values]:
    """Gradient of the mean loss over all examples.

    It is the mean over micro-batches of equal size, summed in float32: what one big batch gives.
    Micro-batch i draws from fold_in(rng, i).

    Args:
      loss: of each example.
      params, frozen: the trained and the frozen leaves.
      batch: leaves [B, ...].
      rng: key of the step.
      accumulation: number of micro-batches.
      constrain: shards a tree of gradients, those of each micro-batch and the sum so far.

    Returns:
      gradients like `params`, float32; {'loss', 'task', every aux of `loss`} with B values each.
    """

    def mean_loss(params: Tree, part: StepBatch, key: jax.Array) -> tuple[jax.Array, Values]:
        values, aux = loss(trees.join(params, frozen), part, key)
        return jnp.mean(values), {"loss": values, "task": part["task"], **aux}

    def grad(part: StepBatch, index: Any) -> tuple[Tree, Values]:
        key = jax.random.fold_in(rng, index)
        found, values = jax.grad(mean_loss, has_aux=True)(params, part, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), constrain(found)), values

    if accumulation == 1:
        return grad(batch, 0)

    def body(total: Tree, inputs: tuple[StepBatch, jax.Array]) -> tuple[Tree, Values]:
        grads, values = grad(*inputs)
        return constrain(jax.tree.map(lambda t, g: t + g / accumulation, total, grads)), values

    zeros = constrain(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    parts = micro_batches(batch, accumulation)
    grads, values = jax.lax.scan(body, zeros, (parts, jnp.arange(accumulation)))
    return grads, one_batch(values)


def gatherer(plan: Plan) -> Callable[[Tree], Tree]:
    """The function from the trained leaves between steps to those that a step computes with.

    A leaf whose columns 'params' and 'optimizer' differ is cast to the compute dtype and gathered
    once per step: under ZeRO-1 and 2 a whole copy of the weights. Its gradient then comes out of
    the backward pass in the compute dtype. The others are cast where they are used, so that their
    gradients are float32 when devices sum them; with dtype.gradients the compute dtype they are
    cast once per step too, and half the bytes are sent.

    Raises:
      InputError: dtype.gradients is neither float32 nor the compute dtype.
    """
    compute, name = plan.model.dtype, plan.config.dtype.gradients
    wanted = config_lib.dtype(name)
    if wanted not in (jnp.float32, compute):
        raise InputError(
            f"dtype.gradients {name!r} must be float32 or dtype.compute, {jnp.dtype(compute).name}"
        )

    def one(leaf: jax.Array, kept: jax.ShapeDtypeStruct, used: Any) -> jax.Array:
        if kept.sharding.spec == used.spec:
            return leaf.astype(wanted)
        return jax.lax.with_sharding_constraint(leaf.astype(compute), used)

    return lambda params: jax.tree.map(one, params, plan.params, plan.weights)
