"""Records as examples of a TensorFlow data set, and back: those that `data.tfds_builder` makes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qk_jax.base import buckets, files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import records

# Of an example: pictures are encoded; `header` is JSON of what else the header of a record has.
TEXTS = ("instruction", "task", "header")
PICTURES = {"source": "source_image", "reference": "references"}  # sequences, by role
FEATURES = (*TEXTS, "roles", "target", *PICTURES.values())


def index_path(folder: files.PathLike, split: str) -> files.Path:
    """The side index of a split, in the folder of the prepared data set."""
    return files.Path(folder) / f"{split}.index.npy"


def example_of(record: records.Record, task: str, name: str) -> dict[str, Any]:
    """The features of a record; `name` is what an error calls it.

    Raises: BadRecord when it is no example of a task.
    """
    header, blobs = dict(record.header), record.blobs
    roles = header.pop("roles", None)
    names = [f"picture_{number}" for number in range(1, len(blobs))]
    if not isinstance(roles, list) or set(blobs) != {"target", *names} or len(roles) != len(names):
        raise BadRecord("roles", f"{name} has the blobs {', '.join(blobs)} and the roles {roles!r}")
    pairs = list(zip(roles, names, strict=True))
    return {
        "instruction": header.pop("instruction", ""),
        "task": task,
        "header": json.dumps(header, ensure_ascii=False, sort_keys=True),
        "roles": roles,
        "target": blobs["target"],
        **{
            feature: [blobs[blob] for given, blob in pairs if given == role]
            for role, feature in PICTURES.items()
        },
    }


def record_of(example: Mapping[str, Any]) -> records.Record:
    """The record of the features of an example."""
    header = json.loads(example["header"])
    roles = [role.decode() for role in example["roles"]]
    left = {role: iter(example[feature]) for role, feature in PICTURES.items()}
    pictures = {f"picture_{n}": bytes(next(left[role])) for n, role in enumerate(roles, start=1)}
    header |= {"instruction": example["instruction"].decode(), "roles": roles}
    return records.Record(header, {"target": bytes(example["target"]), **pictures})


class TfdsFile:
    """The examples of a split as records, like a `RecordFile`.

    Attributes:
      path: of its data set.
      is_open: what keeps few files open need not count these.

    Raises: InputError when its side index is not of it.
    """

    is_open = True

    def __init__(self, name: str, folder: files.PathLike, split: str, data: Any):
        self.path, self._data = name, data
        side = index_path(folder, split)
        try:
            here = buckets.staged(side)
            records.check_index(here, needed=True)
            self._rows: np.ndarray = np.load(here, allow_pickle=False)
            fits = self._rows.dtype == records.INDEX_DTYPE and len(self._rows) == len(data)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{name}: {side} cannot be read ({error}); build it again") from None
        if not fits:
            raise InputError(
                f"{name}: {side} has {len(self._rows)} examples and the split {len(data)}, or it "
                "belongs to another version; build it again, whole"
            )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def index(self) -> np.ndarray:
        """The side index, INDEX_DTYPE [N]."""
        return self._rows

    def close(self) -> None:
        """Has nothing to close."""

    def __getitem__(self, number: int) -> records.Record:
        """Record `number`. Raises: BadRecord of kind 'unreadable'."""
        name = f"record {number} of {self.path}"
        try:
            record = record_of(self._data[number])
        except Exception as error:  # of many classes
            raise records.unreadable(f"{name} cannot be read ({error}); build it again") from None
        if records.digest_of(record.blobs.values()) != self._rows["digest"][number].tobytes():
            raise records.unreadable(
                f"{name} is damaged, or its data set was built in another order; build it again"
            )
        return record


class TfdsSet(records.RecordSet):
    """All examples of a split of a data set of `data.tfds_builder`. Raises: as `TfdsFile`."""

    def __init__(self, name: str, folder: files.PathLike, split: str, data: Any):
        self._hold(files.Path(folder) / split, [TfdsFile(name, folder, split, data)])


def are_records(features: Collection[str]) -> bool:
    """Whether a data set with these features is one of `data.tfds_builder`."""
    return set(FEATURES) <= set(features)
