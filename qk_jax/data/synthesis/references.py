"""Cut-outs as references: on white, at sizes that the batch plan knows before it reads them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qk_jax.data.example import TaskSettings
from qk_jax.data.synthesis import scenes
from qk_jax.data.synthesis.boxes import FULL
from qk_jax.data.synthesis.corpus import Corpus, Cutout
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.sizes import for_number


class References:
    """The references of a task's examples; pictures are kept, the same in every example."""

    def __init__(self, corpus: Corpus, settings: TaskSettings):
        self.corpus, self.settings = corpus, settings
        self._made: dict[tuple[str, Size], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    @functools.cached_property
    def _shape_of(self) -> list[np.ndarray]:
        """For one, two, ... references the index of the size of each cut-out of the corpus."""
        index = self.corpus.file.index
        return [
            self.settings.nearest_reference(index["height"], index["width"], number + 1)
            for number in range(len(self.settings.reference_sizes))
        ]

    def shapes(self, shown: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """`references_of` of examples that show the cut-outs `shown` [N, R], the first `counts`."""
        if len(self.settings.reference_shapes) == 1:
            return np.zeros((len(shown), 0), np.int32)
        index, counts = self.corpus.file.index, counts[:, None]
        absent = np.arange(shown.shape[1]) >= counts
        height, width = (np.where(absent, 1, index[x][shown]) for x in ("height", "width"))
        return self.settings.nearest_reference(height, width, counts).astype(np.int32)

    def of_shape(self, cutouts: np.ndarray, shape: int, number: int) -> np.ndarray:
        """Those of the `cutouts` whose size among `number` references has this index."""
        return cutouts[for_number(self._shape_of, number)[cutouts] == shape]

    def pictures(self, cutouts: Sequence[Cutout], row: np.ndarray) -> list[np.ndarray]:
        """uint8 [H, W, 3] of each cut-out, by the example's row of `references_of`."""
        number = len(cutouts)
        sizes = [self.settings.reference_size(row, place, number) for place in range(number)]
        for cutout, size in zip(cutouts, sizes, strict=True):
            if (cutout.key, size) not in self._made:
                items = [scenes.Item(cutout.rgba, FULL)]
                self._made[cutout.key, size] = scenes.paint(scenes.flat(size, "white"), items)
        return [self._made[x.key, size] for x, size in zip(cutouts, sizes, strict=True)]
