"""What a painter is asked for: a picture, how to paint it, and the limits of a model."""

from __future__ import annotations

import dataclasses

import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data.example import Example
from qk_jax.diffusion import sampler
from qk_jax.pictures.roles import REFERENCE, SOURCE

FULL, NO_TEXT, NOTHING, NO_PICTURES = "full", "no text", "nothing", "no pictures"
MAX_STEPS = 1000
SEEDS = 2**32  # seeds of noise are below it


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One picture to paint.

    Attributes:
      prompt: the instruction; never empty.
      source: uint8 [h, w, 3] picture to edit, or None.
      references: uint8 [h, w, 3] pictures of subjects.
      size: (height, width) in pixels, multiples of 16.
      seed: below SEEDS; with `number`, the only origin of the noise.
      number: counts the pictures of one prompt and seed.

    Raises:
      InputError: there is no prompt, or no such seed.
    """

    prompt: str
    source: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    size: tuple[int, int] = (64, 64)
    seed: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise InputError("there is no prompt; say what to paint")
        if not is_whole(self.seed) or not 0 <= self.seed < SEEDS:
            raise InputError(f"seed is {self.seed!r}; give a whole number from 0 to {SEEDS - 1}")

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """The condition pictures in the order in which the model sees them: the source is first."""
        return (() if self.source is None else (self.source,)) + self.references

    @property
    def roles(self) -> tuple[int, ...]:
        """SOURCE or REFERENCE for each of `pictures`."""
        return (() if self.source is None else (SOURCE,)) + (REFERENCE,) * len(self.references)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; a truth value is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating)


def request_of(example: Example, seed: int = 0, number: int = 0) -> Request:
    """The request of an example of the data; its pictures are fitted already."""
    pairs = list(zip(example.pictures, example.roles, strict=True))
    source = next((picture for picture, role in pairs if role == SOURCE), None)
    references = tuple(picture for picture, role in pairs if role == REFERENCE)
    height, width = example.target.shape[:2]
    return Request(example.instruction, source, references, (height, width), seed, number)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to paint; recorded in every PNG.

    Attributes:
      steps: sampler steps.
      guidance: weight of the text, 1 for none (classifier-free guidance's scale).
      image_guidance: weight of the pictures, 1 for none; without pictures it has no effect.
      solver: 'euler' or 'heun' (two evaluations a step, second order).
      guidance_end: weight of the text at t = 0, to which it goes linearly in t from `guidance` at
        t = 1; None is constant.
      guidance_interval: (first, last) t between which there is guidance (arXiv 2404.07724).
      renormalize: whether a guided velocity keeps the length of the unguided one at every token
        (Qwen-Image); None for where the public pipeline does, with the Qwen-Image position law.
      zero_init_steps: steps at the start in which the picture stays noise (CFG-Zero*, arXiv
        2503.18886).
      symmetric_guidance: whether pictures are also weighed against the text alone; a fourth
        evaluation a step.

    Raises:
      InputError: a value that no sampler can use.
    """

    steps: int = 30
    guidance: float = 4.0
    image_guidance: float = 1.5
    solver: str = "euler"
    guidance_end: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    renormalize: bool | None = None
    zero_init_steps: int = 0
    symmetric_guidance: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.steps) or not 1 <= self.steps <= MAX_STEPS:
            raise InputError(f"steps is {self.steps!r}; give 1 to {MAX_STEPS}")
        if self.solver not in sampler.SOLVERS:
            raise InputError(f"solver is {self.solver!r}; give one of {', '.join(sampler.SOLVERS)}")
        for name in ("guidance", "image_guidance", "guidance_end"):
            value = getattr(self, name)
            is_off = value is None and name == "guidance_end"
            if not is_off and not (_is_number(value) and 0 <= value < float("inf")):
                raise InputError(f"{name} is {value!r}; give a number of at least 0")
        if self.renormalize not in (None, True, False):
            raise InputError(f"renormalize is {self.renormalize!r}; give True, False or None")
        if not is_whole(self.zero_init_steps) or not 0 <= self.zero_init_steps < self.steps:
            raise InputError(
                f"zero_init_steps is {self.zero_init_steps!r}; give 0 to {self.steps - 1}, less "
                "than the steps"
            )
        ends = self.guidance_interval
        are_two = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(_is_number, ends))
        if not are_two or not 0 <= ends[0] <= ends[1] <= 1:
            raise InputError(
                f"guidance_interval is {self.guidance_interval}; give two t in rising order, of 0 "
                "to 1"
            )

    def variants(self, pictured: bool) -> tuple[str, ...]:
        """The conditionings that guidance has to evaluate, the full one first."""
        if pictured and self.image_guidance != 1:
            more = (NO_PICTURES,) if self.symmetric_guidance else ()
            return (FULL, NO_TEXT, NOTHING, *more)
        off = self.guidance == 1 and self.guidance_end in (None, 1)
        return (FULL,) if off else (FULL, NO_TEXT)

    def scales(self) -> tuple[float, ...]:
        """(guidance at t = 1, at t = 0, image guidance, first t, last t of the interval)."""
        end = self.guidance if self.guidance_end is None else self.guidance_end
        return (self.guidance, end, self.image_guidance, *self.guidance_interval)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model was trained on, as far as painting depends on it.

    Attributes:
      sizes: target sizes (height, width) of the training.
      reference_sizes: tables of sizes (height, width) at which references are shown, for one, two,
        ... of them; the last is for more.
      max_references: most references of a training example.
      max_pixels: the largest picture that is read, in pixels.
    """

    sizes: tuple[tuple[int, int], ...]
    reference_sizes: tuple[tuple[tuple[int, int], ...], ...]
    max_references: int
    max_pixels: int

    @property
    def max_area(self) -> int:
        """Pixels of the largest picture that is painted: four times as long and wide as trained."""
        return 16 * max(height * width for height, width in self.sizes)
