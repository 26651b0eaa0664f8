"""AdamW over the trained tree: schedule, clipping, decay and rate per parameter name, EMA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.models.mmdit import UNUSED_IN_LAST_BLOCK


def schedule(config: Mapping[str, Any], steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then 'constant' or 'cosine' down to lr * lr_end.

    Raises:
      InputError: another law, or a warm-up longer than the run.
    """
    lr, warmup, law = config["lr"], config["warmup"], config["schedule"]
    if law not in ("constant", "cosine"):
        raise InputError(f"optimizer.schedule {law!r} is unknown; give 'constant' or 'cosine'")
    if not 0 <= warmup <= steps:
        raise InputError(f"optimizer.warmup {warmup} must lie between 0 and steps = {steps}")
    if law == "cosine":
        after = optax.cosine_decay_schedule(lr, max(steps - warmup, 1), alpha=config["lr_end"])
    else:
        after = optax.constant_schedule(lr)
    if not warmup:
        return after
    # 1 / warmup at the first step: an update of zero would be a wasted one
    rise = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def multipliers(params: Tree, rules: Sequence[tuple[str, float]], what: str) -> Tree:
    """A tree of factors: for each leaf the value of the first rule that matches its name.

    Unlike the rules of a stage, some may match nothing: one table serves several stages.

    Raises:
      InputError: a leaf without a rule, or a rule that is none.
    """
    trees.check_rules(rules, what)
    factors = {}
    for name in trees.flatten(params):
        index = trees.first_match(name, rules)
        if index is None:
            raise InputError(f"{what}: no rule covers {name!r}; end the rules with ('.*', number)")
        factors[name] = float(rules[index][1])
    return trees.unflatten(factors)


def decay_factors(params: Tree, rules: Sequence[tuple[str, float]]) -> Tree:
    """Weight-decay factors, zero for the last block's dead text branch.

    Its modules get no gradient, so that torch's AdamW skips them; here they get zeros, and decay
    alone would shrink them. Blocks are stacked, hence a factor per layer [layers, 1, ...].
    """
    flat = trees.flatten(multipliers(params, rules, "optimizer.decay"))
    arrays = trees.flatten(params)
    for name, factor in flat.items():
        if re.fullmatch(rf"(lora/)?mmdit/{UNUSED_IN_LAST_BLOCK}", name):
            shape = arrays[name].shape
            column = np.full((shape[0],) + (1,) * (len(shape) - 1), factor, np.float32)
            column[-1] = 0.0
            flat[name] = column
    return trees.unflatten(flat)


def add_decay(weight: float, factors: Tree) -> optax.GradientTransformation:
    """Adds weight * factor * parameter to the update (decoupled decay, AdamW)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(
            lambda u, p, f: u + (weight * f * p).astype(u.dtype), updates, params, factors
        ), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def scale_leaves(factors: Tree) -> optax.GradientTransformation:
    """Multiplies each leaf's update by its own factor (rates per parameter name)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, f: u if f == 1.0 else u * f, updates, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


class Optimizer(NamedTuple):
    """The transformation and its schedule (for the log)."""

    tx: optax.GradientTransformation
    rate: optax.Schedule


def build(config: Mapping[str, Any], params: Tree, steps: int) -> Optimizer:
    """AdamW for the trained tree `params` (arrays or shapes), from the section `optimizer`.

    Order: clip by global norm, Adam moments (float32), decoupled decay, factor per name, rate. All
    of them are always there, so that every run's state has the same leaves: what a setting turns
    off, or on again, goes on from any checkpoint.
    """
    rate = schedule(config, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(config["clip"] or np.inf),
        optax.scale_by_adam(config["b1"], config["b2"], config["eps"]),
        add_decay(config["weight_decay"], decay_factors(params, config["decay"])),
        scale_leaves(multipliers(params, config["rates"], "optimizer.rates")),
        optax.scale_by_learning_rate(rate),
    )
    return Optimizer(tx, rate)


def where_finite(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new`, or `old` after a gradient that is not `finite`.

    Counts are new in any case: rates are a function of the step.
    """
    return jax.tree.map(
        lambda n, o: n if jnp.issubdtype(n.dtype, jnp.integer) else jnp.where(finite, n, o),
        new,
        old,
    )


def ema_update(ema: Tree, params: Tree, step: jax.Array, decay: float) -> Tree:
    """ema + (1 - d) (params - ema), d = min(decay, (1 + step) / (10 + step)).

    The rising d keeps the start of training from weighing on short runs. `step` counts finished
    updates before this one; float32 throughout.
    """
    step = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - keep) * (p.astype(jnp.float32) - e), ema, params)
