"""Rows of Parquet files and of the Arrow files of Hugging Face data sets."""

from __future__ import annotations

import contextlib
import itertools
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data.importers import archives, inputs
from qk_jax.data.importers.job import Job, Piece, Row, Rows

ENDINGS = (".parquet", ".arrow")
_AT_ONCE = 8  # rows in memory


def _plan(job: Job) -> tuple[list[Piece], list[BadRecord]]:
    pieces: list[Piece] = []
    bad = archives.index(job)
    for path in inputs.expand(job.inputs, ENDINGS, "table"):
        try:
            pieces += _pieces(path, job)
        except BadRecord as error:
            bad.append(error)
    return pieces, bad


def _pieces(path: str, job: Job) -> list[Piece]:
    """Row groups together until they have job.shard_records rows; an Arrow file is one piece.

    Raises: InputError when the table lacks a column of --columns.
    """
    import pyarrow as pa

    rows = job.shard_records
    with inputs.joined([path]) as raw:
        if not path.endswith(".parquet"):
            with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # told as it is read
                _check_columns(job, path, pa.ipc.open_stream(raw).schema.names)
            return [Piece((path,))]
        file = _parquet(raw, path)
        _check_columns(job, path, file.schema_arrow.names)
        metadata = file.metadata
        sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    pieces, start, found = [], 0, 0
    for number, size in enumerate(sizes):
        if found and found + size > rows:
            pieces.append(Piece((path,), start, number - start))
            start, found = number, 0
        found += size
    return [*pieces, Piece((path,), start, len(sizes) - start)] if sizes else []


def _check_columns(job: Job, path: str, there: Sequence[str]) -> None:
    for role, name in job.columns.items():
        for part in name.split("+"):
            if part not in there and part.partition(".")[0] not in there:
                raise InputError(
                    f"--columns {role}={name}: {path} has no column {part!r}, only "
                    f"{', '.join(there)}"
                )


def _parquet(raw: Any, path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Pages are read when their rows come, so that a row group is not in memory as a whole.
        return pq.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: str, error: Exception) -> BadRecord:
    return BadRecord(
        "truncated", f"{path} is truncated or damaged; the rest is lost ({str(error):.200})"
    )


def _batches(raw: Any, piece: Piece, wanted: frozenset[str]) -> Iterator[Any]:
    """Record batches of the columns that are wanted, of those that are there."""
    import pyarrow as pa

    (path,) = piece.paths
    if not path.endswith(".parquet"):
        yield from pa.ipc.open_stream(raw)  # as `datasets` saves them
        return
    file = _parquet(raw, path)
    there = [name for name in file.schema_arrow.names if name in wanted]
    groups = list(range(piece.start, piece.start + piece.units))
    columns = there or file.schema_arrow.names[:1]
    for group in groups:
        yield from file.iter_batches(_AT_ONCE, [group], columns, use_threads=False)


def _read(job: Job, piece: Piece, wanted: frozenset[str]) -> Iterator[Row | BadRecord]:
    import pyarrow as pa

    (path,) = piece.paths
    store, number = archives.store(job, posixpath.dirname(path)), itertools.count()
    with inputs.joined([path]) as raw:
        try:
            for batch in _batches(raw, piece, wanted):
                names = [name for name in batch.schema.names if name in wanted]
                for at in range(batch.num_rows):
                    key = f"{posixpath.basename(path)}/{piece.start}+{next(number)}"
                    yield _row(batch, names, at, key, store)
        except BadRecord as error:
            yield error
        except (pa.ArrowException, OSError, ValueError) as error:
            yield _damaged(path, error)


def _row(batch: Any, names: list[str], at: int, key: str, store: inputs.Store) -> Row | BadRecord:
    try:
        fields = {name: batch.column(name)[at].as_py() for name in names}
    except UnicodeDecodeError as error:
        return BadRecord("not unicode", f"{key}: a text is not UTF-8 ({error.reason})")
    except (ValueError, OverflowError) as error:
        return BadRecord("bad row", f"{key}: {error}")

    def picture(value: Any) -> bytes:
        return picture_of(value, key, store)

    return Row(key, fields, picture)


def picture_of(value: Any, key: str, store: inputs.Store) -> bytes:
    """Bytes of Hugging Face's {bytes, path}, of bytes, or of a name. Raises: BadRecord."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise BadRecord("missing picture", f"{key}: a picture is null")
    return value if isinstance(value, bytes) else store.read(value, key)


TABLES = Rows(_plan, _read)
