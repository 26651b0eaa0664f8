"""Ready examples in the project's own record files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import buckets, records
from qk_jax.data.example import Example, Source, TaskSettings, caption_of
from qk_jax.data.records import coded
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.fitting import contain, cover
from qk_jax.pictures.roles import REFERENCE, SOURCE

_ROLES = {"source": SOURCE, "reference": REFERENCE}
_SAME = {role: role for role in _ROLES}


class RecordSource:
    """One task of a record file written by an import or by `qk_jax.data.Writer`.

    Attributes, beside those of a `Source`, of its N examples:
      numbers: int [N], of the record of each.
      names: of the sets that they are from.
      name_of: int [N], index into `names`.

    Header: `instruction`, `roles` ('source' or 'reference' for each picture); blobs: `target`,
    `picture_1`, `picture_2`, ... A target goes to the size nearest in aspect ratio (scaled to cover
    it, cropped evenly, and sources alike), a reference to the nearest of its sizes, whole on white.

    Raises: InputError when the file has no record of the task.
    """

    def __init__(
        self,
        file: records.RecordSet,
        task: str,
        settings: TaskSettings,
        max_pixels: int,
        captions: Mapping[str, float] = MappingProxyType({"instruction": 1.0}),
        roles: Mapping[str, str] = MappingProxyType({}),
    ):
        """Reads the side index.

        Args:
          file: with the records.
          task: one of TASKS.
          settings: of the task.
          max_pixels: of a picture; 0 for no bound.
          captions: fields of the header that may be shown as the instruction, with weights.
          roles: {role in the header: role that is trained}.
        """
        self.task, self.file, self.settings, self.max_pixels = task, file, settings, max_pixels
        self.captions, self.roles = dict(captions), {**_SAME, **roles}
        self.names: list[str] = []
        columns = [self._columns(*piece) for piece in file.indices()]
        rows = [np.concatenate(column) for column in zip(*columns, strict=True)]
        if not rows or not len(rows[0]):
            mend = f"set config.data.tasks.{task} to 0"
            if file.path.name.startswith("validation"):
                mend = f"import it with a larger --validation, or {mend}"
            raise InputError(
                f"{file.path} has no record of task {task} (it has "
                f"{', '.join(sorted(file.tasks())) or 'none'}); {mend}"
            )
        self.numbers, self.size_of, self.pictures_of, self.references_of, self.name_of = rows

    def _columns(self, first: int, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """`numbers`, `size_of`, `pictures_of`, `references_of` and `name_of` of a piece of the side
        index; narrow, since a set may have 50 million rows."""
        settings, own = self.settings, np.flatnonzero(index["task"] == self.task.encode())
        sizes = buckets.nearest(index["height"][own], index["width"][own], settings.sizes)
        pictures = index["pictures"][own].clip(max=255).astype(np.uint8)
        references = np.zeros((len(own), 0), np.uint8)
        if len(settings.reference_shapes) > 1:
            width, height = index["references"][own].transpose(2, 0, 1)
            if self.roles != _SAME:  # the index has the sizes of other pictures
                width = height = np.zeros_like(width)
            known = (width > 0).sum(axis=1)
            number = np.where(known > 0, known, pictures)[:, None]
            # What is not known is taken for a square.
            references = settings.nearest_reference(
                np.maximum(height, 1), np.maximum(width, 1), number
            )
        values, codes = coded(index["source"][own])
        names = [value.decode() for value in values]
        self.names += [name for name in names if name not in self.names]
        places = np.array([self.names.index(name) for name in names], np.uint16)
        return (own + first).astype(np.uint32), sizes, pictures, references, places[codes]

    def name(self, number: int) -> str:
        """The set that example `number` is from, '' where it says none."""
        return self.names[self.name_of[number]]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Example:
        record = int(self.numbers[number])
        name = self.file.name(record)
        header, blobs = self.file[record]
        captions = self._captions(header, name)
        roles = header.get("roles") or []
        names = [f"picture_{i + 1}" for i in range(int(self.pictures_of[number]))]
        if len(roles) != len(names) or set(roles) - set(_SAME):
            raise BadRecord("roles", f"{name}: roles are {roles!r:.60}, for {len(names)} pictures")
        roles = [self.roles[role] for role in roles]
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
        instruction, _ = max(captions, key=lambda caption: caption[1])
        several = captions if len(captions) > 1 else ()
        return Example(
            instruction, target, shown, numbers, self.task, record, source=self.name(number),
            captions=several,
        )  # fmt: skip

    def _captions(self, header: Mapping[str, Any], name: str) -> tuple[tuple[str, float], ...]:
        """(text, weight) of those that the record has. Raises: BadRecord when it has none."""
        found, lacks = [], None
        for field, weight in self.captions.items():
            try:
                found.append((caption_of(header.get(field), name), weight))
            except BadRecord as error:
                there = ", ".join(map(str, header))
                text = f"{name} has no field {field!r} of captions, only {there:.200}"
                absent = field not in header
                lacks = lacks or (BadRecord("missing field", text) if absent else error)
        if lacks and not found:
            raise lacks
        return tuple(found)


def sources(
    data: Mapping[str, Any],
    split: str,
    settings: TaskSettings,
    names: Sequence[str],
    **laws: Mapping[str, Any],
) -> dict[str, Source]:
    """Tasks of the records of a split in data.records; `laws` are captions and roles as of
    `RecordSource`. Raises: InputError; see `RecordSource`."""
    file, most = records.RecordSet(data["records"], split), data["max_pixels"]
    return {name: RecordSource(file, name, settings, most, **laws) for name in names}
