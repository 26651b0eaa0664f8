from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.pictures.fitting import Size

log = logging.getLogger(__name__)
MAX_GROUPS = 8  # shapes of one task; rarer ones are merged into the nearest


class Group(NamedTuple):
    """Records of one task and shape; `numbers` count in the task's source."""

    task: str
    size: Size
    pictures: int
    numbers: np.ndarray


class Shape(NamedTuple):
    """One compiled shape, as `Pipeline.shapes` lists it."""

    task: str
    size: Size
    pictures: int
    records: int
    batches: int


def groups_of(source: Any, sizes: Sequence[Size], batch: int, limit: int) -> list[Group]:
    """Groups of one task with at least a batch each, at most `limit` of them.

    While there are too many, or one is smaller than a batch, the rarest joins the group with the
    same number of pictures whose size is nearest in aspect ratio; its records are then shown at
    that size. Changes source.size_of.

    Raises: InputError when no group has a batch of records.
    """
    logs = np.log([size[1] / size[0] for size in sizes])
    while True:
        keys, counts = np.unique(
            np.stack([source.pictures_of, source.size_of]), axis=1, return_counts=True
        )
        rarest = int(counts.argmin())
        pictures, size = keys[:, rarest]
        others = [int(s) for p, s in keys.T if p == pictures and s != size]
        if (len(counts) <= limit and counts[rarest] >= batch) or not others:
            break
        near = min(others, key=lambda other: (abs(logs[other] - logs[size]), other))
        source.size_of[(source.pictures_of == pictures) & (source.size_of == size)] = near
    out = []
    for (pictures, size), count in zip(keys.T.tolist(), counts.tolist(), strict=True):
        numbers = np.flatnonzero((source.pictures_of == pictures) & (source.size_of == size))
        if count >= batch:
            out.append(Group(source.task, sizes[size], pictures, numbers))
        else:
            log.warning(
                "%s: %d records with %d pictures are less than a batch of %d and are left out",
                source.task, count, pictures, batch,
            )  # fmt: skip
    if not out:
        raise InputError(
            f"{source.task} has {len(source)} records, less than one batch of {batch}; "
            "lower config.data.batch or set the task's weight to 0"
        )
    return out


class _Tag:
    """Batch of places -> (group, places), picklable."""

    def __init__(self, group: int):
        self.group = group

    def __call__(self, places: np.ndarray) -> tuple[int, np.ndarray]:
        return self.group, places
