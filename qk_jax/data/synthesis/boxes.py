"""Where things stand in a made picture: boxes, and the names of positions.

A box is (left, top, right, bottom) in fractions of the picture's width and height, from its upper
left corner; it may reach beyond the picture.
"""

from __future__ import annotations

from random import Random

from qk_jax.data.synthesis.wordings import WHERE
from qk_jax.pictures.fitting import Size

Box = tuple[float, float, float, float]
FULL: Box = (0.05, 0.05, 0.95, 0.95)  # nearly the whole picture


def is_horizontal(rng: Random, size: Size) -> bool:
    """Whether things stand side by side in a picture of this size; by chance in a square."""
    height, width = size
    return width > height if width != height else rng.random() < 0.5


def aligned(count: int, horizontal: bool) -> list[Box]:
    """`count` equal boxes from left to right, or from top to bottom."""
    edges = [(0.02 + 0.96 * i / count, 0.02 + 0.96 * (i + 1) / count) for i in range(count)]
    gap = 0.01
    boxes = [(a + gap, 0.06, b - gap, 0.94) for a, b in edges]
    return boxes if horizontal else [(box[1], box[0], box[3], box[2]) for box in boxes]


def box_at(position: str, size: Size, extent: float) -> Box:
    """A square box (in pixels) at a named position, `extent` of the picture's shorter side."""
    height, width = size
    across, down = extent * min(size) / width, extent * min(size) / height
    x, y = 0.5, 0.5
    margin = 0.03
    if "left" in position or "right" in position:
        x = margin + across / 2 if "left" in position else 1 - margin - across / 2
    if "top" in position or "bottom" in position:
        y = margin + down / 2 if "top" in position else 1 - margin - down / 2
    return x - across / 2, y - down / 2, x + across / 2, y + down / 2


def positions(size: Size) -> tuple[str, ...]:
    """The names of positions that differ clearly in a picture of this size."""
    height, width = size
    if width > height:
        return ("left", "middle", "right")
    return ("top", "middle", "bottom") if height > width else tuple(WHERE)


def move(rng: Random, size: Size) -> tuple[str, str, str]:
    """(word, start, end): positions between which a thing moves as the word says.

    'left' is a move along the row, whichever it is; 'middle' and a corner name both ways.
    """
    height, width = size
    columns = ("left", "", "right") if width >= height else ("",)
    rows = ("top", "", "bottom") if height >= width else ("",)
    word = rng.choice(positions(size))
    places = [(row, column) for row in rows for column in columns]
    end = _parts(word)
    if (end[0] == "") != (end[1] == ""):  # one way is named, so the other stays as it is
        across = end[0] == ""
        row, column = rng.choice(places)
        end = (row, end[1]) if across else (end[0], column)
        places = [place for place in places if place[not across] == end[not across]]
    start = rng.choice([place for place in places if place != end])
    return word, " ".join(start).strip() or "middle", " ".join(end).strip() or "middle"


def _parts(position: str) -> tuple[str, str]:
    """(row, column) of a named position, '' for the middle."""
    words = position.split()
    row = next((word for word in words if word in ("top", "bottom")), "")
    return row, next((word for word in words if word in ("left", "right")), "")
