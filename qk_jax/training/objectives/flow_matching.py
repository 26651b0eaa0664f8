"""Flow matching (arXiv 2210.02747) on the target's latents, with an optional alignment term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qk_jax.base.errors import InputError
from qk_jax.base.types import StepBatch, Tree
from qk_jax.diffusion import flow
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models import rotary
from qk_jax.models.query_kontext import QueryKontext

# (params, batch, rng) -> loss of each example [B], and values of each to log, `t` among them
LossFn = Callable[[Tree, StepBatch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def loss_fn(plan: Plan) -> LossFn:
    """The loss of each example: flow matching, plus the weighted alignment term where it is on.

    It is the mean over the target's own tokens. With loss.region_weight those of an edit that
    changed count more (`regions.region`); what is logged as 'flow' is the plain mean all the same,
    so that runs compare.

    Raises:
      InputError: alignment.kind is unknown.
    """
    law, section = config_lib.time_law(plan.config), plan.config.alignment
    model, weight = plan.model, section.weight
    if section.kind not in ("cosine", "infonce"):
        raise InputError(f"alignment.kind is {section.kind!r}; give cosine or infonce")
    temperature = section.temperature if section.kind == "infonce" else None

    def loss(
        params: Tree, batch: StepBatch, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        prediction, target, t, kontext = flow_matching(model, params, batch, rng, law)
        real = rotary.real_tokens(batch["grids"][:, :1], target.shape[1:2])
        values = flow.loss(prediction, target, real)
        aux = {"t": t, "flow": values}
        if "region" in batch:
            values = flow.loss(prediction, target, batch["region"])
        if weight:
            aux["alignment"] = alignment(model, params, batch, kontext, temperature)
            values = values + weight * aux["alignment"]
        return values, aux

    return loss


def flow_matching(
    model: QueryKontext, params: Tree, batch: StepBatch, rng: jax.Array, law: flow.TimeLaw
) -> tuple[
    Float[Array, "B N packed"],
    Float[Array, "B N packed"],
    Float[Array, " B"],
    Float[Array, "B K D"],
]:
    """(predicted velocity, true velocity, t, kontext) of flow matching for each example.

    x_t = (1 - t) x0 + t eps with velocity eps - x0, on target tokens only. N counts the tokens that
    a target is padded to, and so does what is drawn: a picture has the first numbers of it. The
    kontext is the VLM's last states of the queries.
    """
    posterior_key, time_key, noise_key = jax.random.split(rng, 3)
    mean, deviation = batch["posterior"]
    x0 = mean + deviation * jax.random.normal(posterior_key, mean.shape, jnp.float32)
    tokens = jnp.prod(batch["grids"][:, 0], axis=-1)
    t = flow.sample_timesteps(time_key, (x0.shape[0],), law, tokens)
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    x_t = flow.interpolate(x0, noise, t)
    # a key that does not move the three above
    text, kontext = model.states(params, batch, jax.random.fold_in(rng, 3))
    context, mask = model.connect(params, text, kontext, batch["text_mask"])
    latents = batch["latents"]
    prediction = model.velocity_of_tokens(
        params, x_t, t, context, mask, batch["grids"][:, : 1 + len(latents)], latents,
        batch["roles"][:, : len(latents)], batch["condition_mask"],
    )  # fmt: skip
    last = kontext[..., : model.config.vlm.text.hidden_size]
    return prediction, flow.velocity_target(x0, noise), t, last


def alignment(
    model: QueryKontext,
    params: Tree,
    batch: StepBatch,
    kontext: Float[Array, "B K D"],
    temperature: float | None = None,
) -> Float[Array, " B"]:
    """How far the projected mean kontext is from the vision tower's mean of the target.

    The vision tower is a fixed teacher: no gradient enters it.

    Args:
      model, params: the vision tower and the projection `alignment` are read.
      batch: `target_pixel_values` [B, P, 1176] is the target at its vision size, padded, with its
        `target_windows`; only examples that are `whole` [B] count.
      kontext: states of the queries.
      temperature: of InfoNCE; None for 1 - cosine.

    Returns:
      the term of each example, see `agreement`.
    """
    teacher: Any = model.vlm.apply(
        {"params": params["vlm"]},
        batch["target_pixel_values"],
        batch["target_windows"],
        method="pool",
    )
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    pooled = jnp.mean(kontext.astype(jnp.float32), axis=1) @ params["alignment"]["proj"]["kernel"]
    return agreement(pooled, teacher, jnp.asarray(batch["whole"]), temperature)


def agreement(
    student: Float[Array, "B D"],
    teacher: Float[Array, "B D"],
    whole: Bool[Array, " B"],
    temperature: float | None = None,
) -> Float[Array, " B"]:
    """1 - cosine of centred features, or their InfoNCE (arXiv 1807.03748), for each example.

    Most of a feature is the mean of all pictures, which a constant reaches, so both sides lose
    their mean over the batch: a student that is the same for all gains nothing. A batch is one of
    all devices; with optimizer.accumulation it is a micro-batch.

    Examples that are not `whole` have 0, are in no mean and are no InfoNCE candidate; the others
    are scaled so that the mean over B is that over them.
    """
    weights = whole.astype(jnp.float32)
    weights = weights / jnp.maximum(jnp.mean(weights), 1 / len(weights))

    def centred(x: jax.Array) -> jax.Array:
        x = x - jnp.mean(weights[:, None] * x, axis=0)
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

    student, teacher = centred(student), centred(teacher)
    same = jnp.sum(student * teacher, axis=-1)
    if temperature is None:
        return weights * (1.0 - same)
    logits = jnp.where(whole, student @ teacher.T / temperature, -1e9)
    return weights * (jax.nn.logsumexp(logits, axis=-1) - same / temperature)
