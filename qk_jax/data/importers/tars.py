"""Examples of WebDataset tars that are read in place (`config.data.records` = 'tar:FOLDER')."""

from __future__ import annotations

import io
import logging
import os
import tarfile
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.data import records
from qk_jax.data.example import Source, TaskSettings
from qk_jax.data.importers import archives, drafts, inputs, shards, tar_index
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job
from qk_jax.data.importers.record_files import RecordSource

log = logging.getLogger(__name__)
_FORMAT = "webdataset"


class _Open:
    """A file that is open for as long as something reads from it."""

    def __init__(self, path: files.PathLike):
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number).atexit = False  # the system does it then


class TarFile:
    """The examples of one tar by number, as records. Opened at the first read, so that it pickles
    to workers; one in a bucket is copied to the disk of the host before that.

    Attributes:
      path: of the tar.

    Raises: InputError for an index that is damaged, or a tar that has changed since.
    """

    def __init__(self, side: files.PathLike):
        """Reads the index; a tar that is missing is a warning, and each of its examples bad.

        Args:
          side: the index of the tar, in the folder from which it names it.
        """
        self._index = tar_index.Index(side)
        facts = self._index.facts
        is_whole = buckets.is_remote(facts.tar)
        self.path = files.Path(facts.tar if is_whole else files.Path(side).parent / facts.tar)
        self._job = Job("", _FORMAT, (), facts.task, facts.columns, name=facts.name, in_place=True)
        self._open: _Open | None = None
        self._local = self.path
        if self.path.is_file():
            self._local = buckets.staged(self.path)
            self._check(side)
        else:
            log.warning(
                "%s is missing: each of its %d examples is replaced by another; copy it again",
                self.path, len(self),
            )  # fmt: skip

    def _check(self, side: files.PathLike) -> None:
        """Raises InputError for a tar that has changed; one that was copied may be younger."""
        facts, here = self._index.facts, str(self._local)
        is_same = inputs.size_of(here) == facts.size and (
            tar_index.mtime_of(here) == facts.mtime_ns or inputs.digest_of(here) == facts.digest
        )
        if not is_same:
            raise InputError(
                f"{self.path} is not as it was when {side} was made of it; index it again"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def index(self) -> np.ndarray:
        """The side index, INDEX_DTYPE and more [N], mapped from the disk."""
        return self._index.array

    @property
    def is_open(self) -> bool:
        """Whether the system has a file open for it."""
        return self._open is not None

    def close(self) -> None:
        """Closes the file when nothing reads from it; the next read opens it again."""
        self._open = None

    def __getitem__(self, number: int) -> records.Record:
        """The record that an import makes of an example.

        Raises: IndexError; BadRecord of kind 'unreadable'.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)} in {self.path}")
        name = f"example {number} of {self.path}"
        fields: dict[str, Any] = {}
        try:
            found = self._open  # which another thread may close
            if found is None:
                found = self._open = _Open(self._local)
            for span in self._index.spans(number):
                data = os.pread(found.number, span.size, span.start)
                key, ending, fields[ending] = _member(data, span, name)
        except OSError as error:
            self._open = None  # it may be there again
            raise records.unreadable(f"{name} cannot be read ({error})") from None
        row = archives.row_of(str(self.path), key, fields)
        form = FORMATS[_FORMAT]
        (draft,) = form.drafts(row, self._job, form)
        roles = drafts.roles_of(self._job.task, draft)
        return drafts.record_of(shards.completed(self._job, draft), roles, Limits(), name)


def _member(data: bytes, span: records.Span, name: str) -> tuple[str, str, bytes]:
    """(key, ending, bytes) of a member from its headers on. Raises: BadRecord."""
    if zlib.crc32(data) != span.crc:
        raise records.unreadable(
            f"{name}: its tar is truncated or damaged, or has changed since it was indexed; copy "
            "it again, or index it again",
        )
    member = tarfile.TarFile(fileobj=io.BytesIO(data)).next()
    assert member is not None  # by the checksum these are the bytes that were indexed
    return *archives.key_of(member.name), data[member.offset_data :]


class TarSet(records.RecordSet):
    """The examples of all tars whose indexes of a split are in a folder, tar by tar.

    Raises: InputError when there is no index, one is missing, or see `TarFile`.
    """

    def __init__(self, folder: files.PathLike, split: str):
        folder, ending = files.Path(folder), tar_index.ENDING
        found = sorted(path.name for path in folder.glob(f"{split}-*-of-*.{ending}"))
        if not found:
            raise InputError(
                f"{folder} has no index of tars for the split {split!r}; python -m qk_jax.data "
                "index writes it"
            )
        records.check_shards(folder, split, found, ending)
        self._hold(folder / f"{split}.tar", [TarFile(folder / name) for name in found])


def sources(
    data: Mapping[str, Any],
    split: str,
    settings: TaskSettings,
    names: Sequence[str],
    **laws: Mapping[str, Any],
) -> dict[str, Source]:
    """Tasks of the tars of a split in data.records; `laws` are captions and roles as of
    `RecordSource`. Raises: InputError; see `TarSet`."""
    found, most = TarSet(data["records"].partition(":")[2], split), data["max_pixels"]
    return {name: RecordSource(found, name, settings, most, **laws) for name in names}
