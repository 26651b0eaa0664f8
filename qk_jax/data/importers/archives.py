"""Tar archives: their members in order (damage is told, not passed over), WebDatasets, indexes."""

from __future__ import annotations

import contextlib
import gzip
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.importers import inputs
from qk_jax.data.importers.job import Job, Piece, Row, Rows
from qk_jax.data.records import Span


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
      name: as the archive has it; '' where the rest of the archive is lost.
      start: of its first header in what is unpacked.
      offset: of its first byte there.
      size: bytes.
      refused: why it cannot be used.
    """

    name: str
    start: int = 0
    offset: int = 0
    size: int = 0
    refused: BadRecord | None = None


def is_packed(parts: Sequence[str]) -> bool:
    """Whether an archive is compressed, so that it can be read from its start only."""
    with inputs.joined(parts) as file:
        return file.read(2) == b"\x1f\x8b"


@contextlib.contextmanager
def unpacked(parts: Sequence[str]) -> Iterator[Any]:
    """An archive of one or more parts as one file of what is unpacked."""
    packed = is_packed(parts)
    with inputs.joined(parts) as file:
        yield gzip.GzipFile(fileobj=file) if packed else file


def members(file: Any, name: str) -> Iterator[Member]:
    """The files of a tar, in order.

    `tarfile` takes a damaged header for the end and is silent; here it is 'truncated'. Links and
    devices are never followed, and names are only names: nothing is unpacked.
    """
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
        tar.offset = 0  # it has read the first member already
        while True:
            file.seek(tar.offset)
            info = tarfile.TarInfo.fromtarfile(tar)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                kind = "link" if info.islnk() or info.issym() else "special file"
                text = f"{name}: the member {info.name!r:.100} is a {kind}"
                yield Member(info.name, refused=BadRecord("unsafe name", text))
                continue
            try:
                inputs.safe_name(info.name, name)
            except BadRecord as error:
                yield Member(info.name, refused=error)
                continue
            yield Member(info.name, info.offset, info.offset_data, info.size)
    except tarfile.HeaderError as error:
        if type(error).__name__ != "EOFHeaderError":  # the mark of the end
            yield Member("", refused=_rest_is_lost(name, error))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        yield Member("", refused=_rest_is_lost(name, error))


def _rest_is_lost(name: str, error: Exception) -> BadRecord:
    return BadRecord("truncated", f"{name} is truncated or damaged; the rest is lost ({error})")


def _plan(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    found = inputs.archives(job.inputs)
    for parts in found if job.in_place else ():
        if len(parts) > 1 or is_packed(parts):
            raise InputError(
                f"--input {parts[0]} is compressed or one of several parts, so that it cannot be "
                "read in place; make it one plain tar, or import it"
            )
    return [Piece(parts) for parts in found], []


def _samples(job: Job, piece: Piece, wanted: frozenset[str]) -> Iterator[Row | BadRecord]:
    """Samples of a WebDataset: members that follow each other and have one name up to the dot."""
    name = piece.paths[0]
    key = ""
    bad: BadRecord | None = None
    fields: dict[str, Any] = {}
    spans: list[Span] = []
    seen: set[str] = set()
    with unpacked(piece.paths) as file:
        for member in members(file, name):
            own, ending = key_of(member.name) if member.name else (key, "")
            if own != key:
                if fields or bad:
                    yield bad or row_of(name, key, fields, spans)
                key, fields, spans, bad = own, {}, [], None
            if member.name in seen:
                bad = BadRecord("same name", f"{name}: the member {member.name!r:.100} comes twice")
            seen.add(member.name)
            try:
                begin = member.start if job.in_place else member.offset
                data = _bytes_of(file, begin, member, name)
                if job.in_place and ending in wanted:
                    spans.append(Span(begin, len(data), zlib.crc32(data)))
                fields[ending] = data[member.offset - begin :]
            except BadRecord as error:
                bad = error
    if fields or bad:
        yield bad or row_of(name, key, fields, spans)


def row_of(archive: str, key: str, fields: dict[str, Any], spans: Sequence[Span] = ()) -> Row:
    """The row of a sample: its members by what comes after `key` and a dot in their names."""

    def picture(value: Any) -> bytes:
        if isinstance(value, bytes):
            return value
        raise BadRecord("missing picture", f"{archive}: {key} has no member {value!r:.60}")

    return Row(f"{posixpath.basename(archive)}/{key}", fields, picture, tuple(spans))


def key_of(name: str) -> tuple[str, str]:
    """('a/b', 'seg.png') of 'a/b.seg.png'."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _bytes_of(file: Any, begin: int, member: Member, name: str) -> bytes:
    """What is from `begin` to the end of a member."""
    if member.refused:
        raise member.refused
    if member.size > inputs.LARGEST:
        raise BadRecord("too large", f"{name}: {member.name} has {member.size} bytes")
    try:
        file.seek(begin)
        data = file.read(length := member.offset + member.size - begin)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _rest_is_lost(f"{name}: {member.name}", error) from None
    if len(data) < length:
        raise BadRecord("truncated", f"{name}: {member.name} ends before its last byte")
    return data


WEBDATASET = Rows(_plan, _samples)


def index(job: Job) -> list[BadRecord]:
    """Writes where the pictures of the archives of `job.images` lie; returns what is refused.

    Raises: InputError for a compressed archive, whose members cannot be read by name.
    """
    found = image_archives(job)
    if not found:
        return []
    refused: list[BadRecord] = []

    def places() -> Iterator[tuple[str, inputs.Place]]:
        for number, parts in enumerate(found):
            with unpacked(parts) as file:
                for member in members(file, parts[0]):
                    if member.refused:
                        refused.append(member.refused)
                    else:
                        name = posixpath.normpath(member.name)
                        yield name, inputs.Place(number, member.offset, member.size)

    twice = inputs.write_index(index_path(job), places())
    refused += [BadRecord("same name", f"--images: {x!r:.100} is in them twice") for x in twice]
    return refused


def index_path(job: Job) -> files.Path:
    return job.folder / "archives.sqlite"


def image_archives(job: Job) -> list[tuple[str, ...]]:
    """The parts of each archive of `job.images`. Raises: InputError for a compressed one."""
    given = [path for path in job.images if not files.Path(path).is_dir()]
    found = inputs.archives(given, "--images") if given else []
    for parts in found:
        if is_packed(parts):
            raise InputError(
                f"--images {parts[0]} is compressed, so that no picture in it can be read by name; "
                "unpack it and name the folder"
            )
    return found


def store(job: Job, folder: str = "") -> inputs.Store:
    """The pictures that rows name: in `job.images`, or else in `folder`."""
    folders = [path for path in job.images if files.Path(path).is_dir()]
    if not job.images:
        return inputs.Store([folder])
    found = image_archives(job)
    return inputs.Store(folders, found, index_path(job) if found else None)
