"""What a training step changes: step, trained parameters, optimizer state, moving average."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.base import trees
from qk_jax.base.types import Tree


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes; the frozen tree is not part of it.

    Attributes:
      step: int32 [], finished updates.
      params: trained leaves, float32.
      opt_state: optax state of `params`.
      ema: moving average of `params`, float32, or {} when it is off.
    """

    step: Any
    params: Tree
    opt_state: Any
    ema: Tree


def abstract(
    params: Tree,
    tx: optax.GradientTransformation,
    *,
    ema: bool,
    offload: bool,
    replicated: jax.sharding.NamedSharding,
) -> TrainState:
    """The abstract TrainState of abstract `params`: moments and average are sharded as they are.

    Args:
      params: ShapeDtypeStructs with shardings.
      tx: the optimizer.
      ema: whether there is a moving average.
      offload: moments and average are kept in the memory of the host (pinned_host).
      replicated: the sharding of the step and of counters.
    """

    def like(leaf: Any, param: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = param.sharding.with_memory_kind("pinned_host") if offload else param.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def counter(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    shapes = jax.eval_shape(tx.init, params)
    return TrainState(
        step=counter(jax.ShapeDtypeStruct((), jnp.int32)),
        params=params,
        opt_state=optax.tree_utils.tree_map_params(
            tx, like, shapes, params, transform_non_params=counter
        ),
        ema=jax.tree.map(like, params, params) if ema else {},
    )


def create(params: Tree, tx: optax.GradientTransformation, target: TrainState) -> TrainState:
    """The state before the first step, in the shardings of `target`; consumes `params`."""

    def make(params: Tree) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if target.ema else {}
        return TrainState(jnp.int32(0), params, tx.init(params), ema)

    out = trees.shardings(target)
    return jax.jit(make, donate_argnums=0, out_shardings=out)(params)


def counted_on(state: TrainState, step: int) -> TrainState:
    """`state` at a later `step`: as if no update since had changed anything but the counts."""
    by = step - int(state.step)

    def counted(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf
        return jax.device_put(np.asarray(jax.device_get(leaf) + by, leaf.dtype), leaf.sharding)

    return jax.tree.map(counted, state)
