"""Batches padded to the largest of their family, so that one program serves pictures of any size.

The sizes of a bucket table have nearly equal areas, but each is a shape of its own, and so would be
a program. Here every picture has the tokens of the largest of its table: in the generator, in the
vision tower and in the VLM's sequence. No token attends padding, and no loss is of it; what depends
on sizes (positions, windows, the shift of t) travels as data. So the shapes of a step depend on the
number of condition pictures alone, and only the autoencoder has a program for each size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from qk_jax.base.types import Batch, PaddedBatch
from qk_jax.data import settings
from qk_jax.data.example import MAX_REFERENCES, reference_sizes
from qk_jax.experiment import config as config_lib
from qk_jax.models.query_kontext import ModelConfig
from qk_jax.models.qwen_vision import padded_windows, windows_of
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.grids import MERGE, Grids, grid_of, vision_size
from qk_jax.pictures.sizes import PACKED, for_number, parse_sizes
from qk_jax.training.objectives.regions import region

# Tokens of a table are a multiple: whole registers, which 2, 4 or 8 devices of 'context' share.
MULTIPLE = 8
Table = tuple[Size, ...]


class Vision(NamedTuple):
    """What pictures take in the vision tower: patches, windows, and patches of a window."""

    patches: int
    windows: int
    length: int


@dataclasses.dataclass(frozen=True)
class Padding:
    """Batch -> padded batch, in numpy. It pickles to worker processes.

    Attributes:
      model: of the run.
      keeps_pictures: whether the window of the text has the tokens of the pictures in it.
      region_weight: config.loss.region_weight.
      targets: tables of target sizes, one of each phase of the run.
      conditions: for 1, 2, ... condition pictures the tables of their sizes, likewise.
    """

    model: ModelConfig
    keeps_pictures: bool
    region_weight: float
    targets: tuple[Table, ...] = ()
    conditions: tuple[tuple[Table, ...], ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Padding:
        """As an experiment config says. Raises InputError for sizes that are none."""
        tables = [_tables(phase.data) for phase in settings.phases(config)]
        return cls(
            config_lib.model_config(config),
            config["prompt"]["keep_pictures"],
            config["loss"]["region_weight"],
            tuple(targets for targets, _ in tables),
            tuple(zip(*(conditions for _, conditions in tables), strict=True)),
        )

    def exact(self) -> Padding:
        """One that pads nothing: every size is a table of its own."""
        return dataclasses.replace(self, targets=(), conditions=())

    def family(self, size: Size, pictures: int = 0) -> Table:
        """The sizes that share a program with `size`: the smallest table that has it.

        Args:
          size: of a target, or of one of so many condition pictures. One that is in no table is a
            family of its own.
          pictures: condition pictures, 0 for a target.
        """
        own = for_number(self.conditions, pictures) if pictures and self.conditions else ()
        for tables in (own, self.targets):
            if found := [table for table in tables if size in table]:
                return min(found, key=_most_tokens)
        return (size,)

    def tokens(self, batch: Batch | PaddedBatch) -> tuple[int, ...]:
        """Packed tokens that the target and each condition picture are padded to."""
        pictures = len(batch["conditions"])
        families = [self.family(batch["target"].shape[1:3])]
        families += [self.family(x.shape[1:3], pictures) for x in batch["conditions"]]
        return tuple(
            -(-_most_tokens(family) // MULTIPLE) * MULTIPLE if len(family) > 1
            else _most_tokens(family)
            for family in families
        )  # fmt: skip

    def __call__(self, batch: Batch) -> PaddedBatch:
        """The same examples with as many tokens as the largest of their families."""
        shown = [x.shape[1:3] for x in batch["conditions"]]
        grids = self.model.vision_grids(shown)
        rooms = [
            self._vision([self.model.vision_grids([one]) for one in self.family(size, len(shown))])
            for size in shown
        ]
        patches = sum(room.patches for room in rooms)
        spare = (patches - sum(map(math.prod, grids))) // MERGE**2
        sizes = [batch["target"].shape[1:3], *shown]
        packed = np.array([[side // PACKED for side in size] for size in sizes], np.int32)
        found: dict[str, Any] = {
            **batch,
            "input_ids": _before(batch["input_ids"], spare),
            "attention_mask": _before(batch["attention_mask"], spare),
            "position_ids": _before(batch["position_ids"], spare),
            "text_mask": _before(batch["text_mask"], spare if self.keeps_pictures else 0),
            "pixel_values": behind(batch["pixel_values"], 1, patches),
            "windows": self._windows(grids, rooms, batch) if grids else (),
            "grids": _each(packed, batch),
        }
        if "target_pixel_values" in batch:
            found |= self._padded_target(batch)
        if self.region_weight and shown:
            weights = region(batch, self.region_weight)
            found["region"] = behind(weights, 1, self.tokens(batch)[0])
        return cast(PaddedBatch, found)

    def abstract(self, batch: Batch) -> PaddedBatch:
        """The shapes of the padded batch, of those of a batch."""
        return abstractly(self, batch)

    def _vision(self, members: Iterable[Grids]) -> Vision:
        """What the largest of some pictures takes."""
        size = self.model.vlm.vision.window_size
        taken = [(sum(map(math.prod, x)), *windows_of(x, size).slots.shape) for x in members]
        return Vision(*map(max, zip(*taken, strict=True)))

    def _windows(self, grids: Grids, rooms: Sequence[Vision], batch: Batch) -> Any:
        """Those of each slot of pictures that have such rooms."""
        patches, windows = (sum(column) for column in list(zip(*rooms, strict=True))[:2])
        shape = windows, max(room.length for room in rooms)
        return _each(
            padded_windows(grids, self.model.vlm.vision.window_size, patches, shape), batch
        )

    def _padded_target(self, batch: Batch) -> dict[str, Any]:
        """What the teacher of the alignment term sees."""

        def grids(size: Size) -> Grids:
            return (grid_of(*vision_size(*size, self.model.vlm_pixels)),)

        size = batch["target"].shape[1:3]
        room = self._vision(map(grids, self.family(size)))
        return {
            "target_pixel_values": behind(batch["target_pixel_values"], 1, room.patches),
            "target_windows": self._windows(grids(size), [room], batch),
        }


def abstractly(make: Callable[[Batch], PaddedBatch], batch: Batch) -> PaddedBatch:
    """The shapes of what `make` makes of a batch, of those of the batch."""
    one = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), batch)
    examples, canonical = batch["input_ids"].shape[0], jax.dtypes.canonicalize_dtype
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((examples, *x.shape[1:]), canonical(x.dtype)), make(one)
    )


def _tables(data: Mapping[str, Any]) -> tuple[Table, tuple[Table, ...]]:
    """The sizes of targets, and those of 1, 2, ... condition pictures, by config.data."""
    targets = parse_sizes(data["sizes"], "config.data.sizes")
    tasks = {task for task, weight in data["tasks"].items() if weight}
    edits = bool(tasks - MAX_REFERENCES.keys() - {"text_to_image"})
    references, most = reference_sizes(data), max(MAX_REFERENCES.values())
    found = []
    for number in range(1, most + 1):
        # A source has the size of the target, and is alone.
        sizes = list(targets) if edits and number == 1 else []
        if any(MAX_REFERENCES.get(task, 0) >= number for task in tasks):
            sizes += for_number(references, number)
        # Where all are sizes of targets they are padded like those, and share their encoders.
        found.append(targets if {*sizes} <= {*targets} else tuple(dict.fromkeys(sizes)))
    return targets, tuple(found)


def _most_tokens(table: Table) -> int:
    return max(map(math.prod, table)) // PACKED**2


def _each(tree: Any, batch: Batch) -> Any:
    """Arrays of all slots alike -> [B, ...]."""
    examples = len(batch["input_ids"])
    return jax.tree.map(lambda x: np.broadcast_to(x, (examples, *x.shape)), tree)


def _before(x: np.ndarray, count: int) -> np.ndarray:
    """Zeros before the last axis: sequences are left-padded."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(count, 0)]) if count else x


def behind(x: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Zeros behind an axis, up to a length."""
    if x.shape[axis] == length:
        return x
    return np.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
