"""A training example in memory, and the interface of everything that gives examples."""

from __future__ import annotations

import dataclasses
import zlib
from typing import NamedTuple, Protocol

import numpy as np

from qk_jax.base.errors import BadRecord
from qk_jax.pictures.fitting import Size

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
      target: uint8 [H, W, 3], the true picture.
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


class Source(Protocol):
    """The N examples of one task by number. It pickles to worker processes.

    Attributes:
      task: one of TASKS.
      settings: with the target sizes.
      size_of: int [N], index into `settings.sizes` of each target. The batch plan may change it.
      pictures_of: int [N], number of condition pictures of each.
    """

    task: str
    settings: TaskSettings
    size_of: np.ndarray
    pictures_of: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example:
        """Example `number`. Raises: BadRecord."""


def caption_of(value: object, name: str) -> str:
    """A caption or instruction. Raises: BadRecord of kind 'no text' when it is empty or no text."""
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("no text", f"{name}: the caption is {value!r:.60}, expected text")
    return value


def hashed(*parts: object) -> int:
    """A 32-bit seed from anything printable; neighbouring seeds give unrelated ones."""
    return zlib.crc32("/".join(map(str, parts)).encode())
