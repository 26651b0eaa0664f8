"""The one law by which pictures become pixels, wherever they come from.

Upright (EXIF), in sRGB (ICC), 8 bits, the first frame, and white where they are transparent. The
exported pipeline ships alone, so `export/kontext.py` has `standard` and what it calls once more, in
the same words.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms

from qk_jax.base.errors import BadRecord

# What is read: pictures of photographs, drawings and the web. What Pillow reads besides is rare in
# sets, little tested, or runs other programs (EPS runs Ghostscript), and files are not trusted.
FORMATS = (
    "AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
MAX_PIXELS = 64_000_000  # of a picture, where nobody chose another bound
# What turns a picture upright, by its EXIF orientation.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# The transparent colour of samples that Pillow widens or narrows, by their form.
KEYS = {
    "L;2": lambda key: 85 * key, "L;4": lambda key: 17 * key,
    "RGB;16B": lambda key: tuple(part >> 8 for part in key),
}  # fmt: skip


def decode_picture(
    data: bytes, mode: str, max_pixels: int, name: str
) -> UInt8[np.ndarray, "height width channels"]:
    """An encoded picture, as `picture_of` gives it; arguments and errors too."""
    with _refused(name):
        image = Image.open(io.BytesIO(data), formats=_formats())
    return picture_of(image, mode, max_pixels, name)


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this build of Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def picture_of(
    image: Image.Image, mode: str, max_pixels: int, name: str
) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of an image, of which no more than the size may be known yet.

    Args:
      image: at its first frame, or at another that is meant.
      mode: 'RGB', over white where it is transparent, or 'RGBA'.
      max_pixels: the largest picture; 0 is no bound.
      name: what an error calls it.

    Raises:
      BadRecord: of kind 'undecodable' or 'too large'.
    """
    if max_pixels and image.width * image.height > max_pixels:
        raise BadRecord(
            "too large",
            f"{name}: a picture of {image.width}x{image.height} exceeds the bound of "
            f"{max_pixels:,} pixels (config.data.max_pixels)",
        )
    with _refused(name):
        image = standard(image)
    return np.asarray(over_white(image) if mode == "RGB" else image.convert(mode))


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Whatever Pillow raises in the block becomes a BadRecord."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadRecord("too large", f"{name}: {error}") from None
    except Exception as error:  # of many classes, none of them shared by the readers of formats
        told = re.sub(r" ?<_io[^>]*>", "", str(error))  # Python's name of bytes in memory
        raise BadRecord("undecodable", f"{name}: a picture cannot be decoded ({told})") from None


def standard(image: Image.Image) -> Image.Image:
    """An image upright, in sRGB and 8 bits: RGB, or RGBA where it may be transparent."""
    tile = getattr(image, "tile", None)
    stored = str(tile[0][3]) if tile else ""  # form of the samples
    image.load()
    key, alpha, turn = image.info.get("transparency"), None, None
    with contextlib.suppress(Exception):  # of many classes, for damaged EXIF
        turn = TURNS.get(image.getexif().get(0x0112))
    if image.mode == "F":
        raise ValueError("floats have no known range")
    if image.mode.startswith("I"):
        grey, most = np.asarray(image).astype(np.int64), 4095 if "I;12" in stored else 65535
        if grey.min() < 0 or grey.max() > most:
            raise ValueError(f"integers from {grey.min()} to {grey.max()} have no known range")
        alpha = None if key is None else Image.fromarray(np.uint8(255) * (grey != key))
        pixels = Image.fromarray(((510 * grey + most) // (2 * most)).astype(np.uint8))
    elif image.has_transparency_data:
        if stored in KEYS:
            image.info["transparency"] = KEYS[stored](key)
        both = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        pixels, alpha = both.convert(both.mode[:-1]), both.getchannel("A")
    else:
        pixels = image.convert(image.mode if image.mode in ("L", "CMYK") else "RGB")
    mode, transform = to_srgb(image.info.get("icc_profile") or b"")
    if pixels.mode == mode or (pixels.mode, mode) == ("L", "RGB"):
        pixels = transform.apply(pixels.convert(mode))
    pixels = pixels.convert("RGB")
    if alpha is not None:
        pixels.putalpha(alpha)
    pixels = pixels if turn is None else pixels.transpose(turn)
    pixels.info = {}  # orientation and profile are applied
    return pixels


@functools.lru_cache(maxsize=16)
def to_srgb(profile: bytes) -> tuple[str, Any]:
    """(mode, transform) of an ICC profile; mode '' if it is broken or as good as sRGB's own."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    try:
        given, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[given.profile.xcolor_space.strip()]
        relative, flags = (
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        transform = ImageCms.buildTransform(given, srgb, mode, "RGB", relative, flags)
        probe = Image.fromarray(cube).convert(mode)
        moved = np.asarray(transform.apply(probe), np.int16)
    except Exception:  # of many classes, for a broken profile
        return "", None
    is_srgb = np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= 2
    return ("", None) if is_srgb else (mode, transform)


def over_white(image: Image.Image) -> Image.Image:
    """A `standard` image in RGB, white where it is transparent."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
