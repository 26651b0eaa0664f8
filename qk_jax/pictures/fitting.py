"""Pictures decoded, covered, contained and flattened onto the sizes that are trained."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from qk_jax.base.errors import BadRecord

Size = tuple[int, int]  # (height, width) in pixels
Picture = UInt8[np.ndarray, "height width *channels"]


def decode_picture(
    data: bytes, mode: str, max_pixels: int, name: str
) -> UInt8[np.ndarray, "height width *channels"]:
    """An encoded picture in a mode of PIL.

    Raises:
      BadRecord: of kind 'undecodable' or 'too large' (more than max_pixels; 0 is no bound).
    """
    try:
        image = Image.open(io.BytesIO(data))
        if max_pixels and image.width * image.height > max_pixels:
            raise BadRecord(
                "too large",
                f"{name}: a picture of {image.width}x{image.height} exceeds the bound of "
                f"{max_pixels:,} pixels (config.data.max_pixels)",
            )
        return np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise BadRecord("undecodable", f"{name}: a picture cannot be decoded ({error})") from None


def cover(picture: Picture, size: Size) -> UInt8[np.ndarray, "H W *channels"]:
    """Scales a picture to cover `size` and crops both sides evenly."""
    height, width = picture.shape[:2]
    if (height, width) == tuple(size):
        return picture
    scale = max(size[0] / height, size[1] / width)
    box_height, box_width = size[0] / scale, size[1] / scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    resized = Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def contain(picture: Picture, side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Scales a picture into the middle of a white square."""
    height, width = picture.shape[:2]
    if (height, width) == (side, side):
        return picture
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    out = Image.new("RGB", (side, side), "white")
    resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    out.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(out)


def on_white(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """An image in RGB, on white where it is transparent."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
