"""Batches by step: reads the batch plan's examples, replaces bad ones, and makes arrays of them.

A step's batch depends on nothing but the step (`data.plan`): resuming is starting at another step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from random import Random
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.base.types import Batch
from qk_jax.base.workers import leave_to_parent
from qk_jax.data import settings
from qk_jax.data.batch_sizes import BatchSizes, batch_sizes
from qk_jax.data.example import MAX_REFERENCES, TASKS, Example, Joined, Source, hashed
from qk_jax.data.importers.registry import make_sources
from qk_jax.data.plan import (
    Group,
    Groups,
    batches_of,
    by_shape,
    by_source,
    exactly,
    groups_of,
    in_turn,
    interleaved,
    mean_batch,
    mixed_batches,
    shares,
)
from qk_jax.data.prompts import PromptBuilder, pixel_values, text_tokens
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.roles import SOURCE

log = logging.getLogger(__name__)
_FIRST_JUDGED = 1000  # records read before the share of bad ones is judged by itself
_ATTEMPTS = 64  # records tried instead of one bad one


class Bad(NamedTuple):
    """A bad record that was replaced; `source` is the task, and its source where it has several."""

    source: str
    kind: str
    message: str


Tried = tuple[list[Bad], Counter[str]]  # the bad ones, and how many of each source were read


@dataclasses.dataclass(frozen=True)
class Loader:
    """An element of the batch plan -> this host's slots as arrays. Pickles to worker processes.

    Attributes:
      groups: of the plan.
      sources: of each group.
      prompts: by the number of condition pictures.
      dropout: of each task.
      host: its index, and how many hosts share a global batch evenly.
      seed: of the dropout.
      targets: also show targets to the VLM (`target_pixel_values`).
      mixed: batches are of several tasks.
      finish: what is done with each batch at last.
    """

    groups: tuple[Group, ...]
    sources: tuple[Source, ...]
    prompts: Mapping[int, PromptBuilder]
    dropout: Mapping[str, settings.Dropout]
    host: tuple[int, int]
    seed: int
    targets: bool
    mixed: bool
    finish: Callable[[Batch], Any]

    def __call__(self, step: int, element: np.ndarray) -> tuple[Any, Tried]:
        bad: list[Bad] = []
        slots = self.slots(len(element))
        chosen = [self.slot(step, slot, element, bad) for slot in slots]
        examples, dropped = zip(*chosen, strict=True)
        prompts = self.prompts[self.groups[element[slots[0], 0]].pictures]
        tried = Counter(self.groups[index].label for index in element[slots, 0])
        tried.update(record.source for record in bad)
        return self.finish(collate(examples, dropped, prompts, self.targets)), (bad, tried)

    def slots(self, batch: int) -> range:
        """Those of a global batch of so many examples that are this host's."""
        index, count = self.host
        return range(index * batch // count, (index + 1) * batch // count)

    def slot(
        self, step: int, slot: int, element: np.ndarray, bad: list[Bad]
    ) -> tuple[Example, tuple[bool, bool]]:
        """The example of a slot of the global batch, and whether its (text, pictures) are dropped.

        Adds the bad records that it replaces to `bad`. Raises: InputError when many in a row are.
        """
        index, member = element[slot].tolist()
        example = self._worded(self._read(index, member, bad), step, slot)
        return example, self._dropped(step, slot, self.groups[index].task)

    def _worded(self, example: Example, step: int, slot: int) -> Example:
        """The example with one of its captions, drawn by step and slot."""
        if not example.captions:
            return example
        texts, weights = zip(*example.captions, strict=True)
        (text,) = Random(hashed(self.seed, "caption", step, slot)).choices(texts, weights)
        return example._replace(instruction=text)

    def _read(self, index: int, member: int, bad: list[Bad]) -> Example:
        """An example of a group, or a good one instead, the same wherever it is read.

        What is tried instead is spread over the group: the neighbours of a record are bad too where
        a whole file is.

        Raises: InputError when many in a row are bad.
        """
        group = self.groups[index]
        count = len(group.numbers)
        for attempt in range(min(_ATTEMPTS, count)):
            number = group.numbers[(member + attempt * _stride(member, count)) % count]
            try:
                example = self.sources[index][int(number)]
                if self.mixed:
                    _check_shape(example, group)
                return example
            except BadRecord as error:
                bad.append(Bad(group.label, error.kind, str(error)))
        raise InputError(
            f"{min(_ATTEMPTS, count)} records of {group.label} in a row are bad, the last: "
            f"{bad[-1].message}"
        )

    def _dropped(self, step: int, slot: int, task: str) -> tuple[bool, bool]:
        """Whether (text, pictures) are dropped."""
        drawn = Random(hashed(self.seed, "dropout", step, slot)).random()
        text, pictures, both = self.dropout[task]
        if drawn < both:
            return True, True
        return drawn < both + text, both + text <= drawn < both + text + pictures


def _stride(member: int, count: int) -> int:
    """A number that has no divisor in common with `count`, drawn by `member`."""
    stride = hashed("stride", member) % count
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _check_shape(example: Example, group: Group) -> None:
    """Raises BadRecord when a task's roles are not those by which tasks share shapes."""
    found = tuple(picture.shape[:2] for picture in example.pictures)
    if found != group.conditions:
        raise BadRecord(
            "roles",
            f"example {example.record} of {example.task} has condition pictures of {found}, not of "
            f"{group.conditions} (height, width); with config.data.mixed_batches the pictures of "
            f"{', '.join(MAX_REFERENCES)} are references and those of other tasks sources",
        )


def collate(
    examples: Sequence[Example],
    dropped: Sequence[tuple[bool, bool]],
    prompts: PromptBuilder,
    targets: bool = False,
) -> Batch:
    """Examples of one shape as a batch of numpy arrays.

    Args:
      examples: one for each slot.
      dropped: whether text and pictures of each are dropped.
      prompts: builds what the VLM reads.
      targets: add `target_pixel_values` and `whole`.
    """
    request = prompts.batch(
        ["" if text else x.instruction for x, (text, _) in zip(examples, dropped, strict=True)],
        [x.pictures for x in examples],
        [x.roles for x in examples],
        [not pictures for _, pictures in dropped],
    )
    batch: Batch = {
        **request,
        "target": np.stack([x.target for x in examples]),
        "task": np.array([TASKS.index(x.task) for x in examples], np.int32),
        "record": np.array([x.record for x in examples], np.int64),
    }
    if targets:
        seen = [pixel_values([x.target], prompts.vlm_pixels) for x in examples]
        batch["target_pixel_values"] = np.stack(seen)
        pairs = zip(examples, dropped, strict=True)
        batch["whole"] = np.array([not (text or (hid and x.pictures)) for x, (text, hid) in pairs])
    return batch


def abstract(
    config: Mapping[str, Any],
    prompts: PromptBuilder,
    shape: Sequence[Size],
    batch: BatchSizes,
) -> Batch:
    """A global training batch of one shape, without arrays.

    Args:
      config: of the run.
      prompts: of the run.
      shape: (H, W) of the target and of each condition picture.
      batch: examples in a batch.
    """
    target, *pictures = (np.zeros((*size, 3), np.uint8) for size in shape)
    example = Example("", target, tuple(pictures), (SOURCE,) * len(pictures), TASKS[0], 0)
    own = dataclasses.replace(prompts, max_text=text_tokens(config, len(pictures)))
    targets = bool(config["alignment"]["weight"])
    one, slots = collate([example], [(False, False)], own, targets), batch(len(pictures))

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((slots, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(leaf, one)


class _Planned(NamedTuple):
    """The plan of a split.

    Attributes:
      groups: of all phases.
      sources: of each group.
      plan: of the pipeline.
      of_task: batches of each task, in the last phase.
      shares: of each phase, by its first step: what part of its examples each group is.
      examples: of each phase, by its first step: of a step, in the mean.
    """

    groups: tuple[Group, ...]
    sources: tuple[Source, ...]
    plan: grain.MapDataset
    of_task: list[grain.MapDataset]
    shares: dict[int, dict[int, Fraction]]
    examples: dict[int, float]


def _planned(config: Mapping[str, Any], split: str, batch: BatchSizes, seed: int) -> _Planned:
    """The plan of a split. Raises InputError as `Pipeline`."""
    train = split == "train"
    phases = settings.phases(config)[0 if train else -1 :]
    groups: list[Group] = []
    sources: list[Source] = []
    plans, shares_of, examples = [], {}, {}
    mixed = train and config["data"].get("mixed_batches", False)
    for phase in phases:
        weights = {task: float(x) for task in TASKS if (x := phase.data["tasks"][task]) > 0}
        if not weights:
            raise InputError("no task has a weight; set config.data.tasks.text_to_image to 1")
        read = make_sources({**config, "data": phase.data}, split, seed, list(weights))
        begin = len(groups)
        for name in weights:
            found = groups_of(read[name], batch, phase.data["max_groups"])
            if isinstance(source := read[name], Joined):
                found = by_source(found, source)
            groups += found
            sources += [read[name]] * len(found)
        own = dict(list(enumerate(groups))[begin:])
        # The last phase is what a run without the others would be.
        order = seed if phase is phases[-1] else hashed(seed, "phase", phase.first)
        share = shares(own, weights, batch, mixed)
        of_task = [batches_of(name, own, batch, order) for name in weights]
        steps = [exactly(x) / mean_batch(own, share, batch, task) for task, x in weights.items()]
        plans.append(
            mixed_batches(own, weights, batch, order) if mixed else interleaved(of_task, steps)
        )
        shares_of[phase.first] = share
        examples[phase.first] = float(mean_batch(own, share, batch))
        if len(phases) > 1:
            _log_shapes(f"{split}, from step {phase.first}", own)
    _log_shapes(split, dict(enumerate(groups)))
    plan = in_turn(plans, [phase.first for phase in phases])
    return _Planned(tuple(groups), tuple(sources), plan, of_task, shares_of, examples)


def _log_shapes(when: str, groups: Groups) -> None:
    shapes = by_shape(groups)
    shared = sum(len({groups[i].task for i in x}) > 1 for x in shapes.values())
    log.info("%s: %d shapes of batches (%d shared by several tasks)", when, len(shapes), shared)


def unchanged(batch: Batch) -> Batch:
    """The batch itself."""
    return batch


class Pipeline:
    """All batches of one split of one experiment.

    Attributes:
      groups: every shape that occurs (tasks share shapes).
      plan: step -> int [B, 2], (index of a group, into its numbers), the same on all hosts.
      batch_sizes: examples of a global batch.
      shares: of each phase, by its first step: {index of a group: its part of the examples}.
      examples: of each phase, by its first step: those of a step, in the mean.
      loader: reads the slots of an element of the plan.
      bad: how many records were bad so far, by (source, kind); a source is a task, and its source
        where it has several.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        split: str,
        process_index: int | None = None,
        process_count: int | None = None,
        prompts: PromptBuilder | None = None,
        finish: Callable[[Batch], Any] = unchanged,
    ):
        """Reads the side indexes of the data, and makes the plan.

        Args:
          config: a whole experiment config; reads `data`, `model`, `seed`, `steps`, `validation`
            and `alignment`.
          split: 'train', or 'validation': without dropout and with a seed of its own.
          process_index: of this host; JAX's by default.
          process_count: of all hosts; JAX's by default.
          prompts: made from the config by default.
          finish: what is done with each batch at last, where it is made: in a thread or worker. It
            pickles.

        Raises:
          InputError: data is missing or does not fit the config.
        """
        self.config, data, train = config, config["data"], split == "train"
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        prompts = prompts or PromptBuilder.from_config(config)
        self.batch_sizes = (
            batch_sizes(config, prompts) if train else BatchSizes(config["validation"]["batch"])
        )
        seed = config["seed"] if train else config["validation"]["seed"]
        if uneven := [size for size in self.batch_sizes.all() if size % count]:
            raise InputError(f"a batch of {uneven[0]} cannot be shared by {count} hosts evenly")
        dropouts = settings.dropouts(data)
        planned = _planned(config, split, self.batch_sizes, seed)
        self.groups, self.plan, self.shares = planned.groups, planned.plan, planned.shares
        self.examples = planned.examples
        self.loader = Loader(
            groups=self.groups,
            sources=planned.sources,
            prompts={
                pictures: dataclasses.replace(prompts, max_text=text_tokens(config, pictures))
                for pictures in {group.pictures for group in self.groups}
            },
            dropout=dropouts if train else dict.fromkeys(TASKS, settings.NO_DROPOUT),
            host=(index, count),
            seed=seed,
            targets=bool(config["alignment"]["weight"]),
            mixed=train and data.get("mixed_batches", False),
            finish=finish,
        )
        self._loaded = self.plan.map_with_index(self.loader)
        self._prompts = prompts
        self._of_task = [plan.map_with_index(self.loader) for plan in planned.of_task]
        self.bad: Counter[tuple[str, str]] = Counter()
        self._tried = Counter[str]()
        self._examples: dict[str, str] = {}  # the last bad one of each source
        self._open: list[Any] = []

    def batch(self, step: int) -> Any:
        """This host's slots of the batch of a step, counted from 0.

        Raises:
          InputError: too many records are bad.
        """
        return self._checked(*self._loaded[step])

    def batches(self, first: int = 0) -> Iterator[Any]:
        """Batches of the steps first, first + 1, ..., made ahead by threads or processes."""
        data = self.config["data"]
        ahead = grain.ReadOptions(
            num_threads=max(data["threads"], 1), prefetch_buffer_size=max(data["prefetch"], 1)
        )
        made = self._loaded[first:].to_iter_dataset(ahead)
        if data["workers"]:
            if not flags.FLAGS.is_parsed():  # grain's workers read them, outside of absl.app
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(data["workers"], per_worker_buffer_size=2)
            made = made.mp_prefetch(options, worker_init_fn=leave_to_parent)
        iterator = iter(made)
        self._open.append(iterator)
        for element in iterator:
            yield self._checked(*element)

    def fixed(self) -> Iterator[Any]:
        """The same few batches each time, the tasks in turn: config.validation.batches of them,
        but at least one of each task."""
        count = max(self.config["validation"]["batches"], len(self._of_task))
        for number in range(count):
            of_task = self._of_task[number % len(self._of_task)]
            yield self._checked(*of_task[number // len(self._of_task)])

    def records(self, step: int) -> list[str]:
        """Task and number of every record of the global batch of a step, counted from 0."""
        chosen = [(self.groups[index], member) for index, member in self.plan[step].tolist()]
        return [f"{group.task} {group.numbers[member]}" for group, member in chosen]

    def abstract(self) -> list[Batch]:
        """Each global batch of another shape that occurs, without arrays, before it is finished."""
        shapes, sizes = dict.fromkeys(group.shape for group in self.groups), self.batch_sizes
        return [abstract(self.config, self._prompts, shape, sizes) for shape in shapes]

    def digest(self) -> str:
        """Of every shape and its examples: equal where all steps read the same."""
        found = hashlib.sha256()
        for group in self.groups:
            found.update(repr({**group._asdict(), "numbers": None}).encode())
            found.update(np.ascontiguousarray(group.numbers, np.int64).tobytes())
        return found.hexdigest()[:16]

    def close(self) -> None:
        """Stops threads and workers."""
        while self._open:
            iterator = self._open.pop()
            if hasattr(iterator, "close"):
                with contextlib.suppress(Exception):  # it may complain of being stopped
                    iterator.close()

    def bad_counts(self) -> dict[str, int]:
        """How many records of this host were bad so far, as metrics: {'bad/SOURCE/KIND': count}."""
        return {f"bad/{source}/{kind}": count for (source, kind), count in self.bad.items()}

    def _checked(self, batch: Any, found: Tried) -> Any:
        """Counts the batch's bad records. Raises: InputError when too many are bad."""
        bad, tried = found
        self._tried += tried
        for record in bad:
            log.warning("%s: replaced a bad record (%s): %s", *record)
            self.bad[record.source, record.kind] += 1
            self._examples[record.source] = record.message
        share, total, read = self.config["data"]["max_bad_share"], self.bad.total(), self._tried
        if bad and total > share * max(read.total(), _FIRST_JUDGED):
            of_source = Counter[str]()
            for (source, _), count in self.bad.items():
                of_source[source] += count
            worst = max(of_source, key=lambda source: of_source[source] / read[source])
            counts = ", ".join(f"{n} {kind} in {x}" for (x, kind), n in self.bad.most_common(8))
            raise InputError(
                f"{total} of {read.total()} records are bad ({counts}), more than "
                f"config.data.max_bad_share={share}; the worst is {worst} with {of_source[worst]} "
                f"of {read[worst]}, such as: {self._examples[worst]}"
            )
        return batch
