"""From noise to pictures: the noise schedule, two solvers and guidance.

The schedule and the Euler solver equal diffusers' FlowMatchEulerDiscreteScheduler as its
Qwen-Image, FLUX and SD3 pipelines drive it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qk_jax.base.errors import InputError
from qk_jax.diffusion.flow import TimeLaw, linear_shift

SOLVERS = ("euler", "heun")
Velocity = Callable[[Array, Array], Array]  # (x, sigma scalar) -> velocity of x's shape


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """FlowMatchEulerDiscreteScheduler's config under its own names; defaults are Qwen-Image's.

    shift: the constant factor, used only without dynamic shifting.
    use_dynamic_shifting: the exponential shift whose mu grows with the packed target tokens.
    shift_terminal: the last sigma before 0; None leaves it where the shift puts it.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = True
    base_shift: float = 0.5
    max_shift: float = 0.9
    base_image_seq_len: int = 256
    max_image_seq_len: int = 8192
    shift_terminal: float | None = 0.02
    num_train_timesteps: int = 1000

    @classmethod
    def of(cls, law: TimeLaw) -> ScheduleConfig:
        """The schedule whose shift is that of a training's times."""
        return cls(
            base_shift=law.base_shift,
            max_shift=law.max_shift,
            base_image_seq_len=law.base_tokens,
            max_image_seq_len=law.max_tokens,
        )

    def mu(self, tokens: int) -> float:
        """The dynamic shift for `tokens` packed target tokens (condition tokens do not count)."""
        lengths = self.base_image_seq_len, self.max_image_seq_len
        return linear_shift(tokens, self.base_shift, self.max_shift, *lengths)

    def to_hf(self) -> dict[str, Any]:
        """The content of a scheduler_config.json."""
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "time_shift_type": "exponential",
            **dataclasses.asdict(self),
        }


def schedule(steps: int, tokens: int, config: ScheduleConfig) -> Float[np.ndarray, " {steps}+1"]:
    """Noise levels from 1 to 0, float32 [steps + 1], for packed target tokens (pixels / 16).

    Raises:
      InputError: fewer than one step.
    """
    if steps < 1:
        raise InputError(f"{steps} sampling steps are too few; take at least one")
    sigmas: np.ndarray = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if config.use_dynamic_shifting:
        factor = math.exp(config.mu(tokens))
        sigmas = factor / (factor + (1 / sigmas - 1))
    else:
        sigmas = config.shift * sigmas / (1 + (config.shift - 1) * sigmas)
    if config.shift_terminal and steps > 1:  # a single step starts and ends the range
        rest = 1 - sigmas
        sigmas = 1 - rest / (rest[-1] / (1 - config.shift_terminal))
    return np.append(sigmas, 0.0).astype(np.float32)


def step(
    velocity: Velocity,
    x: Float[Array, "*any"],
    now: Float[Array, ""],
    after: Float[Array, ""],
    solver: str = "euler",
) -> Float[Array, "*any"]:
    """One step of `sample` from the noise level `now` to `after`, which 'heun' never takes to 0."""
    first = velocity(x, now).astype(jnp.float32)
    if solver == "euler":
        return x + (after - now) * first
    second = velocity(x + (after - now) * first, after).astype(jnp.float32)
    return x + (after - now) * 0.5 * (first + second)


def sample(
    velocity: Velocity,
    noise: Float[Array, "*any"],
    sigmas: Float[Array | np.ndarray, " levels"],
    solver: str = "euler",
) -> Float[Array, "*any"]:
    """Integrates dx / dsigma = velocity(x, sigma) along `sigmas`; float32.

    Args:
      velocity: the model; called once a step by 'euler', twice by 'heun'.
      noise: x at sigmas[0].
      sigmas: falling noise levels, one more than steps.
      solver: 'euler' (first order) or 'heun' (second order; its last step is Euler's, so that the
        model is never asked at sigma = 0, which training does not reach).

    Raises:
      InputError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise InputError(f"there is no solver {solver!r}; choose one of {SOLVERS}")
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def euler(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return step(velocity, x, *pair, "euler"), None

    def heun(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return step(velocity, x, *pair, "heun"), None

    x, pairs = noise.astype(jnp.float32), (sigmas[:-1], sigmas[1:])
    if solver == "euler":
        return jax.lax.scan(euler, x, pairs)[0]
    x, _ = jax.lax.scan(heun, x, (sigmas[:-2], sigmas[1:-1]))
    return euler(x, (sigmas[-2], sigmas[-1]))[0]


def guide(
    full: Float[Array, "*any"],
    without_text: Float[Array, "*any"],
    without_both: Float[Array, "*any"],
    guidance: float | Float[Array, ""],
    image_guidance: float | Float[Array, ""],
    without_pictures: Float[Array, "*any"] | None = None,
) -> Float[Array, "*any"]:
    """Classifier-free guidance over text and pictures (InstructPix2Pix, equation 3).

    Given the velocity without pictures too, it is the mean of both orders in which the two can be
    added to nothing.

    Args:
      full: velocity given text and condition pictures.
      without_text: velocity given the pictures alone.
      without_both: velocity given neither.
      guidance: weight of the text; 1 with image_guidance 1 returns `full`.
      image_guidance: weight of the pictures.
      without_pictures: velocity given the text alone.
    """
    pictures, text = without_text - without_both, full - without_text
    if without_pictures is not None:
        pictures = 0.5 * (pictures + full - without_pictures)
        text = 0.5 * (text + without_pictures - without_both)
    return without_both + image_guidance * pictures + guidance * text


def renormalize(
    guided: Float[Array, "*any C"], full: Float[Array, "*any C"]
) -> Float[Array, "*any C"]:
    """The guided velocity with the length of `full` at each token (Qwen-Image's pipelines)."""
    length = jnp.linalg.norm(guided, axis=-1, keepdims=True)
    wanted = jnp.linalg.norm(full, axis=-1, keepdims=True)
    return guided * (wanted / jnp.maximum(length, 1e-12))
