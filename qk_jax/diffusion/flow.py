"""Flow matching: x_t = (1 - t) x0 + t noise, velocity noise - x0, and the distribution of t.

t runs from 0 (the picture) to 1 (pure noise), as sigma does in diffusers' flow-matching scheduler.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from qk_jax.base.errors import InputError

DISTRIBUTIONS = ("logit_normal", "uniform")
Tokens = Shaped[Array, "*any"] | int  # packed target tokens, of all pictures alike or of each
EDGE = 1e-6  # t stays this far inside (0, 1)


def linear_shift(
    tokens: Tokens, base_shift: float, max_shift: float, base_tokens: int, max_tokens: int
) -> Any:
    """mu for a number of packed target tokens, or for several: a line through (base_tokens,
    base_shift) and (max_tokens, max_shift), not clamped outside them (`calculate_shift` of
    diffusers' pipelines).
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)


@dataclasses.dataclass(frozen=True)
class TimeLaw:
    """How training draws t.

    distribution: 'logit_normal' is sigmoid(N(mean, std)) (Stable Diffusion 3); 'uniform' ignores
      mean and std.
    base_shift ... max_tokens: the resolution shift of `linear_shift`, applied after the draw. The
      default is the one that Qwen-Image samples with. base_shift = max_shift = log(s) is SD3's
      constant shift s; zeros turn it off.
    """

    distribution: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 0.9
    base_tokens: int = 256
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise InputError(
                f"time.distribution is {self.distribution!r}; choose one of {DISTRIBUTIONS}"
            )
        if self.std <= 0:
            raise InputError(f"time.std is {self.std}; it must be positive")
        if self.base_tokens >= self.max_tokens:
            raise InputError(
                f"time.base_tokens {self.base_tokens} must be less than time.max_tokens"
                f" {self.max_tokens}"
            )

    def mu(self, tokens: Tokens) -> Any:
        """The shift for pictures of `tokens` packed target tokens."""
        return linear_shift(
            tokens, self.base_shift, self.max_shift, self.base_tokens, self.max_tokens
        )


def shift(u: Float[Array, "*any"], mu: Shaped[Array, "*any"] | float) -> Float[Array, "*any"]:
    """e^mu u / (1 + (e^mu - 1) u): moves times towards noise for mu > 0, keeps 0 and 1."""
    factor = jnp.exp(mu)
    return factor * u / (1.0 + (factor - 1.0) * u)


def sample_timesteps(
    rng: Key[Array, ""],
    shape: tuple[int, ...],
    law: TimeLaw,
    tokens: Int[Array, "*shape"] | int,
) -> Float[Array, "*shape"]:
    """Times in (0, 1), float32 of `shape`, for pictures of `tokens` packed target tokens, of all
    alike or of each."""
    if law.distribution == "uniform":
        u = jax.random.uniform(rng, shape, jnp.float32)
    else:
        u = jax.nn.sigmoid(law.mean + law.std * jax.random.normal(rng, shape, jnp.float32))
    return jnp.clip(shift(u, law.mu(tokens)), EDGE, 1.0 - EDGE)


def interpolate(
    x0: Float[Array, " B *any"], noise: Float[Array, " B *any"], t: Float[Array, " B"]
) -> Float[Array, " B *any"]:
    """x_t, float32."""
    t = t.astype(jnp.float32).reshape(-1, *(1,) * (x0.ndim - 1))
    return (1.0 - t) * x0.astype(jnp.float32) + t * noise.astype(jnp.float32)


def velocity_target(
    x0: Float[Array, " B *any"], noise: Float[Array, " B *any"]
) -> Float[Array, " B *any"]:
    """dx_t / dt, float32."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def loss(
    prediction: Float[Array, "B tokens *any"],
    target: Float[Array, "B tokens *any"],
    weights: Shaped[Array, "B tokens"] | None = None,
) -> Float[Array, " B"]:
    """Mean squared error of each example, float32.

    With weights, for instance 0 for padding, it is the weighted mean over the tokens; 0 where all
    are 0.
    """
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if weights is None:
        return jnp.mean(error, axis=tuple(range(1, error.ndim)))
    weights = weights.astype(jnp.float32)
    tokens = jnp.mean(error, axis=tuple(range(2, error.ndim)))
    total = jnp.sum(weights, axis=1)
    return jnp.sum(tokens * weights, axis=1) / jnp.where(total > 0, total, 1.0)


def t_bin(t: Float[Array, " B"], bins: int) -> Int[Array, " B"]:
    """Which of `bins` equal parts of [0, 1] has t."""
    return jnp.clip(jnp.floor(t * bins).astype(jnp.int32), 0, bins - 1)
