"""Records made in pieces, done in any order, anywhere and again: imports, and synthesis.

Unfinished work has a folder `.import` in its output with the plan, and files for each piece that is
done. The manifest is written last, and the folder removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import qk_jax
from qk_jax.base import files
from qk_jax.base.errors import BadRecord, Failure, InputError, some
from qk_jax.data import records
from qk_jax.data.importers import engines, inputs
from qk_jax.data.importers.job import Piece, Work

log = logging.getLogger(__name__)
_EVERY_S = 10.0  # between two lines of the log
Writing = Callable[[files.PathLike], AbstractContextManager[Callable[[records.Entry], None]]]
_MESSAGE = 400  # characters of a message that are kept


class Engine(NamedTuple):
    """Who does the work; nothing of it is in the result.

    Attributes:
      workers: processes.
      ray: address of a Ray cluster instead.
      resume: go on with unfinished work.
    """

    workers: int = 1
    ray: str = ""
    resume: bool = False


class Plan(NamedTuple):
    """What will be done.

    Attributes:
      digest: of the work and the digests of its inputs.
      inputs: {file: its digest}.
      pieces: of the input.
      rejected: names that were refused while the pieces were found.
    """

    digest: str
    inputs: dict[str, str]
    pieces: list[Piece]
    rejected: list[BadRecord]


class Found(NamedTuple):
    """What a look at the input finds.

    Attributes:
      pieces: of the input.
      inputs: names of the files whose digests the plan has.
      rejected: names that were refused.
    """

    pieces: list[Piece]
    inputs: list[str]
    rejected: list[BadRecord]


def plan(work: Work, resume: bool, look: Callable[[], Found]) -> Plan:
    """The plan of the folder, or a new one by `look`.

    Raises: InputError when the folder has files of other work, or some without --resume.
    """
    path, out = work.folder / "plan.json", files.Path(work.out)
    known = out / "manifest.json" if (out / "manifest.json").is_file() else path
    if known.is_file():
        found = files.read_json(known)
        if not resume:
            raise InputError(
                f"--out {out} has been begun already; add --resume to go on, or choose another"
            )
        if found["digest"] != _digest_of(work, found["inputs"]):
            raise InputError(
                f"--out {out} was begun with other arguments or by another version; give the "
                "same, or choose another folder"
            )
        changed = [name for name, digest in found["inputs"].items() if _changed(name, digest)]
        if changed:
            raise InputError(
                f"{some(changed)} is not as it was when {out} was begun; choose another --out"
            )
        pieces = [Piece(tuple(paths), *rest) for paths, *rest in found.get("pieces", ())]
        bad = [BadRecord(*pair) for pair in found.get("bad", ())]
        return Plan(found["digest"], found["inputs"], pieces, bad)
    ours = (work.folder.name, "rejected.jsonl")  # the second of one that made no record
    if any(file.name not in ours and work.owns(file.name) for file in _files(out)):
        raise InputError(f"--out {out} {work.occupied}")
    seen = look()
    digests = {name: inputs.digest_of(name) for name in seen.inputs}
    fresh = Plan(_digest_of(work, digests), digests, seen.pieces, seen.rejected)
    whole = {**fresh._asdict(), "bad": [(error.kind, str(error)) for error in seen.rejected]}
    del whole["rejected"]
    files.write_text(path, json.dumps(whole))
    return fresh


def finished(work: Work) -> dict[str, Any] | None:
    """The manifest of a folder that is complete."""
    out = files.Path(work.out)
    if not (out / "manifest.json").is_file():
        return None
    manifest = files.read_json(out / "manifest.json")
    files.remove_folder(work.folder)  # where the command ended just before it would
    log.info("%s is complete already", out)
    return manifest


def _changed(name: str, digest: str) -> bool:
    return not files.Path(name).is_file() or inputs.digest_of(name) != digest


def _digest_of(work: Work, digests: dict[str, str]) -> str:
    """Of what decides the bytes."""
    given = {**dataclasses.asdict(work), "out": "", "inputs of": digests}
    text = json.dumps([qk_jax.__version__, given], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def do(
    work: Work,
    engine: Engine,
    pieces: Mapping[int, Any],
    what: str,
    done: Callable[[int], files.Path],
    task: engines.Task,
) -> None:
    """Lets the engine do what is not done yet.

    Args:
      work: what is made.
      engine: who does it.
      pieces: by their numbers.
      what: for the log.
      done: of the number of a piece, a file that is there once it is done.
      task: called with the number of a piece and the piece.

    Raises: Failure, also when the user interrupts it.
    """
    sweep(work)
    there = [number for number in pieces if done(number).is_file()]
    left = {number: pieces[number] for number in sorted(set(pieces) - set(there))}
    log.info("%s: %d of %d pieces are done", what, len(there), len(pieces))
    count, told = len(there), time.monotonic()
    try:
        for _ in engines.run(task, left, engine.workers, engine.ray):
            count += 1
            if time.monotonic() - told > _EVERY_S:
                told = time.monotonic()
                log.info("%s: %d of %d pieces are done", what, count, len(pieces))
    except KeyboardInterrupt:
        raise Failure("interrupted; the same command with --resume goes on") from None


def _files(folder: files.Path) -> list[files.Path]:
    """What is in a folder; in a bucket there is none before there is a file."""
    return list(folder.iterdir()) if folder.is_dir() else []


def sweep(work: Work) -> None:
    """Removes what a killed process has left half-written."""
    written = [file for file in _files(files.Path(work.out)) if work.owns(file.name)]
    for file in [*written, *_files(work.folder)]:
        if file.name.startswith(".") and file.name.endswith((".part", ".part-journal")):
            file.unlink(missing_ok=True)


# ---- one piece -----------------------------------------------------------------------------------


def done_path(work: Work, number: int) -> files.Path:
    """What piece `number` has become; there once its shards are whole."""
    return work.folder / f"{number:05d}.json"


def rejected_path(work: Work, number: int) -> files.Path:
    """One line for each reject of piece `number`."""
    return work.folder / f"{number:05d}.rejected.jsonl"


def write(
    work: Work,
    number: int,
    names: Mapping[str, str],
    entries: Iterable[tuple[str, records.Entry] | BadRecord],
    writing: Writing = records.writing,
) -> None:
    """Writes the shards of a piece, its rejects, and last what it has become.

    Args:
      work: what is made.
      number: of the piece.
      names: {split: name of its shard}.
      entries: (split, record), or a reject.
      writing: what writes a shard.
    """
    rejected: Counter[str] = Counter()
    written: Counter[str] = Counter()
    of_source: Counter[str] = Counter()
    with (
        files.beside(rejected_path(work, number)) as lines,
        lines.open("w") as out,
        contextlib.ExitStack() as stack,
    ):
        add = {
            split: stack.enter_context(writing(files.Path(work.out) / name))
            for split, name in names.items()
        }
        for found in entries:
            if isinstance(found, BadRecord):
                rejected[found.kind] += 1
                out.write(line_of(found))
                continue
            split, entry = found
            add[split](entry)
            written[split] += 1
            of_source[entry.source] += 1
    done = {
        "shards": {name: _summary(work, name, written[split]) for split, name in names.items()},
        "records": {split: written[split] for split in names},
        "sources": dict(sorted(of_source.items())),
        "rejected": dict(sorted(rejected.items())),
    }
    files.write_json(done_path(work, number), done)


def line_of(error: BadRecord) -> str:
    """A reject as a line of JSON."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # of Python's objects, other each time
    text = text[:_MESSAGE].encode("utf-8", "backslashreplace").decode()
    return json.dumps({"reason": error.kind, "message": text}, ensure_ascii=False) + "\n"


def _summary(work: Work, name: str, count: int) -> dict[str, Any]:
    path = files.Path(work.out) / name
    return {"records": count, "bytes": int(path.stat().length)}


def side(share: float, group: str, picture: bytes) -> str:
    """The split of an example: by its group, or else by a picture of it."""
    if not share:
        return "train"
    of = group.encode("utf-8", "surrogateescape") if group else picture
    drawn = int.from_bytes(hashlib.sha256(of).digest()[:8]) / 2**64
    return "validation" if drawn < share else "train"


# ---- the end -------------------------------------------------------------------------------------


def finish(
    work: Work, plan: Plan, numbers: Iterable[int], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the list of rejects and the manifest, removes the folder of the work, and returns the
    manifest.

    Args:
      work: what was made.
      plan: of it.
      numbers: of its pieces.
      about: first values of the manifest.

    Raises: Failure when there is no record.
    """
    out, numbers = files.Path(work.out), list(numbers)
    sums = {name: Counter[str]() for name in ("records", "sources", "rejected")}
    written: dict[str, Any] = {}
    sums["rejected"].update(error.kind for error in plan.rejected)
    for number in numbers:
        done = files.read_json(done_path(work, number))
        written |= done["shards"]
        for name, counter in sums.items():
            counter.update(done[name])
    with files.beside(out / "rejected.jsonl") as part, part.open("w") as lines:
        lines.writelines(map(line_of, plan.rejected))
        for number in numbers:
            with rejected_path(work, number).open() as own:
                lines.writelines(own)
    manifest = {
        **about,
        "tool": f"qk_jax {qk_jax.__version__}",
        **{name: dict(sorted(counter.items())) for name, counter in sums.items()},
        "shards": dict(sorted(written.items())),
        "inputs": plan.inputs,
        "digest": plan.digest,
    }
    sweep(work)
    if not sum(sums["records"].values()):
        for name in written:  # so that the folder is free for a command that is mended
            for file in (out / name, records.index_path(out / name)):
                file.unlink(missing_ok=True)
        files.remove_folder(work.folder)
        reasons = ", ".join(f"{n} {kind}" for kind, n in manifest["rejected"].items())
        raise Failure(
            f"no record came of it: {reasons or 'the input is empty'}; {out / 'rejected.jsonl'} "
            "has a line for each reject"
        )
    files.write_json(out / "manifest.json", manifest)
    files.remove_folder(work.folder)
    return manifest


def told(manifest: dict[str, Any]) -> str:
    """What the command prints at its end."""
    counts = ", ".join(f"{count} {split}" for split, count in manifest["records"].items())
    lines = [f"records: {counts} in {len(manifest['shards'])} shards"]
    rejected = manifest["rejected"]
    lines.append(f"rejected: {sum(rejected.values())}")
    lines += [f"  {count} {reason}" for reason, count in rejected.items()]
    return "\n".join(lines)
