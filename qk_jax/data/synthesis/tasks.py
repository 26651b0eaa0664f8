"""The six tasks, made from captioned cut-outs, so that the exact truth of every example is known.

A task is a source of examples; example `i` is a pure function of (seed, split, task, i). It is
drawn again, with the next random numbers, until what its words name can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data.example import TASKS, Example, Source, TaskSettings, hashed
from qk_jax.data.synthesis import scenes
from qk_jax.data.synthesis.boxes import FULL, aligned, box_at, is_horizontal, move, positions
from qk_jax.data.synthesis.corpus import Corpus, Cutout
from qk_jax.data.synthesis.scenes import COLOURS, Item
from qk_jax.data.synthesis.task import Task, uniform
from qk_jax.data.synthesis.wordings import BESIDE, TO, WHERE, WORDINGS, colours_in, with_article
from qk_jax.pictures.fitting import Size


class TextToImage(Task):
    """A caption, on white or on a named background -> the picture."""

    task, variants = "text_to_image", 8

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        return self._sizes_of_cutouts(numbers)

    def _pictures(self, numbers: np.ndarray) -> np.ndarray:
        return np.zeros(len(numbers))

    def _kind(self, number: int, rng: Random, size: Size) -> str:
        return "plain" if rng.random() < 0.5 else "grounded"

    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        canvas, ground = scenes.flat(size, "white"), ""
        if kind == "grounded":
            canvas, ground = self._ground(rng, size, [first], fancy=0.2)
        item = Item(first.rgba, FULL)
        target = scenes.paint(canvas, [item])
        if not scenes.seen(canvas, [item], target):
            return None
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

    def _kind(self, number: int, rng: Random, size: Size) -> str:
        return "copy"

    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        canvas, items, cutouts = self._scene(rng, size, first)
        picture = scenes.paint(canvas, items)
        return self._example(number, rng, kind, {}, picture, cutouts, source=picture)


class Transformation(_OnScenes):
    """A picture and what to do with the whole of it -> the changed picture."""

    task, variants = "transformation", 32
    kinds = (*scenes.CHANGES, "tint", "silhouette")
    # Part of the pixels that must change; a tint is of the whole picture, and white stays white.
    least = 0.05
    least_tint = 0.25

    def _kind(self, number: int, rng: Random, size: Size) -> str:
        turns = () if size[0] == size[1] else scenes.TURNS  # would not fit the target's size
        return rng.choice([kind for kind in self.kinds if kind not in turns])

    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        canvas, items, cutouts = self._scene(rng, size, first)
        least = self.least_tint if kind == "tint" else self.least
        source, gaps = scenes.paint(canvas, items), {}
        if kind == "tint":
            gaps["colour"] = rng.choice(scenes.TINTS)
            target = scenes.tinted(source, gaps["colour"])
        elif kind == "silhouette":
            if float(canvas.mean()) < 90:  # black on dark shows nothing
                canvas = scenes.flat(size, rng.choice(("white", "yellow", "light blue", "pink")))
                source = scenes.paint(canvas, items)
            black = [_black(item) for item in items]
            target = scenes.paint(canvas, black)
            if not scenes.seen(canvas, black, target):
                return None
        else:
            target = scenes.CHANGES[kind](source)
        if not scenes.seen(canvas, items, source):
            return None
        return self._example(number, rng, kind, gaps, target, cutouts, source=source, change=least)


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

    least = 0.02  # part of the pixels that must change

    def _kind(self, number: int, rng: Random, size: Size) -> str:
        return rng.choices(list(self.kinds), list(self.kinds.values()))[0]

    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        edit = {
            "move": self._geometry, "bigger": self._geometry, "smaller": self._geometry,
            "add": self._add,
        }.get(kind, self._things)  # fmt: skip
        cutouts, gaps, before, after = edit(rng, size, first, kind)
        source, target = scenes.paint(*before), scenes.paint(*after)
        if not (scenes.seen(*before, source) and scenes.seen(*after, target)):
            return None
        return self._example(
            number, rng, kind, gaps, target, cutouts, source=source, change=self.least
        )

    def _canvas(self, rng: Random, size: Size, cutouts: Sequence[Cutout]) -> np.ndarray:
        return self._ground(rng, size, cutouts, fancy=0.0, white=0.3)[0]

    def _geometry(self, rng: Random, size: Size, a: Cutout, kind: str) -> _Edit:
        """Moves one thing, or changes its size."""
        canvas, gaps = self._canvas(rng, size, [a]), {"a": a.caption}
        if kind == "move":
            word, *places = move(rng, size)
            gaps["to"] = TO[word]
            boxes = [box_at(place, size, 0.6) for place in places]
        else:
            boxes = [box_at("middle", size, extent) for extent in (0.47, 0.94)]
            boxes = boxes if kind == "bigger" else boxes[::-1]
        before, after = ((canvas, [Item(a.rgba, box)]) for box in boxes)
        return [a], gaps, before, after

    def _add(self, rng: Random, size: Size, a: Cutout, kind: str) -> _Edit:
        """Adds a shape, a second copy, or another subject beside one thing."""
        cutouts, canvas = [a], None
        choice = rng.random()
        if choice < 0.6:
            colour, form = rng.choice(scenes.TINTS), _form(rng, a)
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
        horizontal, first = is_horizontal(rng, size), rng.random() < 0.5
        boxes = aligned(2, horizontal)[:: 1 if first else -1]  # the new thing's box, then a's
        side = ("left" if first else "right") if horizontal else ("top" if first else "bottom")
        gaps = {"a": a.caption, "x": x, "beside": BESIDE[side]}
        here = Item(a.rgba, boxes[1])
        return cutouts, gaps, (canvas, [here]), (canvas, [here, Item(added, boxes[0])])

    def _things(self, rng: Random, size: Size, a: Cutout, kind: str) -> _Edit:
        """Edits in a picture of two things, or (background, recolour) of one or two."""
        cutouts = [a]
        if kind in ("remove", "swap", "replace") or rng.random() < 0.5:
            cutouts += self._others(rng, cutouts, 1)
        boxes = aligned(2, is_horizontal(rng, size)) if len(cutouts) == 2 else [FULL]
        boxes = boxes if rng.random() < 0.5 else boxes[::-1]
        canvas = ground = self._canvas(rng, size, cutouts)
        items = [Item(c.rgba, box) for c, box in zip(cutouts, boxes, strict=True)]
        gaps = {"a": a.caption, "b": cutouts[-1].caption}
        changed = items
        if kind == "background":
            ground, gaps["ground"] = self._ground(rng, size, cutouts, 0.2, unlike=canvas)
        elif kind == "recolour":
            named = colours_in(a.caption)
            fresh = [colour for colour in scenes.TINTS if colour not in named]
            # neither the thing's own colour nor that of the (plain) canvas
            gaps["colour"] = scenes.contrasting(rng, np.stack([a.colour, canvas[0, 0]]), fresh)
            changed = [Item(scenes.tinted(a.rgba, gaps["colour"]), boxes[0]), *items[1:]]
        elif kind == "remove":
            changed = items[1:]
        elif kind == "swap":
            changed = [Item(c.rgba, box) for c, box in zip(cutouts, boxes[::-1], strict=True)]
        else:
            colour, form = scenes.contrasting(rng, canvas[0, :1], scenes.TINTS), _form(rng, a)
            gaps["x"] = with_article(f"{colour} {form}")
            changed = [Item(scenes.shape(form, colour), boxes[0]), items[1]]
        return cutouts, gaps, (canvas, items), (ground, changed)


# The cut-outs, the gaps of the wording, and canvas and items before and after.
_Scene = tuple[np.ndarray, list[Item]]
_Edit = tuple[list[Cutout], dict[str, str], _Scene, _Scene]


def _form(rng: Random, beside: Cutout) -> str:
    """A shape that the caption of the other thing does not name."""
    words = beside.caption.split()
    return rng.choice([form for form in scenes.SHAPES if form not in words])


class Customization(Task):
    """One reference: this subject on that background at that position."""

    task, variants, multiple = "customization", 16, True
    extents = {"centre": 0.92, "placed": 0.62, "small": 0.36}

    def _subjects(self, numbers: np.ndarray) -> np.ndarray:
        return self.first[numbers % len(self.first)][:, None]

    def _kind(self, number: int, rng: Random, size: Size) -> str:
        return rng.choice(list(self.extents))

    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        position = rng.choice([name for name in positions(size) if name != "middle"])
        position = "middle" if kind == "centre" else position
        canvas, ground = self._ground(rng, size, [first], fancy=0.5)
        item = Item(first.rgba, box_at(position, size, self.extents[kind]))
        target = scenes.paint(canvas, [item])
        if not scenes.seen(canvas, [item], target):
            return None
        gaps = {"a": first.caption, "ground": ground, "where": WHERE[position]}
        return self._example(number, rng, kind, gaps, target, [first], references=[first])


class Composition(Task):
    """Two or three references in a row or in a column, in the order of the pictures."""

    task, variants, multiple = "composition", 32, True

    def _pictures(self, numbers: np.ndarray) -> np.ndarray:
        # Three in a square would be small, so there are three only in oblong pictures, if any.
        oblong = np.array([height != width for height, width in self.settings.sizes])
        three = oblong[self.size_of[numbers]] | ~oblong.any()
        return 2 + (three & (uniform(self.key ^ 0x9C, numbers) < 0.6))

    def _subjects(self, numbers: np.ndarray) -> np.ndarray:
        """The first is in the example; of the others, which are chosen later, only the shapes."""
        drawn = [uniform(self.key ^ salt, numbers) * len(self.first) for salt in (0xA1, 0xA2)]
        shown = [numbers % len(self.first), *(x.astype(np.int64) for x in drawn)]
        return self.first[np.stack(shown, axis=1)]

    def _kind(self, number: int, rng: Random, size: Size) -> str:
        way = "row" if is_horizontal(rng, size) else "column"
        return f"{way} of {self.pictures_of[number]}"

    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        count = int(self.pictures_of[number])
        shapes = self.references_of[number, 1:count].tolist()
        cutouts = [first, *self._others(rng, [first], count - 1, shapes)]
        canvas, ground = self._ground(rng, size, cutouts, fancy=0.0, white=0.2)
        boxes = aligned(count, kind.startswith("row"))
        items = [Item(c.rgba, box) for c, box in zip(cutouts, boxes, strict=True)]
        target = scenes.paint(canvas, items)
        if not scenes.seen(canvas, items, target):
            return None
        gaps = dict(zip("abc", (c.caption for c in cutouts), strict=False)) | {"ground": ground}
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
    reference: Size | None = None,
) -> list[Example]:
    """A fixed list of examples, each with another cut-out as its first subject.

    Args:
      split: side of the corpus.
      task, count, seed: which, how many, and the choice among them.
      settings: of the tasks.
      corpus: to use instead of the embedded one.
      size, pictures, kind: only examples with this target size (H, W), number of condition
        pictures, and kind.
      reference: only examples all of whose references have this size (H, W).

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
    if reference is not None:
        only = source.settings.reference_shapes.index(reference)
        fits &= (source.references_of == only).all(axis=1)
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
