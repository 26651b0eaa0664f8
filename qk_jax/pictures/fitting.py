"""Pictures covered and contained at the sizes that are trained."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Size = tuple[int, int]  # (height, width) in pixels
Picture = UInt8[np.ndarray, "height width *channels"]


def cover_box(height: Any, width: Any, size: Any) -> tuple[Any, Any, Any, Any]:
    """The largest box in the middle of a picture that has the aspect of `size`.

    Args:
      height, width: of the picture; numbers, or arrays that broadcast.
      size: (height, width), numbers or arrays.

    Returns:
      (left, top, right, bottom) in pixels, within the picture.
    """
    scale = np.maximum(size[0] / height, size[1] / width)
    box_height, box_width = size[0] / scale, size[1] / scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    # One side of the box is the picture's own up to rounding, which must not lead over its edge.
    right, bottom = np.minimum(left + box_width, width), np.minimum(top + box_height, height)
    return np.maximum(left, 0.0), np.maximum(top, 0.0), right, bottom


def cover(picture: Picture, size: Size) -> UInt8[np.ndarray, "H W *channels"]:
    """Scales a picture to cover `size` and crops both sides evenly."""
    height, width = picture.shape[:2]
    if (height, width) == tuple(size):
        return picture
    box = cover_box(height, width, size)
    resized = Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def contain(picture: Picture, size: Size) -> UInt8[np.ndarray, "H W 3"]:
    """Scales a picture into the middle of a white one of `size`."""
    height, width = picture.shape[:2]
    if (height, width) == tuple(size):
        return picture
    scale = min(size[0] / height, size[1] / width)
    inner = [
        min(side, max(1, round(old * scale))) for side, old in ((size[1], width), (size[0], height))
    ]
    out = Image.new("RGB", size[::-1], "white")
    resized = Image.fromarray(picture).resize(tuple(inner), Image.Resampling.LANCZOS)
    out.paste(resized, ((size[1] - inner[0]) // 2, (size[0] - inner[1]) // 2))
    return np.asarray(out)
