"""The embedded corpus: captioned cut-outs, split by subject."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

import qk_jax
from qk_jax.base import files
from qk_jax.base.errors import BadRecord
from qk_jax.data.example import caption_of
from qk_jax.data.records import RecordFile
from qk_jax.pictures.decoding import decode_picture

EMBEDDED = files.Path(qk_jax.__file__).parent / "assets" / "corpus"


class Cutout(NamedTuple):
    """One captioned picture with a transparent background.

    Attributes:
      rgba: uint8 [h, w, 4], not premultiplied, cropped to what is visible.
      colour: float32 [3], mean colour of what is visible.
      caption: a short English phrase in lower case.
      subject: key of the split; pictures of one subject are on one side.
      key: name of the picture in its source.
    """

    rgba: np.ndarray
    colour: np.ndarray
    caption: str
    subject: str
    key: str


class Corpus:
    """One side of a corpus by number; decoded pictures are kept (about 16 KB each)."""

    def __init__(self, split: str, folder: files.PathLike | None = None, max_pixels: int = 0):
        """Opens the files.

        Args:
          split: 'train' or 'validation'.
          folder: with SPLIT.array_record and its index; the embedded one by default.
          max_pixels: a larger picture is a bad record; 0 for no bound.

        Raises:
          InputError: the files are missing or damaged.
        """
        self.split, self.max_pixels = split, max_pixels
        self.file = RecordFile(files.Path(folder or EMBEDDED) / f"{split}.array_record")
        self._decoded: dict[int, Cutout] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}}

    def __len__(self) -> int:
        return len(self.file)

    @functools.cached_property
    def _words(self) -> np.ndarray:
        captions = (self.file[number].header.get("caption") for number in range(len(self)))
        return np.array([len(c.split()) if isinstance(c, str) else 0 for c in captions])

    def captioned(self, words: int) -> np.ndarray:
        """Numbers of the pictures whose caption has at most so many words.

        A caption that is no string counts as short, so that reading it finds a bad record.
        """
        return np.flatnonzero(self._words <= words)

    def __getitem__(self, number: int) -> Cutout:
        """Cut-out `number`. Raises: IndexError; BadRecord when it cannot be used."""
        if number not in self._decoded:
            self._decoded[number] = self._decode(number)
        return self._decoded[number]

    def _decode(self, number: int) -> Cutout:
        name = f"record {number} of {self.file.path}"
        header, blobs = self.file[number]
        caption = caption_of(header.get("caption"), name)
        if "image" not in blobs:
            raise BadRecord("undecodable", f"{name}: there is no blob 'image'")
        rgba = decode_picture(blobs["image"], "RGBA", self.max_pixels, name)
        weight = rgba[..., 3:].astype(np.float32)
        return Cutout(
            rgba=rgba,
            colour=(rgba[..., :3] * weight).sum((0, 1)) / max(float(weight.sum()), 1.0),
            caption=caption,
            subject=str(header.get("subject") or caption),
            key=str(header.get("key", number)),
        )
