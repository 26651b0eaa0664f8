"""The painter: a model with its parameters and its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base import files, types
from qk_jax.base.errors import InputError
from qk_jax.data import buckets
from qk_jax.data.prompts import PromptBuilder
from qk_jax.diffusion import sampler
from qk_jax.models.query_kontext import ModelConfig
from qk_jax.painting.programs import Conditions, Options, programs
from qk_jax.painting.request import FULL, NO_PICTURES, NO_TEXT, Limits, Request, Settings
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.fitting import contain, cover
from qk_jax.pictures.roles import REFERENCE, SOURCE
from qk_jax.pictures.sizes import PACKED, check_size, for_number

log = logging.getLogger(__name__)
MOST_AT_ONCE = 8  # pictures, where nobody chose how many


class Progress(NamedTuple):
    """How far pictures are.

    Attributes:
      indices: of the requests that are painted at once.
      step: sampler steps that are done.
      steps: of all.
      pictures: uint8 [n, H, W, 3], one for each index: after the last step as painted, before it
        as they would be if the velocity stayed what it is; None where nobody asked for them.
    """

    indices: tuple[int, ...]
    step: int
    steps: int
    pictures: np.ndarray | None


class Painter:
    """A model, its parameters and its tokenizer, ready to paint.

    A call of a program has exactly `batch` slots, the last ones filled up with copies, and the
    noise of a slot depends on its own seed and number only: a picture has the same bits whatever
    else is painted with it, as long as `batch`, the program and the machine are the same. Without
    a `batch` there are as many slots as pictures of one shape are asked for at once, at most
    MOST_AT_ONCE; the bits then depend on that number too.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: types.Tree,
        prompts: PromptBuilder,
        *,
        limits: Limits,
        batch: int | None = None,
        dtype: Any = jnp.float32,
        options: Options = (),
        name: str = "",
        schedule: sampler.ScheduleConfig | None = None,
    ):
        """Compiles nothing yet.

        Args:
          config: of the model.
          params: all parameters, adapters already merged.
          prompts: builds what the VLM reads.
          limits: sizes and counts of the training.
          batch: slots of every program; None for as many as are needed.
          dtype: compute dtype.
          options: of the compiler, see `programs`.
          name: what PNGs call the model.
          schedule: of the noise levels; None for Qwen-Image's.
        """
        self.config, self.params, self.prompts = config, params, prompts
        self.limits, self.batch, self.name = limits, batch, name
        self.schedule = schedule or sampler.ScheduleConfig()
        self.programs = programs(config, dtype, options)
        self._warned: set[str] = set()

    def read(self, path: files.PathLike) -> np.ndarray:
        """A picture file as uint8 RGB [h, w, 3], on white where it is transparent.

        Raises:
          InputError: no such file, no picture, or one beyond `limits.max_pixels`.
        """
        try:
            data = files.Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; name a picture") from None
        return decode_picture(data, "RGB", self.limits.max_pixels, str(path))

    def fit(
        self,
        prompt: str,
        source: np.ndarray | None = None,
        references: Sequence[np.ndarray] = (),
        size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> Request:
        """A request that this model can follow, its pictures fitted as in training.

        The source covers the target's size. A reference is shown whole, on white, at the size of
        so many references that is nearest to its shape. Characters that the tokenizer does not know
        (`PromptBuilder.unknown`) are named in a log line, once for each prompt.

        Args:
          prompt: the instruction.
          source: uint8 [h, w, 3] of any size.
          references: uint8 [h, w, 3] of any size each.
          size: (height, width); None for the trained size nearest to the source's shape, or for
            the first of the training's without a source.
          seed: of the noise.

        Raises:
          InputError: the prompt is empty or too long, or size, seed or number of references are
            beyond the model's limits.
        """
        limits = self.limits
        if size is None and source is not None:
            size = limits.sizes[buckets.nearest(source.shape[0], source.shape[1], limits.sizes)]
        height, width = size or limits.sizes[0]
        request = Request(prompt, size=(height, width), seed=seed)
        roles = (SOURCE,) * (source is not None) + (REFERENCE,) * len(references)
        self.prompts.encode_text(self.prompts.template.instruction(prompt, roles), strict=True)
        check_size(request.size, "the size")
        if height * width > limits.max_area:
            raise InputError(
                f"the size {width}x{height} has more than {limits.max_area} pixels, sixteen times "
                "the training's; choose a smaller one"
            )
        if len(references) > limits.max_references:
            raise InputError(
                f"{len(references)} references are given, the model was trained with at most "
                f"{limits.max_references}; leave some out"
            )
        self._warn_of_unknown(prompt)
        known = for_number(limits.reference_sizes, len(references))
        sizes = [known[buckets.nearest(x.shape[0], x.shape[1], known)] for x in references]
        return dataclasses.replace(
            request,
            source=None if source is None else cover(source, request.size),
            references=tuple(map(contain, references, sizes)),
        )

    def _warn_of_unknown(self, prompt: str) -> None:
        unknown = self.prompts.unknown(prompt)
        if unknown and prompt not in self._warned:
            self._warned.add(prompt)
            log.warning(
                "the tokenizer does not know %s in the prompt %r; say it in other words",
                " ".join(unknown),
                prompt,
            )

    def noise(self, request: Request) -> np.ndarray:
        """Latents of pure noise, float32 [H/8, W/8, C], from the request's seed and number."""
        height, width = request.size
        channels = self.config.mmdit.in_channels // self.config.mmdit.patch_size**2
        key = jax.random.fold_in(jax.random.key(request.seed), request.number)
        return np.asarray(jax.random.normal(key, (height // 8, width // 8, channels), jnp.float32))

    def collate(self, requests: Sequence[Request], variant: str = FULL) -> types.PaintingBatch:
        """Requests of one shape as a batch.

        Args:
          requests: of the same size and the same picture shapes.
          variant: FULL, NO_TEXT (an empty text), NO_PICTURES, or NOTHING (neither).
        """
        return self.prompts.batch(
            [request.prompt if variant in (FULL, NO_PICTURES) else "" for request in requests],
            [request.pictures for request in requests],
            [request.roles for request in requests],
            [variant in (FULL, NO_TEXT)] * len(requests),
        )

    def latents(self, batch: types.PaintingBatch) -> tuple[jax.Array, ...]:
        """Latents [B, h, w, C] of each condition picture; () for a model that takes none."""
        if not self.config.condition_latents:
            return ()
        return tuple(self.programs.encode(self.params, x) for x in batch["conditions"])

    def paint(
        self,
        requests: Sequence[Request],
        settings: Settings,
        noise: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Paints every request: uint8 [H, W, 3] each, in their order; arguments as `stream`."""
        painted = dict(self.stream(requests, settings, noise))
        return [painted[index] for index in range(len(requests))]

    def stream(
        self,
        requests: Sequence[Request],
        settings: Settings,
        noise: Sequence[np.ndarray] | None = None,
        phase: Callable[[str], None] = lambda name: None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index of the request, its picture) as soon as it is painted, shape by shape.

        Args:
          requests: of any sizes and pictures, as `fit` or `request_of` gives them.
          settings: for all of them.
          noise: float32 [H/8, W/8, C] of each request; None for `self.noise` of it.
          phase: called with 'compiling' before the first pictures of a shape, whose programs may
            have to be compiled, and with 'painting' once they are.
        """
        for members in _shapes(requests):
            phase("compiling")
            for chunk, filled in self._chunks(members):
                given = [self.noise(requests[i]) if noise is None else noise[i] for i in filled]
                pictures = self._start([requests[i] for i in filled], np.stack(given), settings)
                phase("painting")
                yield from zip(chunk, np.asarray(pictures)[: len(chunk)], strict=True)

    def steps(
        self,
        requests: Sequence[Request],
        settings: Settings,
        *,
        preview: int = 0,
        phase: Callable[[str], None] = lambda name: None,
    ) -> Iterator[Progress]:
        """Paints step by step: who stops asking for the next step stops the painting.

        The last `Progress` of a request has the picture that `stream` gives it, but for what two
        programs round differently, at most 1/255.

        Args:
          requests, settings, phase: as in `stream`.
          preview: after how many steps there are pictures, as far as they can be foreseen; 0 is
            after the last step only.
        """
        for members in _shapes(requests):
            phase("compiling")
            for chunk, filled in self._chunks(members):
                some = [requests[i] for i in filled]
                x: Any = np.stack([self.noise(request) for request in some])
                sigmas, given, static = self._prepare(some, settings)
                for done in range(settings.zero_init_steps + 1, settings.steps + 1):
                    before, (now, after) = x, sigmas[done - 1 : done + 1]
                    solver = settings.solver if after else "euler"
                    x = self.programs.step(
                        self.params, before, now, after, given, solver=solver, **static
                    )
                    shown = None
                    if not after or preview and done % preview == 0:
                        clean = x - after * (x - before) / (after - now)  # along the last velocity
                        shown = np.asarray(self.programs.decode(self.params, clean))[: len(chunk)]
                    jax.block_until_ready(x)
                    phase("painting")
                    yield Progress(tuple(chunk), done, settings.steps, shown)

    def _chunks(self, members: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Indices of requests of one shape that are painted at once, and those of every slot."""
        slots = self.batch or min(len(members), MOST_AT_ONCE)
        for start in range(0, len(members), slots):
            chunk = members[start : start + slots]
            yield chunk, chunk + chunk[-1:] * (slots - len(chunk))

    def _start(
        self, requests: Sequence[Request], noise: np.ndarray, settings: Settings
    ) -> jax.Array:
        """Requests of one shape, one for each slot: uint8 [B, H, W, 3] still to be painted.

        Returns when the programs are compiled and asked for; reading the pictures waits for them.
        """
        sigmas, given, static = self._prepare(requests, settings)
        # While the velocity is 0 nothing moves.
        sigmas = sigmas[settings.zero_init_steps :]
        latents = self.programs.denoise(
            self.params, noise, sigmas, given, solver=settings.solver, **static
        )
        return self.programs.decode(self.params, latents)

    def _prepare(
        self, requests: Sequence[Request], settings: Settings
    ) -> tuple[np.ndarray, Conditions, dict[str, Any]]:
        """(noise levels, conditions, static arguments) of requests of one shape."""
        height, width = requests[0].size
        grid = (height // PACKED, width // PACKED)
        variants = settings.variants(bool(requests[0].pictures))
        batches = [self.collate(requests, variant) for variant in variants]
        contexts, masks = zip(
            *(self.programs.context(self.params, batch) for batch in batches), strict=True
        )
        renormalize = settings.renormalize
        if renormalize is None:
            renormalize = self.config.law.kind == "qwen_image"
        given = Conditions(
            contexts=jnp.stack(contexts),
            masks=jnp.stack(masks),
            shown=jnp.asarray(np.stack([batch["condition_mask"] for batch in batches])),
            latents=self.latents(batches[0]),
            roles=jnp.asarray(batches[0]["roles"]),
            scales=jnp.asarray(settings.scales(), jnp.float32),
        )
        sigmas = sampler.schedule(settings.steps, grid[0] * grid[1], self.schedule)
        return sigmas, given, {"grid": grid, "renormalize": renormalize}


def _shapes(requests: Sequence[Request]) -> Iterable[list[int]]:
    """The indices of requests, those of one shape together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, request in enumerate(requests):
        shapes = tuple(picture.shape for picture in request.pictures)
        groups.setdefault((request.size, shapes), []).append(index)
    return groups.values()
