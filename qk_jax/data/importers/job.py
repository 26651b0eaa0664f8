"""What an import is asked for, and the vocabulary of the readers: pieces and rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from qk_jax.base import files
from qk_jax.base.errors import BadRecord
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.records import Span

TAR_INDEX = "tar.index.npy"  # ending of the index of a tar that is read in place


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that is made in pieces into a folder; all of it that decides the bytes.

    Attributes:
      out: the folder.
    """

    out: str

    @property
    def occupied(self) -> str:
        """What is said of a folder that has files of such work, but no plan."""
        return "is not empty; choose another folder"

    def owns(self, name: str) -> bool:
        """Whether a file of this name in the folder can be of such work; all are by default."""
        return True

    @property
    def folder(self) -> files.Path:
        """The folder of what is done, as long as not all is."""
        return files.Path(self.out) / ".import"


@dataclasses.dataclass(frozen=True)
class Job(Work):
    """An import, as the command line asks for it. Pickles to worker processes.

    Attributes:
      format: a key of FORMATS.
      inputs: files, folders, or what else the format reads.
      task: one of TASKS.
      columns: {role: name of a column, or several joined by '+'}, above those of the format.
      images: folders and tar archives with the pictures that rows name.
      control: folders with the condition pictures of a training folder.
      name: of the set, for the index and the figures by source.
      licence: what the manifest says; '' is the format's.
      split: of a TensorFlow data set.
      min_score: bound of the set's own quality filter; None is the format's.
      validation: share of the groups that goes to the validation split.
      dedup: leave out examples whose pictures came before.
      shard_records: rows of a piece, where the format can choose.
      limits: what an example must keep to.
      in_place: write no records but where the members of each example lie, of a format that has
        tars.
    """

    format: str
    inputs: tuple[str, ...]
    task: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    name: str = ""
    licence: str = ""
    split: str = "train"
    min_score: float | None = None
    validation: float = 0.0
    dedup: bool = False
    shard_records: int = 4096
    limits: Limits = Limits()
    in_place: bool = False

    @property
    def occupied(self) -> str:
        if self.in_place:
            return "has an index; remove what `index` wrote, or choose another"
        return super().occupied

    def owns(self, name: str) -> bool:
        """With `in_place` the folder may hold the tars, and whatever else."""
        written = (TAR_INDEX, "rejected.jsonl", "manifest.json")
        return not self.in_place or any(x in name for x in written)


class Piece(NamedTuple):
    """A part of the input that becomes one shard of each split.

    Attributes:
      paths: its files, of which all are one archive or table.
      start: where it begins, in the units of its reader.
      units: how many it has; -1 for all.
    """

    paths: tuple[str, ...]
    start: int = 0
    units: int = -1


class Row(NamedTuple):
    """A row of a set.

    Attributes:
      key: its name, for errors and the header.
      fields: by the names that the set gives them.
      picture: bytes of a picture from the value of a field; raises BadRecord.
      members: where the fields lie that an example may need, with `Job.in_place`.
    """

    key: str
    fields: Mapping[str, Any]
    picture: Callable[[Any], bytes]
    members: tuple[Span, ...] = ()


class Rows(NamedTuple):
    """How rows lie in files.

    Attributes:
      plan: the pieces of the input, the same each time, and rejected names; may write to
        job.folder.
      read: the rows of a piece with the fields of these names, BadRecord for each that cannot be
        read. Other fields may be there, too.
    """

    plan: Callable[[Job], tuple[list[Piece], list[BadRecord]]]
    read: Callable[[Job, Piece, frozenset[str]], Iterator[Row | BadRecord]]
