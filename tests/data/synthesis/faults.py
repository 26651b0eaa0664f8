"""Finds made examples that contradict their words, or whose change can hardly be seen.

    python tests/data/synthesis/faults.py [examples of each task]

prints a table of faults per task and kind. What is where is read from the calls of `scenes.paint`;
colours and positions are measured anew.
"""

from __future__ import annotations

import collections
import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qk_jax.data.example import Example, TaskSettings
from qk_jax.data.synthesis import scenes, tasks
from qk_jax.data.synthesis.corpus import Corpus

GAP = 40  # a pixel that differs by more in some channel differs visibly
THING = 0.01  # of the pixels: a smaller thing can hardly be seen
CHANGE = 0.02  # the same for the change of an edit
WHOLE = 0.05  # the same for changes of whole pictures
TINT = 0.25  # and for 'make the whole picture red'
COLOUR = re.compile(rf"\b({'|'.join(sorted(scenes.COLOURS, key=len, reverse=True))})\b")
_ONE = COLOUR.pattern[2:-2]
GROUND = re.compile(
    rf"\ban? (?:\w+ background of {_ONE} and {_ONE}"
    rf"|background from {_ONE} at the top to {_ONE} at the bottom|{_ONE} background)"
)
FORM = re.compile(rf"\ban? ({'|'.join(scenes.TINTS)}) ({'|'.join(scenes.SHAPES)})\b")
NEAR = {"gold": "yellow", "golden": "yellow", "lime": "green", "rose": "pink", "violet": "purple"}


class Scene(NamedTuple):
    """What was painted: where, on what."""

    canvas: np.ndarray
    items: list[scenes.Item]
    picture: np.ndarray


@contextlib.contextmanager
def watched() -> Iterator[list[Scene]]:
    """The list of what `scenes.paint` was asked for since; to be cleared after each example."""
    paint, calls = scenes.paint, []

    def spy(canvas: np.ndarray, items: Any) -> np.ndarray:
        calls.append(Scene(canvas, list(items), paint(canvas, items)))
        return calls[-1].picture

    scenes.paint = spy
    try:
        yield calls
    finally:
        scenes.paint = paint


def of(example: Example, calls: list[Scene], captions: dict[int, str]) -> list[str]:
    """The faults of an example that was made by these calls; captions by `id` of the cut-out."""
    painted = {id(call.picture): call for call in calls}
    sources = [
        picture for picture, role in zip(example.pictures, example.roles, strict=True) if role == 0
    ]
    source = sources[0] if sources else None
    before = painted.get(id(source))
    after = painted.get(id(example.target))
    found = []
    if example.task != "reconstruction":
        if not all(is_seen(scene) for scene in (before, after) if scene):
            found.append("a thing can hardly be seen")
        found += names(example, before or after, captions)
    return found + CHECKS[example.task](example, before, after)


def is_seen(scene: Scene) -> bool:
    """Whether each thing, alone on the canvas, stands out; of a thin one, half of its area."""
    empty = flat(scene)
    for item in scene.items:
        shown = share(empty, scene.picture if len(scene.items) == 1 else alone(scene, item))
        if shown >= THING:
            continue
        ink = np.zeros_like(scene.canvas)
        scenes.paste(ink, scenes.Item(item.rgba | np.uint8([255, 255, 255, 0]), item.box))
        if shown < ink.mean() / 255 * 0.45:  # scaling rounds
            return False
    return True


def names(example: Example, scene: Scene, captions: dict[int, str]) -> list[str]:
    """Whether the words name the first thing, and one thing only."""
    if example.task in ("reconstruction", "transformation") or example.kind == "background":
        return []
    named = [captions[id(item.rgba)] for item in scene.items]
    words = [set(name.split()) for name in named]
    found = [] if named[0] in example.instruction else ["another thing than named"]
    if any(a <= b for i, a in enumerate(words) for j, b in enumerate(words) if i != j):
        found.append("a name fits two things")
    if example.task == "composition":
        found += order(example.instruction, named, [item.box for item in scene.items])
    return found


def flat(scene: Scene) -> np.ndarray:
    return np.rint(scene.canvas).clip(0, 255).astype(np.uint8)


def alone(scene: Scene, item: scenes.Item) -> np.ndarray:
    canvas = scene.canvas.copy()
    scenes.paste(canvas, item)
    return np.rint(canvas).clip(0, 255).astype(np.uint8)


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    gaps = np.abs(a.astype(np.int16) - b) > GAP
    return gaps[..., 0] | gaps[..., 1] | gaps[..., 2]


def share(a: np.ndarray, b: np.ndarray) -> float:
    return float(differs(a, b).mean())


def centre(box: Any) -> np.ndarray:
    return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])


def area(box: Any) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def colour_of(rgba: np.ndarray) -> np.ndarray:
    """Mean colour of what is opaque."""
    weight = rgba[..., 3:].astype(float)
    return (rgba[..., :3] * weight).sum((0, 1)) / max(weight.sum(), 1)


def hue(colour: np.ndarray) -> np.ndarray:
    """Direction of a colour away from grey; the same for all its shades."""
    off = np.asarray(colour, float) - np.min(colour)
    return off / max(np.linalg.norm(off), 1e-6)


def is_shade(colour: np.ndarray, name: str) -> bool:
    return float(hue(colour) @ hue(np.array(scenes.COLOURS[name]))) > 0.95


def near(colour: np.ndarray, canvas: np.ndarray) -> bool:
    """Whether a colour is hard to tell from that of a plain canvas."""
    return bool(np.abs(np.asarray(colour, float) - canvas[0, 0]).max() <= GAP)


def ground(example: Example, scene: Scene) -> list[str]:
    """The named background, against the canvas."""
    phrase = GROUND.search(example.instruction)
    if phrase is None:
        return ["no background is named"]
    named = np.array([scenes.COLOURS[name] for name in phrase.groups() if name])
    canvas = flat(scene)
    if "from" in phrase[0]:
        said = (canvas[0] == named[0]).all() and (canvas[-1] == named[1]).all()
    else:
        alike = (canvas[..., None, :] == named).all(-1)
        said = alike.any(-1).all() and alike.any((0, 1)).all()
    return [] if said else ["another background than named"]


def text_to_image(example: Example, before: Any, after: Scene) -> list[str]:
    return ground(example, after) if example.kind == "grounded" else []


def reconstruction(example: Example, before: Any, after: Any) -> list[str]:
    return [] if np.array_equal(example.pictures[0], example.target) else ["not the same"]


def _grey(x: np.ndarray) -> np.ndarray:
    return np.repeat(x @ np.array([0.299, 0.587, 0.114]), 3).reshape(x.shape)


def _means(x: np.ndarray, side: int) -> np.ndarray:
    """Means of blocks of `side` x `side` pixels, which divide the picture."""
    height, width = x.shape[0] // side, x.shape[1] // side
    return x.reshape(height, side, width, side, 3).mean((1, 3))


def _middle(x: np.ndarray) -> np.ndarray:
    height, width = x.shape[0] // 4, x.shape[1] // 4
    return x[height:-height, width:-width]


def _rough(x: np.ndarray) -> float:
    """How much pixels differ from what is between their neighbours: none in a blurred picture."""
    return sum(float((np.diff(x.astype(float), n=2, axis=axis) ** 2).mean()) for axis in (0, 1))


WHOLES = {
    "greyscale": _grey,
    "mirror": np.fliplr,
    "upside down": np.flipud,
    "turn left": lambda x: x.transpose(1, 0, 2)[::-1],
    "turn right": lambda x: x.transpose(1, 0, 2)[:, ::-1],
    "negative": lambda x: 255 - x,
    "darker": lambda x: x * 0.5,
    "brighter": lambda x: 255 - (255 - x) * 0.5,
    "red and blue": lambda x: x[..., [2, 1, 0]],
    "coarse": lambda x: _means(x, 8).repeat(8, 0).repeat(8, 1),
    "tile": lambda x: np.tile(_means(x, 2), (2, 2, 1)),
}
# Those that interpolate: what both pictures must share, on the whole.
SHARED = {
    "zoom": (_middle, lambda x: _means(x, 2)),
    "blur": (lambda x: _means(x, 4), lambda x: _means(x, 4)),
}


def transformation(example: Example, before: Scene, after: Any) -> list[str]:
    kind, source, target = example.kind, example.pictures[0], example.target
    found = []
    if share(source, target) < (TINT if kind == "tint" else WHOLE):
        found.append("hardly changes the picture")
    if kind in WHOLES and np.abs(WHOLES[kind](source.astype(float)) - target).max() > 1:
        found.append("another change than named")
    if kind in SHARED:
        one, other = (
            f(x.astype(float)) for f, x in zip(SHARED[kind], (source, target), strict=True)
        )
        if np.abs(one - other).mean() > 20:  # of a checkered background
            found.append("another change than named")
        if kind == "blur" and _rough(target) > 0.5 * _rough(source):
            found.append("hardly softer")
    if kind == "tint":
        (colour,) = COLOUR.findall(example.instruction)
        grey = target.max(-1).astype(int) - target.min(-1) < 24
        if not is_shade(target[~grey].mean(0) if not grey.all() else target[0, 0], colour):
            found.append("another colour than named")
    if kind == "silhouette":
        dark = np.concatenate([i.rgba[i.rgba[..., 3] > 0, :3] for i in after.items])
        boxes = [i.box for i in after.items] == [i.box for i in before.items]
        if dark.any() or not boxes or not np.array_equal(before.canvas, after.canvas):
            found.append("another change than named")
    return found


def editing(example: Example, before: Scene, after: Scene) -> list[str]:
    found = [] if share(before.picture, after.picture) >= CHANGE else ["hardly changes the picture"]
    if example.kind != "background" and not np.array_equal(before.canvas, after.canvas):
        found.append("the background changes too")
    return found + EDITS[example.kind](example, before, after)


def _same(one: scenes.Item, other: scenes.Item) -> bool:
    return one.box == other.box and np.array_equal(one.rgba, other.rgba)


def background(example: Example, before: Scene, after: Scene) -> list[str]:
    found = ground(example, after)
    if not all(_same(a, b) for a, b in zip(before.items, after.items, strict=True)):
        found.append("things change too")
    if share(flat(before), flat(after)) < 0.5:
        found.append("hardly another background")
    return found


def recolour(example: Example, before: Scene, after: Scene) -> list[str]:
    said = re.search(rf"(?:make|paint) the (.*) ({'|'.join(scenes.TINTS)})$", example.instruction)
    said = said or re.search(r"of the (.*) to (\w+)$", example.instruction)
    said = said or re.search(r"recolour the (.*) in (\w+)$", example.instruction)
    caption, colour = said.groups()
    found, (old, *rest), (new, *others) = [], before.items, after.items
    if colour in {NEAR.get(word, word) for word in re.split("[ -]", caption)}:
        found.append("to a colour that the caption names")
    if near(scenes.COLOURS[colour], before.canvas):
        found.append("to the background's colour")
    if not is_shade(colour_of(new.rgba), colour):
        found.append("another colour than named")
    if new.box != old.box or not np.array_equal(new.rgba[..., 3], old.rgba[..., 3]):
        found.append("it moves or changes its form")
    if not all(_same(a, b) for a, b in zip(rest, others, strict=True)):
        found.append("things change too")
    return found


def remove(example: Example, before: Scene, after: Scene) -> list[str]:
    gone, *rest = before.items
    kept = len(rest) == len(after.items) and all(map(_same, rest, after.items))
    return [] if kept and rest else ["more changes than named"]


def add(example: Example, before: Scene, after: Scene) -> list[str]:
    found, (old,), new = [], before.items, after.items[-1]
    if len(after.items) != 2 or not _same(old, after.items[0]):
        found.append("things change too")
    found += beside(example.instruction, new.box, old.box)
    form = FORM.search(example.instruction)
    if (
        form
        and not example.subjects[1:]
        and np.array_equal(new.rgba, scenes.shape(form[2], form[1]))
    ):
        if near(scenes.COLOURS[form[1]], before.canvas):
            found.append("in the background's colour")
    return found


def beside(words: str, new: Any, old: Any) -> list[str]:
    """Whether `new` lies to the side of `old` that the words name, and to no other."""
    x, y = centre(new) - centre(old)
    sides = {
        "to the left of": x < -0.2 and abs(y) < 0.01,
        "to the right of": x > 0.2 and abs(y) < 0.01,
        "above": y < -0.2 and abs(x) < 0.01,
        "below": y > 0.2 and abs(x) < 0.01,
    }
    named = [side for side in sides if re.search(rf"\b{side}\b", words)]
    return [] if len(named) == 1 and sides[named[0]] else ["another side than named"]


def swap(example: Example, before: Scene, after: Scene) -> list[str]:
    (a, b), (c, d) = before.items, after.items
    same = np.array_equal(a.rgba, c.rgba) and np.array_equal(b.rgba, d.rgba)
    ok = same and a.box == d.box and b.box == c.box
    return [] if ok else ["places are not exchanged"]


def move(example: Example, before: Scene, after: Scene) -> list[str]:
    (old,), (new,) = before.items, after.items
    said = example.instruction.rsplit(" to the ", 1)[1]
    x, y = centre(new.box) - centre(old.box)
    found = []
    signs = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
    ends = [signs[word] for word in said.split() if word in signs]
    to = centre(new.box) - 0.5
    for way, (moved, place) in enumerate(((x, to[0]), (y, to[1]))):
        wanted = sum(end[way] for end in ends)
        is_named = wanted != 0 or said == "middle"
        if wanted and (place * wanted < 0.05 or moved * wanted < -1e-6):
            found.append("does not go where it is told")
        if said == "middle" and abs(place) > 1e-6:
            found.append("does not go where it is told")
        if len(ends) == 1 and wanted and moved * wanted < 0.1:
            found.append("does not go where it is told")
        if not is_named and abs(moved) > 1e-6:
            found.append("also goes where it is not told")
    if max(abs(x), abs(y)) < 0.1:
        found.append("hardly moves")
    if not np.array_equal(old.rgba, new.rgba) or not np.isclose(area(old.box), area(new.box)):
        found.append("things change too")
    return sorted(set(found))


def resize(example: Example, before: Scene, after: Scene) -> list[str]:
    (old,), (new,) = before.items, after.items
    factor = area(new.box) / area(old.box)
    wanted = 4.0 if example.kind == "bigger" else 0.25  # twice or half in each direction
    same = np.allclose(centre(new.box), centre(old.box)) and np.array_equal(old.rgba, new.rgba)
    return [] if same and np.isclose(factor, wanted, rtol=0.1) else ["another change than named"]


def replace(example: Example, before: Scene, after: Scene) -> list[str]:
    (old, rest), (new, other) = before.items, after.items
    form = FORM.findall(example.instruction)[-1]
    found = []
    if new.box != old.box or not _same(rest, other):
        found.append("things change too")
    if not np.array_equal(new.rgba, scenes.shape(form[1], form[0])):
        found.append("another thing than named")
    if near(scenes.COLOURS[form[0]], before.canvas):
        found.append("in the background's colour")
    return found


EDITS = {
    "background": background, "recolour": recolour, "remove": remove, "add": add, "swap": swap,
    "move": move, "bigger": resize, "smaller": resize, "replace": replace,
}  # fmt: skip


def customization(example: Example, before: Any, after: Scene) -> list[str]:
    found, (item,) = ground(example, after), after.items
    x, y = centre(item.box) - 0.5
    said = re.search(
        r"(?:on the|at the|in the) ([a-z ]*?)( corner)?\b(?: on|$)", example.instruction
    )
    words = said[1].split() if said and example.kind != "centre" else []
    wanted = (("right" in words) - ("left" in words), ("bottom" in words) - ("top" in words))
    for place, sign in zip((x, y), wanted, strict=True):
        if (abs(place) > 1e-6) if not sign else place * sign < 0.05:
            found.append("another place than named")
    if (wanted == (0, 0)) != (example.kind == "centre"):
        found.append("another place than named")
    return sorted(set(found))


def composition(example: Example, before: Any, after: Scene) -> list[str]:
    found = ground(example, after)
    places = np.array([centre(item.box) for item in after.items])
    way = 0 if example.kind.startswith("row") else 1
    steps = np.diff(places[:, way])
    ordered = (steps > 0.2).all() and np.abs(np.diff(places[:, 1 - way])).max() < 1e-6
    if not ordered or len(places) != len(example.pictures):
        found.append("another order than that of the pictures")
    return found


def order(words: str, named: list[str], boxes: list[Any]) -> list[str]:
    """Whether the things lie as the words say of them."""
    marks = dict(zip(named, "ABC", strict=False))
    for name in sorted(marks, key=len, reverse=True):
        words = words.replace(f"the {name}", f"the {marks[name]}")
    at = {mark: centre(box) - 0.5 for mark, box in zip("ABC", boxes, strict=False)}
    says = []
    for mark, place in re.findall(
        r"the ([ABC]) (?:on|at|in) the (left|right|top|bottom|mid)", words
    ):
        x, y = at[mark]
        says.append(
            {"left": x < -0.1, "right": x > 0.1, "top": y < -0.1, "bottom": y > 0.1,
             "mid": max(abs(x), abs(y)) < 0.1}[place]
        )  # fmt: skip
    for one, side, other in re.findall(
        r"the ([ABC]) (to the \w+ of|above|below) the ([ABC])", words
    ):
        says.append(
            not beside(side, at[one].repeat(2)[[0, 2, 1, 3]], at[other].repeat(2)[[0, 2, 1, 3]])
        )
    way = re.search("from (left|top) to|(side) by side in this|from the (top) down", words)
    way = way or re.search("(side) by side", words) or re.search("stack the", words)
    if way:
        axis = 0 if "left" in way.group(0) or "side" in way.group(0) else 1
        mentioned = re.findall(r"\bthe ([ABC])\b", words)
        says.append(all(np.diff([at[mark][axis] for mark in mentioned]) > 0.2))
        if "stack" in words and "from the top" not in words:
            return ["the order is not said"]
    middle = re.search(r"the ([ABC]) between the ([ABC]).* and the ([ABC])", words)
    if middle:
        x, y = (at[middle[3]] - at[middle[2]]) / 2 + at[middle[2]] - at[middle[1]]
        says.append(max(abs(x), abs(y)) < 0.01)
        after = re.search(r"the [ABC] (on the left|above) and", words)
        axis = 0 if after and "left" in after[1] else 1
        says.append(at[middle[3]][axis] - at[middle[2]][axis] > 0.4)
    return [] if says and all(says) else ["another order than named"]


CHECKS = {
    "text_to_image": text_to_image, "reconstruction": reconstruction,
    "transformation": transformation, "editing": editing, "customization": customization,
    "composition": composition,
}  # fmt: skip


def scan(task: str, count: int, corpus: Corpus, **settings: Any) -> dict[str, collections.Counter]:
    """{kind: how often each fault, and '' for all examples} of `count` examples over a task."""
    source = tasks.SOURCES[task](corpus, TaskSettings(**settings))
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    captions = {id(corpus[i].rgba): corpus[i].caption for i in range(len(corpus))}
    with watched() as calls:
        for number in np.linspace(0, len(source) - 1, count).astype(int).tolist():
            calls.clear()
            example = source[number]
            table[example.kind].update(["", *of(example, calls, captions)])
    return dict(table)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    corpus = Corpus("train")
    print("| task | kind | examples | fault | share |\n| --- | --- | --- | --- | --- |")
    for task in tasks.SOURCES:
        for kind, faults in sorted(scan(task, count, corpus).items()):
            total = faults.pop("")
            for fault, number in faults.most_common() or [("none", 0)]:
                print(f"| {task} | {kind} | {total} | {fault} | {number / total:.1%} |")


if __name__ == "__main__":
    main()
