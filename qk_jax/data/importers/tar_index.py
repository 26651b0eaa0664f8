"""The side index of a tar that is read in place: what the plan needs, and where each example lies.

`SPLIT-00000-of-00002.tar.index.npy` is a structured array with the columns INDEX_DTYPE of a record
file's index and `members`, the spans of an example's members in their order, with zeros behind
them. Behind the array come a JSON object that says of which tar it is and how samples became
examples, and a checksum of all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.data import records
from qk_jax.data.importers import inputs
from qk_jax.data.importers.job import TAR_INDEX, Job, Piece

ENDING = TAR_INDEX
_SPAN = [("start", "<u8"), ("size", "<u4"), ("crc", "<u4")]


class Facts(NamedTuple):
    """What a tar was when it was indexed.

    Attributes:
      tar: its path, from the folder of the index where it lies below that.
      size: bytes.
      mtime_ns: when it was last changed; 0 in a bucket.
      digest: as `inputs.digest_of`.
      task, columns, name: as of the job.
    """

    tar: str
    size: int
    mtime_ns: int
    digest: str
    task: str
    columns: dict[str, str]
    name: str


def mtime_of(path: files.PathLike) -> int:
    """When a file was last changed, in ns; 0 for one in a bucket."""
    return 0 if buckets.is_remote(path) else os.stat(path).st_mtime_ns


def writing(
    job: Job, piece: Piece
) -> Callable[[files.PathLike], AbstractContextManager[Callable[[records.Entry], None]]]:
    """As `records.writing`, but entries go to the index of the tar of `piece` alone.

    Raises: InputError for a tar that changes while it is read.
    """
    (tar,) = piece.paths
    there, folder = files.absolute(tar), files.absolute(job.out)
    name = str(there.relative_to(folder) if there.is_relative_to(folder) else there)

    def facts() -> Facts:
        about = inputs.size_of(tar), mtime_of(tar), inputs.digest_of(tar)
        return Facts(name, *about, job.task, dict(job.columns), job.name)

    before = facts()

    @contextlib.contextmanager
    def begin(path: files.PathLike) -> Iterator[Callable[[records.Entry], None]]:
        rows: list[tuple[Any, ...]] = []
        spans: list[tuple[records.Span, ...]] = []

        def add(entry: records.Entry) -> None:
            rows.append(records.row_of(entry, sum(span.size for span in entry.members)))
            spans.append(entry.members)

        yield add
        if facts() != before:
            raise InputError(f"{tar} has changed while it was read; index it when it is whole")
        more = json.dumps(before._asdict()).encode()
        files.write_bytes(path, records.index_bytes(_array(rows, spans), more))

    return begin


def _array(rows: list[tuple[Any, ...]], spans: list[tuple[records.Span, ...]]) -> np.ndarray:
    most = max(map(len, spans), default=1)
    found = np.zeros(len(rows), np.dtype([*records.INDEX_DTYPE.descr, ("members", _SPAN, (most,))]))
    whole = np.array(rows, records.INDEX_DTYPE)
    for column in records.INDEX_DTYPE.names or ():
        found[column] = whole[column]
    for row, own in zip(found["members"], spans, strict=True):
        row[: len(own)] = list(map(tuple, own))
    return found


class Index:
    """An index on disk. It pickles, and has no file open between two reads.

    Attributes:
      facts: of its tar.

    Raises: InputError for a damaged one, or one of another version.
    """

    def __init__(self, path: files.PathLike):
        self._path = buckets.staged(path)
        try:
            records.check_index(self._path, needed=True)
            found = self.array
            facts = files.json_object(records.more_of(found, self._path))
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"the side index {path} is damaged ({error}); index the tar again"
            ) from None
        names = (*(records.INDEX_DTYPE.names or ()), "members")
        if found.dtype.names != names or set(facts) != {*Facts._fields}:
            raise InputError(
                f"the side index {path} belongs to another version; index the tar again"
            )
        self.facts, self._count = Facts(**facts), len(found)
        self._dtype, self._offset = found.dtype, found.offset

    def __len__(self) -> int:
        return self._count

    @property
    def array(self) -> np.memmap[Any, Any]:
        """INDEX_DTYPE and `members` [N], mapped from the disk."""
        found: np.memmap[Any, Any] = np.load(self._path, mmap_mode="r", allow_pickle=False)
        return found

    def spans(self, number: int) -> list[records.Span]:
        """Where the members of an example lie. Raises: OSError."""
        size = self._dtype.itemsize
        with open(self._path, "rb", buffering=0) as file:
            row = os.pread(file.fileno(), size, self._offset + number * size)
        if len(row) < size:
            raise OSError("its side index ends before it")
        found = np.frombuffer(row, self._dtype)[0]["members"].tolist()
        return [records.Span(*span) for span in found if span[1]]
