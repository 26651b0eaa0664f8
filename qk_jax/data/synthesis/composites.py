"""Cut-outs on real backgrounds: customization, composition and edits, whose truth is known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from qk_jax.base.errors import BadRecord
from qk_jax.data.importers.drafts import Draft, encoded
from qk_jax.data.synthesis import bilingual, scenes, shadows
from qk_jax.data.synthesis.boxes import FULL, box_at, is_horizontal, move, positions
from qk_jax.data.synthesis.cutouts import Cutout, Ground
from qk_jax.data.synthesis.order import Order
from qk_jax.data.synthesis.scenes import Item
from qk_jax.data.synthesis.whole import as_file
from qk_jax.data.synthesis.wordings import alike
from qk_jax.pictures.fitting import Size

ENLARGED = 1.5  # most that a cut-out is enlarged
_TRIES = 32  # draws of places
_PICKS = 60  # draws of records
_CHANGE = 0.005  # part of the pixels that an edit must change visibly
_EDITS = ("add", "add shown", "add beside", "remove", "move", "bigger", "smaller")


class Pool(Protocol):
    """What examples of one split are made of."""

    def cutout(self, rng: Random) -> Cutout:
        """One by chance. Raises: BadRecord."""

    def ground(self, rng: Random) -> Ground:
        """One by chance. Raises: BadRecord."""


class Scene(NamedTuple):
    """What an example is made of.

    Attributes:
      canvas: float32 [H, W, 3], the background.
      ground: its record.
      cutouts: subjects, of which no two have names that might mean each other.
      light: of all of its pictures.
      scale: (least, most) longer side of each subject, of the canvas's shorter side.
    """

    canvas: np.ndarray
    ground: Ground
    cutouts: list[Cutout]
    light: shadows.Light
    scale: list[tuple[float, float]]

    @property
    def size(self) -> Size:
        """(H, W)."""
        return self.canvas.shape[0], self.canvas.shape[1]


class _Drawn(NamedTuple):
    """A draw of an example: its kind, the gaps of its words, items before and after the edit
    (before is None where nothing is edited), and the cut-outs that are shown as references."""

    kind: str
    gaps: dict[str, str]
    before: list[Item] | None
    after: list[Item]
    references: list[Cutout]


def draft(order: Order, rng: Random, first: Cutout, pool: Pool, key: str) -> Draft:
    """An example about the cut-out `first`.

    Raises: BadRecord of kind 'no other name' where every other subject or background that was
      drawn might be meant by the same words, or 'hardly visible' when no draw shows what its words
      say within the limits of overlap; and as `Pool`.
    """
    edits = _EDITS if 2 * order.scale[0] <= order.scale[1] else _EDITS[:-2]
    kind = rng.choice(edits) if order.kind == "edit" else order.kind
    count = {"composition": rng.choice((2, 3)), "add beside": 2, "remove": rng.choice((1, 2))}
    cutouts = _unlike(rng, [first], count.get(kind, 1), pool, key)
    scene = _scene(order, rng, cutouts, pool, key)
    draw = {"customization": _placed, "composition": _in_line}.get(order.kind, _edit)
    for _ in range(_TRIES):
        found = draw(rng, scene, kind)
        if max(covered(found.after, scene.size), covered(found.before or [], scene.size)) > (
            order.overlap
        ):
            continue
        made = _painted(scene, found)
        if made is not None:
            return _finished(order, rng, scene, found, made, key)
    raise BadRecord("hardly visible", f"{key}: {first.caption!r} on {scene.ground.caption!r:.60}")


# ---- what is in it -------------------------------------------------------------------------------


def _unlike(rng: Random, shown: list[Cutout], count: int, pool: Pool, key: str) -> list[Cutout]:
    """`count` cut-outs, those `shown` first, none of which the name of another might mean."""
    for _ in range(_PICKS * count):
        if len(shown) == count:
            return shown
        other = pool.cutout(rng)
        if not any(_alike(other.caption, one.caption) for one in shown):
            shown = [*shown, other]
    raise BadRecord("no other name", f"{key}: beside {shown[0].caption!r:.60}")


def _alike(one: str, other: str) -> bool:
    return alike(bilingual.phrase(one), bilingual.phrase(other))


def _scene(order: Order, rng: Random, cutouts: list[Cutout], pool: Pool, key: str) -> Scene:
    """A background that names none of the cut-outs, at a size that enlarges none too much."""
    for _ in range(_PICKS):
        ground = pool.ground(rng)
        if not any(_alike(ground.caption, one.caption) for one in cutouts):
            break
    else:
        raise BadRecord("no other name", f"{key}: each background names {cutouts[0].caption!r:.60}")
    low, high = order.scale
    longest = [max(one.rgba.shape[:2]) for one in cutouts]
    height, width = ground.picture.shape[:2]
    # So that the smallest can have half more than the least size.
    side = min(order.side, height, width, round(ENLARGED * min(longest) / (1.5 * low)))
    factor = side / min(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(ground.picture)
    if size != (width, height):
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = np.asarray(picture).astype(np.float32)
    most = [min(high, max(low, ENLARGED * one / min(size))) for one in longest]
    return Scene(canvas, ground, cutouts, shadows.drawn(rng), [(low, one) for one in most])


# ---- where it is ---------------------------------------------------------------------------------


def _item(cutout: Cutout, size: Size, x: float, y: float, extent: float) -> Item:
    """A cut-out with its middle at (x, y), fractions of the picture, as far as it fits there, and
    its longer side `extent` of the picture's shorter side."""
    rows, columns = cutout.rgba.shape[:2]
    scale = extent * min(size) / max(rows, columns)
    across, down = columns * scale / size[1] / 2, rows * scale / size[0] / 2
    x, y = min(max(x, across), 1 - across), min(max(y, down), 1 - down)
    return Item(cutout.rgba, (x - across, y - down, x + across, y + down))


def _at(rng: Random, scene: Scene, number: int, where: str, extent: float) -> Item:
    """A cut-out at a named position, anywhere along an axis that the name leaves open."""
    left, top, right, bottom = box_at(where, scene.size, extent)
    x, y = (left + right) / 2, (top + bottom) / 2
    height, width = scene.size
    free = 0.25 if height != width else 0.1
    if where in ("left", "right"):
        y += rng.uniform(-free, free)
    elif where in ("top", "bottom"):
        x += rng.uniform(-free, free)
    return _item(scene.cutouts[number], scene.size, x, y, extent)


def _line(rng: Random, scene: Scene, horizontal: bool) -> list[Item]:
    """The cut-outs from left to right, or from top to bottom."""
    count, items = len(scene.cutouts), []
    cell = 1 / count
    for number, cutout in enumerate(scene.cutouts):
        along = (number + rng.uniform(0.35, 0.65)) * cell
        across = rng.uniform(0.35, 0.65)
        low, high = scene.scale[number]
        # A subject may reach into the cell of the next.
        room = cell * scene.size[1 if horizontal else 0] / min(scene.size) * 1.4
        extent = rng.uniform(low, max(low, min(high, room)))
        x, y = (along, across) if horizontal else (across, along)
        items.append(_item(cutout, scene.size, x, y, extent))
    return items


def covered(items: Sequence[Item], size: Size) -> float:
    """The largest part, 0..1, of one of the items that another lies over or under."""
    most = 0.0
    for one, other in itertools.combinations([scenes.fitted(item, size) for item in items], 2):
        (a, ax, ay), (b, bx, by) = one, other
        left, right = max(ax, bx), min(ax + a.shape[1], bx + b.shape[1])
        top, bottom = max(ay, by), min(ay + a.shape[0], by + b.shape[0])
        if left < right and top < bottom:
            parts = [
                x[top - y : bottom - y, left - z : right - z, 3] / np.float32(255)
                for x, z, y in (one, other)
            ]
            both = float((parts[0] * parts[1]).sum())
            least = min(float(x[..., 3].sum(dtype=np.float64)) for x in (a, b)) / 255
            most = max(most, both / max(least, 1.0))
    return most


# ---- draws ---------------------------------------------------------------------------------------


def _placed(rng: Random, scene: Scene, kind: str) -> _Drawn:
    """One reference, somewhere on the background."""
    where = rng.choice(positions(scene.size))
    item = _at(rng, scene, 0, where, rng.uniform(*scene.scale[0]))
    (first,) = scene.cutouts
    gaps = {"a": first.caption, "where": where, "scene": scene.ground.caption}
    return _Drawn("placed", gaps, None, [item], [first])


def _in_line(rng: Random, scene: Scene, kind: str) -> _Drawn:
    """Two or three references in a row or a column, in the order of the pictures."""
    horizontal = is_horizontal(rng, scene.size)
    gaps = dict(zip("abc", (one.caption for one in scene.cutouts), strict=False))
    gaps["scene"] = scene.ground.caption
    kind = f"{'row' if horizontal else 'column'} of {len(scene.cutouts)}"
    return _Drawn(kind, gaps, None, _line(rng, scene, horizontal), scene.cutouts)


def _edit(rng: Random, scene: Scene, kind: str) -> _Drawn:
    """Adds, removes, moves or scales the first cut-out."""
    first, (low, high) = scene.cutouts[0], scene.scale[0]
    gaps = {"a": first.caption, "x": first.caption}
    if kind in ("add", "add shown"):
        gaps["where"] = rng.choice(positions(scene.size))
        item = _at(rng, scene, 0, gaps["where"], rng.uniform(low, high))
        return _Drawn(kind, gaps, [], [item], [first] if kind == "add shown" else [])
    if kind == "move":
        extent = rng.uniform(low, max(low, min(high, 0.45)))
        gaps["where"], start, end = move(rng, scene.size)
        before, after = (
            [Item(first.rgba, box_at(where, scene.size, extent))] for where in (start, end)
        )
        return _Drawn(kind, gaps, before, after, [])
    if kind in ("bigger", "smaller"):
        extent = 2 * rng.uniform(low, max(low, high / 2))
        large = _item(first, scene.size, rng.random(), rng.uniform(0.4, 0.8), extent)
        left, top, right, bottom = large.box
        middle, quarter = (left + right) / 2, (right - left) / 4
        box = (middle - quarter, (top + bottom) / 2, middle + quarter, bottom)  # on the same feet
        sizes = [Item(first.rgba, box), large]
        before, after = ([item] for item in (sizes if kind == "bigger" else sizes[::-1]))
        return _Drawn(kind, gaps, before, after, [])
    if len(scene.cutouts) == 1:
        item = _at(rng, scene, 0, rng.choice(positions(scene.size)), rng.uniform(low, high))
        return _Drawn(kind, gaps, [item], [], [])
    return _beside(rng, scene, kind, gaps)


def _beside(rng: Random, scene: Scene, kind: str, gaps: dict[str, str]) -> _Drawn:
    """The first cut-out comes beside the second, or is taken from there."""
    horizontal, leads = is_horizontal(rng, scene.size), rng.random() < 0.5
    if leads:
        item, other = _line(rng, scene, horizontal)
    else:
        turned = scene._replace(cutouts=scene.cutouts[::-1], scale=scene.scale[::-1])
        other, item = _line(rng, turned, horizontal)
    if kind == "remove":
        return _Drawn(kind, gaps, [item, other], [other], [])
    sides = ("left", "right") if horizontal else ("top", "bottom")
    gaps |= {"a": scene.cutouts[1].caption, "beside": sides[0 if leads else 1]}
    return _Drawn(kind, gaps, [other], [other, item], [])


# ---- pictures ------------------------------------------------------------------------------------


def _painted(scene: Scene, found: _Drawn) -> list[np.ndarray] | None:
    """The pictures before, if there is one, and after; None when something does not show."""
    pictures = []
    for items in (found.before, found.after):
        if items is None:
            continue
        # What stands further below is nearer.
        items = sorted(items, key=lambda item: item.box[3])
        ground = shadows.shaded(scene.canvas, items, scene.light)
        picture = scenes.paint(ground, items)
        if not scenes.seen(ground, items, picture):
            return None
        pictures.append(picture)
    if len(pictures) == 2 and scenes.changed(*pictures) < _CHANGE:
        return None
    return pictures


def _finished(
    order: Order, rng: Random, scene: Scene, found: _Drawn, made: list[np.ndarray], key: str
) -> Draft:
    """Words and encoded pictures of a draw."""
    tongue = bilingual.language(order.language, rng, [scene.cutouts[0].caption])
    words = bilingual.instruction(rng, tongue, found.kind, found.gaps)
    files = [as_file(picture, scene.ground.is_jpeg) for picture in made]
    pictures = [("source", data) for data in files[:-1]]
    pictures += [("reference", reference(one)) for one in found.references]
    keys = [*(one.key for one in scene.cutouts), scene.ground.key]
    more = {"kind": found.kind, "made_from": keys}
    group = scene.cutouts[0].group
    return Draft(key, words, files[-1], tuple(pictures), group=group, more=more)


def reference(cutout: Cutout) -> bytes:
    """A cut-out on white with a margin, at its own size, as PNG."""
    height, width = (round(side / 0.9) + 1 for side in cutout.rgba.shape[:2])
    canvas = scenes.flat((height, width), "white")
    return encoded(Image.fromarray(scenes.paint(canvas, [Item(cutout.rgba, FULL)])), "PNG")
