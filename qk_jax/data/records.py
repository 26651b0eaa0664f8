"""The project's record file: an ArrayRecord of small records that need no schema compiler.

One record is

    u32 length of the header (little endian) | header (UTF-8 JSON) | blobs, one after another

The header names its blobs in order (`"blobs": [{"name": ..., "size": bytes}, ...]`); everything
else in it is free (caption, task, licence, ...). Files are written with `group_size:1`, so that any
record can be read by its number in one small read. `NAME.array_record.index.npy`, a structured
array with one element per record (`INDEX_DTYPE`), tells the batch plan what it must know before any
record is opened. The records of a split are one file, `SPLIT.array_record`, or several shards,
`SPLIT-00000-of-00002.array_record` and so on (`RecordSet`).
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import hashlib
import io
import itertools
import json
import logging
import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from qk_jax.base import buckets, files
from qk_jax.base.errors import BadRecord, InputError

log = logging.getLogger(__name__)
_OLD_DTYPE = np.dtype(  # of files that were written before references had sizes of their own
    [("width", "<u4"), ("height", "<u4"), ("pictures", "<u2"), ("bytes", "<u4"), ("task", "S24")]
)
# `references`: (width, height) of the first three references; 0 where there is none or none known.
# `digest`: of the pictures (`digest_of`); `source`: of which set. Both 0 in files from before them.
INDEX_DTYPE = np.dtype(
    [
        *_OLD_DTYPE.descr,
        ("references", "<u4", (3, 2)),
        ("digest", "u1", (16,)),
        ("source", "S24"),
    ]
)
ROWS_AT_ONCE = 1 << 20  # of a side index in memory
OPEN_AT_ONCE = 400  # shards of one split; systems allow a process 1,024 files
NAME_LIMIT = 24  # ASCII characters of a task or a source in the index
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
ENDING = "array_record"  # of a file of records
_INDEX = ".index.npy"
_CHECK, _CHECKED = struct.Struct("<8sI"), b"qk-crc32"
_BLOCK = 1 << 24  # bytes of which a checksum is taken at once
_HEADER_LENGTH = struct.Struct("<I")
_HEADER_LIMIT = 1 << 24


class Record(NamedTuple):
    """One record: `header` (without its blob table) and `blobs` by name."""

    header: dict[str, Any]
    blobs: dict[str, bytes]


class Span(NamedTuple):
    """Where a member of a tar lies, with the headers before it.

    Attributes:
      start: of its first header, in bytes.
      size: bytes from there to the end of its data.
      crc: CRC-32 of these bytes.
    """

    start: int
    size: int
    crc: int


class Entry(NamedTuple):
    """A record to write, and what the side index says of it.

    Attributes:
      header: free JSON values.
      blobs: encoded pictures and the like, by name, in order.
      width, height: pixels of the picture that decides the bucket (the target).
      pictures: number of condition pictures.
      task: name of the task, empty for plain pictures; at most 24 ASCII characters.
      references: (width, height) in pixels of the references, in order.
      source: name of the set that it is from; at most 24 ASCII characters.
      members: of a tar, where the example is read in place; a record file has no use for them.
    """

    header: Mapping[str, Any]
    blobs: Mapping[str, bytes]
    width: int
    height: int
    pictures: int = 0
    task: str = ""
    references: tuple[tuple[int, int], ...] = ()
    source: str = ""
    members: tuple[Span, ...] = ()


def unreadable(message: str) -> BadRecord:
    """What a record raises that is damaged, or in a file that is."""
    return BadRecord("unreadable", message)


def digest_of(blobs: Iterable[bytes]) -> bytes:
    """16 bytes that are the same for the same pictures in the same order, whatever the words."""
    found = hashlib.sha256()
    for blob in blobs:
        found.update(hashlib.sha256(blob).digest())
    return found.digest()[:16]


def shard_name(split: str, number: int, count: int, ending: str = ENDING) -> str:
    """File name of shard `number` of `count` of a split."""
    return f"{split}-{number:05d}-of-{count:05d}.{ending}"


def index_path(path: files.PathLike) -> files.Path:
    """The side index of the record file `path`."""
    path = files.Path(path)
    return path.with_name(path.name + _INDEX)


def encode(header: Mapping[str, Any], blobs: Mapping[str, bytes]) -> bytes:
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


@contextlib.contextmanager
def writing(path: files.PathLike) -> Iterator[Callable[[Entry], None]]:
    """A function that adds a record to the record file `path` and to its side index.

    Both appear under their names only when the block ends well; an error leaves nothing behind.

    Raises: InputError when they cannot be written.
    """
    files.writable_folder(files.Path(path).parent, "the folder")
    index: list[tuple[Any, ...]] = []
    # The index gets its name first.
    with (
        files.beside(path) as part,
        files.beside(index_path(path)) as side,
        buckets.local_file(part) as here,
    ):
        # Pictures are compressed already.
        writer = array_record_module.ArrayRecordWriter(str(here), "group_size:1,uncompressed")

        def add(entry: Entry) -> None:
            data = encode(entry.header, entry.blobs)
            writer.write(data)
            index.append(row_of(entry, len(data)))

        try:
            yield add
        finally:
            writer.close()
        side.write_bytes(index_bytes(np.array(index, INDEX_DTYPE)))


def index_bytes(index: np.ndarray, more: bytes = b"") -> bytes:
    """A side index as its file: a .npy, and behind it `more` and a checksum of both, which NumPy
    does not read."""
    buffer = io.BytesIO()
    np.save(buffer, index)
    data = buffer.getvalue() + more
    return data + _CHECK.pack(_CHECKED, zlib.crc32(data))


def check_index(path: files.PathLike, needed: bool = False) -> None:
    """Raises ValueError for a side index on disk whose checksum does not agree; those of record
    files that were written before there was one have none, which is an error if `needed`."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = len(data) - _CHECK.size
        if end < 0 or data[end : end + len(_CHECKED)] != _CHECKED:
            if needed:
                raise ValueError("it has no checksum")
            return
        found = 0
        with memoryview(data) as view:
            for begin in range(0, end, _BLOCK):
                with view[begin : min(begin + _BLOCK, end)] as part:
                    found = zlib.crc32(part, found)
        if found != _CHECK.unpack(data[end:])[1]:
            raise ValueError("its checksum does not agree")


def more_of(index: np.memmap[Any, Any], path: files.PathLike) -> bytes:
    """What a side index on disk, of which `index` is the array, has behind it (`index_bytes`)."""
    with open(path, "rb") as file:
        file.seek(index.offset + index.nbytes)
        return file.read()[: -_CHECK.size]


def row_of(entry: Entry, size: int) -> tuple[Any, ...]:
    """The columns INDEX_DTYPE of an entry that takes `size` bytes."""
    sizes = [*entry.references[:3], *[(0, 0)] * (3 - len(entry.references))]
    digest = list(digest_of(entry.blobs.values()))
    task, source = entry.task.encode("ascii"), entry.source.encode("ascii")
    return (*entry[2:5], size, task, sizes, digest, source)


def write_records(path: files.PathLike, entries: Iterable[Entry]) -> int:
    """Writes a record file and its side index, as `writing` does; returns how many records."""
    count = 0
    with writing(path) as add:
        for entry in entries:
            add(entry)
            count += 1
    return count


def coded(names: np.ndarray) -> tuple[list[bytes], np.ndarray]:
    """The different names of a column [N], and int [N] which each row has."""
    if len(names) and (names == names[0]).all():  # mostly; sorting text takes long
        return [names[0]], np.zeros(len(names), np.intp)
    values, codes = np.unique(names, return_inverse=True)
    return values.tolist(), codes


class RecordFile:
    """Random access to one record file. Opened at the first read, so that it pickles to workers.

    One in a bucket is copied to the disk of the host before that: its reader opens local files
    only, and what is read again and again costs a request for each record only without a copy.

    Raises: InputError for a file that is missing, or does not fit its side index.
    """

    def __init__(self, path: files.PathLike, needed: bool = True):
        """Reads the side index.

        Args:
          path: of the file.
          needed: without it a missing file is a warning, and each of its records is unreadable.
        """
        self.path = files.Path(path)
        self._reader: Any = None
        exists = self.path.is_file()
        if needed and not exists:
            mend = "name one that exists"
            if self.path.name.startswith("validation"):
                mend = f"import with --validation SHARE, or {mend}"
            raise InputError(f"there is no record file {self.path}; {mend}")
        side = index_path(self.path)
        if not side.is_file():
            raise InputError(
                f"the side index {side} is missing; copy it too or write the file again"
            )
        self._side = buckets.staged(side)
        try:
            check_index(self._side)
            found = self._mapped()
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"the side index {side} is damaged ({error})") from None
        columns = found.dtype.descr
        if columns[:5] != _OLD_DTYPE.descr or columns != INDEX_DTYPE.descr[: len(columns)]:
            raise InputError(
                f"the side index {side} has the columns {found.dtype.names}; "
                "it belongs to another version: write the file again"
            )
        self._count = len(found)
        if not exists:
            log.warning(
                "%s is missing: each of its %d records is replaced by another; copy it again",
                self.path, len(self),
            )  # fmt: skip
        self._local = buckets.staged(self.path) if exists else self.path

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __len__(self) -> int:
        return self._count

    def _mapped(self) -> np.ndarray:
        return np.load(self._side, mmap_mode="r", allow_pickle=False)

    @property
    def index(self) -> np.ndarray:
        """The side index, INDEX_DTYPE [N], mapped from the disk; what old files lack is 0."""
        found = self._mapped()
        if found.dtype == INDEX_DTYPE:
            return found
        new = np.zeros(len(found), INDEX_DTYPE)
        for column in found.dtype.names or ():
            new[column] = found[column]
        return new

    @property
    def is_open(self) -> bool:
        """Whether the system has a file open for it."""
        return self._reader is not None

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        self._reader = None

    def _open(self) -> Any:
        try:
            reader = array_record_module.ArrayRecordReader(
                str(self._local), "readahead_buffer_size:0"
            )
            count = reader.num_records()
            if not count and len(self):
                raise ValueError("no record is found in it")
        except (ValueError, RuntimeError, OSError) as error:
            raise unreadable(
                f"{self.path} cannot be opened; it is missing, truncated or no ArrayRecord file: "
                f"copy it again ({str(error).splitlines()[0]})",
            ) from None
        if count != len(self):
            raise InputError(
                f"{self.path} has {count} records, its side index {len(self)}; "
                "file and index belong to different versions: copy both again"
            )
        return reader

    def __getitem__(self, number: int) -> Record:
        """Record `number`.

        Raises: IndexError; BadRecord of kind 'unreadable'; InputError when the file does not belong
        to its side index.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)} in {self.path}")
        reader = self._reader  # which another thread may close
        if reader is None:
            reader = self._reader = self._open()
        name = f"record {number} of {self.path}"
        try:
            (data,) = reader.read([int(number)])
            return decode(data, name)
        except (ValueError, RuntimeError, OSError, IndexError, InputError) as error:
            self._reader = None  # another reader may do better where the disk had failed
            raise unreadable(
                f"{name} cannot be read; the file is truncated or damaged: copy it again "
                f"({str(error).splitlines()[0]})",
            ) from None


class RecordSet:
    """All records of one split of a folder, numbered through its shards in their order.

    Attributes:
      path: what errors call the whole.

    Raises: InputError when there is no such file, a shard is missing, or see `RecordFile`.
    """

    def __init__(self, folder: files.PathLike, split: str):
        folder = files.Path(folder)
        path = folder / f"{split}.array_record"
        pattern = f"{split}-*-of-*.array_record"
        indexed = [x.name.removesuffix(_INDEX) for x in folder.glob(pattern + _INDEX)]
        shards = sorted({path.name for path in folder.glob(pattern)} | set(indexed))
        if not shards:
            self._hold(path, [RecordFile(path)])
        else:
            check_shards(folder, split, shards)
            self._hold(path, [RecordFile(folder / name, needed=False) for name in shards])

    def _hold(self, path: files.Path, found: Sequence[Any]) -> None:
        """Begins with these files, each like a `RecordFile`."""
        self.path, self.files = path, list(found)
        self._ends = list(itertools.accumulate(map(len, self.files)))
        self._opened: collections.deque[Any] = collections.deque()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": collections.deque()}

    def __len__(self) -> int:
        return self._ends[-1]

    def indices(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first record, side index) of pieces, of which no more need be in memory
        than one: those of a large set have some gigabytes."""
        for end, file in zip(self._ends, self.files, strict=True):
            index, first = file.index, end - len(file)
            for begin in range(0, len(index), ROWS_AT_ONCE):
                yield first + begin, index[begin : begin + ROWS_AT_ONCE]

    def tasks(self) -> set[str]:
        """Of all records."""
        found: set[bytes] = set()
        for _, index in self.indices():
            found |= set(coded(index["task"])[0])
        return {name.decode() for name in found}

    def _place(self, number: int) -> tuple[Any, int]:
        """The file of a record, and its number there."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)} in {self.path}")
        found = bisect.bisect_right(self._ends, number)
        return self.files[found], number - (self._ends[found] - len(self.files[found]))

    def name(self, number: int) -> str:
        """What errors call a record: its file, and its number there."""
        file, own = self._place(number)
        return f"record {own} of {file.path}"

    def __getitem__(self, number: int) -> Record:
        """Record `number`. Raises: as `RecordFile`."""
        file, own = self._place(number)
        if not file.is_open:
            self._opened.append(file)
            if len(self._opened) > OPEN_AT_ONCE:
                self._opened.popleft().close()
        return file[own]


def check_shards(folder: files.Path, split: str, names: list[str], ending: str = ENDING) -> None:
    """Raises InputError unless the names are the shards of one writing, all of them."""
    found = [match for name in names if (match := _SHARD.search(name))]
    counts = {match[2] for match in found}
    if (folder / f"{split}.{ending}").exists() or len(counts) != 1:
        raise InputError(
            f"{folder} has the records of {split} from several writings "
            f"({names[0]} beside others); keep those of one"
        )
    count = int(*counts)
    expected = [shard_name(split, number, count, ending) for number in range(count)]
    if absent := sorted(set(expected) - set(names)):
        raise InputError(f"{folder / absent[0]} is missing; copy it too or write the records again")
