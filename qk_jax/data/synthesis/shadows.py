"""Soft shadows that cut-outs throw on the ground where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from qk_jax.data.synthesis import scenes
from qk_jax.data.synthesis.scenes import Item


class Light(NamedTuple):
    """Where the light of a picture comes from, and how hard it is.

    Attributes:
      slant: how far the top of a shadow lies to the right, in heights of its subject.
      length: of a shadow, in heights of its subject.
      strength: how much darker the middle of a shadow is, 0..1.
      softness: radius of its blur, in longer sides of its subject.
    """

    slant: float
    length: float
    strength: float
    softness: float


def drawn(rng: Random) -> Light:
    """A light by chance."""
    return Light(
        slant=rng.uniform(-0.5, 0.5), length=rng.uniform(0.12, 0.3),
        strength=rng.uniform(0.35, 0.6), softness=rng.uniform(0.02, 0.05),
    )  # fmt: skip


def shaded(canvas: np.ndarray, items: Sequence[Item], light: Light) -> np.ndarray:
    """A canvas, float32 [H, W, 3], with the shadows of items, but without the items."""
    canvas = canvas.copy()
    height, width = canvas.shape[:2]
    for item in items:
        shadow, x, y = _shadow(*scenes.fitted(item, (height, width)), light)
        rows, columns = shadow.shape
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + columns, width), min(y + rows, height)
        if x0 < x1 and y0 < y1:
            part = shadow[y0 - y : y1 - y, x0 - x : x1 - x, None]
            canvas[y0:y1, x0:x1] *= 1 - np.float32(light.strength) * part
    return canvas


def _shadow(rgba: np.ndarray, x: int, y: int, light: Light) -> tuple[np.ndarray, int, int]:
    """The shadow of a cut-out at (x, y), 0..1 float32 [h, w], and where it lies."""
    rows, columns = rgba.shape[:2]
    flat = max(2, round(rows * light.length))
    radius = max(1.0, light.softness * max(rows, columns))
    pad, shift = int(3 * radius) + 1, light.slant * rows
    before = max(0, round(-shift))  # columns to the left of the subject
    size = columns + round(abs(shift)) + 2 * pad, flat + 2 * pad
    mask = Image.fromarray(np.ascontiguousarray(rgba[..., 3])).resize((columns, flat))
    # Row r of `flat` lies further to the right by shift x (1 - r / flat).
    lean = shift / flat
    law = (1, lean, -pad - before - shift - lean * pad, 0, 1, -pad)
    thrown = mask.transform(size, Image.Transform.AFFINE, law, Image.Resampling.BILINEAR)
    soft = np.asarray(thrown.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
    # A third of it lies before the feet, which stand in it.
    return soft, x - pad - before, y + rows - flat + flat // 3 - pad
