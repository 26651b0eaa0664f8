"""A trained stage from Python: `load` and what it returns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from qk_jax import painting
from qk_jax.api.summary import summary
from qk_jax.base import files, runtime
from qk_jax.base.errors import InputError
from qk_jax.pictures.decoding import picture_of

Picture = files.PathLike | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A whole Query-Kontext model as a stage of the trainer left it.

    Attributes:
      painter: what paints; `python -m qk_jax.sample` uses the same.
    """

    painter: painting.Painter

    def __repr__(self) -> str:
        painter = self.painter
        name = painter.name or "Query-Kontext"
        return summary(self, name, painter.params, painter.programs.model.dtype)

    def generate(
        self,
        prompt: str,
        source: Picture | None = None,
        references: Sequence[Picture] = (),
        size: tuple[int, int] | None = None,
        steps: int = 30,
        guidance: float = 4.0,
        seed: int = 0,
        *,
        image_guidance: float = 1.5,
        solver: str = "euler",
        num: int = 1,
        **settings: Any,
    ) -> list[np.ndarray]:
        """Paints: uint8 [H, W, 3] pictures, the same bits as `python -m qk_jax.sample` writes.

        A picture is given as a path, a PIL image or a uint8 array of any size, [h, w, 3] or
        [h, w, 4] with alpha. Files and images are turned upright and taken to sRGB; all are seen
        over white.

        Args:
          prompt: what to paint, or what to do with the pictures.
          source: the picture to edit.
          references: pictures of subjects.
          size: (height, width) in pixels, multiples of 16; None for the trained size that is
            nearest to the source's shape, or the first without a source.
          steps: of the sampler.
          guidance: weight of the text; 1 is off.
          seed: of the noise, 0 to 2^32 - 1.
          image_guidance: weight of the pictures; 1 is off.
          solver: 'euler' or 'heun'.
          num: pictures to paint, each from noise of its own.
          **settings: further fields of `painting.Settings`, such as `guidance_interval`.

        Raises:
          InputError: no prompt, or something that this model cannot follow.
        """
        if num < 1:
            raise InputError(f"num is {num}; give at least 1")
        if isinstance(references, str | os.PathLike | Image.Image):
            raise InputError("references is one picture; give a list: references=[picture]")
        known = [field.name for field in dataclasses.fields(painting.Settings)]
        if unknown := settings.keys() - set(known):
            raise InputError(f"there is no setting {sorted(unknown)[0]!r}; give one of {known}")
        chosen = painting.Settings(steps, guidance, image_guidance, solver, **settings)
        shown = None if source is None else self._picture("source", source)
        subjects = [self._picture(f"references[{i}]", x) for i, x in enumerate(references)]
        size = None if size is None else _size(size)
        request = self.painter.fit(prompt, shown, subjects, size, seed)
        requests = [dataclasses.replace(request, number=number) for number in range(num)]
        return self.painter.paint(requests, chosen)

    def _picture(self, name: str, given: Picture) -> np.ndarray:
        """A picture as uint8 RGB [h, w, 3].

        Raises:
          InputError: it cannot be read, or the array is none of a picture.
        """
        if isinstance(given, str | os.PathLike):
            return self.painter.read(given)
        if isinstance(given, Image.Image):
            return picture_of(given, "RGB", self.painter.limits.max_pixels, name)
        array = np.asarray(given)
        channels = array.shape[2] if array.ndim == 3 else 0
        if array.dtype != np.uint8 or channels not in (3, 4) or not array.size:
            raise InputError(
                f"{name} is an array {array.dtype} {array.shape}; give uint8 [height, width, 3 or "
                "4], a PIL image or a path"
            )
        return array if channels == 3 else self._picture(name, Image.fromarray(array))


def _size(size: Any) -> tuple[int, int]:
    """(height, width) as given. Raises InputError when it is no pair of whole numbers."""
    try:
        height, width = size
    except (TypeError, ValueError):
        height = width = None
    if not all(isinstance(side, int | np.integer) for side in (height, width)):
        raise InputError(f"size is {size!r}; give (height, width) in pixels, multiples of 16")
    return int(height), int(width)


def load(
    checkpoint: files.PathLike,
    *,
    ema: bool = True,
    step: int | None = None,
    batch: int = 4,
    mesh: Mesh | None = None,
) -> TrainedModel:
    """A model that the trainer wrote; arguments and errors as `painting.load`.

    Args:
      checkpoint: the folder of a stage, W/stage3.
      ema: take the moving average of the weights where there is one.
      step: default the newest that is whole.
      batch: pictures painted at once; a picture has the same bits only with the same `batch`.
      mesh: to shard the parameters over, by the tables of the training; None for one device.
    """
    runtime.skip_absent_tpu()
    painter = painting.load(checkpoint, ema=ema, step=step, batch=batch, mesh=mesh)
    return TrainedModel(painter)
