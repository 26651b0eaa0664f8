"""Files of other people's sets: opened here or in a bucket, joined from parts, found by name."""

from __future__ import annotations

import errno
import hashlib
import io
import pathlib
import posixpath
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from qk_jax.base import buckets, files
from qk_jax.base.errors import BadRecord, Failure, InputError, some

PICTURE_ENDINGS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2",
    ".ppm", ".tga",
)  # fmt: skip
LARGEST = 256 << 20  # bytes of a picture or another member
_WHOLE = 64 << 20  # bytes up to which an input is digested whole
_PART = 1 << 20
# x.tar, x.tgz, x.tar.gz, and their parts: x.tar.split.000, x.tar.gz.part-aa, x.tar.001, x.tar.aa
_ARCHIVE = re.compile(
    r"(?P<whole>.+\.(?:tar\.gz|tgz|tar))"
    r"(?:[._-](?:split|part)[._-]?\w{1,5}|\.\d{2,5}|\.a[a-z])?",
    re.IGNORECASE,
)
_ABSENT = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)


class Joined(io.RawIOBase):
    """Files one after another as one that is read at any place. Nothing is open before it is read.

    Raises: Failure when a file cannot be read.
    """

    def __init__(self, paths: Sequence[str]):
        super().__init__()
        self._paths, self._at = list(paths), 0
        sizes = [size_of(path) for path in paths]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        self._open: tuple[int, Any] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._starts[-1]}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        number = next((i for i, end in enumerate(self._starts[1:]) if self._at < end), None)
        if number is None:
            return 0
        try:
            if self._open is None or self._open[0] != number:
                self._close_part()
                self._open = number, opened(self._paths[number])
            handle = self._open[1]
            handle.seek(self._at - self._starts[number])
            data = handle.read(min(len(view), self._starts[number + 1] - self._at))
        except Exception as error:
            raise unreadable(self._paths[number], error) from None
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _close_part(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        self._close_part()
        super().close()


def opened(path: str) -> Any:
    """A file for reading bytes at any place, here or in a bucket."""
    if buckets.is_remote(path):
        return buckets.file_system(path).open(path, "rb")
    return open(path, "rb")


def joined(paths: Sequence[str]) -> io.BufferedReader:
    """Files one after another, buffered."""
    return io.BufferedReader(Joined(paths), 1 << 20)


def unreadable(path: str, error: Exception) -> Exception:
    """The Failure of a disk or bucket; any other error as it is."""
    if not buckets.is_failure(error):
        return error
    return Failure(f"{path} cannot be read ({error}); the same command with --resume goes on")


def size_of(path: str) -> int:
    try:
        return int(files.Path(path).stat().length)
    except Exception as error:
        raise unreadable(path, error) from None


def digest_of(path: str) -> str:
    """SHA-256 in hex, of a file up to 64 MiB; of a larger one, of its size and its first, middle
    and last MiB."""
    size, found = size_of(path), hashlib.sha256()
    with Joined([path]) as file:
        if size <= _WHOLE:
            found.update(file.read(size))
        else:
            found.update(str(size).encode())
            for place in (0, size // 2, size - _PART):
                file.seek(place)
                found.update(file.read(_PART))
    return found.hexdigest()


def expand(
    given: Iterable[str],
    endings: tuple[str, ...],
    what: str,
    option: str = "--input",
    needed: bool = True,
) -> list[str]:
    """The files that are given, and those below given folders with one of the endings, sorted.

    Hidden files and folders, such as those that downloads leave, are not looked at, nor are links
    to folders, which may lead in a circle.

    Raises: InputError when a path does not exist, or there is no file and one is `needed`.
    """
    found: list[str] = []
    for text in given:
        path = files.Path(text)
        if path.is_dir():
            below = (
                str(file)
                for file in files.below(path)
                if not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            found += sorted(file for file in below if file.lower().endswith(endings))
        elif path.is_file():
            found.append(str(path))
        else:
            raise InputError(f"{option} {text} does not exist; name a file or a folder")
    if needed and not found:
        raise InputError(f"{option} {some(given)} has no {what} ({', '.join(endings)})")
    return list(dict.fromkeys(found))


def archives(given: Iterable[str], option: str = "--input") -> list[tuple[str, ...]]:
    """The parts of each tar archive among the given files and those below given folders."""
    known: dict[str, list[str]] = {}
    for path in expand(given, ("",), "tar", option):
        if match := _ARCHIVE.fullmatch(path):
            known.setdefault(match["whole"], []).append(path)
        elif path in given:
            raise InputError(f"{option} {path} is no .tar, .tgz or .tar.gz, nor a part of one")
    if not known:
        raise InputError(f"{option} {some(given)} has no tar archive (.tar, .tgz, .tar.gz)")
    return [tuple(sorted(parts)) for _, parts in sorted(known.items())]


def safe_name(name: object, where: str) -> str:
    """A relative name without '..'. Raises: BadRecord of kind 'unsafe name' or 'bad row'."""
    if not isinstance(name, str) or not name:
        raise BadRecord("missing picture", f"{where}: a picture is named {name!r:.60}")
    plain = posixpath.normpath(name)
    absolute = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:|[a-z0-9]+://", name)
    if (
        absolute
        or plain == ".."
        or plain.startswith("../")
        or "\0" in name
        or not _is_unicode(name)
    ):
        raise BadRecord("unsafe name", f"{where}: the name {name!r:.100} leads out of its folder")
    return plain


def _is_unicode(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeError:
        return False


class Place(NamedTuple):
    """Where a member of an archive lies."""

    archive: int
    offset: int
    size: int


class Store:
    """Pictures by name, in folders and in tar archives that are read in place.

    Attributes:
      folders: looked into first, in order.
      archives: the parts of each.
      index: a file by `write_index`, where there are archives.
    """

    def __init__(
        self,
        folders: Sequence[str],
        archives: Sequence[tuple[str, ...]] = (),
        index: files.PathLike | None = None,
    ):
        self.folders = [files.Path(folder) for folder in folders]
        self.archives, self._index = archives, index
        self._database: sqlite3.Connection | None = None
        self._open: dict[int, io.BufferedReader] = {}

    def read(self, name: object, where: str) -> bytes:
        """The bytes of a picture; `where` is what an error calls the row that names it.

        Raises: BadRecord of kind 'unsafe name', 'missing picture' or 'too large'.
        """
        for folder in self.folders:  # a name from the root of the disk may lie below one
            if isinstance(name, str):
                name = name.removeprefix(f"{str(files.absolute(folder)).rstrip('/')}/")
        plain = safe_name(name, where)
        for folder in self.folders:
            path = folder / plain
            try:
                if path.stat().length > LARGEST:
                    raise BadRecord("too large", f"{where}: {plain} has more than {LARGEST} bytes")
                return path.read_bytes()
            except Exception as error:
                if getattr(error, "errno", None) not in _ABSENT and not isinstance(
                    error, FileNotFoundError
                ):
                    raise unreadable(str(path), error) from None
        if place := self._place(plain):
            return self._member(place, f"{where}: {plain}")
        raise BadRecord("missing picture", f"{where}: there is no {plain}")

    def _place(self, name: str) -> Place | None:
        if self._index is None:
            return None
        if self._database is None:
            local = pathlib.Path(buckets.staged(self._index)).absolute()
            self._database = sqlite3.connect(f"{local.as_uri()}?immutable=1", uri=True)
        query = "SELECT archive, start, size FROM members WHERE name = ?"
        found = self._database.execute(query, (name,)).fetchone()
        return Place(*found) if found else None

    def _member(self, place: Place, name: str) -> bytes:
        if place.archive not in self._open:
            self._open[place.archive] = joined(self.archives[place.archive])
        if place.size > LARGEST:
            raise BadRecord("too large", f"{name} has more than {LARGEST} bytes")
        file = self._open[place.archive]
        file.seek(place.offset)
        data = file.read(place.size)
        if len(data) < place.size:
            raise BadRecord("truncated", f"{name}: its archive ends before it")
        return data


def write_index(path: files.PathLike, members: Iterable[tuple[str, Place]]) -> Iterator[str]:
    """Writes where each member lies, for `Store`; yields names that were there before."""
    with files.beside(path) as part, buckets.local_file(part) as here:
        database = sqlite3.connect(str(here))
        database.execute("CREATE TABLE members (name TEXT PRIMARY KEY, archive, start, size)")
        for name, place in members:
            query = "INSERT OR IGNORE INTO members VALUES (?, ?, ?, ?)"
            if not database.execute(query, (name, *place)).rowcount:
                yield name
        database.commit()
        database.close()
