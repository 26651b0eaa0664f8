"""A training example in memory, and the interface of everything that gives examples."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import buckets
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.sizes import PACKED, parse_sizes

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
      source: name of the set that it is from, '' where it has none.
      captions: (text, weight) of several texts, one of which is drawn as the instruction each time
        that it is trained on; () where there is one.
    """

    instruction: str
    target: np.ndarray
    pictures: tuple[np.ndarray, ...]
    roles: tuple[int, ...]
    task: str
    record: int
    kind: str = ""
    subjects: tuple[str, ...] = ()
    source: str = ""
    captions: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What all tasks share.

    Attributes:
      sizes: target sizes (H, W).
      reference_sizes: of references, by their number in an example: for one, two, ..., the last
        for more, each a table of sizes (H, W).
      seed: of everything that is drawn.
    """

    sizes: tuple[Size, ...] = ((64, 64), (48, 80), (80, 48))
    reference_sizes: tuple[tuple[Size, ...], ...] = (((64, 64),),)
    seed: int = 0

    @classmethod
    def from_config(cls, data: Mapping[str, Any], seed: int) -> TaskSettings:
        """As config.data says. Raises InputError for sizes or ratios that are none."""
        sizes = parse_sizes(data["sizes"], "config.data.sizes")
        return cls(sizes, reference_sizes(data), seed)

    @functools.cached_property
    def reference_shapes(self) -> tuple[Size, ...]:
        """Every (H, W) of `reference_sizes` once."""
        return tuple(dict.fromkeys(itertools.chain(*self.reference_sizes)))

    def nearest_reference(
        self, height: ArrayLike, width: ArrayLike, number: ArrayLike
    ) -> np.ndarray:
        """Index [...] into `reference_shapes` of the size that is nearest in aspect ratio to a
        picture of `height` and `width` among those for `number` references; arrays broadcast."""
        kind = np.min_scalar_type(len(self.reference_shapes))
        found = [
            np.array([self.reference_shapes.index(size) for size in table], kind)[
                buckets.nearest(height, width, table)
            ]
            for table in self.reference_sizes
        ]
        return np.choose(np.clip(number, 1, len(found)) - 1, found)

    def squarest(self, number: int) -> int:
        """Index of the most nearly square size for `number` references."""
        return int(self.nearest_reference(1, 1, number))

    def reference_size(self, row: np.ndarray, place: int, number: int) -> Size:
        """(H, W) of the reference at `place` of an example with `number` of them, by its row of
        `references_of`."""
        return self.reference_shapes[row[place] if place < len(row) else self.squarest(number)]


def reference_sizes(data: Mapping[str, Any]) -> tuple[tuple[Size, ...], ...]:
    """Tables of sizes (H, W) for one, two, ... references, the last for more, by config.data: its
    reference_ratios at about the square of the side for that number.

    One square without ratios and one side for any number, as in checkpoints from before these were
    fields.

    Raises: InputError when sides or ratios are none.
    """
    most, ratios = max(MAX_REFERENCES.values()), data.get("reference_ratios", ())
    sides = data.get("reference_sizes_by_number", ())
    if len(sides) > most or not all(type(x) is int and x > 0 == x % PACKED for x in sides):
        raise InputError(
            f"config.data.reference_sizes_by_number is {sides}; give the sides for 1 to at most "
            f"{most} references, multiples of {PACKED}, such as (512, 384, 256)"
        )
    if not all(isinstance(x, tuple | list) and len(x) == 2 and min(x) > 0 for x in ratios):
        raise InputError(
            f"config.data.reference_ratios is {ratios}; give pairs such as ((1, 1), (2, 3))"
        )
    square = all(short == long for short, long in ratios)
    return tuple(
        ((side, side),) if square else buckets.table(side, PACKED, ratios)
        for side in sides or (data["reference_size"],)
    )


class Source(Protocol):
    """The N examples of one task by number. It pickles to worker processes.

    Attributes:
      task: one of TASKS.
      settings: with the target sizes.
      size_of: int [N], index into `settings.sizes` of each target. The batch plan may change it.
      pictures_of: int [N], number of condition pictures of each.
      references_of: int [N, R], index into `settings.reference_shapes` of the first R references of
        each, the squarest where there is none. R is 0 where all references have one size. The batch
        plan may change it.
    """

    task: str
    settings: TaskSettings
    size_of: np.ndarray
    references_of: np.ndarray

    @property
    def pictures_of(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Example:
        """Example `number`. Raises: BadRecord."""


class Part(NamedTuple):
    """One of several sources of a task.

    Attributes:
      name: what metrics and errors call it.
      weight: its share of the task's examples, beside those of the others.
      source: the examples.
    """

    name: str
    weight: float
    source: Source


class Joined:
    """Several sources of one task as one: their examples one after another.

    Attributes:
      parts: the sources, in order.
      ends: int [len(parts)], number of the first example after each.
    """

    def __init__(self, parts: Sequence[Part]):
        self.parts, first = tuple(parts), parts[0].source
        self.task, self.settings = first.task, first.settings
        self.ends = np.cumsum([len(part.source) for part in parts])
        self._columns = max(part.source.references_of.shape[1] for part in parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Example:
        place = int(np.searchsorted(self.ends, number, side="right"))
        source = self.parts[place].source
        example = source[number - int(self.ends[place]) + len(source)]
        return example._replace(record=number)

    @property
    def pictures_of(self) -> np.ndarray:
        return np.concatenate([part.source.pictures_of for part in self.parts])

    @property
    def size_of(self) -> np.ndarray:
        return np.concatenate([part.source.size_of for part in self.parts])

    @size_of.setter
    def size_of(self, sizes: np.ndarray) -> None:
        for part, own in zip(self.parts, np.split(sizes, self.ends[:-1]), strict=True):
            part.source.size_of = own

    @property
    def references_of(self) -> np.ndarray:
        return np.concatenate([self._filled(part.source) for part in self.parts])

    @references_of.setter
    def references_of(self, sizes: np.ndarray) -> None:
        for part, own in zip(self.parts, np.split(sizes, self.ends[:-1]), strict=True):
            part.source.references_of = own

    def _filled(self, source: Source) -> np.ndarray:
        """Its `references_of` with as many columns as that with the most, squares in the new."""
        missing = self._columns - source.references_of.shape[1]
        if not missing:
            return source.references_of
        squares = self.settings.nearest_reference(1, 1, source.pictures_of)
        return np.hstack([source.references_of, *[squares[:, None]] * missing])


def caption_of(value: object, name: str) -> str:
    """A caption or instruction. Raises: BadRecord of kind 'no text' when it is empty or no text."""
    if not isinstance(value, str) or not value.strip():
        raise BadRecord("no text", f"{name}: the caption is {value!r:.60}, expected text")
    return value


def hashed(*parts: object) -> int:
    """A 32-bit seed from anything printable; neighbouring seeds give unrelated ones."""
    return zlib.crc32("/".join(map(str, parts)).encode())
