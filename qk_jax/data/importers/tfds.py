"""TensorFlow data sets (`config.data.records` = 'tfds:NAME'): captioned pictures, and all tasks of
those that `data.tfds_builder` makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.example import Example, Source, TaskSettings, caption_of
from qk_jax.data.importers import tfds_records
from qk_jax.data.importers.drafts import encoded
from qk_jax.data.importers.job import Job, Piece, Row, Rows
from qk_jax.data.importers.record_files import RecordSource
from qk_jax.pictures.decoding import decode_picture, picture_of
from qk_jax.pictures.fitting import cover


class Opened(NamedTuple):
    """A split of a prepared data set.

    Attributes:
      data: its examples by number; pictures stay encoded.
      features: their names.
      folder: of the data set.
    """

    data: Any
    features: list[str]
    folder: str


def opened(name: str, split: str) -> Opened:
    """A split of a data set.

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
        data = builder.as_data_source(split, decoders=raw)
        return Opened(data, list(builder.info.features), str(builder.data_path))
    except Exception as error:  # of many classes, none of them shared
        raise InputError(
            f"the data set tfds:{name} has no split {split!r} that can be read by number "
            f"({str(error).splitlines()[0]}); prepare it with file_format='array_record'"
        ) from None


class TfdsSource:
    """Text to image from a prepared TensorFlow data set (`tfds.data_source`; no TensorFlow needed).

    Only a file format with random access (array_record) works. Sizes are not known before a picture
    is decoded, so every picture goes to the squarest size.

    Raises: InputError when the data set has no such features.
    """

    task = "text_to_image"

    def __init__(
        self, name: str, found: Opened, settings: TaskSettings, image: str, text: str,
        max_pixels: int,
    ):  # fmt: skip
        self.name, self.image, self.text = name, image, text
        self.settings, self.max_pixels, self.data = settings, max_pixels, found.data
        absent = [feature for feature in (image, text) if feature not in found.features]
        if absent:
            has = ", ".join(found.features)
            raise InputError(f"{name} has no feature {absent[0]!r}, but {has}")
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
    """Tasks of a data set. Raises: InputError; see `TfdsSource` and `tfds_records.TfdsSet`."""
    name, most = data["records"], data["max_pixels"]
    found = opened(name.partition(":")[2], split)
    if tfds_records.are_records(found.features):
        whole = tfds_records.TfdsSet(name, found.folder, split, found.data)
        return {task: RecordSource(whole, task, settings, most) for task in names}
    if set(names) != {TfdsSource.task}:
        raise InputError(f"{name} has text_to_image only; set other data.tasks to 0")
    image, text = data["tfds_image"], data["tfds_text"]
    return {TfdsSource.task: TfdsSource(name, found, settings, image, text, most)}


def _plan(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    pieces = []
    for name in job.inputs:
        count = len(opened(name, job.split).data)
        starts = range(0, count, job.shard_records)
        pieces += [Piece((name,), n, min(job.shard_records, count - n)) for n in starts]
    return pieces, []


def _read(job: Job, piece: Piece, wanted: frozenset[str]) -> Iterator[Row | BadRecord]:
    (name,) = piece.paths
    data = opened(name, job.split).data
    for number in range(piece.start, piece.start + piece.units):
        key = f"{name}/{job.split}/{number}"

        def picture(value: Any, key: str = key) -> bytes:
            return value if isinstance(value, bytes) else encoded(_image(value, key), "PNG")

        yield Row(key, data[number], picture)


DATA_SOURCE = Rows(_plan, _read)
