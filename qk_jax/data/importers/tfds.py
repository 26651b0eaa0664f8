"""Captioned pictures of TensorFlow data sets (`config.data.records` = 'tfds:NAME')."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.example import Example, Source, TaskSettings, caption_of
from qk_jax.data.importers.drafts import encoded
from qk_jax.data.importers.job import Job, Piece, Row, Rows
from qk_jax.pictures.decoding import decode_picture, picture_of
from qk_jax.pictures.fitting import cover


def opened(name: str, split: str) -> tuple[Any, list[str]]:
    """The data source of a split by number, and its features; pictures stay encoded.

    Args:
      name: of a data set, or the folder of a prepared one.
      split: of it.

    Raises:
      InputError: it is not prepared, or has no random access.
    """
    import tensorflow_datasets as tfds  # slow to import, and rarely used

    try:
        here = files.Path(name).is_dir()
        builder = tfds.builder_from_directory(name) if here else tfds.builder(name)
        raw = {
            feature: tfds.decode.SkipDecoding()  # it would decode by a law of its own
            for feature, kind in builder.info.features.items()
            if isinstance(kind, tfds.features.Image) and kind.np_dtype != np.float32
        }
        return builder.as_data_source(split, decoders=raw), list(builder.info.features)
    except Exception as error:  # of many classes, none of them shared
        raise InputError(
            f"the data set tfds:{name} has no split {split!r} that can be read by number "
            f"({str(error).splitlines()[0]}); prepare it with file_format='array_record'"
        ) from None


class TfdsSource:
    """Text to image from a prepared TensorFlow data set (`tfds.data_source`; no TensorFlow needed).

    Only a file format with random access (array_record) works. Sizes are not known before a picture
    is decoded, so every picture goes to the squarest size.

    Raises: InputError when the data set is not prepared, or has no such features.
    """

    task = "text_to_image"

    def __init__(
        self, name: str, split: str, settings: TaskSettings, image: str, text: str, max_pixels: int
    ):
        self.name, self.image, self.text = f"tfds:{name}", image, text
        self.settings, self.max_pixels = settings, max_pixels
        self.data, features = opened(name, split)
        absent = [feature for feature in (image, text) if feature not in features]
        if absent:
            raise InputError(f"tfds:{name} has no feature {absent[0]!r}, but {', '.join(features)}")
        shapes = [abs(np.log(height / width)) for height, width in settings.sizes]
        self.size_of = np.full(len(self.data), int(np.argmin(shapes)))
        self.pictures_of = np.zeros(len(self.data), np.int32)
        self.references_of = np.zeros((len(self.data), 0), np.int32)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Example:
        name = f"record {number} of {self.name}"
        features = self.data[int(number)]
        text = features[self.text]
        caption = caption_of(text.decode() if isinstance(text, bytes) else text, name)
        given = features[self.image]
        if isinstance(given, bytes):
            picture = decode_picture(given, "RGB", self.max_pixels, name)
        else:
            picture = picture_of(_image(given, name), "RGB", self.max_pixels, name)
        target = cover(picture, self.settings.sizes[self.size_of[number]])
        return Example(caption, target, (), (), self.task, int(number), source=self.name)


def _image(array: Any, name: str) -> Image.Image:
    """An array [h, w, 1, 3 or 4] of a feature that was not encoded. Raises: BadRecord."""
    array = np.asarray(array)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.dtype != np.uint8:
        raise BadRecord("undecodable", f"{name}: a picture is {array.dtype}{array.shape}")
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def sources(
    data: Mapping[str, Any], split: str, settings: TaskSettings, names: Sequence[str]
) -> dict[str, Source]:
    """The one task of a data set. Raises: InputError; see `TfdsSource`."""
    if set(names) != {TfdsSource.task}:
        raise InputError(f"{data['records']} has text_to_image only; set other data.tasks to 0")
    source = TfdsSource(
        data["records"].partition(":")[2], split, settings,
        data["tfds_image"], data["tfds_text"], data["max_pixels"],
    )  # fmt: skip
    return {source.task: source}


def _plan(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    pieces = []
    for name in job.inputs:
        count = len(opened(name, job.split)[0])
        starts = range(0, count, job.shard_records)
        pieces += [Piece((name,), n, min(job.shard_records, count - n)) for n in starts]
    return pieces, []


def _read(job: Job, piece: Piece, wanted: frozenset[str]) -> Iterator[Row | BadRecord]:
    (name,) = piece.paths
    data, _ = opened(name, job.split)
    for number in range(piece.start, piece.start + piece.units):
        key = f"{name}/{job.split}/{number}"

        def picture(value: Any, key: str = key) -> bytes:
            return value if isinstance(value, bytes) else encoded(_image(value, key), "PNG")

        yield Row(key, data[number], picture)


DATA_SOURCE = Rows(_plan, _read)
