"""Cut-outs, backgrounds and whole pictures as records have them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import BadRecord
from qk_jax.data.importers.drafts import text_of
from qk_jax.data.records import RecordSet
from qk_jax.pictures.decoding import decode_picture

SPLITS = ("train", "validation")
LEAST_SIDE = 64  # pixels of the longer side of a cut-out
MOST_SIDE = 1024  # to which larger ones are scaled down
LEAST_GROUND = 32  # pixels of the shorter side of a background
_LEAST_CLEAR = 0.01  # part of a cut-out's picture that must be transparent
_WORDS, _CHARACTERS = 12, 80  # of the caption of a cut-out, which stands within a sentence
_SCENE_CHARACTERS = 300  # of the caption of a background
_CUT = 0.25  # part of a side of a masked subject that may lie at the edge of its picture


class Cutout(NamedTuple):
    """A subject with a transparent background.

    Attributes:
      rgba: uint8 [h, w, 4], not premultiplied, cropped to what is visible.
      caption: a phrase that names it.
      key: name of its record.
      group: of its record, '' where there is none.
    """

    rgba: np.ndarray
    caption: str
    key: str
    group: str


class Ground(NamedTuple):
    """A background.

    Attributes:
      picture: uint8 [h, w, 3].
      caption: of the scene.
      key: name of its record.
      is_jpeg: whether it is encoded as JPEG.
    """

    picture: np.ndarray
    caption: str
    key: str
    is_jpeg: bool


class Whole(NamedTuple):
    """A picture by its bytes.

    Attributes:
      data: encoded.
      key: name of its record.
      group: of its record, '' where there is none.
    """

    data: bytes
    key: str
    group: str


def has_split(folder: files.PathLike, split: str) -> bool:
    """Whether a folder has record files of a split."""
    folder = files.Path(folder)
    if (folder / f"{split}.array_record").is_file():
        return True
    return any(True for _ in folder.glob(f"{split}-*-of-*.array_record*"))


@functools.lru_cache(maxsize=8)
def record_set(folder: str, split: str) -> RecordSet:
    """The records of a split, opened once in a process. Raises: InputError."""
    return RecordSet(folder, split)


def is_jpeg(data: bytes) -> bool:
    """Whether a picture is encoded as JPEG."""
    return data.startswith(b"\xff\xd8\xff")


def whole(folder: str, split: str, number: int) -> Whole:
    """The target of a record, undecoded. Raises: BadRecord."""
    file = record_set(folder, split)
    header, blobs = file[number]
    return Whole(_target(blobs, file.name(number)), *_names(header, split, number))


@functools.lru_cache(maxsize=48)  # few records, read again and again
def cutout(folder: str, split: str, number: int, max_pixels: int = 0) -> Cutout:
    """The subject of a record: what is visible of its target, or white in its mask.

    Raises: BadRecord, of kind 'no cut-out' for a picture without transparency or mask.
    """
    file = record_set(folder, split)
    name = file.name(number)
    header, blobs = file[number]
    caption = _caption(header, name, _CHARACTERS)
    if len(caption.split()) > _WORDS:
        raise BadRecord("long text", f"{name}: the caption has more than {_WORDS} words")
    rgba = decode_picture(_target(blobs, name), "RGBA", max_pixels, name)
    if "mask" in blobs:
        mask = decode_picture(blobs["mask"], "RGB", max_pixels, f"{name}, mask")[..., 0]
        rgba = _masked(rgba, mask, name)
    alpha = rgba[..., 3]
    if (alpha < 16).mean() < _LEAST_CLEAR:
        raise BadRecord("no cut-out", f"{name}: nothing of it is transparent, and it has no mask")
    rows, columns = (np.flatnonzero((alpha > 8).any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise BadRecord("hardly visible", f"{name}: all of it is transparent")
    rgba = np.ascontiguousarray(rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    height, width = rgba.shape[:2]
    if max(height, width) < LEAST_SIDE:
        raise BadRecord("too small", f"{name}: the subject is {width}x{height}")
    if rgba[..., 3].mean() < 0.05 * 255:
        raise BadRecord("hardly visible", f"{name}: less than a twentieth of the subject's box")
    if max(height, width) > MOST_SIDE:
        image = Image.fromarray(rgba)
        image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
        rgba = np.asarray(image)
    return Cutout(rgba, caption, *_names(header, split, number))


def _masked(rgba: np.ndarray, mask: np.ndarray, name: str) -> np.ndarray:
    """A picture with its mask as alpha. Raises: BadRecord of kind 'bad mask' or 'cut off'."""
    if mask.shape != rgba.shape[:2]:
        sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (mask, rgba)]
        raise BadRecord("bad mask", f"{name}: the mask is {sizes[0]}, the picture {sizes[1]}")
    seen = mask >= 128
    lines = (seen[0], seen[-1], seen[:, 0], seen[:, -1])
    if any(line.sum() > _CUT * seen.any(axis=x // 2).sum() for x, line in enumerate(lines)):
        raise BadRecord("cut off", f"{name}: the subject goes on beyond the edge of the picture")
    return np.dstack([rgba[..., :3], np.minimum(rgba[..., 3], mask)])


@functools.lru_cache(maxsize=4)
def ground(folder: str, split: str, number: int, max_pixels: int = 0) -> Ground:
    """A background. Raises: BadRecord, of kind 'no background' for one that is transparent."""
    file = record_set(folder, split)
    name = file.name(number)
    header, blobs = file[number]
    caption, data = _caption(header, name, _SCENE_CHARACTERS), _target(blobs, name)
    rgba = decode_picture(data, "RGBA", max_pixels, name)
    if (rgba[..., 3] < 240).any():
        raise BadRecord("no background", f"{name}: some of it is transparent")
    if min(rgba.shape[:2]) < LEAST_GROUND:
        size = f"{rgba.shape[1]}x{rgba.shape[0]}"
        raise BadRecord("too small", f"{name}: {size}, less than {LEAST_GROUND} for a background")
    key, _ = _names(header, split, number)
    return Ground(np.ascontiguousarray(rgba[..., :3]), caption, key, is_jpeg(data))


def forget() -> None:
    """Forgets what was read, since the files may have changed."""
    for kept in (record_set, cutout, ground):
        kept.cache_clear()


def _target(blobs: Mapping[str, bytes], name: str) -> bytes:
    if "target" not in blobs:
        raise BadRecord("undecodable", f"{name}: there is no blob 'target'")
    return blobs["target"]


def _caption(header: Mapping[str, Any], name: str, limit: int) -> str:
    """The caption of a record without condition pictures. Raises: BadRecord."""
    if header.get("roles"):
        raise BadRecord("no caption", f"{name}: its text is an instruction about other pictures")
    return text_of(header.get("instruction"), limit, name)


def _names(header: Mapping[str, Any], split: str, number: int) -> tuple[str, str]:
    """The key and the group of a record."""
    key, group = header.get("key"), header.get("group")
    return str(key or f"{split} {number}"), "" if group is None else str(group)
