"""An import from the first check to the manifest: plan, pieces by an engine, sums."""

from __future__ import annotations

import functools
import io
import itertools
import logging
import re
from typing import Any

import numpy as np

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError, some
from qk_jax.data.example import TASKS
from qk_jax.data.importers import pieces, shards
from qk_jax.data.importers.columns import ROLES, by_columns, unseen, wanted
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job, Piece

log = logging.getLogger(__name__)
LOOKED_AT = 100  # rows, for what none of them has
_WORDS = re.compile(r"(?<![a-z])[a-z]+(?![a-z])")


def run(job: Job, engine: pieces.Engine) -> dict[str, Any]:
    """Imports, and returns the manifest.

    Raises:
      InputError: the job is wrong, or its folder has another one's files.
      Failure: no record came of it, or a disk or a process failed.
    """
    check(job)
    files.writable_folder(job.out, "--out")
    plan = pieces.plan(job, engine.resume, functools.partial(_look, job))
    if manifest := pieces.finished(job):
        return manifest
    numbered, count = dict(enumerate(plan.pieces)), len(plan.pieces)
    if job.dedup:
        done = functools.partial(shards.digests_path, job)
        digest = functools.partial(shards.digest_piece, job)
        pieces.do(job, engine, numbered, "digests", done, digest)
        _find_duplicates(job, count)
    task = functools.partial(shards.import_piece, job, count)
    pieces.do(job, engine, numbered, "shards", functools.partial(pieces.done_path, job), task)
    form = FORMATS[job.format]
    about = {
        "format": job.format,
        "task": job.task,
        "name": job.name or job.format,
        "licence": job.licence or form.licence or "unknown",
    }
    manifest = pieces.finish(job, plan, numbered, about)
    if job.validation and not manifest["records"].get("validation"):
        log.warning(
            "--validation %g: no group of %d records went to that split, and training needs one; "
            "give a larger share", job.validation, manifest["records"]["train"],
        )  # fmt: skip
    return manifest


def check(job: Job) -> None:
    """Raises InputError for a job that cannot be done; reads no data."""
    if job.format not in FORMATS:
        raise InputError(f"--format {job.format} is unknown; give one of {', '.join(FORMATS)}")
    if job.task not in TASKS:
        raise InputError(f"--task {job.task} is unknown; give one of {', '.join(TASKS)}")
    if unknown := set(job.columns) - set(ROLES):
        raise InputError(
            f"--columns has {some(sorted(unknown))}; give ROLE=COLUMN with {', '.join(ROLES)}"
        )
    if not 0 <= job.validation < 1:
        raise InputError(f"--validation {job.validation:g} is no share from 0 to below 1")
    if job.shard_records < 1:
        raise InputError(f"--shard-records {job.shard_records} is less than 1")
    if not (job.name.isascii() and len(job.name) <= 24):
        raise InputError(f"--name {job.name!r} has more than 24 characters, or some beyond ASCII")
    buckets.check((*job.inputs, *job.images, *job.control, job.out))


def _look(job: Job) -> pieces.Found:
    """The pieces of the input."""
    log.info("looking through %s", some(job.inputs))
    found, bad = FORMATS[job.format].rows.plan(job)
    if named := _published_splits(found):
        log.warning(
            "the input names the splits %s, which are not kept: all goes to train, or by "
            "--validation; to keep one, import it alone", ", ".join(named),
        )  # fmt: skip
    if found and job.columns and FORMATS[job.format].drafts is by_columns:
        _warn_of_unseen(job, found[0])
    return pieces.Found(found, _named(job, found), bad)


def _warn_of_unseen(job: Job, piece: Piece) -> None:
    """Warns of columns that the first rows lack: not always needed, they may be misspelt."""
    form = FORMATS[job.format]
    rows = itertools.islice(form.rows.read(job, piece, wanted(job, form)), LOOKED_AT)
    for role in unseen(rows, job, form):
        log.warning(
            "--columns %s=%s: none of the first %d rows has that field; correct it if it is "
            "misspelt", role, job.columns[role], LOOKED_AT,
        )  # fmt: skip


def _published_splits(found: list[Piece]) -> list[str]:
    """Names of splits among those of the files and of their folders, where there are several."""
    ends = {"/".join(path.split("/")[-2:]) for piece in found for path in piece.paths}
    words = {word for end in ends for word in _WORDS.findall(end)}
    named = sorted(words & {"train", "test", "validation", "val", "valid", "dev"})
    return named if len(named) > 1 else []


def _named(job: Job, found: list[Piece]) -> list[str]:
    """The input files that have a digest: those of the pieces and archives of pictures."""
    names = {path for piece in found for path in piece.paths}
    names |= {path for path in job.images if not files.Path(path).is_dir()}
    work = str(job.folder)
    return sorted(x for x in names if not x.startswith(work) and files.Path(x).is_file())


def _find_duplicates(job: Job, count: int) -> None:
    """Writes, for each piece, which drafts have the pictures of an earlier one."""
    if count == 0 or shards.duplicates_path(job, count - 1).is_file():
        return
    parts = [_load(shards.digests_path(job, number)) for number in range(count)]
    digests = np.concatenate(parts)
    first = np.zeros(len(digests), bool)
    keys = np.ascontiguousarray(digests).view("V16").ravel()
    first[np.unique(keys, return_index=True)[1]] = True
    twice = ~first & digests.any(axis=1)
    starts = np.cumsum([0, *map(len, parts)])
    for number in range(count):
        buffer = io.BytesIO()
        np.save(buffer, np.flatnonzero(twice[starts[number] : starts[number + 1]]))
        files.write_bytes(shards.duplicates_path(job, number), buffer.getvalue())


def _load(path: files.Path) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return found
