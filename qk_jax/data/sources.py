"""Examples that were made elsewhere: the project's own record files, and TFDS data sets.

A source has `len`, `[i]` -> `tasks.Example`, and the arrays `size_of`, `pictures_of` [N] that the
batch plan reads before any picture is decoded; so do the made tasks of `qk_jax.data.tasks`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from qk_jax.data import buckets, records
from qk_jax.data.corpus import BadRecord, caption_of, decode_picture
from qk_jax.data.scenes import Size
from qk_jax.data.tasks import REFERENCE, SOURCE, TASKS, Example, Settings
from qk_jax.errors import InputError

_ROLES = {"source": SOURCE, "reference": REFERENCE}


def cover(picture: np.ndarray, size: Size) -> np.ndarray:
    """Scales a picture to cover (H, W) and crops what is over, evenly: uint8 [H, W, 3]."""
    height, width = picture.shape[:2]
    if (height, width) == tuple(size):
        return picture
    scale = max(size[0] / height, size[1] / width)
    box_height, box_width = size[0] / scale, size[1] / scale
    left, top = (width - box_width) / 2, (height - box_height) / 2
    box = (left, top, left + box_width, top + box_height)
    resized = Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def contain(picture: np.ndarray, side: int) -> np.ndarray:
    """Scales a picture into a white square, centred: uint8 [side, side, 3]."""
    height, width = picture.shape[:2]
    if (height, width) == (side, side):
        return picture
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    out = Image.new("RGB", (side, side), "white")
    resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
    out.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(out)


class RecordSource:
    """One task of a record file written by `write_examples`.

    Header: `instruction`, `roles` ('source' or 'reference' for each picture); blobs: `target`,
    `picture_1`, `picture_2`, ... A target goes to the size nearest in aspect ratio (scaled to cover
    it, cropped evenly, and sources alike); references are fitted on white squares.

    Raises: InputError when the file has no record of the task.
    """

    def __init__(self, file: records.RecordFile, task: str, settings: Settings, max_pixels: int):
        self.task, self.file, self.settings, self.max_pixels = task, file, settings, max_pixels
        self.name = file.path
        self.numbers = np.flatnonzero(file.index["task"] == task.encode())
        if not len(self.numbers):
            known = sorted({name.decode() for name in np.unique(file.index["task"])})
            raise InputError(
                f"{file.path} has no record of task {task} (it has {', '.join(known) or 'none'}); "
                f"set config.data.tasks.{task} to 0"
            )
        rows = file.index[self.numbers]
        self.size_of = buckets.nearest(rows["height"], rows["width"], settings.sizes)
        self.pictures_of = rows["pictures"].astype(np.int32)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Example:
        """Example `number`. Raises: BadRecord."""
        record = int(self.numbers[number])
        name = f"record {record} of {self.file.path}"
        header, blobs = self.file[record]
        instruction = caption_of(header.get("instruction"), name)
        roles = header.get("roles") or []
        names = [f"picture_{i + 1}" for i in range(int(self.pictures_of[number]))]
        if len(roles) != len(names) or set(roles) - set(_ROLES):
            raise BadRecord("roles", f"{name}: roles are {roles!r:.60}, for {len(names)} pictures")
        absent = [blob for blob in ("target", *names) if blob not in blobs]
        if absent:
            raise BadRecord("undecodable", f"{name}: there is no blob {absent[0]!r}")
        size = self.settings.sizes[self.size_of[number]]

        def picture(blob: str) -> np.ndarray:
            return decode_picture(blobs[blob], "RGB", self.max_pixels, f"{name}, {blob}")

        side = self.settings.reference_size
        shown = tuple(
            cover(picture(blob), size) if role == "source" else contain(picture(blob), side)
            for blob, role in zip(names, roles, strict=True)
        )
        numbers = tuple(_ROLES[role] for role in roles)
        target = cover(picture("target"), size)
        return Example(instruction, target, shown, numbers, self.task, record)


class TfdsSource:
    """Text to image from a prepared TensorFlow data set (`tfds.data_source`; no TensorFlow needed).

    Only a file format with random access (array_record) works. Sizes are not known before a picture
    is decoded, so every picture goes to the squarest size.

    Raises: InputError when the data set is not prepared, or has no such features.
    """

    task = "text_to_image"

    def __init__(
        self, name: str, split: str, settings: Settings, image: str, text: str, max_pixels: int
    ):
        import tensorflow_datasets as tfds  # slow to import, and rarely used

        self.name, self.image, self.text = f"tfds:{name}", image, text
        self.settings, self.max_pixels = settings, max_pixels
        try:
            builder = tfds.builder(name)
            self.data = builder.as_data_source(split)
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

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Example:
        """Example `number`. Raises: BadRecord."""
        name = f"record {number} of {self.name}"
        row = self.data[int(number)]
        text = row[self.text]
        caption = caption_of(text.decode() if isinstance(text, bytes) else text, name)
        picture = np.asarray(row[self.image])
        if self.max_pixels and picture.shape[0] * picture.shape[1] > self.max_pixels:
            raise BadRecord("too large", f"{name}: a picture of {picture.shape[:2]} pixels")
        if picture.ndim != 3 or picture.shape[-1] not in (1, 3) or picture.dtype != np.uint8:
            raise BadRecord("undecodable", f"{name}: a picture is {picture.dtype}{picture.shape}")
        picture = np.repeat(picture, 3, axis=-1) if picture.shape[-1] == 1 else picture
        target = cover(picture, self.settings.sizes[self.size_of[number]])
        return Example(caption, target, (), (), self.task, int(number))


def write_examples(path: str | os.PathLike, examples: Iterable[Example]) -> int:
    """Writes examples as a record file that `RecordSource` reads (PNG); returns how many.

    Raises: InputError for an unknown task, an empty instruction, or roles that do not fit.
    """
    names = {number: name for name, number in _ROLES.items()}

    def png(picture: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()

    def rows():
        for count, example in enumerate(examples):
            if example.task not in TASKS:
                raise InputError(f"example {count} has the task {example.task!r}, not of {TASKS}")
            if len(example.roles) != len(example.pictures):
                raise InputError(
                    f"example {count} has {len(example.pictures)} pictures, "
                    f"but {len(example.roles)} roles"
                )
            caption_of(example.instruction, f"example {count}")
            blobs = {"target": png(example.target)}
            blobs |= {f"picture_{i + 1}": png(x) for i, x in enumerate(example.pictures)}
            yield {
                "header": {
                    "instruction": example.instruction,
                    "roles": [names[role] for role in example.roles],
                },
                "blobs": blobs,
                "width": example.target.shape[1],
                "height": example.target.shape[0],
                "pictures": len(example.pictures),
                "task": example.task,
            }

    return records.write_records(Path(path), rows())
