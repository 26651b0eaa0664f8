"""The batch plan: which examples each step reads, as a pure function of the step.

Every example's shape is known before it is read: each task's examples are grouped by (target size,
number of condition pictures), shuffled and cut into global batches, the batches are shuffled over
the groups and repeated in another order each epoch. Together with the mixture of the tasks
(`pipeline`) the step number alone names task, shape and examples, for any number of hosts and
workers.

Seeds are hashed from names, because grain's shuffle adds the epoch to its seed: neighbouring seeds
would repeat each other's orders one epoch later.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data.example import Source, hashed
from qk_jax.pictures.fitting import Size

log = logging.getLogger(__name__)


class Group(NamedTuple):
    """Examples of one task and one shape.

    Attributes:
      task: one of TASKS.
      size: (H, W) of the targets.
      pictures: number of condition pictures.
      numbers: int [N], of the examples in the task's source.
    """

    task: str
    size: Size
    pictures: int
    numbers: np.ndarray


def groups_of(source: Source, batch: int, limit: int) -> list[Group]:
    """The groups of one task with at least a batch each, at most `limit` of them.

    While there are too many, or one is smaller than a batch, the rarest joins the group with the
    same number of pictures whose size is nearest in aspect ratio; its examples are then shown at
    that size. Changes source.size_of.

    Raises: InputError when no group has a batch of examples.
    """
    sizes = source.settings.sizes
    logs = np.log([width / height for height, width in sizes])
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
    groups = []
    for pictures, size in keys.T.tolist():
        numbers = np.flatnonzero((source.pictures_of == pictures) & (source.size_of == size))
        if len(numbers) >= batch:
            groups.append(Group(source.task, sizes[size], pictures, numbers))
        else:
            log.warning(
                "%s: %d records with %d pictures are less than a batch of %d and are left out",
                source.task, len(numbers), pictures, batch,
            )  # fmt: skip
    if not groups:
        raise InputError(
            f"{source.task} has {len(source)} records, less than one batch of {batch}; "
            "lower config.data.batch or set the task's weight to 0"
        )
    return groups


def batches_of(task: str, groups: Sequence[Group], batch: int, seed: int) -> grain.MapDataset:
    """The endless global batches of a task: (index of a group, int [batch] into its numbers).

    Each epoch's order leaves other examples out, so that every one is seen some time.
    """
    parts = []
    for index, group in enumerate(groups):
        if group.task == task:
            count = len(group.numbers)
            order = grain.MapDataset.range(count).shuffle(
                seed=hashed(seed, task, group.size, group.pictures)
            )
            cut = order[: count // batch * batch].batch(batch)
            parts.append(cut.map(functools.partial(_tagged, index)))
    whole = grain.MapDataset.concatenate(parts)
    return whole.shuffle(seed=hashed(seed, task, "batches")).repeat()


def _tagged(group: int, members: np.ndarray) -> tuple[int, np.ndarray]:
    return group, members
