"""Encoded pictures of every kind that must become the same pixels everywhere.

`CASES` gives each with the pixels that it shows: upright, in sRGB, over white.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 48, 80  # one of the tiny model's sizes, so that nothing is scaled
SHADES = np.random.default_rng(0)


class Case(NamedTuple):
    """An encoded picture, the uint8 [48, 80, 3] that it shows, and how near a lossy one comes."""

    data: bytes
    shown: np.ndarray
    within: int = 0


def blocks(*channels: int, kind: type = np.uint8, most: int = 256) -> np.ndarray:
    """[48, 80, *channels] of 3 x 5 blocks with other values each; no two turns of it are alike."""
    values = SHADES.choice(most, (3, 5, *channels), replace=False).astype(kind)
    return values.repeat(16, axis=0).repeat(16, axis=1)


def encode(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    """A picture in a format of Pillow; lossless but for JPEG."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(form, {})
    buffer = io.BytesIO()
    image.save(buffer, form, **lossless, **options)
    return buffer.getvalue()


def inked(ink: np.ndarray) -> Image.Image:
    """A CMYK image; 255 is full ink."""
    return Image.merge(
        "CMYK", [Image.fromarray(np.ascontiguousarray(x)) for x in ink.T.swapaxes(1, 2)]
    )


# ---- orientation -------------------------------------------------------------------------------

# What the camera stored of an upright picture, by the orientation that it noted.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def turned(upright: np.ndarray, number: int, form: str, **options) -> bytes:
    """A picture stored as a camera of that orientation stores it."""
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(np.ascontiguousarray(STORED[number](upright)), form, exif=exif, **options)


# ---- profiles ----------------------------------------------------------------------------------

D50 = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)


def profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The bytes of an ICC profile."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    date = struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head = b"lcms" + b"\2\x10\0\0" + kind + space + pcs + date + b"acsp" + b"\0" * 28 + D50
    head = struct.pack(">I", start + len(body)) + head
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def swapping() -> bytes:
    """sRGB with red's primary for blue's and the other way round."""
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return (
        whole.replace(b"rXYZ", b"swap", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"swap", b"bXYZ", 1)
    )


def dark() -> bytes:
    """Grey whose values are darker than in sRGB: light is their 2.5th power."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 0x0280)
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": b"XYZ " + bytes(4) + D50, b"kTRC": curve})


def white_ink() -> bytes:
    """CMYK in which the fourth ink is white on black paper, and the others show nothing."""
    identity = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    lut += struct.pack(">9i", *(np.eye(3, dtype=int) * 0x10000).flatten().tolist())
    lut += identity * 4 + bytes([0, 128, 128, 255, 128, 128]) * 8 + identity * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": b"XYZ " + bytes(4) + D50, b"A2B0": lut})


def darkened(grey: np.ndarray) -> np.ndarray:
    """The sRGB values of grey with the profile `dark`."""
    x = (grey / 255) ** 2.5
    return np.where(x < 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255


# ---- files that Pillow does not write ----------------------------------------------------------


def png(samples: np.ndarray, depth: int, key: tuple[int, ...] = ()) -> bytes:
    """A PNG of grey or RGB samples of 4 or 16 bits, with a transparent colour."""
    height, width = samples.shape[:2]
    if depth == 4:
        rows = (samples[:, ::2] << 4 | samples[:, 1::2]).astype(np.uint8)
    else:
        rows = samples.reshape(height, -1).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, 2 * (samples.ndim - 2), 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", struct.pack(f">{len(key)}H", *key))]
    parts = [part for part in parts if part[1]] + [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    whole = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        check = struct.pack(">I", zlib.crc32(name + data))
        whole += struct.pack(">I", len(data)) + name + data + check
    return whole


def tiff12(grey: np.ndarray) -> bytes:
    """A TIFF of grey samples of 12 bits."""
    first, second = grey[:, ::2].astype(int), grey[:, 1::2].astype(int)
    strip = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    strip = strip.astype(np.uint8).tobytes()
    height, width = grey.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = len(strip)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    folder = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + folder


# ---- all cases ---------------------------------------------------------------------------------


def grey3(grey: np.ndarray) -> np.ndarray:
    """Grey as RGB."""
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=-1)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] seen over white."""
    part = alpha[..., None] / 255
    return np.rint(colour * part + 255 * (1 - part)).astype(np.uint8)


def _orientations() -> dict[str, Case]:
    upright = blocks(3)
    found = {f"orientation {n}": Case(turned(upright, n, "PNG"), upright) for n in STORED}
    found["orientation 6 of a JPEG"] = Case(turned(upright, 6, "JPEG", subsampling=0), upright, 12)
    found["orientation 5 of a WebP"] = Case(turned(upright, 5, "WEBP"), upright)
    found["orientation 8 of a TIFF"] = Case(turned(upright, 8, "TIFF"), upright)
    found["damaged EXIF"] = Case(encode(upright, "PNG", exif=b"Exif\0\0II*\0broken"), upright)
    return found


def _profiles() -> dict[str, Case]:
    colour, grey, alpha = blocks(3), blocks(), ALPHA
    swapped, bgr = swapping(), np.ascontiguousarray(colour[..., ::-1])
    rgba = np.dstack([colour, alpha])
    palette = Image.fromarray(colour).quantize(15)
    kept = np.where(blocks()[..., None] > 127, np.uint8(255), np.uint8(0))
    ink = np.dstack([colour, kept])
    return {
        "profile": Case(encode(colour, "PNG", icc_profile=swapped), bgr, 2),
        "profile of a JPEG": Case(
            encode(colour, "JPEG", icc_profile=swapped, subsampling=0), bgr, 16
        ),
        "profile and alpha": Case(
            encode(rgba, "PNG", icc_profile=swapped), over_white(bgr, alpha), 2
        ),
        "profile of a palette": Case(encode(palette, "PNG", icc_profile=swapped), bgr, 2),
        "profile and orientation": Case(turned(colour, 6, "PNG", icc_profile=swapped), bgr, 2),
        "profile of grey": Case(encode(grey, "PNG", icc_profile=dark()), grey3(darkened(grey)), 2),
        "profile of inks": Case(
            encode(inked(ink), "TIFF", icc_profile=white_ink()),
            np.repeat(kept, 3, axis=-1), 3,
        ),
        "profile of RGB for grey": Case(encode(grey, "PNG", icc_profile=swapped), grey3(grey), 2),
        "broken profile": Case(encode(colour, "PNG", icc_profile=b"no profile"), colour),
        "profile of another space": Case(encode(colour, "PNG", icc_profile=dark()), colour),
        "profile of sRGB": Case(encode(colour, "PNG", icc_profile=SRGB), colour),
    }  # fmt: skip


def _alphas() -> dict[str, Case]:
    colour, grey, alpha = blocks(3), blocks(), ALPHA
    gone = np.zeros((HEIGHT, WIDTH), bool)
    gone[16:32, 16:48] = True
    clear = np.where(gone, np.uint8(0), np.uint8(255))
    holed = colour.copy()
    holed[gone] = (9, 99, 199)
    keyed = np.where(gone, np.uint8(77), grey | 128)
    palette = Image.fromarray(holed).quantize(16)
    index = int(np.asarray(palette)[20, 20])
    several = bytes(0 if n == index else 255 - 9 * n for n in range(16))
    shades = np.array(list(several), np.uint8)[np.asarray(palette)]
    bits = np.where(gone, np.uint8(0), np.uint8(255))
    four = np.where(gone, 3, 5 + keyed % 8)
    wide = np.where(gone, 500, 20_000 + keyed.astype(int))
    wide3 = np.where(gone[..., None], [300, 600, 900], 20_000 + colour.astype(int))
    shown = over_white(holed, clear)
    return {
        "alpha": Case(encode(np.dstack([colour, alpha]), "PNG"), over_white(colour, alpha), 1),
        "alpha of a WebP": Case(
            encode(np.dstack([colour, clear]), "WEBP", exact=True), over_white(colour, clear)
        ),
        "grey with alpha": Case(
            encode(np.dstack([grey, alpha]), "PNG"), over_white(grey3(grey), alpha), 1
        ),
        "index of a palette": Case(encode(palette, "PNG", transparency=index), shown),
        "alphas of a palette": Case(
            encode(palette, "PNG", transparency=several), over_white(holed, shades), 1
        ),
        "index of a GIF": Case(encode(palette, "GIF", transparency=index), shown),
        "key of RGB": Case(encode(holed, "PNG", transparency=(9, 99, 199)), shown),
        "key of grey": Case(encode(keyed, "PNG", transparency=77), over_white(grey3(keyed), clear)),
        "key of black and white": Case(
            encode(Image.fromarray(bits).convert("1"), "PNG", transparency=0),
            np.full((HEIGHT, WIDTH, 3), 255, np.uint8),
        ),
        "key of 4 bits": Case(png(four, 4, (3,)), over_white(grey3(four * 17), clear)),
        "key of 16 bits": Case(png(wide, 16, (500,)), over_white(grey3(wide / 257), clear)),
        "key of 48 bits": Case(
            png(wide3, 16, (300, 600, 900)), over_white((wide3 >> 8).astype(np.uint8), clear)
        ),
    }


def _depths() -> dict[str, Case]:
    wide = blocks(kind=np.uint16, most=65536)
    wide[:16, :16] = 20_000
    shown = grey3(wide / 257)
    assert shown[0, 0, 0] == 78
    ink, colour = blocks(4), blocks(3)
    ink[..., 3] //= 2
    naive = np.rint((255 - ink[..., :3]) * (255 - ink[..., 3:].astype(float)) / 255)
    naive = naive.astype(np.uint8)
    portable = b"P5 80 48 65535\n" + wide.astype(">u2").tobytes()
    twelve = wide >> 4
    return {
        "16 bits": Case(encode(wide, "PNG"), shown),
        "16 bits of a TIFF": Case(encode(wide, "TIFF"), shown),
        "16 bits, the high byte first": Case(encode(wide.astype(">u2"), "TIFF"), shown),
        "16 bits in 32": Case(encode(wide.astype(np.int32), "TIFF"), shown),
        "16 bits of a PGM": Case(portable, shown),
        "12 bits": Case(tiff12(twelve), grey3(twelve / 4095 * 255)),
        "inks": Case(encode(inked(ink), "TIFF"), naive, 1),
        "inverted inks of a JPEG": Case(encode(inked(ink), "JPEG"), naive, 24),
        "black and white": Case(
            encode(Image.fromarray(colour[..., 0]).convert("1", dither=0), "PNG"),
            grey3(np.where(colour[..., 0] > 127, 255, 0)),
        ),
    }


def _frames() -> dict[str, Case]:
    first, second = blocks(3), blocks(3)
    alpha = np.where(ALPHA > 127, np.uint8(255), np.uint8(0))
    found = {}
    for form in ("GIF", "WEBP", "PNG"):
        frames = [Image.fromarray(np.dstack([frame, alpha])) for frame in (first, second)]
        data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
        found[f"frames of a {form}"] = Case(data, over_white(first, alpha))
    return found


ALPHA = np.array([0, 255, 128, 30, 220], np.uint8).repeat(16)[None].repeat(HEIGHT, axis=0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CASES = _orientations() | _profiles() | _alphas() | _depths() | _frames()

# What no law can show.
BAD = {
    "floats": encode(blocks().astype(np.float32) / 255, "TIFF"),
    "32 bits": encode(blocks().astype(np.int32) * 1000, "TIFF"),
    "no picture": b"no picture",
    "cut": CASES["orientation 1"].data[:-40],
}
