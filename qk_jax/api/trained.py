"""A trained stage from Python: `load` and what it returns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from qk_jax import painting
from qk_jax.api.summary import summary
from qk_jax.base import files, runtime
from qk_jax.base.errors import InputError
from qk_jax.painting.request import is_whole
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
        *,
        height: int | None = None,
        width: int | None = None,
        steps: int = 30,
        guidance: float = 4.0,
        image_guidance: float = 1.5,
        solver: str = "euler",
        seed: int = 0,
        num: int = 1,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Paints pictures in RGB, the same bits as `python -m qk_jax.sample` writes.

        A picture is given as a path, a PIL image or a uint8 array of any size, [h, w, 3] or
        [h, w, 4] with alpha. Files and images are turned upright and taken to sRGB; all are seen
        over white.

        Args:
          prompt: what to paint, or what to do with the pictures.
          source: the picture to edit.
          references: pictures of subjects.
          height: in pixels, a multiple of 16; without it and `width` it is the trained size that
            is nearest to the source's shape, or the first without a source.
          width: the same.
          steps: of the sampler.
          guidance: weight of the text; 1 is off.
          image_guidance: weight of the pictures; 1 is off.
          solver: 'euler' or 'heun'.
          seed: of the noise, 0 to 2^32 - 1.
          num: pictures to paint, each from noise of its own.
          progress: called with (pictures that are painted, `num`) at the start and after each.
          **settings: further fields of `painting.Settings`, such as `guidance_interval`.

        Raises:
          InputError: no prompt, or something that this model cannot follow.
        """
        if not is_whole(num) or num < 1:
            raise InputError(f"num is {num!r}; give a whole number of at least 1")
        if isinstance(references, str | os.PathLike | Image.Image):
            raise InputError("references is one picture; give a list: references=[picture]")
        if not isinstance(references, Sequence | np.ndarray):
            raise InputError(f"references is {references!r}; give a list: references=[picture]")
        known = [field.name for field in dataclasses.fields(painting.Settings)]
        if unknown := settings.keys() - set(known):
            raise InputError(f"there is no setting {sorted(unknown)[0]!r}; give one of {known}")
        chosen = painting.Settings(steps, guidance, image_guidance, solver, **settings)
        shown = None if source is None else self._picture("source", source)
        subjects = [self._picture(f"references[{i}]", x) for i, x in enumerate(references)]
        request = self.painter.fit(prompt, shown, subjects, _size(height, width), seed)
        requests = [dataclasses.replace(request, number=number) for number in range(num)]
        tell = progress or (lambda done, total: None)
        tell(0, num)
        painted: dict[int, Image.Image] = {}
        for number, pixels in self.painter.stream(requests, chosen):
            painted[number] = Image.fromarray(pixels)
            tell(len(painted), num)
        return [painted[number] for number in range(num)]

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


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """(height, width) as given, None without both.

    Raises:
      InputError: one is missing or no whole number.
    """
    if height is None and width is None:
        return None
    for name, side in (("height", height), ("width", width)):
        if not is_whole(side):
            raise InputError(f"{name} is {side!r}; give height and width in pixels, or neither")
    return int(height), int(width)


def load(
    checkpoint: files.PathLike | None = None,
    *,
    ema: bool = True,
    step: int | None = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
) -> TrainedModel:
    """A model on disk; arguments and errors as `painting.load`. Its programs are kept in the user's
    cache folder (`runtime.keep_programs`).

    Args:
      checkpoint: the folder of a stage, W/stage3, or an export of `convert to-pytorch`; None for
        the tiny model that the package carries.
      ema: take the moving average of the weights where there is one.
      step: default the newest that is whole.
      batch: pictures painted at once, with which a picture has the same bits whatever `num` is;
        None for the `num` of each call, at most 8.
      mesh: to shard the parameters over, by the tables of the training; None for one device.
    """
    if batch is not None and not (is_whole(batch) and batch >= 1):
        raise InputError(f"batch is {batch!r}; give a whole number of at least 1")
    runtime.quiet()
    runtime.skip_absent_tpu()
    runtime.keep_programs()
    painter = painting.load(checkpoint, ema=ema, step=step, batch=batch, mesh=mesh)
    return TrainedModel(painter)
