"""What frozen towers make of pictures, kept on disk and found again by the pixels.

A folder has arrays [N, ...] of one kind and shape, KIND-SHAPE-NAME.npy, from which rows are read as
they are asked for, and beside each NAME.npy its NAME.index.npy: for every row the digest of its
picture and a checksum. manifest.json names the towers; a folder never holds rows of others. A part
of an encoding that came to its end leaves IofN.done.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError

MOMENTS, VISION = "moments", "vision"  # kinds
MANIFEST, FORMAT = "manifest.json", 1
DONE = ".done"  # of the mark of a part that came to its end
SHARD_BYTES = 2**28  # of rows that wait in memory, for each kind and shape
_INDEX = np.dtype([("digest", "u1", (16,)), ("crc", "<u4")])
_STORED = np.dtype(np.uint16)  # what NumPy writes for bfloat16, which it does not know


def digest_of(picture: np.ndarray) -> bytes:
    """16 bytes that tell pictures uint8 [H, W, 3] apart, by their pixels and sizes."""
    found = hashlib.sha256(repr(picture.shape).encode())
    found.update(np.ascontiguousarray(picture).data)
    return found.digest()[:16]


class _Kind:
    """Where the rows of one kind are: sorted keys of their digests, and the file and row of each.

    Attributes:
      paths: of the files.
      keys: uint64 [N], the first half of each digest, rising.
      file, row: int [N].
    """

    def __init__(self, paths: Sequence[files.Path]):
        self.paths = list(paths)
        indexes = [_load(_index_path(path)) for path in self.paths]
        counts = [len(index) for index in indexes]
        digests = np.concatenate([np.zeros((0, 16), np.uint8), *[x["digest"] for x in indexes]])
        keys = np.ascontiguousarray(digests[:, :8]).view("<u8").ravel()
        order = np.argsort(keys, kind="stable")
        self.keys = keys[order]
        self.file = np.repeat(np.arange(len(counts)), counts)[order]
        self.row = np.concatenate([np.arange(0), *map(np.arange, counts)])[order]
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def find(self, digest: bytes) -> tuple[int, int] | None:
        """The file and the row of a picture, or None."""
        key = np.frombuffer(digest[:8], "<u8")[0]
        place = int(np.searchsorted(self.keys, key))
        while place < len(self.keys) and self.keys[place] == key:
            file, row = int(self.file[place]), int(self.row[place])
            if self._opened(file)[1]["digest"][row].tobytes() == digest:
                return file, row
            place += 1
        return None

    def read(self, file: int, row: int) -> np.ndarray:
        """A row. Raises: InputError when it is damaged."""
        rows, index = self._opened(file)
        found = np.array(rows[row])
        if zlib.crc32(found.data) != index["crc"][row]:
            raise InputError(
                f"row {row} of {self.paths[file]} is damaged; delete the file and encode again"
            )
        return found

    def _opened(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        if file not in self._open:
            path = self.paths[file]
            self._open[file] = _load(path), _load(_index_path(path))
        return self._open[file]


class Cache:
    """The rows of a folder. It pickles to worker processes.

    Attributes:
      folder: where it is.
      towers: {kind: digest of the tower that made its rows}.
      dtypes: of the rows of each kind.
    """

    def __init__(self, folder: files.PathLike):
        """Reads manifest and indexes.

        Raises:
          InputError: the folder is none, or damaged.
        """
        self.folder = files.absolute(folder)
        if not (self.folder / MANIFEST).is_file():
            raise InputError(
                f"{self.folder} holds no encoded pictures; make them by "
                f"`python -m qk_jax.data encode --out {self.folder}`"
            )
        manifest = files.read_json(self.folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise InputError(f"{self.folder} is of another version; encode into another folder")
        self.towers: dict[str, str] = manifest["towers"]
        self.dtypes = {kind: _dtype(name) for kind, name in manifest["dtypes"].items()}
        self._kinds = {kind: _Kind(self._files(kind)) for kind in self.towers}

    def _files(self, kind: str) -> list[files.Path]:
        found = self.folder.glob(f"{kind}-*.index.npy")
        return sorted(x.with_name(x.name.replace(".index.npy", ".npy")) for x in found)

    def __len__(self) -> int:
        return sum(len(kind.keys) for kind in self._kinds.values())

    def check_whole(self) -> None:
        """Raises InputError unless every part of the last encoding came to its end."""
        done = {path.name.removesuffix(DONE) for path in self.folder.glob(f"*{DONE}")}
        counts = [name.partition("of")[2] for name in done]
        count = max(map(int, filter(str.isdecimal, counts)), default=1)
        lacking = [f"{i}/{count}" for i in range(count) if _stem(i, count) not in done]
        if lacking:
            raise InputError(
                f"{self.folder} is half made: of its parts {', '.join(lacking)} did not come to "
                "the end; run the same encode again, which adds what is missing"
            )

    def has(self, kind: str, digest: bytes) -> bool:
        """Whether there is a row of a kind for a picture."""
        return self._kinds[kind].find(digest) is not None

    def get(self, kind: str, picture: np.ndarray) -> np.ndarray:
        """The row of a picture uint8 [H, W, 3].

        Raises:
          InputError: there is none, or it is damaged.
        """
        rows = self._kinds[kind]
        if (found := rows.find(digest_of(picture))) is None:
            height, width = picture.shape[:2]
            raise InputError(
                f"{self.folder} lacks the {kind} of a picture of {width}x{height}: data, sizes or "
                "roles have changed since it was made; run the same encode again, which adds them"
            )
        return rows.read(*found).view(self.dtypes[kind])


class Writer:
    """Adds rows to a folder, which may be read between; several may share the work by parts."""

    def __init__(
        self,
        folder: files.PathLike,
        towers: Mapping[str, str],
        dtypes: Mapping[str, Any],
        part: tuple[int, int] = (0, 1),
    ):
        """Makes the folder, or goes on with it.

        Args:
          folder: to write.
          towers: {kind: digest of the tower that makes its rows}.
          dtypes: of the rows of each kind.
          part: (i, n), of n parts of the work the i-th, counted from 0.

        Raises:
          InputError: the folder holds rows of other towers, or cannot be written.
        """
        self.folder, self.name = files.writable_folder(folder, "--out"), _stem(*part)
        manifest = {
            "format": FORMAT, "towers": dict(towers),
            "dtypes": {kind: np.dtype(dtype).name for kind, dtype in dtypes.items()},
        }  # fmt: skip
        path = self.folder / MANIFEST
        if path.is_file() and files.read_json(path) != manifest:
            raise InputError(
                f"{self.folder} holds what other weights or settings made of pictures; give "
                "another folder"
            )
        files.write_json(path, manifest)
        for mark in self.folder.glob(f"*{DONE}"):  # this part's, and those of other divisions
            if mark.name == self.name + DONE or not mark.name.endswith(f"of{part[1]}{DONE}"):
                mark.unlink(missing_ok=True)
        self._waiting: dict[str, list[tuple[bytes, np.ndarray]]] = {}

    def add(self, kind: str, digests: Sequence[bytes], rows: np.ndarray) -> None:
        """Adds rows [N, ...] of pictures with these digests; they are on disk after `close`."""
        shape = "x".join(map(str, rows.shape[1:]))
        waiting = self._waiting.setdefault(f"{kind}-{shape}", [])
        waiting += zip(digests, rows, strict=True)
        if len(waiting) * rows[0].nbytes >= SHARD_BYTES:
            self._write(f"{kind}-{shape}")

    def _write(self, stem: str) -> None:
        digests, rows = zip(*self._waiting.pop(stem), strict=True)
        together = np.stack(rows)
        if together.dtype == ml_dtypes.bfloat16:
            together = together.view(_STORED)
        index = np.zeros(len(rows), _INDEX)
        index["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        index["crc"] = [zlib.crc32(row.data) for row in together]
        own = f"{stem}-{self.name}-"
        known = [x.name.removeprefix(own)[:5] for x in self.folder.glob(f"{own}*.index.npy")]
        path = self.folder / f"{own}{1 + max(map(int, known), default=-1):05d}.npy"
        for where, array in ((path, together), (_index_path(path), index)):  # the index last
            with files.beside(where) as part, buckets.local_file(part) as here:
                with open(here, "wb") as file:
                    np.save(file, array)

    def close(self) -> None:
        """Writes what waits, and that this part is whole. Raises: InputError."""
        for stem in list(self._waiting):
            self._write(stem)
        files.write_text(self.folder / f"{self.name}{DONE}", "")


def _stem(index: int, count: int) -> str:
    return f"{index}of{count}"


def _index_path(path: files.Path) -> files.Path:
    return path.with_name(path.name.removesuffix(".npy") + ".index.npy")


def _load(path: files.Path) -> np.ndarray:
    """An array on disk, mapped. Raises: InputError."""
    try:
        return np.load(buckets.staged(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} is missing or damaged ({error}); delete it and its index, and encode again"
        ) from None


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
