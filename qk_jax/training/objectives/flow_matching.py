"""Flow matching (arXiv 2210.02747) on the target's latents, with an optional alignment term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qk_jax.base.errors import InputError
from qk_jax.base.types import Batch, Tree
from qk_jax.data.synthesis.scenes import VISIBLE
from qk_jax.diffusion import flow
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models import mmdit, vae
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.pictures.grids import grid_of, vision_size
from qk_jax.pictures.roles import SOURCE
from qk_jax.pictures.sizes import PACKED

# (params, batch, rng) -> loss of each example [B], and values of each to log, `t` among them
LossFn = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def loss_fn(plan: Plan) -> LossFn:
    """The loss of each example: flow matching, plus the weighted alignment term where it is on.

    With loss.region_weight the tokens of an edit's target that changed count more (`region`); what
    is logged as 'flow' is the plain mean all the same, so that runs compare.

    Raises:
      InputError: alignment.kind is unknown, or loss.region_weight is negative.
    """
    law, section = config_lib.time_law(plan.config), plan.config.alignment
    weight, pixels = section.weight, plan.config.model.vlm_pixels
    model, regions = plan.model, plan.config.loss.region_weight
    if regions < 0:
        raise InputError(f"loss.region_weight is {regions}; give 0 for none, or 1")
    if section.kind not in ("cosine", "infonce"):
        raise InputError(f"alignment.kind is {section.kind!r}; give cosine or infonce")
    temperature = section.temperature if section.kind == "infonce" else None

    def loss(params: Tree, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        prediction, target, t, kontext = flow_matching(model, params, batch, rng, law)
        values = flow.loss(prediction, target)
        aux = {"t": t, "flow": values}
        if regions and batch["conditions"]:
            values = flow.loss(prediction, target, region(batch, regions))
        if weight:
            aux["alignment"] = alignment(model, params, batch, kontext, pixels, temperature)
            values = values + weight * aux["alignment"]
        return values, aux

    return loss


def flow_matching(
    model: QueryKontext, params: Tree, batch: Batch, rng: jax.Array, law: flow.TimeLaw
) -> tuple[
    Float[Array, "B N packed"],
    Float[Array, "B N packed"],
    Float[Array, " B"],
    Float[Array, "B K D"],
]:
    """(predicted velocity, true velocity, t, kontext) of flow matching for each example.

    x_t = (1 - t) x0 + t eps with velocity eps - x0, on target tokens only. A batch that holds what
    `QueryKontext.encode` returns is not encoded again; here only the sizes of its pictures are
    read. The kontext is the VLM's last states of the queries.
    """
    encoded: Mapping[str, Any] = batch if "posterior" in batch else model.encode(params, batch)
    posterior_key, time_key, noise_key = jax.random.split(rng, 3)
    mean, logvar = encoded["posterior"]
    z = vae.sample(mean, logvar, posterior_key)
    x0 = mmdit.pack(vae.normalize(z, model.config.vae))
    height, width = batch["target"].shape[1:3]
    grid = (height // PACKED, width // PACKED)
    t = flow.sample_timesteps(time_key, (x0.shape[0],), law, x0.shape[1])
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    x_t = flow.interpolate(x0, noise, t)
    # a key that does not move the three above
    text, kontext = model.states(params, batch, jax.random.fold_in(rng, 3))
    context, mask = model.connect(params, text, kontext, batch["text_mask"])
    prediction = model.velocity(
        params, x_t, t, context, mask, grid, encoded["latents"], batch["roles"],
        batch["condition_mask"],
    )  # fmt: skip
    last = kontext[..., : model.config.vlm.text.hidden_size]
    return prediction, flow.velocity_target(x0, noise), t, last


def region(batch: Batch, strength: float) -> Float[Array, "B N"]:
    """Weights of the target's tokens: larger where an edit changed its source.

    A token of which a pixel changed weighs 1 + strength log2(N / changed tokens), as in UniWorld-V1
    (arXiv 2506.03147, strength 1, there for every pixel of a dilated mask); others weigh 1, as do
    all tokens of an example without a source, or whose first picture has another size.
    """
    target, source = batch["target"], batch["conditions"][0]
    examples, height, width = target.shape[:3]
    rows, columns = height // PACKED, width // PACKED
    if source.shape != target.shape:
        return jnp.ones((examples, rows * columns), jnp.float32)
    difference = jnp.abs(jnp.asarray(target, jnp.int32) - jnp.asarray(source, jnp.int32))
    pixels = jnp.max(difference, axis=-1).reshape(examples, rows, PACKED, columns, PACKED)
    changed = (jnp.max(pixels, axis=(2, 4)) > VISIBLE).reshape(examples, -1)
    changed &= jnp.asarray(batch["roles"])[:, :1] == SOURCE
    share = jnp.maximum(jnp.mean(changed, axis=1, keepdims=True), 1 / changed.shape[1])
    return jnp.where(changed, 1 - strength * jnp.log2(share), 1.0)


def alignment(
    model: QueryKontext,
    params: Tree,
    batch: Batch,
    kontext: Float[Array, "B K D"],
    pixels: int,
    temperature: float | None = None,
) -> Float[Array, " B"]:
    """How far the projected mean kontext is from the vision tower's mean of the target.

    The vision tower is a fixed teacher: no gradient enters it.

    Args:
      model, params: the vision tower and the projection `alignment` are read.
      batch: `target_pixel_values` [B, P, 1176] is the target at its vision size; only examples
        that are `whole` [B] count.
      kontext: states of the queries.
      pixels: area at which the VLM sees a picture.
      temperature: of InfoNCE; None for 1 - cosine.

    Returns:
      the term of each example, see `agreement`.
    """
    height, width = batch["target"].shape[1:3]
    teacher: Any = model.vlm.apply(
        {"params": params["vlm"]},
        batch["target_pixel_values"],
        (grid_of(*vision_size(height, width, pixels)),),
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
