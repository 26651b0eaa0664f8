"""Batches as a pure function of the step.

The plan knows every record's shape up front: each task's records are grouped by (target size,
number of condition pictures), shuffled and cut into global batches of places, batches are shuffled
over the groups and repeated with another order each epoch, and tasks are mixed by their weights. So
the step number alone names task, shape, records and what is dropped out, for any number of hosts
and workers: resuming is starting at another step.

Seeds are hashed from names, because grain's shuffle adds the epoch to its seed: neighbouring seeds
would repeat each other's orders one epoch later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import prompts
from qk_jax.data.example import TASKS, Example, hashed
from qk_jax.data.importers.registry import make_sources
from qk_jax.data.plan import MAX_GROUPS, Group, Shape, _Tag, groups_of
from qk_jax.data.prompts import make_layout, text_tokens

log = logging.getLogger(__name__)
_FIRST_JUDGED = 1000  # records read before the share of bad ones is judged by itself
_ATTEMPTS = 64  # records tried in place of one bad one
Batch = dict[str, Any]


class Bad(NamedTuple):
    """A bad record that was replaced."""

    source: str
    kind: str
    message: str


@dataclasses.dataclass(frozen=True)
class Load:
    """Places of a global batch -> this host's rows as arrays. Pickles to worker processes.

    Attributes:
      groups, sources: of the plan.
      layouts: build rows of tokens, by the number of condition pictures.
      dropout: probabilities of dropping text, pictures and both.
      rows: (first, end) of this host in the global batch.
      seed: of the dropout.
      targets: also show targets to the VLM (`target_pixel_values`).
    """

    groups: tuple[Group, ...]
    sources: Mapping[str, Any]
    layouts: Mapping[int, prompts.PromptLayout]
    dropout: Mapping[str, float]
    rows: tuple[int, int]
    seed: int
    targets: bool

    def __call__(self, step: int, element: tuple[int, np.ndarray]) -> tuple[Batch, list[Bad]]:
        group, places = element
        bad: list[Bad] = []
        rows, examples = range(*self.rows), []
        for row in rows:
            examples.append(self._read(self.groups[group], int(places[row]), bad))
        dropped = [self._dropped(step, row) for row in rows]
        layout = self.layouts[self.groups[group].pictures]
        return collate(examples, dropped, layout, self.targets), bad

    def _read(self, group: Group, place: int, bad: list[Bad]) -> Example:
        """The example at a place, or the next good one of its group.

        Raises: InputError when many in a row are bad.
        """
        source = self.sources[group.task]
        for attempt in range(min(_ATTEMPTS, len(group.numbers))):
            number = group.numbers[(place + attempt) % len(group.numbers)]
            try:
                return source[int(number)]
            except BadRecord as error:
                bad.append(Bad(group.task, error.kind, str(error)))
        raise InputError(f"{len(bad)} records in a row are bad, the last: {bad[-1].message}")

    def _dropped(self, step: int, row: int) -> tuple[bool, bool]:
        """Whether (text, pictures) are dropped at this place of the plan."""
        drawn = Random(hashed(self.seed, "dropout", step, row)).random()
        text, pictures, both = (self.dropout[name] for name in ("text", "pictures", "both"))
        if drawn < both:
            return True, True
        return drawn < both + text, both + text <= drawn < both + text + pictures


def collate(
    examples: Sequence[Example],
    dropped: Sequence[tuple[bool, bool]],
    layout: prompts.PromptLayout,
    targets: bool = False,
) -> Batch:
    """Examples of one shape as one batch of numpy arrays.

    Returns:
      input_ids int32 [B, S], attention_mask bool [B, S], position_ids int32 [B, 3, S],
      text_mask bool [B, T], pixel_values float32 [B, P, 1176], target uint8 [B, H, W, 3],
      conditions: tuple of uint8 [B, h, w, 3], condition_mask bool [B], roles int32 [B, n],
      task int32 [B] (index into TASKS), record int64 [B], and with `targets`
      target_pixel_values float32 [B, P', 1176].
    """
    sizes = [picture.shape[:2] for picture in examples[0].pictures]
    rows = [
        layout.build("" if text else example.instruction, sizes, pictures=not pictures)
        for example, (text, pictures) in zip(examples, dropped, strict=True)
    ]
    batch: Batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    shown = [prompts.pixel_values(example.pictures, layout.vlm_pixels) for example in examples]
    batch["pixel_values"] = np.stack(shown)
    batch["target"] = np.stack([example.target for example in examples])
    batch["conditions"] = tuple(map(np.stack, zip(*(e.pictures for e in examples), strict=True)))
    batch["condition_mask"] = np.array([not pictures for _, pictures in dropped])
    batch["roles"] = np.array([example.roles for example in examples], np.int32)
    batch["task"] = np.array([TASKS.index(example.task) for example in examples], np.int32)
    batch["record"] = np.array([example.record for example in examples], np.int64)
    if targets:
        seen = [prompts.pixel_values([example.target], layout.vlm_pixels) for example in examples]
        batch["target_pixel_values"] = np.stack(seen)
    return batch


class Pipeline:
    """All batches of one split of one experiment.

    Args:
      config: a whole experiment config; reads `data`, `model`, `seed`, `validation`, `alignment`.
      split: 'train', or 'validation': without dropout and with a seed of its own.
      process_index, process_count: of this host; JAX's by default.
      layout: of token rows; made from the config by default.

    Raises: InputError for data that is missing or does not fit the config.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        split: str,
        process_index: int | None = None,
        process_count: int | None = None,
        layout: prompts.PromptLayout | None = None,
    ):
        self.config, self.split, data = config, split, config["data"]
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        train = split == "train"
        batch = data["batch"] if train else config["validation"]["batch"]
        seed = config["seed"] if train else config["validation"]["seed"]
        if batch % count:
            raise InputError(f"a batch of {batch} cannot be shared by {count} hosts evenly")
        weights = {name: float(data["tasks"][name]) for name in TASKS if data["tasks"][name] > 0}
        if not weights:
            raise InputError("no task has a weight; set config.data.tasks.text_to_image to 1")
        made = make_sources(config, split, seed, list(weights))
        limit = data.get("max_groups", MAX_GROUPS)
        per_task = {
            name: groups_of(made[name], made[name].settings.sizes, batch, limit) for name in weights
        }
        self.groups = tuple(group for groups in per_task.values() for group in groups)
        self.batch_size = batch
        layout = layout or make_layout(config)
        layouts = {
            count: dataclasses.replace(layout, max_text=text_tokens(config, count))
            for count in {group.pictures for group in self.groups}
        }
        load = Load(
            self.groups, made, layouts,
            dict(data["dropout"]) if train else dict.fromkeys(("text", "pictures", "both"), 0.0),
            (index * batch // count, (index + 1) * batch // count),
            seed, bool(config["alignment"]["weight"]),
        )  # fmt: skip
        plans = {name: self._plan_of(name, seed) for name in weights}
        self.plan = grain.MapDataset.mix(list(plans.values()), weights=list(weights.values()))
        self.dataset = self.plan.map_with_index(load)
        self._of_task = [plan.map_with_index(load) for plan in plans.values()]
        self._read, self._bad = 0, Counter()
        self._examples: list[str] = []
        self._open: list[Any] = []

    def _plan_of(self, task: str, seed: int) -> grain.MapDataset:
        """Endless (group, places [B]) of one task."""
        parts = []
        for number, group in enumerate(self.groups):
            if group.task == task:
                whole = len(group.numbers) // self.batch_size * self.batch_size
                places = grain.MapDataset.range(len(group.numbers))
                # Each epoch's order leaves out others, so that no record is never seen.
                places = places.shuffle(seed=hashed(seed, task, group.size, group.pictures))[:whole]
                parts.append(places.batch(self.batch_size).map(_Tag(number)))
        whole = grain.MapDataset.concatenate(parts) if len(parts) > 1 else parts[0]
        return whole.shuffle(seed=hashed(seed, task, "batches")).repeat()

    def shapes(self) -> list[Shape]:
        """Every shape that occurs, and so every program that is compiled (tasks share shapes)."""
        return [
            Shape(g.task, g.size, g.pictures, len(g.numbers), len(g.numbers) // self.batch_size)
            for g in self.groups
        ]

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0: this host's rows, see `collate`.

        Raises: InputError when too many records are bad.
        """
        return self._checked(*self.dataset[step])

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """Batches of the steps first, first + 1, ..., made ahead by threads or processes."""
        data = self.config["data"]
        ahead = grain.ReadOptions(
            num_threads=max(data["threads"], 1), prefetch_buffer_size=max(data["prefetch"], 1)
        )
        made = self.dataset[first:].to_iter_dataset(ahead)
        if data["workers"]:
            _parse_no_flags()
            options = grain.MultiprocessingOptions(data["workers"], per_worker_buffer_size=2)
            made = made.mp_prefetch(options)
        iterator = iter(made)
        self._open.append(iterator)
        for element in iterator:
            yield self._checked(*element)

    def fixed(self) -> Iterator[Batch]:
        """The same few batches each time, the tasks in turn: config.validation.batches of them,
        but at least one of each task."""
        count = max(self.config["validation"]["batches"], len(self._of_task))
        for number in range(count):
            of_task = self._of_task[number % len(self._of_task)]
            yield self._checked(*of_task[number // len(self._of_task)])

    def close(self) -> None:
        """Stops threads and workers."""
        while self._open:
            iterator = self._open.pop()
            if hasattr(iterator, "close"):
                with contextlib.suppress(Exception):  # it may complain of being stopped
                    iterator.close()

    @property
    def bad_records(self) -> dict[tuple[str, str], int]:
        """How many records were bad so far, by (task, kind)."""
        return dict(self._bad)

    def _checked(self, batch: Batch, bad: list[Bad]) -> Batch:
        self._read += len(batch["record"])
        for record in bad:
            log.warning("%s: replaced a bad record (%s): %s", *record)
            self._bad[record.source, record.kind] += 1
            self._examples = [*self._examples[-4:], record.message]
        share, total = self.config["data"]["max_bad_share"], self._bad.total()
        if bad and total > share * max(self._read, _FIRST_JUDGED):
            counts = ", ".join(f"{n} {kind} in {task}" for (task, kind), n in self._bad.items())
            raise InputError(
                f"{total} of {self._read} records are bad ({counts}), more than "
                f"config.data.max_bad_share={share}; such as: {'; '.join(self._examples)}"
            )
        return batch


def _parse_no_flags() -> None:
    """grain's workers read absl flags, which nobody parses outside absl.app."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
