"""The unit of an import: one piece of the input becomes one shard of each split.

A shard depends on its piece alone, so that pieces are imported in any order, anywhere and again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np

from qk_jax.base import files
from qk_jax.base.errors import BadRecord
from qk_jax.data import records
from qk_jax.data.importers import drafts, pieces, tar_index
from qk_jax.data.importers.columns import wanted
from qk_jax.data.importers.drafts import Draft
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job, Piece


def splits(job: Job) -> tuple[str, ...]:
    """The splits that an import writes."""
    return ("train", "validation") if job.validation else ("train",)


def digests_path(job: Job, number: int) -> files.Path:
    """Digest of every draft of piece `number`, zeros for one that cannot be used."""
    return job.folder / f"{number:05d}.digests.npy"


def duplicates_path(job: Job, number: int) -> files.Path:
    """Numbers of the drafts of piece `number` whose pictures came before."""
    return job.folder / f"{number:05d}.duplicates.npy"


def read(job: Job, piece: Piece) -> Iterator[Draft | BadRecord]:
    """All that a piece has, in order."""
    form = FORMATS[job.format]
    for row in form.rows.read(job, piece, wanted(job, form)):
        if isinstance(row, BadRecord):
            yield row
            continue
        try:
            for draft in form.drafts(row, job, form):
                yield draft._replace(members=row.members)
        except BadRecord as error:
            yield error


def digest_piece(job: Job, number: int, piece: Piece) -> None:
    """Writes the digests of a piece."""
    found = []
    for draft in read(job, piece):
        if isinstance(draft, BadRecord):
            continue
        try:
            drafts.text_of(draft.instruction, job.limits.max_characters, draft.key)
            drafts.roles_of(job.task, draft)
            found.append(records.digest_of([draft.target, *(data for _, data in draft.pictures)]))
        except BadRecord:
            found.append(bytes(16))
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16))
    files.write_bytes(digests_path(job, number), buffer.getvalue())


def import_piece(job: Job, count: int, number: int, piece: Piece) -> None:
    """Writes the shards of piece `number` of `count`, and last what it has become.

    Raises: InputError or Failure, such as for a disk; never for what is in the piece.
    """
    ending = tar_index.ENDING if job.in_place else records.ENDING
    names = {split: records.shard_name(split, number, count, ending) for split in splits(job)}
    writing = tar_index.writing(job, piece) if job.in_place else records.writing
    pieces.write(job, number, names, _entries(job, number, piece), writing)


def _entries(
    job: Job, number: int, piece: Piece
) -> Iterator[tuple[str, records.Entry] | BadRecord]:
    """(split, record) of each draft, or why there is none."""
    duplicates: set[int] = set()
    if job.dedup:
        duplicates = set(np.load(io.BytesIO(duplicates_path(job, number).read_bytes())).tolist())
    ordinal = -1
    for draft in read(job, piece):
        try:
            if isinstance(draft, BadRecord):
                raise draft
            ordinal += 1
            if ordinal in duplicates:
                raise BadRecord("duplicate", f"{draft.key}: its pictures came before")
            first = draft.pictures[0][1] if draft.pictures else draft.target
            roles = drafts.roles_of(job.task, draft)
            entry = drafts.entry_of(completed(job, draft), job.task, roles, job.limits, draft.key)
            yield pieces.side(job.validation, draft.group, first), entry
        except BadRecord as error:
            yield error


def completed(job: Job, draft: Draft) -> Draft:
    """A draft with what its header has besides, of the job."""
    return drafts.completed(draft, job.name or job.format)
