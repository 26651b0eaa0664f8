"""The six tasks, made from captioned cut-outs, so that the exact truth of every example is known.

A task is a source of examples; example `i` is a pure function of (seed, split, task, i).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data import buckets
from qk_jax.data.example import TASKS, Example, Source, TaskSettings, hashed
from qk_jax.data.synthesis import scenes
from qk_jax.data.synthesis.boxes import FULL, aligned, box_at, is_horizontal, positions
from qk_jax.data.synthesis.corpus import Corpus, Cutout
from qk_jax.data.synthesis.scenes import COLOURS, Item
from qk_jax.data.synthesis.wordings import BESIDE, TO, WHERE, WORDINGS, with_article
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.roles import REFERENCE, SOURCE

# A caption with more words names a subject in tasks with one subject only: instructions stay short.
_SHORT = 4


def _uniform(key: int, numbers: np.ndarray) -> np.ndarray:
    """A number in [0, 1) drawn for each of `numbers`, by splitmix64."""
    with np.errstate(over="ignore"):
        x = (numbers.astype(np.uint64) + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64


class Task(abc.ABC):
    """A task on a corpus (a `Source`).

    Example i shows cut-out `first[i % len(first)]` and, where a task needs more, others by chance.
    """

    task: str
    variants: int  # examples per cut-out
    multiple = False  # names several subjects, so uses short captions only

    def __init__(self, corpus: Corpus, settings: TaskSettings):
        self.corpus, self.settings = corpus, settings
        self.key = hashed(settings.seed, corpus.split, self.task)
        self.first = corpus.captioned(_SHORT) if self.multiple else np.arange(len(corpus))
        if len(self.first) < 4:
            raise InputError(
                f"{corpus.file.path} has {len(self.first)} pictures fit for {self.task}; "
                "at least 4 are needed"
            )
        self._references: dict[str, np.ndarray] = {}
        numbers = np.arange(len(self))
        self.size_of = self._sizes(numbers).astype(np.int32)
        self.pictures_of = self._pictures(numbers).astype(np.int32)

    def __len__(self) -> int:
        return len(self.first) * self.variants

    def __getitem__(self, number: int) -> Example:
        """Example `number`. Raises: BadRecord when a picture or caption in it is bad."""
        rng = Random(self.key * 2_654_435_761 + int(number))
        size = self.settings.sizes[self.size_of[number]]
        cutout = self.corpus[self.first[number % len(self.first)]]
        return self._make(int(number), rng, size, cutout)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_references": {}}

    # ---- what a task decides -------------------------------------------------------------------

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the target size of each example: by chance, the squarest half of the time."""
        sizes = self.settings.sizes
        order = sorted(range(len(sizes)), key=lambda i: abs(np.log(sizes[i][0] / sizes[i][1])))
        drawn = (_uniform(self.key ^ 0x51, numbers) * 2 * max(1, len(sizes) - 1)).astype(np.int64)
        return np.array(order)[np.where(drawn < len(sizes), drawn, 0)]

    def _pictures(self, numbers: np.ndarray) -> np.ndarray:
        """Number of condition pictures of each example."""
        return np.ones(len(numbers))

    @abc.abstractmethod
    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        """Example `number` about the cut-out `first`."""

    # ---- what tasks share ----------------------------------------------------------------------

    def _sizes_of_cutouts(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the size nearest in aspect ratio to the example's first cut-out."""
        index = self.corpus.file.index[self.first[numbers % len(self.first)]]
        return buckets.nearest(index["height"], index["width"], self.settings.sizes)

    def _others(self, rng: Random, taken: Sequence[Cutout], count: int) -> list[Cutout]:
        """`count` cut-outs with short captions whose subjects are not yet in the picture."""
        pool = self.corpus.captioned(_SHORT)
        found: list[Cutout] = []
        names = {cutout.caption for cutout in taken} | {cutout.subject for cutout in taken}
        while len(found) < count:
            other = self.corpus[rng.choice(pool)]
            if other.caption not in names and other.subject not in names:
                found.append(other)
                names |= {other.caption, other.subject}
        return found

    def _ground(
        self,
        rng: Random,
        size: Size,
        cutouts: Sequence[Cutout],
        fancy: float,
        white: float = 0.0,
        unlike: np.ndarray | None = None,
    ) -> tuple[np.ndarray, str]:
        """A background and its phrase: white, one colour, or with probability `fancy` two.

        `unlike` is a canvas whose colour is left out.
        """
        if rng.random() < white:
            return scenes.flat(size, "white"), "a white background"
        shown = np.stack([cutout.colour for cutout in cutouts])
        taken = () if unlike is None else tuple(unlike[0, 0].astype(int).tolist())
        names = [name for name, colour in COLOURS.items() if colour != taken]
        first = scenes.contrasting(rng, shown, names)
        if rng.random() >= fancy:
            return scenes.flat(size, first), with_article(f"{first} background")
        rest = [name for name in names if name != first]
        second = scenes.contrasting(rng, shown, rest)
        if rng.random() < 0.4:
            phrase = f"a background from {first} at the top to {second} at the bottom"
            return scenes.gradient(size, first, second), phrase
        pattern = rng.choice(scenes.PATTERNS)
        phrase = f"a {pattern} background of {first} and {second}"
        return scenes.patterned(size, pattern, first, second), phrase

    def _reference(self, cutout: Cutout) -> np.ndarray:
        """The cut-out on a white square; kept, because it is the same in every example."""
        if cutout.key not in self._references:
            side = self.settings.reference_size
            canvas = scenes.flat((side, side), "white")
            self._references[cutout.key] = scenes.paint(canvas, [Item(cutout.rgba, FULL)])
        return self._references[cutout.key]

    def _example(
        self,
        number: int,
        rng: Random,
        kind: str,
        gaps: dict[str, str],
        target: np.ndarray,
        cutouts: Sequence[Cutout],
        source: np.ndarray | None = None,
        references: Sequence[Cutout] = (),
    ) -> Example:
        """Puts an example together, with one of the wordings of its kind."""
        instruction = rng.choice(WORDINGS[kind]).format(**gaps)
        pictures = [] if source is None else [source]
        pictures += [self._reference(cutout) for cutout in references]
        roles = (SOURCE,) * (source is not None) + (REFERENCE,) * len(references)
        subjects = tuple(cutout.subject for cutout in cutouts)
        return Example(
            instruction, target, tuple(pictures), roles, self.task, number, kind, subjects
        )


class TextToImage(Task):
    """A caption, on white or on a named background -> the picture."""

    task, variants = "text_to_image", 8

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        return self._sizes_of_cutouts(numbers)

    def _pictures(self, numbers: np.ndarray) -> np.ndarray:
        return np.zeros(len(numbers))

    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        kind = "plain" if rng.random() < 0.5 else "grounded"
        canvas, ground = scenes.flat(size, "white"), ""
        if kind == "grounded":
            canvas, ground = self._ground(rng, size, [first], fancy=0.2)
        target = scenes.paint(canvas, [Item(first.rgba, FULL)])
        gaps = {"a": first.caption, "ground": ground}
        return self._example(number, rng, kind, gaps, target, [first])


class _OnScenes(Task):
    """Tasks on a scene of one cut-out, sometimes of two."""

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        return self._sizes_of_cutouts(numbers)

    def _scene(
        self, rng: Random, size: Size, first: Cutout
    ) -> tuple[np.ndarray, list[Item], list[Cutout]]:
        cutouts = [first]
        if rng.random() < 0.25:
            cutouts += self._others(rng, cutouts, 1)
        canvas, _ = self._ground(rng, size, cutouts, fancy=0.2, white=0.3)
        if len(cutouts) == 2:
            boxes = aligned(2, is_horizontal(rng, size))
        else:
            boxes = [box_at(rng.choice(positions(size)), size, rng.uniform(0.55, 0.95))]
            boxes = boxes if rng.random() < 0.5 else [FULL]
        return canvas, [Item(c.rgba, box) for c, box in zip(cutouts, boxes, strict=True)], cutouts


class Reconstruction(_OnScenes):
    """A picture -> the same picture."""

    task, variants = "reconstruction", 16

    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        canvas, items, cutouts = self._scene(rng, size, first)
        picture = scenes.paint(canvas, items)
        return self._example(number, rng, "copy", {}, picture, cutouts, source=picture)


class Transformation(_OnScenes):
    """A picture and what to do with the whole of it -> the changed picture."""

    task, variants = "transformation", 32
    kinds = (*scenes.CHANGES, "tint", "silhouette")

    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        canvas, items, cutouts = self._scene(rng, size, first)
        turns = () if size[0] == size[1] else scenes.TURNS  # would not fit the target's size
        kind = rng.choice([kind for kind in self.kinds if kind not in turns])
        source, gaps = scenes.paint(canvas, items), {}
        if kind == "tint":
            gaps["colour"] = rng.choice(scenes.TINTS)
            target = scenes.tinted(source, gaps["colour"])
        elif kind == "silhouette":
            if float(canvas.mean()) < 90:  # black on dark shows nothing
                canvas = scenes.flat(size, rng.choice(("white", "yellow", "light blue", "pink")))
                source = scenes.paint(canvas, items)
            target = scenes.paint(canvas, [_black(item) for item in items])
        else:
            target = scenes.CHANGES[kind](source)
        return self._example(number, rng, kind, gaps, target, cutouts, source=source)


def _black(item: Item) -> Item:
    rgba = item.rgba.copy()
    rgba[..., :3] = 0
    return Item(rgba, item.box)


class Editing(Task):
    """A source picture and an instruction about something in it -> the edited picture."""

    task, variants, multiple = "editing", 32, True
    # Kinds of edits and how often they come.
    kinds = {
        "background": 2, "recolour": 2, "remove": 2, "add": 4, "swap": 1.5,
        "move": 1.5, "bigger": 0.75, "smaller": 0.75, "replace": 1,
    }  # fmt: skip

    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        (kind,) = rng.choices(list(self.kinds), list(self.kinds.values()))
        if kind in ("move", "bigger", "smaller"):
            edit = self._geometry
        elif kind == "add":
            edit = self._add
        else:
            edit = self._things
        return edit(number, rng, size, first, kind)

    def _canvas(self, rng: Random, size: Size, cutouts: Sequence[Cutout]) -> np.ndarray:
        return self._ground(rng, size, cutouts, fancy=0.0, white=0.3)[0]

    def _geometry(self, number: int, rng: Random, size: Size, a: Cutout, kind: str) -> Example:
        """Moves one thing, or changes its size."""
        canvas, gaps = self._canvas(rng, size, [a]), {"a": a.caption}
        if kind == "move":
            start, end = rng.sample(positions(size), 2)
            gaps["to"] = TO[end]
            boxes = [box_at(start, size, 0.6), box_at(end, size, 0.6)]
        else:
            boxes = [box_at("middle", size, extent) for extent in (0.47, 0.94)]
            boxes = boxes if kind == "bigger" else boxes[::-1]
        source, target = (scenes.paint(canvas, [Item(a.rgba, box)]) for box in boxes)
        return self._example(number, rng, kind, gaps, target, [a], source=source)

    def _add(self, number: int, rng: Random, size: Size, a: Cutout, kind: str) -> Example:
        """Adds a shape, a second copy, or another subject beside one thing."""
        cutouts, canvas = [a], None
        choice = rng.random()
        if choice < 0.6:
            colour, form = rng.choice(scenes.TINTS), rng.choice(scenes.SHAPES)
            x, added = with_article(f"{colour} {form}"), scenes.shape(form, colour)
            others = [name for name in COLOURS if name != colour]
            shown = np.stack([a.colour, np.array(COLOURS[colour], np.float32)])
            canvas = scenes.flat(size, scenes.contrasting(rng, shown, others))
        elif choice < 0.85:
            x, added = f"another {a.caption}", a.rgba
        else:
            cutouts += self._others(rng, [a], 1)
            x, added = with_article(cutouts[1].caption), cutouts[1].rgba
        canvas = self._canvas(rng, size, cutouts) if canvas is None else canvas
        horizontal, before = is_horizontal(rng, size), rng.random() < 0.5
        boxes = aligned(2, horizontal)[:: 1 if before else -1]  # the new thing's box, then a's
        side = ("left" if before else "right") if horizontal else ("top" if before else "bottom")
        here = Item(a.rgba, boxes[1])
        source, target = (scenes.paint(canvas, i) for i in ([here], [here, Item(added, boxes[0])]))
        gaps = {"a": a.caption, "x": x, "beside": BESIDE[side]}
        return self._example(number, rng, kind, gaps, target, cutouts, source=source)

    def _things(self, number: int, rng: Random, size: Size, a: Cutout, kind: str) -> Example:
        """Edits in a picture of two things, or (background, recolour) of one or two."""
        cutouts = [a]
        if kind in ("remove", "swap", "replace") or rng.random() < 0.5:
            cutouts += self._others(rng, cutouts, 1)
        boxes = aligned(2, is_horizontal(rng, size)) if len(cutouts) == 2 else [FULL]
        boxes = boxes if rng.random() < 0.5 else boxes[::-1]
        canvas = after = self._canvas(rng, size, cutouts)
        items = [Item(c.rgba, box) for c, box in zip(cutouts, boxes, strict=True)]
        gaps = {"a": a.caption, "b": cutouts[-1].caption}
        changed = items
        if kind == "background":
            after, gaps["ground"] = self._ground(rng, size, cutouts, 0.2, unlike=canvas)
        elif kind == "recolour":
            gaps["colour"] = rng.choice(scenes.TINTS)
            changed = [Item(scenes.tinted(a.rgba, gaps["colour"]), boxes[0]), *items[1:]]
        elif kind == "remove":
            changed = items[1:]
        elif kind == "swap":
            changed = [Item(c.rgba, box) for c, box in zip(cutouts, boxes[::-1], strict=True)]
        else:
            colour, form = rng.choice(scenes.TINTS), rng.choice(scenes.SHAPES)
            gaps["x"] = with_article(f"{colour} {form}")
            changed = [Item(scenes.shape(form, colour), boxes[0]), items[1]]
        source, target = scenes.paint(canvas, items), scenes.paint(after, changed)
        return self._example(number, rng, kind, gaps, target, cutouts, source=source)


class Customization(Task):
    """One reference: this subject on that background at that position."""

    task, variants, multiple = "customization", 16, True
    extents = {"centre": 0.92, "placed": 0.62, "small": 0.36}

    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        kind = rng.choice(list(self.extents))
        position = rng.choice([name for name in positions(size) if name != "middle"])
        position = "middle" if kind == "centre" else position
        canvas, ground = self._ground(rng, size, [first], fancy=0.5)
        box = box_at(position, size, self.extents[kind])
        target = scenes.paint(canvas, [Item(first.rgba, box)])
        gaps = {"a": first.caption, "ground": ground, "where": WHERE[position]}
        return self._example(number, rng, kind, gaps, target, [first], references=[first])


class Composition(Task):
    """Two or three references in a row or in a column, in the order of the pictures."""

    task, variants, multiple = "composition", 32, True

    def _pictures(self, numbers: np.ndarray) -> np.ndarray:
        # Three in a square would be small, so there are three only in oblong pictures, if any.
        oblong = np.array([height != width for height, width in self.settings.sizes])
        three = oblong[self.size_of[numbers]] | ~oblong.any()
        return 2 + (three & (_uniform(self.key ^ 0x9C, numbers) < 0.6))

    def _make(self, number: int, rng: Random, size: Size, first: Cutout) -> Example:
        count = int(self.pictures_of[number])
        cutouts = [first, *self._others(rng, [first], count - 1)]
        horizontal = is_horizontal(rng, size)
        canvas, ground = self._ground(rng, size, cutouts, fancy=0.0, white=0.2)
        boxes = aligned(count, horizontal)
        items = [Item(c.rgba, box) for c, box in zip(cutouts, boxes, strict=True)]
        gaps = dict(zip("abc", (c.caption for c in cutouts), strict=False)) | {"ground": ground}
        kind = f"{'row' if horizontal else 'column'} of {count}"
        target = scenes.paint(canvas, items)
        return self._example(number, rng, kind, gaps, target, cutouts, references=cutouts)


SOURCES: dict[str, type[Task]] = {
    kind.task: kind
    for kind in (
        TextToImage, Reconstruction, Transformation, Editing, Customization, Composition,
    )
}  # fmt: skip


def sources(
    data: Mapping[str, Any], split: str, settings: TaskSettings, names: Sequence[str]
) -> dict[str, Source]:
    """Tasks made from the cut-outs of config.data.corpus ('' for the embedded ones)."""
    corpus = Corpus(split, data["corpus"], data["max_pixels"])
    return {name: SOURCES[name](corpus, settings) for name in names}


def examples(
    split: str,
    task: str,
    count: int,
    seed: int = 0,
    settings: TaskSettings | None = None,
    corpus: Corpus | None = None,
    size: Size | None = None,
    pictures: int | None = None,
    kind: str | None = None,
) -> list[Example]:
    """A fixed list of examples, each with another cut-out as its first subject.

    Args:
      split: side of the corpus.
      task, count, seed: which, how many, and the choice among them.
      settings: of the tasks.
      corpus: to use instead of the embedded one.
      size, pictures, kind: only examples with this target size (H, W), number of condition
        pictures, and kind.

    Raises: InputError when there are not so many.
    """
    if task not in SOURCES:
        raise InputError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    source = SOURCES[task](corpus or Corpus(split), settings or TaskSettings())
    fits = np.ones(len(source), bool)
    if size is not None:
        index = [i for i, known in enumerate(source.settings.sizes) if known == tuple(size)]
        fits &= np.isin(source.size_of, index)
    if pictures is not None:
        fits &= source.pictures_of == pictures
    order = np.flatnonzero(fits).tolist()
    Random(hashed(seed, split, task, "examples")).shuffle(order)
    found: dict[int, Example] = {}  # by their first cut-out
    for number in order:
        if len(found) == count:
            break
        cutout = number % len(source.first)
        if cutout not in found:
            example = source[number]
            if kind is None or example.kind == kind:
                found[cutout] = example
    if len(found) < count:
        raise InputError(
            f"{split} has {len(found)} such examples of {task}, not {count}; ask for fewer"
        )
    return list(found.values())


def template_texts() -> Iterator[str]:
    """Every wording with sample fillings, for training a tokenizer."""
    colours = list(COLOURS)
    grounds = [with_article(f"{colour} background") for colour in colours]
    grounds += [
        f"a {pattern} background of {first} and {second}"
        for pattern in scenes.PATTERNS
        for first, second in zip(colours, colours[1:], strict=False)
    ]
    grounds += [
        f"a background from {first} at the top to {second} at the bottom"
        for first, second in zip(colours, colours[2:], strict=False)
    ]
    things = [with_article(f"{c} {form}") for c in scenes.TINTS for form in scenes.SHAPES]
    rng = Random(0)
    for wordings in WORDINGS.values():
        for wording in wordings:
            for _ in range(8):
                yield wording.format(
                    a="red apple", b="dog", c="car", colour=rng.choice(scenes.TINTS),
                    ground=rng.choice(grounds), where=rng.choice(list(WHERE.values())),
                    to=rng.choice(list(TO.values())), beside=rng.choice(list(BESIDE.values())),
                    x=rng.choice(things),
                )  # fmt: skip
