"""Drawing: backgrounds, cut-outs pasted onto them, simple shapes, and changes of whole pictures.

A canvas is float32 [H, W, 3] in 0..255; a finished picture is uint8 [H, W, 3]. A cut-out keeps its
aspect ratio and is centred in its box (`boxes`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from qk_jax.data.synthesis.boxes import Box
from qk_jax.pictures.fitting import Size

COLOURS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (150, 150, 150),
    "red": (220, 40, 40),
    "orange": (250, 150, 30),
    "yellow": (250, 220, 60),
    "green": (50, 160, 70),
    "blue": (45, 90, 210),
    "purple": (140, 60, 180),
    "pink": (250, 160, 200),
    "brown": (130, 85, 50),
    "light blue": (150, 210, 250),
}
# Colours in which an object is still recognised.
TINTS = ("red", "green", "blue", "purple", "orange", "yellow", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
PATTERNS = ("striped", "checkered", "dotted")
VISIBLE = 40  # a pixel that differs by more in some channel differs visibly, of 255
LEAST = 0.01  # part of a picture's pixels that a thing must stand out in
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Item(NamedTuple):
    """Something in a picture: `rgba` uint8 [h, w, 4], fitted into `box`."""

    rgba: np.ndarray
    box: Box


def flat(size: Size, colour: str) -> np.ndarray:
    """A canvas of one named colour."""
    return np.broadcast_to(np.array(COLOURS[colour], np.float32), (*size, 3)).copy()


def patterned(size: Size, pattern: str, first: str, second: str) -> np.ndarray:
    """A canvas with upright stripes, squares or dots of two named colours.

    Periods are parts of the shorter side, so that a pattern looks alike at every size.
    """
    step = max(4, min(size) // 6)
    rows, columns = np.mgrid[: size[0], : size[1]]
    if pattern == "striped":
        chosen = columns // step % 2 == 1
    elif pattern == "checkered":
        chosen = (columns // step + rows // step) % 2 == 1
    else:
        centre = (step * 2 - 1) / 2
        gaps = (columns % (2 * step) - centre) ** 2 + (rows % (2 * step) - centre) ** 2
        chosen = gaps <= (0.55 * step) ** 2
    colours = np.array([COLOURS[first], COLOURS[second]], np.float32)
    return colours[chosen.astype(np.intp)]


def gradient(size: Size, top: str, bottom: str) -> np.ndarray:
    """A canvas that goes from one named colour at the top to another at the bottom."""
    part = np.linspace(0, 1, size[0], dtype=np.float32)[:, None, None]
    ends = np.array([COLOURS[top], COLOURS[bottom]], np.float32)
    return np.repeat((1 - part) * ends[0] + part * ends[1], size[1], axis=1)


def contrasting(rng: Random, shown: np.ndarray, names: Sequence[str]) -> str:
    """A random one of `names` that is far from all colours `shown` [n, 3], or else the farthest."""
    palette = np.array([COLOURS[name] for name in names], np.float32)
    gaps = np.abs(palette[:, None] - shown).mean(-1).min(-1)
    clear = [name for name, gap in zip(names, gaps.tolist(), strict=True) if gap > 55]
    return rng.choice(clear) if clear else names[int(gaps.argmax())]


def _scale(item: Item, size: Size) -> float:
    """Pixels of a picture of this size for one of the cut-out."""
    left, top, right, bottom = item.box
    rows, columns = item.rgba.shape[:2]
    return min((right - left) * size[1] / columns, (bottom - top) * size[0] / rows)


def fitted(item: Item, size: Size) -> tuple[np.ndarray, int, int]:
    """An item as it lies in a picture of this size: uint8 [h, w, 4], and the column and row of its
    upper left corner, which may be beyond the picture."""
    height, width = size
    left, top, right, bottom = item.box
    rows, columns = item.rgba.shape[:2]
    scale = _scale(item, size)
    inner = max(1, round(columns * scale)), max(1, round(rows * scale))
    picture = item.rgba
    if inner != (columns, rows):  # Pillow premultiplies alpha for this
        resized = Image.fromarray(picture).resize(inner, Image.Resampling.BICUBIC)
        picture = np.asarray(resized)
    x = round((left + right) / 2 * width - inner[0] / 2)
    y = round((top + bottom) / 2 * height - inner[1] / 2)
    return picture, x, y


def paste(canvas: np.ndarray, item: Item) -> None:
    """Draws an item onto a canvas, in place."""
    height, width = canvas.shape[:2]
    picture, x, y = fitted(item, (height, width))
    rows, columns = picture.shape[:2]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + columns, width), min(y + rows, height)
    picture = picture[y0 - y : y1 - y, x0 - x : x1 - x].astype(np.float32)
    alpha = picture[..., 3:] * np.float32(1 / 255)
    region = canvas[y0:y1, x0:x1]
    region += alpha * (picture[..., :3] - region)


def paint(canvas: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """The finished picture of items on a canvas, which is left as it is: uint8 [H, W, 3]."""
    canvas = canvas.copy()
    for item in items:
        paste(canvas, item)
    return finish(canvas)


def _differs(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    gaps = np.abs(before.astype(np.int16) - after)
    return np.maximum(np.maximum(gaps[..., 0], gaps[..., 1]), gaps[..., 2]) > VISIBLE


def changed(before: np.ndarray, after: np.ndarray) -> float:
    """The part of the pixels, 0..1, of two pictures [H, W, 3] that differ visibly."""
    return float(_differs(before, after).mean())


def seen(canvas: np.ndarray, items: Sequence[Item], picture: np.ndarray) -> bool:
    """Whether each item of a painted picture stands out from the canvas.

    It shows in LEAST of the picture or, if it is thinner, in half of its own area. The boxes do
    not overlap.
    """
    height, width = picture.shape[:2]
    shown = _differs(finish(canvas), picture)
    for item in items:
        left, top, right, bottom = (max(0.0, edge) for edge in item.box)
        rows = slice(round(top * height), round(bottom * height))
        part = shown[rows, round(left * width) : round(right * width)].sum()
        area = item.rgba[..., 3].sum(dtype=np.int64) / 255 * _scale(item, (height, width)) ** 2
        if part < max(1, min(LEAST * shown.size, area / 2)):
            return False
    return True


def finish(canvas: np.ndarray) -> np.ndarray:
    """float32 0..255 to uint8."""
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=256)
def shape(kind: str, colour: str) -> np.ndarray:
    """A simple shape in a named colour as a cut-out, uint8 [64, 64, 4]."""
    side = 256
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    last = side - 1
    if kind == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif kind == "square":
        draw.rectangle((24, 24, last - 24, last - 24), fill=255)
    elif kind == "triangle":
        draw.polygon([(last / 2, 12), (last, last - 12), (0, last - 12)], fill=255)
    elif kind == "diamond":
        draw.polygon([(last / 2, 0), (last, last / 2), (last / 2, last), (0, last / 2)], fill=255)
    elif kind == "ring":
        draw.ellipse((0, 0, last, last), fill=255)
        draw.ellipse((68, 68, last - 68, last - 68), fill=0)
    else:
        draw.rectangle((88, 8, last - 88, last - 8), fill=255)
        draw.rectangle((8, 88, last - 8, last - 88), fill=255)
    alpha = np.asarray(image.resize((64, 64), Image.Resampling.BOX))
    rgb = np.broadcast_to(np.array(COLOURS[colour], np.uint8), (64, 64, 3))
    return np.dstack([rgb, alpha])


def luma(picture: np.ndarray) -> np.ndarray:
    """Brightness, float32 [..., 1] in 0..255 (Rec. 601)."""
    return (picture[..., :3].astype(np.float32) @ _LUMA)[..., None]


def tinted(picture: np.ndarray, colour: str) -> np.ndarray:
    """Shades of one colour: middle grey becomes the colour, white stays white, black a dark shade.

    Takes [H, W, 3] or [H, W, 4] uint8; alpha stays. Black does not stay black, so that the change
    shows in line drawings too.
    """
    part = luma(picture) / 255
    target = np.array(COLOURS[colour], np.float32)
    dark, light = target * (0.35 + 1.3 * part), target + (255 - target) * (part * 2 - 1)
    out = finish(np.where(part < 0.5, dark, light))
    return np.dstack([out, picture[..., 3:]]) if picture.shape[-1] == 4 else out


def _scaled(picture: np.ndarray, size: Size, resample: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize(size[::-1], resample))


def _tiled(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    half = _scaled(picture, (height // 2, width // 2), Image.Resampling.BOX)
    return np.tile(half, (2, 2, 1))


def _zoomed(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    middle = picture[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return _scaled(middle, (height, width), Image.Resampling.BICUBIC)


def _shrunk(picture: np.ndarray, factor: int, resample: Image.Resampling) -> np.ndarray:
    """Scaled down by box means and up again."""
    height, width = picture.shape[:2]
    small = _scaled(picture, (height // factor, width // factor), Image.Resampling.BOX)
    return _scaled(small, (height, width), resample)


# Changes of a whole picture, uint8 [H, W, 3] to the same shape (turns: to [W, H, 3]).
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "greyscale": lambda x: finish(np.repeat(luma(x), 3, axis=-1)),
    "mirror": lambda x: np.ascontiguousarray(x[:, ::-1]),
    "upside down": lambda x: np.ascontiguousarray(x[::-1]),
    "turn left": lambda x: np.ascontiguousarray(np.rot90(x)),
    "turn right": lambda x: np.ascontiguousarray(np.rot90(x, -1)),
    "negative": lambda x: 255 - x,
    "darker": lambda x: finish(x.astype(np.float32) * 0.5),
    "brighter": lambda x: finish(127.5 + x.astype(np.float32) * 0.5),
    "red and blue": lambda x: np.ascontiguousarray(x[..., ::-1]),
    "tile": _tiled,
    "zoom": _zoomed,
    "coarse": lambda x: _shrunk(x, 8, Image.Resampling.NEAREST),
    "blur": lambda x: _shrunk(x, 4, Image.Resampling.BICUBIC),
}
TURNS = ("turn left", "turn right")
