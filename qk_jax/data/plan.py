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

With config.data.tokens batches of more condition pictures have fewer examples (`batch_sizes`). The
weights are shares of the examples all the same: a step is the more often of a task or shape the
fewer examples its batches have.

A run may have phases with sizes of their own (`in_turn`): the step names the phase, and the step
within the phase the batch, by a plan of that phase's groups.

So the step number alone names tasks, shape and examples, for any number of hosts and workers.

Seeds are hashed from names, because grain's shuffle adds the epoch to its seed: neighbouring seeds
would repeat each other's orders one epoch later.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import grain
import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data.batch_sizes import BatchSizes
from qk_jax.data.example import MAX_REFERENCES, Joined, Source, hashed
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
      source: name of its source, '' where the task has one.
      weight: of its source beside the others of the task.
    """

    task: str
    size: Size
    pictures: int
    numbers: np.ndarray
    conditions: tuple[Size, ...]
    references: tuple[Size, ...] = ()
    source: str = ""
    weight: float = 1.0

    @property
    def label(self) -> str:
        """Task and source, as metrics and errors name them."""
        return f"{self.task}/{self.source}" if self.source else self.task

    @property
    def shape(self) -> tuple[Size, ...]:
        """The sizes of the target and of the condition pictures."""
        return (self.size, *self.conditions)


def groups_of(source: Source, batch: BatchSizes, limit: int) -> list[Group]:
    """The groups of one task with at least a batch each, at most `limit` of them; where none has
    a batch, all of them.

    While there are too many, or one is smaller than a batch, the rarest joins the group with the
    same number of pictures whose targets, then whose references are nearest in aspect ratio; its
    examples are then shown at those sizes. While there are too many, groups that differ in their
    references only are joined first, because a reference is shown whole at any size. Changes
    source.size_of and source.references_of.

    Raises: InputError when there are no examples.
    """
    if not len(source.size_of):
        raise InputError(f"{source.task} has no example; set config.data.tasks.{source.task} to 0")
    sizes, shown = source.settings.sizes, source.settings.reference_shapes
    keys, counts, key_of = _keys(source, len(sizes), len(shown))
    needed = np.array([batch(pictures) for pictures in keys[:, 0].tolist()])
    owner = _merged(keys, counts, _aspects(sizes), _aspects(shown), needed, limit)
    key_of = owner.astype(key_of.dtype)[key_of]
    narrow = keys.astype(np.min_scalar_type(max(len(sizes), len(shown))))
    source.size_of, source.references_of = narrow[:, 1][key_of], narrow[:, 2:][key_of]
    groups = []
    often = np.bincount(key_of, minlength=len(keys))
    small = bool((often < needed).all())
    for key, numbers in _members(key_of, often).items():
        pictures, size, *references = keys[key].tolist()
        if small or len(numbers) >= needed[key]:
            fitted = tuple(shown[i] for i in references[:pictures])
            conditions = (sizes[size],) * pictures
            if source.task in MAX_REFERENCES:
                unknown = pictures - len(fitted)
                conditions = (*fitted, *[shown[source.settings.squarest(pictures)]] * unknown)
            groups.append(Group(source.task, sizes[size], pictures, numbers, conditions, fitted))
        else:
            log.warning(
                "%s: %d records with %d pictures are less than a batch of %d and are left out",
                source.task, len(numbers), pictures, needed[key],
            )  # fmt: skip
    if small:
        log.warning(
            "%s: its %d records, in %d shapes, are less than a batch of %d of any shape: a batch "
            "repeats them", source.task, len(source.size_of), len(groups), needed.min(),
        )  # fmt: skip
    return groups


def _keys(source: Source, sizes: int, shown: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a source with so many sizes of targets and references: int [K, 2 + R], number of pictures,
    size and sizes of references that occur; how many examples of each; int [N], of each example."""
    columns = [source.pictures_of, source.size_of, *source.references_of.T]
    most = [int(source.pictures_of.max()) + 1, sizes, *[shown] * (len(columns) - 2)]
    codes = np.ravel_multi_index(columns, most)
    counts = np.bincount(codes)
    found = np.flatnonzero(counts)
    place = np.zeros(len(counts), np.min_scalar_type(len(found)))
    place[found] = np.arange(len(found))
    return np.stack(np.unravel_index(found, most), axis=1), counts[found], place[codes]


def _members(key_of: np.ndarray, often: np.ndarray) -> dict[int, np.ndarray]:
    """{key: numbers of its examples, rising}, from the key of each and how many each key has."""
    order = np.argsort(key_of, kind="stable").astype(np.uint32)
    parts = np.split(order, np.cumsum(often)[:-1])
    return {key: part for key, part in enumerate(parts) if len(part)}


def by_source(groups: Sequence[Group], source: Joined) -> list[Group]:
    """The groups of several sources of a task, cut into those of each source."""
    found = []
    for group in groups:
        pieces = np.split(group.numbers, np.searchsorted(group.numbers, source.ends[:-1]))
        for part, numbers in zip(source.parts, pieces, strict=True):
            if len(numbers):
                own = group._replace(source=part.name, weight=part.weight, numbers=numbers)
                found.append(own)
    for part in source.parts:
        if part.name not in {group.source for group in found}:
            log.warning("%s: nothing is read from %s", source.task, part.name)
    return found


def _aspects(sizes: Sequence[Size]) -> np.ndarray:
    return np.log([width / height for height, width in sizes])


def _merged(
    keys: np.ndarray,
    counts: np.ndarray,
    targets: np.ndarray,
    references: np.ndarray,
    needed: np.ndarray,
    limit: int,
) -> np.ndarray:
    """Index [K] of the key that each of `keys` is merged into, by the law of `groups_of`.

    Args:
      keys: int [K, 2 + R], number of pictures, target size and reference sizes.
      counts: examples of each.
      targets, references: log aspect ratios of the sizes.
      needed: int [K], examples of a batch of each.
      limit: see `groups_of`.
    """
    owner, counts = np.arange(len(keys)), counts.copy()
    apart = keys[:, 0] * len(targets) + keys[:, 1]  # but for references
    while True:
        live = np.flatnonzero(counts)
        rarest = live[(counts[live] / needed[live]).argmin()]
        if len(live) <= limit and counts[rarest] >= needed[rarest]:
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


def batches_of(task: str, groups: Groups, batch: BatchSizes, seed: int) -> grain.MapDataset:
    """The endless global batches of a task: int [batch, 2], (index of a group, into its numbers).

    Each epoch's order leaves other examples out, so that every one is seen some time. The examples
    of a group that is smaller than a batch are repeated in it.
    """
    own = {index: group for index, group in groups.items() if group.task == task}
    if any(group.source for group in own.values()):
        return mixed_batches(own, {task: 1.0}, batch, seed)
    parts = []
    for index, group in own.items():
        whole = _whole(group, batch)
        order = _shuffled(index, group, seed)
        if whole > len(group.numbers):
            order = order.repeat(math.ceil(whole / len(group.numbers)))
        parts.append(order[:whole].batch(batch(group.pictures)))
    together = grain.MapDataset.concatenate(parts)
    return together.shuffle(seed=hashed(seed, task, "batches")).repeat()


def _whole(group: Group, batch: BatchSizes) -> int:
    """Examples in an epoch of a group, by whole batches."""
    examples = batch(group.pictures)
    return max(len(group.numbers) // examples, 1) * examples


def mixed_shares(groups: Groups, weights: Mapping[str, float]) -> dict[int, Fraction]:
    """What part of the examples of `mixed_batches` each group is, with the sum of the weights.

    A task's part of them is its weight, a source's of those its own, and within a source each
    example comes as often as another.
    """
    examples = Counter[str]()
    for group in groups.values():
        examples[group.label] += len(group.numbers)
    source = {group.label: (group.task, exactly(group.weight)) for group in groups.values()}
    total = {task: sum(own for name, own in source.values() if name == task) for task in weights}
    return {
        index: exactly(weights[group.task]) * exactly(group.weight) / total[group.task]
        * Fraction(len(group.numbers), examples[group.label])
        for index, group in groups.items()
    }  # fmt: skip


def shares(
    groups: Groups, weights: Mapping[str, float], batch: BatchSizes, mixed: bool
) -> dict[int, Fraction]:
    """What part of a run's examples each group is; they sum to 1.

    Args:
      groups: of all tasks.
      weights: of each task, above 0.
      batch: examples in a batch.
      mixed: by `mixed_batches`, not by `batches_of` each task.
    """
    found = mixed_shares(groups, weights)
    if not mixed:
        whole = Counter[str]()  # examples in an epoch of each task that has one source
        for group in groups.values():
            whole[group.task] += _whole(group, batch)
        found |= {
            index: exactly(weights[group.task]) * Fraction(_whole(group, batch), whole[group.task])
            for index, group in groups.items() if not group.source
        }  # fmt: skip
    total = sum(map(exactly, weights.values()))
    return {index: share / total for index, share in found.items()}


def mean_batch(
    groups: Groups, share: Mapping[int, Fraction], batch: BatchSizes, task: str = ""
) -> Fraction:
    """Examples of a step in the mean, where each group has its share of the examples.

    Args:
      groups: of all tasks.
      share: of `shares`.
      batch: examples in a batch.
      task: only of its steps.
    """
    own = {i: share[i] for i, group in groups.items() if task in ("", group.task)}
    steps = sum((part / batch(groups[i].pictures) for i, part in own.items()), Fraction())
    return sum(own.values(), Fraction()) / steps


def mixed_batches(
    groups: Groups, weights: Mapping[str, float], batch: BatchSizes, seed: int
) -> grain.MapDataset:
    """The endless global batches of all tasks, of one shape each: int [batch, 2] as `batches_of`.

    Args:
      groups: of all tasks.
      weights: of each task, above 0.
      batch: examples in a batch.
      seed: of the orders.
    """
    share = mixed_shares(groups, weights)
    parts, sums = [], []
    for (_, *conditions), indices in by_shape(groups).items():
        streams = [_shuffled(index, groups[index], seed).repeat() for index in indices]
        own, examples = [share[index] for index in indices], batch(len(conditions))
        parts.append(interleaved(streams, own).batch(examples))
        sums.append(sum(own, Fraction()) / examples)
    return interleaved(parts, sums)


def exactly(weight: float) -> Fraction:
    """A weight as it is written: 0.1 is a tenth."""
    return Fraction(str(float(weight)))


def interleaved(parts: Sequence[grain.MapDataset], shares: Sequence[Fraction]) -> grain.MapDataset:
    """Endless parts as one, evenly and in exactly these shares; grain's own mix rounds them."""
    return grain.MapDataset.select_from_datasets(parts, _Interleaving(shares))


class _Interleaving(grain.transforms.DatasetSelectionMap):
    """Element -> (part, element of the part).

    Of the first n elements, and at every n, the parts after one have their share of what it and
    they have together, rounded down. So no part is ever further from its share than a constant.
    """

    def __init__(self, shares: Sequence[Fraction]):
        scale = math.lcm(*(share.denominator for share in shares))
        self._own = [int(share * scale) for share in shares]
        self._from_here = list(itertools.accumulate(reversed(self._own)))[::-1]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, element: int) -> tuple[int, int]:
        before, until = element, element + 1
        for part, (own, rest) in enumerate(zip(self._own, self._from_here, strict=True)):
            later_before, later_until = before * (rest - own) // rest, until * (rest - own) // rest
            if later_before == later_until:
                return part, before - later_before
            before, until = later_before, later_until
        raise AssertionError("the last part has what is left")


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
    names = [group.source] if group.source else []
    seed = hashed(seed, group.task, group.size, group.pictures, *group.references, *names)
    order = grain.MapDataset.range(len(group.numbers)).shuffle(seed=seed)
    return order.map(functools.partial(_tagged, index))


def _tagged(group: int, member: int) -> np.ndarray:
    return np.array([group, member])
