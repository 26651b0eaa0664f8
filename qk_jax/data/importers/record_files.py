"""Ready examples in the project's own record files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import buckets, records
from qk_jax.data.example import Example, Source, TaskSettings, caption_of
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.fitting import contain, cover
from qk_jax.pictures.roles import REFERENCE, SOURCE

_ROLES = {"source": SOURCE, "reference": REFERENCE}


class RecordSource:
    """One task of a record file written by an import or by `qk_jax.data.Writer`.

    Header: `instruction`, `roles` ('source' or 'reference' for each picture); blobs: `target`,
    `picture_1`, `picture_2`, ... A target goes to the size nearest in aspect ratio (scaled to cover
    it, cropped evenly, and sources alike), a reference to the nearest of its sizes, whole on white.

    Raises: InputError when the file has no record of the task.
    """

    def __init__(self, file: records.RecordSet, task: str, settings: TaskSettings, max_pixels: int):
        self.task, self.file, self.settings, self.max_pixels = task, file, settings, max_pixels
        self.numbers = np.flatnonzero(file.index["task"] == task.encode())
        if not len(self.numbers):
            known = sorted({name.decode() for name in np.unique(file.index["task"])})
            raise InputError(
                f"{file.path} has no record of task {task} (it has {', '.join(known) or 'none'}); "
                f"set config.data.tasks.{task} to 0"
            )
        index = file.index[self.numbers]
        self.size_of = buckets.nearest(index["height"], index["width"], settings.sizes)
        self.pictures_of = index["pictures"].astype(np.int32)
        self.references_of = np.zeros((len(index), 0), np.int32)
        if len(settings.reference_shapes) > 1:
            width, height = index["references"].transpose(2, 0, 1)
            known = (width > 0).sum(axis=1)
            number = np.where(known > 0, known, self.pictures_of)[:, None]
            # What is not known is taken for a square.
            self.references_of = settings.nearest_reference(
                np.maximum(height, 1), np.maximum(width, 1), number
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Example:
        record = int(self.numbers[number])
        name = self.file.name(record)
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

        def fitted(blob: str, role: str, place: int) -> np.ndarray:
            if role == "source":
                return cover(picture(blob), size)
            row, count = self.references_of[number], roles.count("reference")
            return contain(picture(blob), self.settings.reference_size(row, place, count))

        places = [roles[:i].count("reference") for i in range(len(roles))]
        shown = tuple(map(fitted, names, roles, places))
        numbers = tuple(_ROLES[role] for role in roles)
        target = cover(picture("target"), size)
        name = self.file.index["source"][record].decode()
        return Example(instruction, target, shown, numbers, self.task, record, source=name)


def sources(
    data: Mapping[str, Any], split: str, settings: TaskSettings, names: Sequence[str]
) -> dict[str, Source]:
    """Tasks of the records of a split in data.records. Raises: InputError; see `RecordSource`."""
    file = records.RecordSet(data["records"], split)
    return {name: RecordSource(file, name, settings, data["max_pixels"]) for name in names}
