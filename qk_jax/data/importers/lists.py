"""Rows in text files: JSON lists, JSON lines and CSV, read from any row on."""

from __future__ import annotations

import contextlib
import csv
import io
import mmap
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qk_jax.base import buckets, files
from qk_jax.base.errors import BadRecord
from qk_jax.data.importers import archives, inputs
from qk_jax.data.importers.job import Job, Piece, Row, Rows

ENDINGS = (".jsonl", ".json", ".csv")
_LONGEST = 16 << 20  # bytes of a row
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{}]|[^][{}",:\s]+', re.S)


def plan_of(job: Job, paths: list[str]) -> list[Piece]:
    """The files in pieces of job.shard_records rows."""
    pieces = []
    for path in paths:
        starts = [start for n, start in enumerate(_starts(path)) if n % job.shard_records == 0]
        pieces += [Piece((path,), start, job.shard_records) for start in starts]
    return pieces


def _plan(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    paths = inputs.expand(job.inputs, ENDINGS, "list")
    return plan_of(job, paths), archives.index(job)


def _starts(path: str) -> Iterator[int]:
    """Where each row begins: a byte, but for CSV the number of the row."""
    if path.lower().endswith(".csv"):
        yield from (number for number, _ in _csv_rows(path))
    else:
        yield from (start for start, _ in _texts(path, 0))


def rows_of(path: str, start: int, count: int) -> Iterator[Mapping[str, Any] | BadRecord]:
    """`count` rows of a file from one of `_starts` on, BadRecord for what is no row."""
    if path.lower().endswith(".csv"):
        for number, row in _csv_rows(path):
            if start <= number < start + count:
                yield row
        return
    for number, (at, text) in enumerate(_texts(path, start)):
        if number == count:
            return
        where = f"{path}, byte {at}"
        try:
            if isinstance(text, BadRecord):
                raise text
            yield files.json_object(text)
        except BadRecord as error:
            yield error
        except UnicodeDecodeError as error:
            yield BadRecord("not unicode", f"{where}: {error.reason}")
        except (ValueError, RecursionError) as error:
            yield BadRecord("bad row", f"{where}: {error}")


def _texts(path: str, start: int) -> Iterator[tuple[int, bytes | BadRecord]]:
    """(first byte, text) of each row from byte `start` on."""
    if path.lower().endswith(".json") and _is_list(path):
        yield from _elements(path, start)
    else:
        yield from _lines(path, start)


def _is_list(path: str) -> bool:
    """Whether the text begins as a JSON list; JSON lines are often named .json too."""
    with inputs.joined([path]) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(path: str, start: int) -> Iterator[tuple[int, bytes | BadRecord]]:
    with inputs.joined([path]) as file:
        file.seek(start)
        while line := file.readline(_LONGEST):
            at, start = start, start + len(line)
            if at == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) == _LONGEST:
                while not line.endswith(b"\n") and (line := file.readline(_LONGEST)):
                    start += len(line)
                yield at, BadRecord("bad row", f"{path}, byte {at}: more than {_LONGEST} bytes")
            elif line.strip():
                yield at, line


def _elements(path: str, start: int) -> Iterator[tuple[int, bytes | BadRecord]]:
    """The elements of a JSON list."""
    local = os.fspath(buckets.staged(path))
    with open(local, "rb") as file, contextlib.ExitStack() as stack:
        if not os.fstat(file.fileno()).st_size:
            return
        text = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        depth, begin, closed = (0 if start == 0 else 1), start, False
        for token in _TOKENS.finditer(text, start):
            mark = token[0][:1]
            if closed:
                where = f"{path}, byte {token.start()}"
                yield token.start(), BadRecord("bad row", f"{where}: it is after the list's end")
                break
            if mark in b"[{":
                if depth == 1:
                    begin = token.start()
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth == 1:
                    yield begin, text[begin : token.end()]
                closed = depth <= 0
            elif depth == 1:  # no object
                yield token.start(), token[0]
        if not closed:
            at = begin if depth > 1 else len(text)
            yield at, BadRecord("truncated", f"{path} ends within its list; the rest is lost")


def _csv_rows(path: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRecord]]:
    """(number, row) of a CSV file with a header."""
    with inputs.joined([path]) as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True)
        number = -1
        while True:
            number += 1
            try:
                row: dict[Any, Any] = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, BadRecord("bad row", f"{path}, line {reader.line_num}: {error}")
                continue
            if None in row or None in row.values():
                yield (
                    number,
                    BadRecord("bad row", f"{path}, line {reader.line_num}: not as many columns"),
                )
            else:
                yield number, row


def _read(job: Job, piece: Piece, wanted: frozenset[str]) -> Iterator[Row | BadRecord]:
    """Pictures are named from job.images, or else from the list's folder."""
    (path,) = piece.paths
    store = archives.store(job, posixpath.dirname(path))
    for number, fields in enumerate(rows_of(path, piece.start, piece.units)):
        if isinstance(fields, BadRecord):
            yield fields
            continue
        key = f"{posixpath.basename(path)}/{piece.start}+{number}"

        def picture(value: Any, key: str = key) -> bytes:
            return value if isinstance(value, bytes) else store.read(value, key)

        yield Row(key, fields, picture)


LISTS = Rows(_plan, _read)
