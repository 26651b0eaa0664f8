"""Folders of pictures: metadata beside them, or a caption in a text file of the same name.

What is found in folders is written as JSON lines to the folder of the unfinished import, whose rows
`lists` reads.
"""

from __future__ import annotations

import json
import pathlib
import posixpath
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.importers import archives, inputs, lists
from qk_jax.data.importers.job import Job, Piece, Row, Rows

METADATA = ("metadata.jsonl", "metadata.csv")
_FOUND = "pictures.jsonl"


def _plan(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    """Metadata files, and pictures with captions in text files where no metadata lies above."""
    folders(job.inputs)
    named = [
        path
        for path in inputs.expand(job.inputs, ("",), "file")
        if posixpath.basename(path) in METADATA
    ]
    covered = tuple(f"{posixpath.dirname(path)}/" for path in named)
    pictures = inputs.expand(job.inputs, inputs.PICTURE_ENDINGS, "picture", needed=not named)
    alone = [path for path in pictures if not path.startswith(covered)]
    told, bad = (lists.plan_of(job, named), archives.index(job)) if named else ([], [])
    if not alone:
        return told, bad
    captioned, lacking = _captioned(job, alone, lambda picture: [])
    return told + captioned, bad + lacking


def folders(given: tuple[str, ...], option: str = "--input") -> list[str]:
    """The given folders. Raises: InputError when one is none."""
    for path in given:
        if not files.Path(path).is_dir():
            raise InputError(f"{option} {path} is no folder; name one that exists")
    return list(given)


def _captioned(
    job: Job, pictures: Iterable[str], controls: Callable[[str], list[str]]
) -> tuple[list[Piece], list[BadRecord]]:
    """Pictures whose caption is in NAME.txt, with the pictures that `controls` gives for each."""
    bad: list[BadRecord] = []

    def rows() -> Iterator[dict[str, Any]]:
        for path in pictures:
            caption = f"{posixpath.splitext(path)[0]}.txt"
            if not files.Path(caption).is_file():
                bad.append(BadRecord("no text", f"{path} has no {posixpath.basename(caption)}"))
                continue
            yield {"file_name": path, "text_file": caption, "pictures": controls(path)}

    with files.beside(job.folder / _FOUND) as part, part.open("w") as out:
        for row in rows():
            out.write(json.dumps(row) + "\n")
    return lists.plan_of(job, [str(job.folder / _FOUND)]), bad


def _read(job: Job, piece: Piece, wanted: frozenset[str]) -> Iterator[Row | BadRecord]:
    if posixpath.basename(piece.paths[0]) != _FOUND:
        yield from lists.LISTS.read(job, piece, wanted)
        return
    for fields in lists.rows_of(piece.paths[0], piece.start, piece.units):
        assert not isinstance(fields, BadRecord)  # we have written it
        try:
            text = _whole(fields["text_file"])
        except BadRecord as error:
            yield error
            continue
        yield Row(fields["file_name"], {**fields, "text": text}, _whole)


def _whole(path: str) -> bytes:
    if inputs.size_of(path) > inputs.LARGEST:
        raise BadRecord("too large", f"{path} has more than {inputs.LARGEST} bytes")
    try:
        return files.Path(path).read_bytes()
    except Exception as error:
        raise inputs.unreadable(path, error) from None


def _stems(given: list[str]) -> dict[str, list[str]]:
    """{name without ending: the pictures of that name in the folders, in order}."""
    found: dict[str, list[str]] = {}
    for folder in given:
        for path in inputs.expand([folder], inputs.PICTURE_ENDINGS, "picture"):
            found.setdefault(pathlib.PurePosixPath(path).stem, []).append(path)
    return found


def _controlled(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    """Pictures with captions, and condition pictures in the folders of --control.

    One of the same name in each folder, or NAME_0, NAME_1, ... in one. Lists name their own.
    """
    if all(path.endswith(lists.ENDINGS) for path in job.inputs):
        return lists.LISTS.plan(job)
    folders(job.inputs)
    if not job.control:
        raise InputError(
            f"--format {job.format} needs --control, the folders of its control images"
        )
    stems = _stems(folders(job.control, "--control"))

    def controls(picture: str) -> list[str]:
        stem = pathlib.PurePosixPath(picture).stem
        numbered = [f"{stem}_{number}" for number in range(10)]
        return stems.get(stem) or [path for name in numbered for path in stems.get(name, [])]

    inside = tuple(f"{files.Path(folder)}/" for folder in job.control)
    pictures = inputs.expand(job.inputs, inputs.PICTURE_ENDINGS, "picture")
    return _captioned(job, (path for path in pictures if not path.startswith(inside)), controls)


FOLDER = Rows(_plan, _read)
CONTROLLED = Rows(_controlled, _read)
