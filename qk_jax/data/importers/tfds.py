"""Captioned pictures of TensorFlow data sets (`config.data.records` = 'tfds:NAME')."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.example import Example, Source, TaskSettings, caption_of
from qk_jax.pictures.decoding import decode_picture, picture_of
from qk_jax.pictures.fitting import cover


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
        import tensorflow_datasets as tfds  # slow to import, and rarely used

        self.name, self.image, self.text = f"tfds:{name}", image, text
        self.settings, self.max_pixels = settings, max_pixels
        try:
            builder = tfds.builder(name)
            feature = builder.info.features[image] if image in builder.info.features else None
            is_picture = isinstance(feature, tfds.features.Image) and feature.np_dtype != np.float32
            # TensorFlow Datasets would decode by a law of its own.
            raw = {image: tfds.decode.SkipDecoding()} if is_picture else None
            self.data = builder.as_data_source(split, decoders=raw)
        except Exception as error:  # of many classes, none of them shared
            raise InputError(
                f"the data set tfds:{name} has no split {split!r} that can be read by number "
                f"({str(error).splitlines()[0]}); prepare it with file_format='array_record'"
            ) from None
        absent = [feature for feature in (image, text) if feature not in builder.info.features]
        if absent:
            raise InputError(
                f"tfds:{name} has no feature {absent[0]!r}, but {', '.join(builder.info.features)}"
            )
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
        picture = self._picture(features[self.image], name)
        target = cover(picture, self.settings.sizes[self.size_of[number]])
        return Example(caption, target, (), (), self.task, int(number))

    def _picture(self, given: Any, name: str) -> np.ndarray:
        """uint8 [h, w, 3] of an encoded picture, or of an array [h, w, 1, 3 or 4]."""
        if isinstance(given, bytes):
            return decode_picture(given, "RGB", self.max_pixels, name)
        array = np.asarray(given)
        if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.dtype != np.uint8:
            raise BadRecord("undecodable", f"{name}: a picture is {array.dtype}{array.shape}")
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        return picture_of(image, "RGB", self.max_pixels, name)


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
