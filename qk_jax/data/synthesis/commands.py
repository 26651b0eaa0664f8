"""Examples by way of other programs: a folder of jobs, a command, and a folder of results.

    jobs/jobs.jsonl     {"id", "task", "kind", "instruction", "pictures": [{"role", "path"}],
                         "target": path}
    results/results.jsonl   {"id", "target": path} or {"id", "keep": true or false, "reason": text}

Paths are relative to the folder of their list. A result without `keep` is kept, and one without
`target` keeps the target of its job.
"""

from __future__ import annotations

import io
import json
import logging
import pathlib
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, Failure, InputError
from qk_jax.data.importers.drafts import Draft, roles_of
from qk_jax.pictures.decoding import decode_picture

log = logging.getLogger(__name__)
JOBS, RESULTS = "jobs.jsonl", "results.jsonl"


class Job(NamedTuple):
    """An example as a command gets it.

    Attributes:
      id: its name.
      task, kind: of the example.
      instruction: its text.
      pictures: (role, path) of each condition picture.
      target: path of the target that was made.
    """

    id: str
    task: str
    kind: str
    instruction: str
    pictures: tuple[tuple[str, pathlib.Path], ...]
    target: pathlib.Path


# ---- the side of the synthesis -------------------------------------------------------------------


def results(
    commands: Sequence[str], task: str, made: Iterable[Draft | BadRecord], folder: files.Path
) -> Iterator[Draft | BadRecord]:
    """Drafts as the commands leave them, each of which gets what the one before has left.

    Args:
      commands: with {jobs} and {results}.
      task: of all drafts.
      made: the drafts.
      folder: for what they read and write; removed in the end.

    Raises: Failure when a command fails or writes no results.
    """
    found = list(made)
    for number, command in enumerate(commands):
        jobs, answers = (pathlib.Path(folder) / f"{number}-{x}" for x in ("jobs", "results"))
        files.remove_folder(folder)
        jobs.mkdir(parents=True)
        answers.mkdir()
        drafts = [draft for draft in found if isinstance(draft, Draft)]
        if not drafts:
            break
        _write_jobs(jobs, task, drafts)
        _run(command, jobs, answers)
        lines = _read_results(answers)
        found = [
            draft if isinstance(draft, BadRecord) else _taken(draft, lines, answers)
            for draft in found
        ]
    files.remove_folder(folder)
    yield from found


def _write_jobs(folder: pathlib.Path, task: str, drafts: Sequence[Draft]) -> None:
    with (folder / JOBS).open("w", encoding="utf-8") as out:
        for number, draft in enumerate(drafts):
            roles = roles_of(task, draft)
            names = [
                _save(folder / f"{number:06d}-{place}", data)
                for place, data in enumerate((draft.target, *(data for _, data in draft.pictures)))
            ]
            pairs = zip(roles, names[1:], strict=True)
            job = {
                "id": draft.key, "task": task, "kind": str(draft.more.get("kind", task)),
                "instruction": draft.instruction,
                "pictures": [{"role": role, "path": name} for role, name in pairs],
                "target": names[0],
            }  # fmt: skip
            out.write(json.dumps(job, ensure_ascii=False) + "\n")


def _save(stem: pathlib.Path, data: bytes) -> str:
    """Writes a picture, with the ending of its format; returns its name."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            ending = (image.format or "picture").lower()
    except OSError:  # what Pillow cannot read becomes a reject when its record is made
        ending = "picture"
    path = stem.with_name(f"{stem.name}.{ending}")
    path.write_bytes(data)
    return path.name


def _run(command: str, jobs: pathlib.Path, answers: pathlib.Path) -> None:
    gaps = {"{jobs}": str(jobs.absolute()), "{results}": str(answers.absolute())}
    words = shlex.split(command)
    for gap, path in gaps.items():
        words = [word.replace(gap, path) for word in words]
    log.info("running %s", shlex.join(words))
    try:
        status = subprocess.run(words, check=False).returncode
    except OSError as error:
        raise Failure(f"--command {command!r} cannot be run ({error.strerror})") from None
    if status:
        raise Failure(
            f"--command {command!r} ended with status {status}; its jobs are in {jobs}, and the "
            "same command line with --resume goes on"
        )


def _read_results(folder: pathlib.Path) -> dict[str, list[Any]]:
    """{id: all that is said of it}. Raises: Failure when there is no list, or a line has no id."""
    path = folder / RESULTS
    if not path.is_file():
        raise Failure(f"the --command wrote no {path}; it needs a line for each job")
    found: dict[str, list[Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            result = files.json_object(line)
        except (ValueError, RecursionError) as error:
            raise Failure(f"line {number} of {path} is no JSON object ({error})") from None
        if not isinstance(result.get("id"), str):
            raise Failure(f"line {number} of {path} has no id; give that of its job")
        found.setdefault(result["id"], []).append(result)
    return found


def _taken(draft: Draft, lines: Mapping[str, list[Any]], folder: pathlib.Path) -> Draft | BadRecord:
    """A draft with its result, or why it is dropped."""
    found = lines.get(draft.key, [])
    if len(found) != 1:
        return BadRecord("no result", f"{draft.key}: {len(found)} results, expected one")
    result = found[0]
    keep, path, score = result.get("keep", True), result.get("target"), result.get("score")
    if not (isinstance(keep, bool) and (path is None or isinstance(path, str))):
        return BadRecord("bad result", f"{draft.key}: {result!r:.100}")
    if not keep:
        return BadRecord("not kept", f"{draft.key}: {result.get('reason') or 'no reason given'}")
    if isinstance(score, int | float):
        draft = draft._replace(more={**draft.more, "score": score})
    if path is None:
        return draft
    file = (folder / path).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        return BadRecord("missing picture", f"{draft.key}: {path!r:.100} is not in the results")
    return draft._replace(target=file.read_bytes())


# ---- the side of a command -----------------------------------------------------------------------


def read_jobs(folder: files.PathLike) -> list[Job]:
    """The jobs of a folder. Raises: InputError when it has none."""
    folder = pathlib.Path(folder)
    path = folder / JOBS
    if not path.is_file():
        raise InputError(f"{folder} has no {JOBS}; give the folder that {{jobs}} stands for")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            job = files.json_object(line.encode())
            pictures = tuple((one["role"], folder / one["path"]) for one in job["pictures"])
            texts = (job["id"], job["task"], job["kind"], job["instruction"])
            found.append(Job(*texts, pictures, folder / job["target"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} has a line that is no job ({error})") from None
    return found


def read_picture(path: pathlib.Path, max_pixels: int = 0) -> Any:
    """A picture of a job, uint8 [H, W, 3]. Raises: BadRecord."""
    return decode_picture(path.read_bytes(), "RGB", max_pixels, str(path))


def write_results(folder: files.PathLike, lines: Iterable[Mapping[str, Any]]) -> None:
    """The list of results, under its name only when it is whole."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(pathlib.Path(folder) / RESULTS, text)
