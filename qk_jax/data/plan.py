"""The batch plan: which examples each step reads, as a pure function of the step.

Every example's shape is known before it is read: each task's examples are grouped by (target size,
number of condition pictures, sizes of references), shuffled and cut into global batches, the
batches are shuffled over the groups and repeated in another order each epoch. Together with the
mixture of the tasks (`pipeline`) the step number alone names task, shape and examples, for any
number of hosts and workers.

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
      references: (H, W) of the references; () where all have one size.
    """

    task: str
    size: Size
    pictures: int
    numbers: np.ndarray
    references: tuple[Size, ...] = ()


def groups_of(source: Source, batch: int, limit: int) -> list[Group]:
    """The groups of one task with at least a batch each, at most `limit` of them.

    While there are too many, or one is smaller than a batch, the rarest joins the group with the
    same number of pictures whose targets, then whose references are nearest in aspect ratio; its
    examples are then shown at those sizes. While there are too many, groups that differ in their
    references only are joined first, because a reference is shown whole at any size. Changes
    source.size_of and source.references_of.

    Raises: InputError when no group has a batch of examples.
    """
    sizes, shown = source.settings.sizes, source.settings.reference_sizes
    columns = [source.pictures_of, source.size_of, *source.references_of.T]
    most = [int(source.pictures_of.max()) + 1, len(sizes), *[len(shown)] * (len(columns) - 2)]
    codes, key_of, counts = np.unique(
        np.ravel_multi_index(columns, most), return_inverse=True, return_counts=True
    )
    keys = np.stack(np.unravel_index(codes, most), axis=1)
    key_of = _merged(keys, counts, _aspects(sizes), _aspects(shown), batch, limit)[key_of]
    source.size_of, source.references_of = keys[key_of, 1], keys[key_of, 2:]
    groups = []
    for key in np.unique(key_of):
        pictures, size, *references = keys[key].tolist()
        numbers = np.flatnonzero(key_of == key)
        if len(numbers) >= batch:
            fitted = tuple(shown[i] for i in references[:pictures])
            groups.append(Group(source.task, sizes[size], pictures, numbers, fitted))
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


def _aspects(sizes: Sequence[Size]) -> np.ndarray:
    return np.log([width / height for height, width in sizes])


def _merged(
    keys: np.ndarray,
    counts: np.ndarray,
    targets: np.ndarray,
    references: np.ndarray,
    batch: int,
    limit: int,
) -> np.ndarray:
    """Index [K] of the key that each of `keys` is merged into, by the law of `groups_of`.

    Args:
      keys: int [K, 2 + R], number of pictures, target size and reference sizes.
      counts: examples of each.
      targets, references: log aspect ratios of the sizes.
      batch, limit: see `groups_of`.
    """
    owner, counts = np.arange(len(keys)), counts.copy()
    apart = keys[:, 0] * len(targets) + keys[:, 1]  # but for references
    while True:
        live = np.flatnonzero(counts)
        rarest = live[counts[live].argmin()]
        if len(live) <= limit and counts[rarest] >= batch:
            return owner
        twins = live[np.bincount(apart[live])[apart[live]] > 1]
        if len(live) > limit and len(twins):
            rarest = twins[counts[twins].argmin()]
        others = live[(keys[live, 0] == keys[rarest, 0]) & (live != rarest)]
        if not len(others):
            return owner
        gaps = np.abs(references[keys[others, 2:]] - references[keys[rarest, 2:]]).sum(axis=1)
        near = np.abs(targets[keys[others, 1]] - targets[keys[rarest, 1]])
        into = others[np.lexsort((gaps, near))[0]]
        owner[owner == rarest] = into
        counts[into] += counts[rarest]
        counts[rarest] = 0


def batches_of(task: str, groups: Sequence[Group], batch: int, seed: int) -> grain.MapDataset:
    """The endless global batches of a task: (index of a group, int [batch] into its numbers).

    Each epoch's order leaves other examples out, so that every one is seen some time.
    """
    parts = []
    for index, group in enumerate(groups):
        if group.task == task:
            count = len(group.numbers)
            order = grain.MapDataset.range(count).shuffle(
                seed=hashed(seed, task, group.size, group.pictures, *group.references)
            )
            cut = order[: count // batch * batch].batch(batch)
            parts.append(cut.map(functools.partial(_tagged, index)))
    whole = grain.MapDataset.concatenate(parts)
    return whole.shuffle(seed=hashed(seed, task, "batches")).repeat()


def _tagged(group: int, members: np.ndarray) -> tuple[int, np.ndarray]:
    return group, members
