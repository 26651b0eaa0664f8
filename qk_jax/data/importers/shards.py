"""The unit of an import: one piece of the input becomes one shard of each split.

A shard depends on its piece alone, so that pieces are imported in any order, anywhere and again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from qk_jax.base import files
from qk_jax.base.errors import BadRecord
from qk_jax.data import records
from qk_jax.data.importers import drafts, tar_index
from qk_jax.data.importers.columns import wanted
from qk_jax.data.importers.drafts import Draft
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job, Piece

_MESSAGE = 400  # characters of a message that are kept


def splits(job: Job) -> tuple[str, ...]:
    """The splits that an import writes."""
    return ("train", "validation") if job.validation else ("train",)


def done_path(job: Job, number: int) -> files.Path:
    """What piece `number` has become; there once its shards are whole."""
    return job.work / f"{number:05d}.json"


def rejected_path(job: Job, number: int) -> files.Path:
    """One line for each reject of piece `number`."""
    return job.work / f"{number:05d}.rejected.jsonl"


def digests_path(job: Job, number: int) -> files.Path:
    """Digest of every draft of piece `number`, zeros for one that cannot be used."""
    return job.work / f"{number:05d}.digests.npy"


def duplicates_path(job: Job, number: int) -> files.Path:
    """Numbers of the drafts of piece `number` whose pictures came before."""
    return job.work / f"{number:05d}.duplicates.npy"


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
    duplicates: set[int] = set()
    if job.dedup:
        duplicates = set(np.load(io.BytesIO(duplicates_path(job, number).read_bytes())).tolist())
    rejected: Counter[str] = Counter()
    written: Counter[str] = Counter()
    of_source: Counter[str] = Counter()
    ending = tar_index.ENDING if job.in_place else records.ENDING
    names = {split: records.shard_name(split, number, count, ending) for split in splits(job)}
    writing = tar_index.writing(job, piece) if job.in_place else records.writing
    with (
        files.beside(rejected_path(job, number)) as lines,
        lines.open("w") as out,
        contextlib.ExitStack() as stack,
    ):
        add = {
            split: stack.enter_context(writing(files.Path(job.out) / name))
            for split, name in names.items()
        }
        ordinal = -1
        for draft in read(job, piece):
            try:
                if isinstance(draft, BadRecord):
                    raise draft
                ordinal += 1
                if ordinal in duplicates:
                    raise BadRecord("duplicate", f"{draft.key}: its pictures came before")
                entry = _entry(job, draft)
            except BadRecord as error:
                rejected[error.kind] += 1
                out.write(line_of(error))
                continue
            split = _split(job, draft)
            add[split](entry)
            written[split] += 1
            of_source[entry.source] += 1
    found = {
        "shards": {name: _summary(job, name, written[split]) for split, name in names.items()},
        "records": {split: written[split] for split in names},
        "sources": dict(sorted(of_source.items())),
        "rejected": dict(sorted(rejected.items())),
    }
    files.write_json(done_path(job, number), found)


def _entry(job: Job, draft: Draft) -> records.Entry:
    roles = drafts.roles_of(job.task, draft)
    return drafts.entry_of(completed(job, draft), job.task, roles, job.limits, draft.key)


def completed(job: Job, draft: Draft) -> Draft:
    """A draft with what its header has besides, of the job."""
    source = draft.source or job.name or job.format
    more: dict[str, Any] = {"key": draft.key, "source": source, **draft.more}
    if draft.group:
        more["group"] = draft.group
    return draft._replace(source=source, more=more)


def _split(job: Job, draft: Draft) -> str:
    """The side of a draft: by its group, or else by its first condition picture or its target."""
    if not job.validation:
        return "train"
    first = draft.pictures[0][1] if draft.pictures else draft.target
    group = draft.group.encode("utf-8", "surrogateescape") if draft.group else first
    drawn = int.from_bytes(hashlib.sha256(group).digest()[:8]) / 2**64
    return "validation" if drawn < job.validation else "train"


def line_of(error: BadRecord) -> str:
    """A reject as a line of JSON."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # of Python's objects, other each time
    text = text[:_MESSAGE].encode("utf-8", "backslashreplace").decode()
    return json.dumps({"reason": error.kind, "message": text}, ensure_ascii=False) + "\n"


def _summary(job: Job, name: str, count: int) -> dict[str, Any]:
    path = files.Path(job.out) / name
    return {"records": count, "bytes": int(path.stat().length)}
