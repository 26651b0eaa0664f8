"""Painting with a trained model: prompts and pictures in, pictures out, bit for bit again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from qk_jax.base import files, runtime
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.checkpoints import run_folder
from qk_jax.data import buckets, prompts
from qk_jax.data.example import MAX_REFERENCES
from qk_jax.diffusion import sampler
from qk_jax.experiment.plan import Plan
from qk_jax.models import lora
from qk_jax.models.query_kontext import PACKED, ModelConfig
from qk_jax.painting.programs import Options, programs
from qk_jax.painting.request import FULL, NOTHING, Limits, Request, Settings
from qk_jax.pictures.fitting import contain, cover, decode_picture, on_white


class Painter:
    """A model, its parameters and its tokenizer, ready to paint.

    Every call of a program has exactly `batch` slots, short ones filled up with copies, and the
    noise of a slot depends on its own seed and number only: a picture has the same bits whatever
    else is painted with it, as long as `batch`, the program and the machine are the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        layout: prompts.PromptLayout,
        *,
        limits: Limits,
        batch: int = 4,
        dtype: Any = jnp.float32,
        options: Options = (),
        name: str = "",
    ):
        """Holds what is needed to paint.

        Args:
          config: of the model.
          params: the tree, adapters already merged.
          layout: builds the VLM's rows.
          limits: sizes and counts of the training.
          batch: rows of every program.
          dtype: compute dtype.
          options: of the compiler, see `programs`.
          name: what PNGs call the model.
        """
        self.config, self.params, self.layout = config, params, layout
        self.limits, self.batch, self.name = limits, batch, name
        self.schedule = sampler.ScheduleConfig()
        self.programs = programs(config, dtype, options)

    def check(self, request: Request) -> None:
        """Raises InputError, naming the mend, for what this model cannot paint."""
        if not isinstance(request.prompt, str) or not request.prompt.strip():
            raise InputError("there is no prompt; say what to paint")
        self.layout.encode_text(request.prompt, strict=True)
        height, width = request.size
        if height % PACKED or width % PACKED or min(height, width) < PACKED:
            near = [max(1, round(side / PACKED)) * PACKED for side in (width, height)]
            raise InputError(
                f"the size {width}x{height} is no multiple of {PACKED}; {near[0]}x{near[1]} is near"
            )
        if height * width > self.limits.max_area:
            raise InputError(
                f"the size {width}x{height} has more than {self.limits.max_area} pixels, sixteen "
                "times the training's; choose a smaller one"
            )
        count, most = len(request.references), self.limits.max_references
        if count > most:
            raise InputError(
                f"{count} references are given, the model was trained with at most {most}; "
                "leave some out"
            )

    def read(self, path: str | os.PathLike) -> np.ndarray:
        """A picture file as uint8 RGB [h, w, 3], on white where it is transparent.

        Raises:
          InputError: no such file, no picture, or one beyond `limits.max_pixels`.
        """
        try:
            data = files.Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; name a picture") from None
        rgba = decode_picture(data, "RGBA", self.limits.max_pixels, str(path))
        return on_white(Image.fromarray(rgba))

    def fit(
        self,
        prompt: str,
        source: np.ndarray | None = None,
        references: Sequence[np.ndarray] = (),
        size: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> Request:
        """A request with its pictures fitted as in training: the source covers the target's size,
        a reference lies whole on a white square.

        Args:
          prompt: the instruction.
          source: uint8 [h, w, 3] of any size.
          references: uint8 [h, w, 3] of any size each.
          size: (height, width); None for the trained size nearest to the source's shape, or for
            the first of the training's without a source.
          seed: of the noise.
        """
        if size is None:
            size = self.limits.sizes[0]
            if source is not None:
                size = self.limits.sizes[buckets.nearest(*source.shape[:2], self.limits.sizes)]
        if source is not None:
            source = cover(source, size)
        side = self.limits.reference_size
        fitted = tuple(contain(reference, side) for reference in references)
        return Request(prompt, source, fitted, tuple(size), seed)

    def noise(self, request: Request) -> np.ndarray:
        """Latents of pure noise, float32 [H / 8, W / 8, C], from the request's seed and number."""
        height, width = request.size
        channels = self.config.mmdit.in_channels // self.config.mmdit.patch_size**2
        key = jax.random.fold_in(jax.random.key(request.seed), request.number)
        return np.asarray(jax.random.normal(key, (height // 8, width // 8, channels), jnp.float32))

    def rows(self, requests: Sequence[Request], variant: str = FULL) -> dict[str, Any]:
        """The model's batch for requests of one shape: a row each, without target.

        Args:
          requests: same size and same picture shapes.
          variant: FULL, NO_TEXT (an empty text) or NOTHING (no pictures either).
        """
        pictures = [request.pictures for request in requests]
        sizes = [picture.shape[:2] for picture in pictures[0]]
        shown = variant != NOTHING
        texts = [request.prompt if variant == FULL else "" for request in requests]
        built = [self.layout.build(text, sizes, pictures=shown) for text in texts]
        batch = {name: np.stack([row[name] for row in built]) for name in built[0]}
        area = self.config.vlm_pixels
        batch["pixel_values"] = np.stack([prompts.pixel_values(p, area) for p in pictures])
        batch["conditions"] = tuple(np.stack(column) for column in zip(*pictures, strict=True))
        batch["condition_mask"] = np.full(len(requests), shown)
        roles = [request.roles for request in requests]
        batch["roles"] = np.asarray(roles, np.int32).reshape(len(requests), len(sizes))
        return batch

    def latents(self, batch: dict[str, Any]) -> tuple[jax.Array, ...]:
        """Condition latents of a batch of `rows`; () for a model that takes none."""
        if not self.config.condition_latents:
            return ()
        return tuple(self.programs.encode(self.params, x) for x in batch["conditions"])

    def paint(self, requests: Sequence[Request], settings: Settings) -> list[np.ndarray]:
        """Paints every request: uint8 [H, W, 3] each, in their order.

        Raises:
          InputError: a request or a setting that the model cannot follow.
        """
        return [picture for _, picture in sorted(self.stream(requests, settings), key=_first)]

    def paint_with_noise(
        self, requests: Sequence[Request], noise: Sequence[np.ndarray], settings: Settings
    ) -> list[np.ndarray]:
        """As `paint`, from given noise, float32 [H / 8, W / 8, C] each."""
        painted = self.stream(requests, settings, noise)
        return [picture for _, picture in sorted(painted, key=_first)]

    def stream(
        self,
        requests: Sequence[Request],
        settings: Settings,
        noise: Sequence[np.ndarray] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the request, its picture) as soon as it is painted, shape by shape.

        Args:
          requests: any mixture of sizes and pictures; condition pictures as `fit` gives them.
          settings: for all of them.
          noise: of each request; None for `self.noise` of it.

        Raises:
          InputError: before anything is painted, a request or setting that the model cannot follow.
        """
        settings.check()
        groups: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            self.check(request)
            shapes = tuple(picture.shape for picture in request.pictures)
            groups.setdefault((request.size, shapes), []).append(index)
        chunks = [
            members[start : start + self.batch]
            for members in groups.values()
            for start in range(0, len(members), self.batch)
        ]
        for chunk in chunks:
            filled = chunk + chunk[-1:] * (self.batch - len(chunk))
            given = [self.noise(requests[i]) if noise is None else noise[i] for i in filled]
            painted = self._paint_batch([requests[i] for i in filled], np.stack(given), settings)
            yield from zip(chunk, painted[: len(chunk)], strict=True)

    def _paint_batch(
        self, requests: Sequence[Request], noise: np.ndarray, settings: Settings
    ) -> np.ndarray:
        """Requests of one shape, exactly `batch` of them: uint8 [B, H, W, 3]."""
        height, width = requests[0].size
        grid = (height // PACKED, width // PACKED)
        variants = settings.variants(bool(requests[0].pictures))
        batches = [self.rows(requests, variant) for variant in variants]
        contexts, masks = zip(
            *(self.programs.context(self.params, batch) for batch in batches), strict=True
        )
        latents = self.programs.denoise(
            self.params,
            noise,
            sampler.schedule(settings.steps, grid[0] * grid[1], self.schedule),
            jnp.stack(contexts),
            jnp.stack(masks),
            np.stack([batch["condition_mask"] for batch in batches]),
            self.latents(batches[0]),
            batches[0]["roles"],
            np.asarray([settings.guidance, settings.image_guidance], np.float32),
            grid=grid,
            solver=settings.solver,
        )
        return np.asarray(self.programs.decode(self.params, latents))


def _first(pair: tuple[int, np.ndarray]) -> int:
    return pair[0]


def load(
    folder: str | os.PathLike,
    *,
    ema: bool = True,
    step: int | None = None,
    batch: int = 4,
    mesh: jax.sharding.Mesh | None = None,
) -> Painter:
    """The painter of a stage folder (W/stage3) that the trainer wrote.

    Args:
      folder: with `checkpoints/` and `frozen/` inside.
      ema: take the moving average of the weights where there is one.
      step: default the newest that is whole.
      batch: slots of every program.
      mesh: to shard the parameters over; None for one device.

    Raises:
      InputError: no such folder or step, or it is damaged.
    """
    return of_loaded(run_folder.load(folder, step=step, ema=ema, mesh=mesh), batch=batch)


def of_loaded(loaded: run_folder.Loaded, *, batch: int = 4) -> Painter:
    """The painter of a model that was read from its folder; `batch` slots in every program."""
    return of_params(loaded.plan, loaded.params, batch=batch, name=loaded.name)


def of_params(plan: Plan, params: Tree, *, batch: int = 4, name: str = "") -> Painter:
    """The painter of parameters in memory.

    Args:
      plan: of their run.
      params: all of them; adapters are merged here, which changes no picture but saves time.
      batch: slots of every program.
      name: what PNGs call the model.
    """
    config, data, params = plan.model.config, plan.config.data, dict(params)
    for tower, adapter in params.pop("lora", {}).items():
        params[tower] = jax.jit(lora.merge, static_argnums=2)(
            params[tower], adapter, config.lora_scale
        )
    limits = Limits(
        sizes=tuple(tuple(size) for size in data.sizes),
        reference_size=data.reference_size,
        max_references=max(MAX_REFERENCES.get(task, 0) for task, x in data.tasks.items() if x),
        max_pixels=data.max_pixels,
    )
    options = runtime.compiler_options(plan.config.compiler, jax.default_backend())
    # The adapters are merged and nothing is differentiated: painters of all stages share programs.
    config = dataclasses.replace(config, lora_scale=1.0, remat=None)
    return Painter(
        config, params, plan.prompts,
        limits=limits, batch=batch, dtype=plan.model.dtype, options=tuple(sorted(options.items())),
        name=name,
    )  # fmt: skip
