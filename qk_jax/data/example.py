"""A training example in memory: what every source of data gives and the batch plan reads."""

from __future__ import annotations

import dataclasses
import zlib
from typing import NamedTuple

import numpy as np

from qk_jax.base.errors import BadRecord
from qk_jax.pictures.fitting import Size


def caption_of(value: object, name: str) -> str:
    """A caption or instruction. Raises: BadRecord of kind 'no text' when it is no filled string."""
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("no text", f"{name}: the caption is {value!r:.60}, no string of words")
    return value


TASKS = (
    "text_to_image",
    "reconstruction",
    "transformation",
    "editing",
    "customization",
    "composition",
)
# Most references in an example of a task; the others have none.
MAX_REFERENCES = {"customization": 1, "composition": 3}


class Example(NamedTuple):
    """One training or validation example.

    Attributes:
      instruction: what the user writes.
      target: uint8 [H, W, 3], the truth.
      pictures: condition pictures, uint8 [h, w, 3] each, in order.
      roles: SOURCE or REFERENCE for each picture.
      task: one of TASKS.
      record: number of the example in its source.
      kind: what is done, a key of WORDINGS for made examples.
      subjects: subjects that occur, as the split counts them.
    """

    instruction: str
    target: np.ndarray
    pictures: tuple[np.ndarray, ...]
    roles: tuple[int, ...]
    task: str
    record: int
    kind: str = ""
    subjects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What all tasks share.

    Attributes:
      sizes: target sizes (H, W).
      reference_size: side of a reference picture in pixels.
      seed: of everything that is drawn.
    """

    sizes: tuple[Size, ...] = ((64, 64), (48, 80), (80, 48))
    reference_size: int = 64
    seed: int = 0


def hashed(*parts: object) -> int:
    """A 32-bit number from anything printable; differs for neighbouring seeds."""
    return zlib.crc32("/".join(map(str, parts)).encode())
