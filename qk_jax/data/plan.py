"""The batch plan: which examples each step reads, as a pure function of the step.

Every example's shape is known before it is read: each task's examples are grouped by (target size,
number of condition pictures, sizes of references). A batch is of one task, or of one shape:

- Of one task (`batches_of`): a group's examples are shuffled and cut into global batches, the
  batches are shuffled over the task's groups and repeated in another order each epoch, and the
  mixture of the tasks (`pipeline`) says whose batch a step takes.
- Of one shape (`mixed_batches`): groups of several tasks with the same target size and sizes of
  condition pictures make one shape. A group's share is its task's weight
  times its part of the task's examples. A step takes a batch of a shape by the sum of the shares
  of its groups, and the slots of that shape's batches, counted on from one to the next, take the
  groups by their shares: over many steps every task has its weight. Each group's examples are
  shuffled, and all come once in an epoch of the group.

A run may have phases with sizes of their own (`in_turn`): the step names the phase, and the step
within the phase the batch, by a plan of that phase's groups.

So the step number alone names tasks, shape and examples, for any number of hosts and workers.

Seeds are hashed from names, because grain's shuffle adds the epoch to its seed: neighbouring seeds
would repeat each other's orders one epoch later.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data.example import MAX_REFERENCES, Source, hashed
from qk_jax.pictures.fitting import Size

log = logging.getLogger(__name__)
_FOREVER = 2**40  # steps; grain joins plans that have an end


class Group(NamedTuple):
    """Examples of one task and one shape.

    Attributes:
      task: one of TASKS.
      size: (H, W) of the targets.
      pictures: number of condition pictures.
      numbers: int [N], of the examples in the task's source.
      conditions: (H, W) of the condition pictures; sources have the target's size.
      references: (H, W) of the references; () where all have one size.
    """

    task: str
    size: Size
    pictures: int
    numbers: np.ndarray
    conditions: tuple[Size, ...]
    references: tuple[Size, ...] = ()

    @property
    def shape(self) -> tuple[Size, ...]:
        """The sizes of the target and of the condition pictures."""
        return (self.size, *self.conditions)


def groups_of(source: Source, batch: int, limit: int) -> list[Group]:
    """The groups of one task with at least a batch each, at most `limit` of them.

    While there are too many, or one is smaller than a batch, the rarest joins the group with the
    same number of pictures whose targets, then whose references are nearest in aspect ratio; its
    examples are then shown at those sizes. While there are too many, groups that differ in their
    references only are joined first, because a reference is shown whole at any size. Changes
    source.size_of and source.references_of.

    Raises: InputError when no group has a batch of examples.
    """
    sizes, shown = source.settings.sizes, source.settings.reference_shapes
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
            conditions = (sizes[size],) * pictures
            if source.task in MAX_REFERENCES:
                unknown = pictures - len(fitted)
                conditions = (*fitted, *[shown[source.settings.squarest(pictures)]] * unknown)
            groups.append(Group(source.task, sizes[size], pictures, numbers, conditions, fitted))
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


Groups = Mapping[int, Group]  # by the index that the plan names them with


def batches_of(task: str, groups: Groups, batch: int, seed: int) -> grain.MapDataset:
    """The endless global batches of a task: int [batch, 2], (index of a group, into its numbers).

    Each epoch's order leaves other examples out, so that every one is seen some time.
    """
    parts = []
    for index, group in groups.items():
        if group.task == task:
            whole = len(group.numbers) // batch * batch
            parts.append(_shuffled(index, group, seed)[:whole].batch(batch))
    together = grain.MapDataset.concatenate(parts)
    return together.shuffle(seed=hashed(seed, task, "batches")).repeat()


def mixed_batches(
    groups: Groups, weights: Mapping[str, float], batch: int, seed: int
) -> grain.MapDataset:
    """The endless global batches of all tasks, of one shape each: int [batch, 2] as `batches_of`.

    Args:
      groups: of all tasks.
      weights: of each task, above 0.
      batch: examples in a batch.
      seed: of the orders.
    """
    examples = Counter[str]()
    for group in groups.values():
        examples[group.task] += len(group.numbers)
    share = {i: weights[x.task] * len(x.numbers) / examples[x.task] for i, x in groups.items()}
    parts, shares = [], []
    for indices in by_shape(groups).values():
        streams = [_shuffled(index, groups[index], seed).repeat() for index in indices]
        own = [share[index] for index in indices]
        parts.append(grain.MapDataset.mix(streams, own).batch(batch))
        shares.append(sum(own))
    return grain.MapDataset.mix(parts, shares)


def in_turn(plans: Sequence[grain.MapDataset], firsts: Sequence[int]) -> grain.MapDataset:
    """Endless plans one after another, each from its first step on, where it begins with its 0."""
    ends = [*firsts[1:], _FOREVER]
    lengths = [end - first for first, end in zip(firsts, ends, strict=True)]
    return grain.MapDataset.concatenate([x[:n] for x, n in zip(plans, lengths, strict=True)])


def by_shape(groups: Groups) -> dict[tuple[Size, ...], list[int]]:
    """Indices of the groups of each shape."""
    found: dict[tuple[Size, ...], list[int]] = {}
    for index, group in groups.items():
        found.setdefault(group.shape, []).append(index)
    return found


def _shuffled(index: int, group: Group, seed: int) -> grain.MapDataset:
    """(index, into its numbers) of every example of a group, in another order each epoch."""
    seed = hashed(seed, group.task, group.size, group.pictures, *group.references)
    order = grain.MapDataset.range(len(group.numbers)).shuffle(seed=seed)
    return order.map(functools.partial(_tagged, index))


def _tagged(group: int, member: int) -> np.ndarray:
    return np.array([group, member])
