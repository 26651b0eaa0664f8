"""A training example in memory, and the interface of everything that gives examples."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import buckets
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.sizes import parse_sizes

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
      reference_sizes: sizes (H, W) of references.
      seed: of everything that is drawn.
    """

    sizes: tuple[Size, ...] = ((64, 64), (48, 80), (80, 48))
    reference_sizes: tuple[Size, ...] = ((64, 64),)
    seed: int = 0

    @classmethod
    def from_config(cls, data: Mapping[str, Any], seed: int) -> TaskSettings:
        """As config.data says. Raises InputError for sizes or ratios that are none."""
        sizes = parse_sizes(data["sizes"], "config.data.sizes")
        return cls(sizes, reference_sizes(data), seed)

    @property
    def squarest(self) -> int:
        """Index of the reference size that is nearest to a square."""
        return int(buckets.nearest(1, 1, self.reference_sizes))

    def reference_size(self, row: np.ndarray, place: int) -> Size:
        """(H, W) of the reference at `place` of an example, by its row of `references_of`."""
        return self.reference_sizes[row[place] if place < len(row) else self.squarest]


def reference_sizes(data: Mapping[str, Any]) -> tuple[Size, ...]:
    """Sizes (H, W) of references by config.data: its reference_ratios at about reference_size^2.

    One square without ratios, as in checkpoints from before they were a field.

    Raises: InputError when the ratios are none.
    """
    side, ratios = data["reference_size"], data.get("reference_ratios", ())
    if not all(isinstance(x, tuple | list) and len(x) == 2 and min(x) > 0 for x in ratios):
        raise InputError(
            f"config.data.reference_ratios is {ratios}; give pairs such as ((1, 1), (2, 3))"
        )
    if all(short == long for short, long in ratios):
        return ((side, side),)
    return buckets.table(side, 16, ratios)


class Source(Protocol):
    """The N examples of one task by number. It pickles to worker processes.

    Attributes:
      task: one of TASKS.
      settings: with the target sizes.
      size_of: int [N], index into `settings.sizes` of each target. The batch plan may change it.
      pictures_of: int [N], number of condition pictures of each.
      references_of: int [N, R], index into `settings.reference_sizes` of the first R references of
        each, the squarest where there is none. R is 0 where all references have one size. The batch
        plan may change it.
    """

    task: str
    settings: TaskSettings
    size_of: np.ndarray
    pictures_of: np.ndarray
    references_of: np.ndarray

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
