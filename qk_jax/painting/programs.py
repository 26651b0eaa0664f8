"""The compiled programs of painting: context, condition latents, denoising, decoding, loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from qk_jax import sharding
from qk_jax.base.types import Prompt, Tree
from qk_jax.diffusion import flow, sampler
from qk_jax.models import mmdit, rotary
from qk_jax.models.query_kontext import ModelConfig, QueryKontext

Options = tuple[tuple[str, Any], ...]


class Conditions(NamedTuple):
    """What the velocity of B pictures depends on besides their latents and the noise level.

    Attributes:
      contexts: [V, B, L, J], one for each of V conditionings, the full one first.
      masks: [V, B, L].
      shown: [V, B], False where the pictures are hidden.
      latents: condition latents [B, h, w, C].
      roles: int32 [B, n].
      scales: of `Settings.scales`.
    """

    contexts: jax.Array
    masks: jax.Array
    shown: jax.Array
    latents: tuple[jax.Array, ...]
    roles: jax.Array
    scales: jax.Array


class Towers:
    """The compiled parts of painting around the generator.

    Each takes all parameters and passes on those that it reads, so that another generator needs no
    other program.
    """

    def __init__(self, config: ModelConfig, dtype: Any, options: Options):
        self.model = QueryKontext(config, dtype)
        jit = functools.partial(jax.jit, compiler_options=dict(options))
        self._context = jit(self.model.context)
        self._encode = jit(self.model.encode_pictures)
        self._decode = jit(self._decoded)
        self._pool = jit(self._pooled, static_argnames="grid")

    def context(self, params: Tree, batch: Prompt) -> tuple[jax.Array, jax.Array]:
        """As `QueryKontext.context`."""
        read = {part: params[part] for part in ("vlm", "queries", "connector")}
        return self._context(read, {k: v for k, v in batch.items() if k != "roles"})

    def encode(self, params: Tree, pictures: ArrayLike) -> jax.Array:
        """uint8 pictures [B, H, W, 3] -> the mode of their latents [B, H/8, W/8, C]."""
        return self._encode({"vae": params["vae"]}, pictures)

    def decode(self, params: Tree, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C] -> uint8 [B, 8 h, 8 w, 3]."""
        return self._decode({"vae": params["vae"]}, latents)

    def pool(self, params: Tree, patches: ArrayLike, grid: tuple[int, int]) -> jax.Array:
        """Mean feature [B, D] of one picture each, patches [B, P, 1176], in the vision tower."""
        return self._pool({"vlm": params["vlm"]}, patches, grid=grid)

    def _decoded(self, params: Tree, latents: jax.Array) -> jax.Array:
        """Each device of a mesh decodes its share; every host gets all pictures."""
        share = sharding.constrain(latents, sharding.Activations(), "batch", None, None, None)
        x = self.model.decode(params, share)
        pictures = jnp.round((x + 1.0) * 127.5).astype(jnp.uint8)
        if sharding.single():
            return pictures
        return jax.lax.with_sharding_constraint(pictures, PartitionSpec())

    def _pooled(self, params: Tree, patches: jax.Array, *, grid: tuple[int, int]) -> Any:
        return self.model.vlm.apply({"params": params["vlm"]}, patches, (grid,), method="pool")


@functools.lru_cache(maxsize=8)
def _towers(config: ModelConfig, dtype: Any, options: Options) -> Towers:
    return Towers(config, dtype, options)


class Programs:
    """The compiled parts of painting for one model config; parameters are arguments."""

    def __init__(self, config: ModelConfig, dtype: Any, options: Options):
        self.model = QueryKontext(config, dtype)
        # Stages differ in the generator only: they share the programs around it.
        some = dataclasses.replace(
            config.mmdit, num_layers=1, num_attention_heads=1, zero_cond_t=False
        )
        around = dataclasses.replace(
            config, mmdit=some, condition_latents=False, law=rotary.PositionLaw()
        )
        towers = _towers(around, dtype, options)
        self.context, self.pool = towers.context, towers.pool
        self.encode, self.decode = towers.encode, towers.decode
        jit = functools.partial(jax.jit, compiler_options=dict(options))
        static = ("grid", "solver", "renormalize")
        self.denoise = jit(self._denoise, static_argnames=static)
        self.step = jit(self._step, static_argnames=static)
        self.loss = jit(self._loss, static_argnames="grid")

    def _loss(
        self,
        params: Tree,
        target: jax.Array,
        noise: jax.Array,
        t: jax.Array,
        context: jax.Array,
        mask: jax.Array,
        latents: tuple[jax.Array, ...],
        roles: jax.Array,
        shown: jax.Array,
        *,
        grid: tuple[int, int],
    ) -> jax.Array:
        """Flow-matching loss [B] of latents `target` [B, h, w, C] with given noise, at time t."""
        x0, noise = mmdit.pack(target), mmdit.pack(noise)
        t = jnp.full((x0.shape[0],), t, jnp.float32)
        prediction = self.model.velocity(
            params, flow.interpolate(x0, noise, t), t, context, mask, grid, latents, roles, shown
        )
        return flow.loss(prediction, flow.velocity_target(x0, noise))

    def _denoise(
        self,
        params: Tree,
        noise: jax.Array,
        sigmas: jax.Array,
        given: Conditions,
        *,
        grid: tuple[int, int],
        solver: str,
        renormalize: bool,
    ) -> jax.Array:
        """Noise [B, h, w, C] -> latents [B, h, w, C], all steps in one scan.

        Args:
          params: all parameters.
          noise: float32 latents of pure noise.
          sigmas: [steps + 1], from 1 to 0.
          given: what the pictures depend on besides.
          grid: (rows, columns) of the packed target.
          solver: 'euler' or 'heun'.
          renormalize: as in `Settings`.
        """
        velocity = self._velocity(params, given, grid, renormalize)
        x = sampler.sample(velocity, mmdit.pack(noise), sigmas, solver)
        return mmdit.unpack(x, *noise.shape[1:3])

    def _step(
        self,
        params: Tree,
        x: jax.Array,
        now: jax.Array,
        after: jax.Array,
        given: Conditions,
        *,
        grid: tuple[int, int],
        solver: str,
        renormalize: bool,
    ) -> jax.Array:
        """Latents x [B, h, w, C] at the noise level `now` -> at `after`; the rest as `_denoise`."""
        velocity = self._velocity(params, given, grid, renormalize)
        return mmdit.unpack(
            sampler.step(velocity, mmdit.pack(x), now, after, solver), *x.shape[1:3]
        )

    def _velocity(
        self, params: Tree, given: Conditions, grid: tuple[int, int], renormalize: bool
    ) -> sampler.Velocity:
        """The guided velocity of packed latents."""
        variants, slots = given.masks.shape[:2]

        def every(x: jax.Array) -> jax.Array:  # the same input for each conditioning
            return jnp.tile(x, (variants,) + (1,) * (x.ndim - 1))

        def merged(x: jax.Array) -> jax.Array:
            return x.reshape(variants * slots, *x.shape[2:])

        pictures, every_role = tuple(every(z) for z in given.latents), every(given.roles)

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            v = self.model.velocity(
                params,
                every(x),
                jnp.full((variants * slots,), sigma, jnp.float32),
                merged(given.contexts),
                merged(given.masks),
                grid,
                pictures,
                every_role,
                merged(given.shown),
            ).reshape(variants, slots, *x.shape[1:])
            if variants == 1:
                return v[0]
            start, end, image_scale, first, last = given.scales
            inside = (first <= sigma) & (sigma <= last)
            scale = jnp.where(inside, end + (start - end) * sigma, 1.0)
            if variants == 2:
                guided = v[1] + scale * (v[0] - v[1])
            else:
                image_scale = jnp.where(inside, image_scale, 1.0)
                guided = sampler.guide(v[0], v[1], v[2], scale, image_scale, *v[3:])
            return sampler.renormalize(guided, v[0]) if renormalize else guided

        return velocity


@functools.lru_cache(maxsize=8)
def programs(config: ModelConfig, dtype: Any = jnp.float32, options: Options = ()) -> Programs:
    """The programs of a model config: painters of the same config share what is compiled.

    Args:
      config: of the model.
      dtype: compute dtype.
      options: (name, value) of the compiler, as `runtime.compiler_options` gives them.
    """
    return Programs(config, dtype, options)
