"""The project's record file: an ArrayRecord of small records that need no schema compiler.

One record is

    u32 length of the header (little endian) | header (UTF-8 JSON) | blobs, one after another

The header names its blobs in order (`"blobs": [{"name": ..., "size": bytes}, ...]`); everything
else in it is free (caption, task, licence, ...). Files are written with `group_size:1`, so that any
record can be read by its number in one small read. Beside `NAME.array_record` lies
`NAME.array_record.index.npy`, a structured array with one row per record (`INDEX_DTYPE`): what the
batch plan must know before any record is opened.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module

from qk_jax.base.errors import InputError

INDEX_DTYPE = np.dtype(
    [
        ("width", "<u4"),
        ("height", "<u4"),
        ("pictures", "<u2"),
        ("bytes", "<u4"),
        ("task", "S24"),
    ]
)
_HEADER_LENGTH = struct.Struct("<I")
_HEADER_LIMIT = 1 << 24


class Record(NamedTuple):
    """One record: `header` (a dict without its blob table) and `blobs` by name."""

    header: dict
    blobs: dict[str, bytes]


def index_path(path: str | os.PathLike) -> Path:
    """The side index that belongs to the record file `path`."""
    return Path(f"{os.fspath(path)}.index.npy")


def encode(header: Mapping, blobs: Mapping[str, bytes]) -> bytes:
    """One record as bytes. Raises: ValueError when the header already has a key 'blobs'."""
    if "blobs" in header:
        raise ValueError("the key 'blobs' of a record header is written by encode")
    table = [{"name": name, "size": len(blob)} for name, blob in blobs.items()]
    head = json.dumps({**header, "blobs": table}, ensure_ascii=False, sort_keys=True).encode()
    return b"".join([_HEADER_LENGTH.pack(len(head)), head, *blobs.values()])


def decode(data: bytes, name: str = "record") -> Record:
    """The record in `data`; `name` is what an error calls it.

    Raises: InputError when the header is no JSON object, or when its lengths do not fit the data.
    """
    if len(data) < _HEADER_LENGTH.size:
        raise InputError(f"{name} has {len(data)} bytes, less than a header; write the file again")
    (length,) = _HEADER_LENGTH.unpack_from(data)
    start = _HEADER_LENGTH.size + length
    if length > _HEADER_LIMIT or start > len(data):
        raise InputError(
            f"{name} says that its header has {length} bytes, but holds {len(data)} in all; "
            "it is no record of this project or is damaged: write the file again"
        )
    try:
        header = json.loads(data[_HEADER_LENGTH.size : start])
        table = [(str(blob["name"]), int(blob["size"])) for blob in header.pop("blobs")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{name} has a bad header ({error}); write the file again") from None
    blobs = {}
    for blob, size in table:
        blobs[blob] = data[start : start + size]
        start += size
    if start != len(data):
        raise InputError(
            f"{name} should end at byte {start} by its header, but has {len(data)}; "
            "write the file again"
        )
    return Record(header, blobs)


class RecordWriter:
    """Writes a record file and its side index; both appear under their names only when complete.

    Use as a context manager: an exception inside leaves nothing behind.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._rows: list[tuple] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch()
        except OSError as error:
            raise InputError(
                f"cannot write {self.path} ({error.strerror}); choose a folder that is writable"
            ) from None
        self._writer = array_record_module.ArrayRecordWriter(str(self._partial), "group_size:1")

    def write(
        self,
        header: Mapping,
        blobs: Mapping[str, bytes],
        *,
        width: int,
        height: int,
        pictures: int = 0,
        task: str = "",
    ) -> None:
        """Appends one record.

        Args:
          header: free JSON values.
          blobs: encoded pictures and the like, by name, in order.
          width, height: pixels of the picture that decides the bucket (the target).
          pictures: number of condition pictures.
          task: name of the task, empty for plain pictures; at most 24 ASCII characters.
        """
        data = encode(header, blobs)
        self._writer.write(data)
        self._rows.append((width, height, pictures, len(data), task.encode("ascii")))

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._writer.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        side = index_path(self._partial)
        np.save(side, np.array(self._rows, INDEX_DTYPE))
        os.replace(side, index_path(self.path))
        os.replace(self._partial, self.path)


def write_records(path: str | os.PathLike, rows: Iterable[Mapping]) -> int:
    """Writes an iterable of keyword dicts for `RecordWriter.write`; returns how many."""
    count = 0
    with RecordWriter(path) as writer:
        for row in rows:
            writer.write(**row)
            count += 1
    return count


class RecordFile:
    """Random access to one record file. Opened at the first read, so that it pickles to workers.

    Raises: InputError for a file that is missing, truncated, or does not fit its side index.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._reader = None
        if not os.path.isfile(self.path):
            raise InputError(f"there is no record file {self.path}; name one that exists")
        side = index_path(self.path)
        try:
            self.index = np.load(side, allow_pickle=False)
        except FileNotFoundError:
            raise InputError(
                f"the side index {side} is missing; copy it too or write the file again"
            ) from None
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"the side index {side} is damaged ({error})") from None
        if self.index.dtype != INDEX_DTYPE:
            raise InputError(
                f"the side index {side} has the columns {self.index.dtype.names}; "
                "it belongs to another version: write the file again"
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_reader": None}

    def __len__(self) -> int:
        return len(self.index)

    def _open(self):
        if self._reader is None:
            try:
                reader = array_record_module.ArrayRecordReader(self.path, "readahead_buffer_size:0")
                count = reader.num_records()
            except (ValueError, RuntimeError, OSError) as error:
                raise InputError(
                    f"{self.path} cannot be opened; it is truncated or no ArrayRecord file: "
                    f"copy it again ({str(error).splitlines()[0]})"
                ) from None
            if count != len(self):
                raise InputError(
                    f"{self.path} has {count} records, its side index {len(self)}; "
                    "file and index belong to different versions: copy both again"
                )
            self._reader = reader
        return self._reader

    def raw(self, number: int) -> bytes:
        """The bytes of record `number`. Raises: IndexError, InputError when it cannot be read."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)} in {self.path}")
        reader = self._open()
        try:
            (data,) = reader.read([int(number)])
        except (ValueError, RuntimeError, OSError, IndexError) as error:
            raise InputError(
                f"record {number} of {self.path} cannot be read; the file is truncated or "
                f"damaged: copy it again ({str(error).splitlines()[0]})"
            ) from None
        return data

    def __getitem__(self, number: int) -> Record:
        return decode(self.raw(number), f"record {number} of {self.path}")
