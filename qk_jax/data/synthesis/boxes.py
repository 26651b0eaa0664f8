from __future__ import annotations

from random import Random

from qk_jax.data.synthesis.scenes import Box
from qk_jax.data.synthesis.wordings import WHERE
from qk_jax.pictures.fitting import Size


def is_row(rng: Random, size: Size) -> bool:
    """Whether things stand side by side in a picture of this size; by chance in a square."""
    height, width = size
    return width > height if width != height else rng.random() < 0.5


def line(row: bool, count: int) -> list[Box]:
    """`count` boxes from left to right (row) or from top to bottom."""
    edges = [(0.02 + 0.96 * i / count, 0.02 + 0.96 * (i + 1) / count) for i in range(count)]
    gap = 0.01
    boxes = [(a + gap, 0.06, b - gap, 0.94) for a, b in edges]
    return boxes if row else [(box[1], box[0], box[3], box[2]) for box in boxes]


def place(size: Size, where: str, extent: float) -> Box:
    """The box at a named place; `extent` is its part of the shorter side of the picture."""
    height, width = size
    across, down = extent * min(size) / width, extent * min(size) / height
    x, y = 0.5, 0.5
    margin = 0.03
    if "left" in where or "right" in where:
        x = margin + across / 2 if "left" in where else 1 - margin - across / 2
    if "top" in where or "bottom" in where:
        y = margin + down / 2 if "top" in where else 1 - margin - down / 2
    return x - across / 2, y - down / 2, x + across / 2, y + down / 2


def places(size: Size) -> tuple[str, ...]:
    """The names of places that differ clearly in a picture of this size."""
    height, width = size
    if width > height:
        return ("left", "middle", "right")
    return ("top", "middle", "bottom") if height > width else tuple(WHERE)
