"""Which examples are shown, read as training reads them, and which cannot be.

One example is in memory at a time, so that a page of many costs no more than a page of few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.example import Example, Joined, Part, Source
from qk_jax.data.importers.record_files import RecordSource
from qk_jax.data.pipeline import Bad, Pipeline
from qk_jax.data.prompts import PromptBuilder, text_tokens
from qk_jax.pictures.roles import SOURCE

_UNBOUNDED = 1 << 30  # tokens


class Text(NamedTuple):
    """What the VLM reads of an example.

    Attributes:
      read: the user's words, as far as they are read.
      cut: the rest, which is not.
      tokens: of the whole text.
      most: tokens of a text that are read.
      sequence: tokens of the whole prompt, with pictures and queries.
    """

    read: str
    cut: str
    tokens: int
    most: int
    sequence: int


class Shown(NamedTuple):
    """An example to show.

    Attributes:
      place: where it is: 'step 3, slot 5', or 'record 7'.
      task: its task.
      source: name of the set that it is from.
      example: None where it could not be read.
      no_text: training drops its text here.
      no_pictures: training drops its condition pictures here.
      text: None where there is no example.
      bad: why it could not be read, or which records it replaces.
    """

    place: str
    task: str
    source: str
    example: Example | None
    no_text: bool
    no_pictures: bool
    text: Text | None
    bad: tuple[Bad, ...]

    def conditions(self) -> list[tuple[str, np.ndarray]]:
        """(role, pixels) of each condition picture; roles are numbered where there are several."""
        if self.example is None:
            return []
        roles, found = self.example.roles, []
        for place, (role, pixels) in enumerate(zip(roles, self.example.pictures, strict=True)):
            name = "source" if role == SOURCE else "reference"
            several = roles.count(role) > 1
            found.append((f"{name} {roles[:place].count(role) + 1}" if several else name, pixels))
        return found

    def pictures(self) -> list[tuple[str, np.ndarray, bool]]:
        """(label, pixels, whether it is dropped) of the condition pictures and the target."""
        if self.example is None:
            return []
        found = [(role, pixels, self.no_pictures) for role, pixels in self.conditions()]
        return [*found, ("target", self.example.target, False)]


class Reader:
    """Reads examples to show from a pipeline, which gives training its own."""

    def __init__(self, pipeline: Pipeline, name: str):
        """`name` is the source of examples that name none."""
        self.pipeline, self.config, self.name = pipeline, pipeline.config, name
        self._prompts: dict[int, tuple[PromptBuilder, PromptBuilder]] = {}

    def sources(self) -> list[Part]:
        """The sources of all tasks, in the last phase of the run."""
        found: list[Part] = []
        for source in {source.task: source for source in self.pipeline.loader.sources}.values():
            alone = Part(self.name, 1.0, source)
            found += source.parts if isinstance(source, Joined) else [alone]
        return found

    def step(self, step: int, limit: int) -> Iterator[Shown]:
        """The first slots of the global batch of a step, as a run trains them."""
        for slot in range(min(limit, len(self.pipeline.plan[step]))):
            yield self._slot(step, slot)

    def run(self, steps: int, count: int, seed: int) -> Iterator[Shown]:
        """Slots of a run of so many steps, drawn by chance, in their order."""
        slots = len(self.pipeline.plan[0])
        for place in _drawn(steps * slots, count, seed):
            yield self._slot(*divmod(place, slots))

    def sample(self, count: int, seed: int) -> Iterator[Shown]:
        """Examples of all tasks, drawn by chance, each once; nothing is dropped."""
        parts = self.sources()
        ends = np.cumsum([len(part.source) for part in parts])
        for place in _drawn(int(ends[-1]), count, seed):
            index = int(np.searchsorted(ends, place, side="right"))
            length = len(parts[index].source)
            yield self._record(parts[index], place - int(ends[index]) + length)

    def records(self, records: Sequence[int]) -> Iterator[Shown]:
        """The examples with these numbers, of each source that has them; nothing is dropped.

        Raises: InputError when no source has one of them.
        """
        parts = self.sources()
        for record in records:
            found = [(part, n) for part in parts for n in _numbers(part.source, record)]
            if not found:
                tasks = ", ".join(dict.fromkeys(part.source.task for part in parts))
                raise InputError(
                    f"there is no record {record} of {tasks}; the numbers count from 0"
                )
            for part, number in found:
                yield self._record(part, number)

    def _slot(self, step: int, slot: int) -> Shown:
        element, bad = self.pipeline.plan[step], list[Bad]()
        place = f"step {step}, slot {slot}"
        group = self.pipeline.groups[element[slot, 0]]
        name = group.source or self.name
        try:
            example, dropped = self.pipeline.loader.slot(step, slot, element, bad)
            return self._whole(place, name, example, dropped, bad)
        except InputError as error:  # which would end a run
            return self._unread(place, group.task, name, [*bad, _bad(group.label, error)])

    def _record(self, part: Part, number: int) -> Shown:
        (name, _, source), record = part, number
        if isinstance(source, RecordSource):
            record = int(source.numbers[number])
            name = source.name(number) or name
        place = f"record {record}"
        try:
            return self._whole(place, name, source[number], (False, False), [])
        except InputError as error:
            return self._unread(place, source.task, name, [_bad(source.task, error)])

    def _whole(
        self,
        place: str,
        name: str,
        example: Example,
        dropped: tuple[bool, bool],
        bad: Sequence[Bad],
    ) -> Shown:
        text = self._text(example, *dropped)
        hidden = dropped[1] and bool(example.pictures)
        name = example.source or name
        return Shown(place, example.task, name, example, dropped[0], hidden, text, tuple(bad))

    def _unread(self, place: str, task: str, source: str, bad: Sequence[Bad]) -> Shown:
        return Shown(place, task, source, None, False, False, None, tuple(bad))

    def _text(self, example: Example, no_text: bool, no_pictures: bool) -> Text:
        """Raises: InputError for a text that is not valid Unicode."""
        prompts, whole = self._builders(len(example.pictures))
        seen = bool(example.pictures) and not no_pictures
        words = whole.template.instruction(
            "" if no_text else example.instruction, example.roles if seen else ()
        )
        ids, read = whole.encode_text(words), prompts.encode_text(words)
        sizes = [picture.shape[:2] for picture in example.pictures]
        built = prompts.build("" if no_text else example.instruction, sizes, example.roles, seen)
        words, cut = map(prompts.tokenizer.decode, (read, ids[len(read) :]))
        length = int(built["attention_mask"].sum())
        return Text(words, cut, len(ids), prompts.max_text, length)

    def _builders(self, pictures: int) -> tuple[PromptBuilder, PromptBuilder]:
        """Builders for a number of pictures, of which the second does not cut a text."""
        if pictures not in self._prompts:
            any_ = next(iter(self.pipeline.loader.prompts.values()))
            self._prompts[pictures] = (
                dataclasses.replace(any_, max_text=text_tokens(self.config, pictures)),
                dataclasses.replace(any_, max_text=_UNBOUNDED),
            )
        return self._prompts[pictures]


def _drawn(total: int, count: int, seed: int) -> list[int]:
    """At most `count` of the numbers below `total`, rising."""
    return sorted(Random(seed).sample(range(total), min(count, total)))


def _numbers(source: Source, record: int) -> list[int]:
    """Numbers of the examples of a source that `Example.record` calls by this number."""
    if isinstance(source, RecordSource):
        return np.flatnonzero(source.numbers == record).tolist()
    return [record] if record < len(source) else []


def _bad(source: str, error: InputError) -> Bad:
    return Bad(source, error.kind if isinstance(error, BadRecord) else "unreadable", str(error))


class Sizes(NamedTuple):
    """Of every example of a split, before its picture is read.

    Attributes:
      width, height: int [N], of targets in pixels.
      original: they are those of the files; otherwise those of the buckets.
    """

    width: np.ndarray
    height: np.ndarray
    original: bool


def sizes_of(parts: Sequence[Part]) -> Sizes:
    """The sizes of the targets of all sources, from the side index where each has one."""
    sources = [part.source for part in parts]
    original = all(isinstance(source, RecordSource) for source in sources)
    pairs = []
    for source in sources:
        if original and isinstance(source, RecordSource):
            for first, index in source.file.indices():
                ends = np.searchsorted(source.numbers, (first, first + len(index)))
                rows = source.numbers[slice(*ends)] - first
                pairs.append(np.stack([index[side][rows] for side in ("width", "height")]))
        else:
            pairs.append(np.array(source.settings.sizes)[source.size_of].T[::-1])
    width, height = np.concatenate(pairs, axis=1)
    return Sizes(width, height, original)
