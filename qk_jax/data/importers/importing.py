"""An import from the first check to the manifest: plan, pieces by an engine, sums.

An unfinished import has a folder `.import` in its output with the plan, and a file for each piece
that is done. The manifest is written last, and the folder removed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import qk_jax
from qk_jax.base import buckets, files
from qk_jax.base.errors import BadRecord, Failure, InputError, some
from qk_jax.data.example import TASKS
from qk_jax.data.importers import engines, inputs, shards, tar_index
from qk_jax.data.importers.columns import ROLES
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job, Piece

log = logging.getLogger(__name__)
_EVERY_S = 10.0  # between two lines of the log


class Engine(NamedTuple):
    """Who does the work; nothing of it is in the result.

    Attributes:
      workers: processes.
      ray: address of a Ray cluster instead.
      resume: go on with an unfinished import.
    """

    workers: int = 1
    ray: str = ""
    resume: bool = False


class Plan(NamedTuple):
    """What an import will do.

    Attributes:
      digest: of the job and the digests of its inputs.
      inputs: {file: its digest}.
      pieces: of the input.
      rejected: names that were refused while the pieces were found.
    """

    digest: str
    inputs: dict[str, str]
    pieces: list[Piece]
    rejected: list[BadRecord]


def run(job: Job, engine: Engine) -> dict[str, Any]:
    """Imports, and returns the manifest.

    Raises:
      InputError: the job is wrong, or its folder has another one's files.
      Failure: no record came of it, or a disk or a process failed.
    """
    check(job)
    out = files.writable_folder(job.out, "--out")
    plan = _plan(job, engine.resume)
    if (out / "manifest.json").is_file():
        manifest = files.read_json(out / "manifest.json")
        files.remove_folder(job.work)  # where the command ended just before it would
        log.info("%s is complete already", out)
        return manifest
    if job.dedup:
        _work(
            job,
            engine,
            plan,
            "digests",
            shards.digests_path,
            functools.partial(shards.digest_piece, job),
        )
        _find_duplicates(job, len(plan.pieces))
    _work(
        job,
        engine,
        plan,
        "shards",
        shards.done_path,
        functools.partial(shards.import_piece, job, len(plan.pieces)),
    )
    manifest = _finish(job, plan)
    if not sum(manifest["records"].values()):
        reasons = ", ".join(f"{n} {kind}" for kind, n in manifest["rejected"].items())
        raise Failure(
            f"no record could be imported: {reasons or 'the input is empty'}; {_lines(out)}"
        )
    return manifest


def _lines(out: files.Path) -> str:
    return f"{out / 'rejected.jsonl'} has a line for each reject"


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


def _plan(job: Job, resume: bool) -> Plan:
    """The plan of the folder, or a new one.

    Raises: InputError when the folder has files of another import, or one without --resume.
    """
    path, out = job.work / "plan.json", files.Path(job.out)
    known = out / "manifest.json" if (out / "manifest.json").is_file() else path
    if known.is_file():
        found = files.read_json(known)
        if not resume:
            raise InputError(
                f"--out {out} has an import already; add --resume to go on, or choose another"
            )
        if found["digest"] != _digest_of(job, found["inputs"]):
            raise InputError(
                f"--out {out} has an import with other arguments or of another version; give the "
                "same, or choose another folder"
            )
        changed = [name for name, digest in found["inputs"].items() if _changed(name, digest)]
        if changed:
            raise InputError(
                f"{some(changed)} is not as it was when the import began; choose another --out"
            )
        pieces = [Piece(tuple(paths), *rest) for paths, *rest in found.get("pieces", ())]
        bad = [BadRecord(*pair) for pair in found.get("bad", ())]
        return Plan(found["digest"], found["inputs"], pieces, bad)
    if job.in_place and any(map(_is_of_an_index, _files(out))):
        raise InputError(f"--out {out} has an index; remove what `index` wrote, or choose another")
    if not job.in_place and any(file.name != job.work.name for file in _files(out)):
        raise InputError(f"--out {out} is not empty; choose another folder")
    log.info("looking through %s", some(job.inputs))
    pieces, bad = FORMATS[job.format].rows.plan(job)
    digests = {name: inputs.digest_of(name) for name in _named(job, pieces)}
    plan = Plan(_digest_of(job, digests), digests, pieces, bad)
    whole = {**plan._asdict(), "bad": [(error.kind, str(error)) for error in bad]}
    del whole["rejected"]
    files.write_text(path, json.dumps(whole))
    return plan


def _named(job: Job, pieces: list[Piece]) -> list[str]:
    """The input files that have a digest: those of the pieces and archives of pictures."""
    found = {path for piece in pieces for path in piece.paths}
    found |= {path for path in job.images if not files.Path(path).is_dir()}
    work = str(job.work)
    return sorted(x for x in found if not x.startswith(work) and files.Path(x).is_file())


def _changed(name: str, digest: str) -> bool:
    return not files.Path(name).is_file() or inputs.digest_of(name) != digest


def _digest_of(job: Job, digests: dict[str, str]) -> str:
    """Of what decides the bytes of an import."""
    given = {**dataclasses.asdict(job), "out": "", "inputs of": digests}
    text = json.dumps([qk_jax.__version__, given], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _work(job: Job, engine: Engine, plan: Plan, what: str, done: Any, task: Any) -> None:
    """Lets the engine do what is not done yet."""
    _sweep(job)
    count = len(plan.pieces)
    there = [number for number in range(count) if done(job, number).is_file()]
    left = {n: plan.pieces[n] for n in sorted(set(range(count)) - set(there))}
    log.info("%s: %d of %d pieces are done", what, len(there), count)
    finished, told = len(there), time.monotonic()
    try:
        for _ in engines.run(task, left, engine.workers, engine.ray):
            finished += 1
            if time.monotonic() - told > _EVERY_S:
                told = time.monotonic()
                log.info("%s: %d of %d pieces are done", what, finished, count)
    except KeyboardInterrupt:
        raise Failure("interrupted; the same command with --resume goes on") from None


def _files(folder: files.Path) -> list[files.Path]:
    """What is in a folder; in a bucket there is none before there is a file."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_of_an_index(file: files.Path) -> bool:
    """Whether `index` wrote a file; the folder may hold the tars, and whatever else."""
    return any(x in file.name for x in (tar_index.ENDING, "rejected.jsonl", "manifest.json"))


def _sweep(job: Job) -> None:
    """Removes what a killed process has left half-written."""
    written = [
        file for file in _files(files.Path(job.out)) if not job.in_place or _is_of_an_index(file)
    ]
    for file in [*written, *_files(job.work)]:
        if file.name.startswith(".") and file.name.endswith((".part", ".part-journal")):
            file.unlink(missing_ok=True)


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


def _finish(job: Job, plan: Plan) -> dict[str, Any]:
    """Writes the list of rejects and the manifest, and removes the folder of the work."""
    out, count = files.Path(job.out), len(plan.pieces)
    sums = {name: Counter[str]() for name in ("records", "sources", "rejected")}
    written: dict[str, Any] = {}
    sums["rejected"].update(error.kind for error in plan.rejected)
    for number in range(count):
        done = files.read_json(shards.done_path(job, number))
        written |= done["shards"]
        for name, counter in sums.items():
            counter.update(done[name])
    with files.beside(out / "rejected.jsonl") as part, part.open("w") as lines:
        lines.writelines(_rejects(job, plan))
    form = FORMATS[job.format]
    manifest = {
        "format": job.format,
        "task": job.task,
        "name": job.name or job.format,
        "licence": job.licence or form.licence or "unknown",
        "tool": f"qk_jax {qk_jax.__version__}",
        **{name: dict(sorted(counter.items())) for name, counter in sums.items()},
        "shards": dict(sorted(written.items())),
        "inputs": plan.inputs,
        "digest": plan.digest,
    }
    _sweep(job)
    files.write_json(out / "manifest.json", manifest)
    files.remove_folder(job.work)
    return manifest


def _rejects(job: Job, plan: Plan) -> Iterator[str]:
    for error in plan.rejected:
        yield shards.line_of(error)
    for number in range(len(plan.pieces)):
        with shards.rejected_path(job, number).open() as lines:
            yield from lines


def told(manifest: dict[str, Any]) -> str:
    """What the command prints at its end."""
    records = ", ".join(f"{count} {split}" for split, count in manifest["records"].items())
    lines = [f"records: {records} in {len(manifest['shards'])} shards"]
    rejected = manifest["rejected"]
    lines.append(f"rejected: {sum(rejected.values())}")
    lines += [f"  {count} {reason}" for reason, count in rejected.items()]
    return "\n".join(lines)
