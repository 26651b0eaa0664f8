"""From a row to its examples by a map of columns: what most published sets need, and formats."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from qk_jax.base import files
from qk_jax.base.errors import BadRecord
from qk_jax.data.importers.drafts import Draft
from qk_jax.data.importers.job import Job, Row, Rows

ROLES = (
    "text", "target", "source", "references", "pictures", "mask", "group", "score", "key",
)  # fmt: skip
_ABSENT: Any = object()


def by_columns(row: Row, job: Job, form: Format) -> Iterator[Draft]:
    """The example of a row: its text, target and condition pictures from the columns."""
    get = getter(row, job, form)
    check_score(row, get("score"), job, form)
    text, target = required(row, get, "text"), required(row, get, "target")
    targets = _several(target)
    if len(targets) != 1:
        kind = "bad row" if targets else "missing picture"
        raise BadRecord(kind, f"{row.key}: {len(targets)} target pictures")
    pictures = [
        (role, row.picture(value))
        for column, role in (("source", "source"), ("references", "reference"), ("pictures", ""))
        for value in _several(get(column))
    ]
    if isinstance(text, list):
        if text and not form.takes_last_text:
            raise BadRecord(
                "bad row", f"{row.key}: the text is a list of {len(text)}; name a column of one"
            )
        text = text[-1] if text else None
    group, mask = get("group"), get("mask")
    yield Draft(
        key=_name(get("key"), row.key),
        instruction=form.words(text) if isinstance(text, str) else text,
        target=row.picture(targets[0]),
        pictures=tuple(pictures),
        group="" if group in (_ABSENT, None) else f"{group}",
        mask=b"" if mask in (_ABSENT, None, "") else row.picture(mask),
    )


def columns_of(job: Job, form: Format) -> dict[str, tuple[str, ...]]:
    """{role: names of columns}, those of the command line above the format's."""
    return {**form.columns, **{role: (name,) for role, name in job.columns.items()}}


def wanted(job: Job, form: Format) -> frozenset[str]:
    """The fields that a row must have for the columns."""
    names = [
        part
        for alternatives in columns_of(job, form).values()
        for name in alternatives
        for part in name.split("+")
    ]
    return frozenset([*names, *(name.partition(".")[0] for name in names), *form.fields])


def getter(row: Row, job: Job, form: Format) -> Callable[[str], Any]:
    """A function that gives the value of a role, or _ABSENT."""
    columns = columns_of(job, form)

    def get(role: str) -> Any:
        found: Any = _ABSENT
        for name in columns.get(role, ()):
            values = [field(row, part) for part in name.split("+")]
            if _ABSENT in values:
                continue
            found = values[0] if len(values) == 1 else values
            if found is not None:  # as a table has it where another column is meant
                break
        return found

    return get


def unseen(rows: Iterable[Row | BadRecord], job: Job, form: Format) -> list[str]:
    """Roles of the job whose columns none of the rows has, of rows that could be read."""
    lacking, read = set(job.columns), 0
    for row in rows:
        with contextlib.suppress(BadRecord):
            if isinstance(row, Row):
                lacking = {x for x in lacking if getter(row, job, form)(x) is _ABSENT}
                read += 1
    return sorted(lacking) if read else []


def field(row: Row, name: str) -> Any:
    """A field by its name, or 'a.b' for what is within it, also where that is JSON in a text.

    Raises: BadRecord of kind 'bad row' when that is no JSON.
    """
    if name in row.fields:
        return row.fields[name]
    first, dot, rest = name.partition(".")
    if not dot or first not in row.fields:
        return _ABSENT
    inner = row.fields[first]
    if isinstance(inner, str | bytes):
        try:
            inner = files.json_object(inner if isinstance(inner, bytes) else inner.encode())
        except (UnicodeEncodeError, UnicodeDecodeError) as error:
            raise BadRecord("not unicode", f"{row.key}: {first} ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise BadRecord("bad row", f"{row.key}: {first} ({error})") from None
    return field(row._replace(fields=inner), rest) if isinstance(inner, Mapping) else _ABSENT


def required(row: Row, get: Callable[[str], Any], role: str) -> Any:
    """The value of a role. Raises: BadRecord of kind 'missing field'."""
    value = get(role)
    if value is _ABSENT:
        there = ", ".join(map(str, row.fields))
        raise BadRecord("missing field", f"{row.key} has no {role}, only the fields {there:.200}")
    return value


def check_score(row: Row, value: Any, job: Job, form: Format) -> None:
    """Raises BadRecord: 'filtered' below the bound, 'no number' for what is none."""
    bound = form.min_score if job.min_score is None else job.min_score
    if bound is None:
        return
    for score in value if isinstance(value, list) else [value]:
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            text = "missing" if score is _ABSENT else f"{score!r:.60}"
            raise BadRecord("no number", f"{row.key}: the score is {text}")
        if number < bound:
            raise BadRecord("filtered", f"{row.key}: the score {number:g} is less than {bound:g}")


def _several(value: Any) -> list[Any]:
    """A value, those of a list of them, or none."""
    if isinstance(value, list):
        return [one for inner in value for one in _several(inner)]
    return [] if value in (_ABSENT, None, "") else [value]


def _name(value: Any, otherwise: str) -> str:
    return otherwise if value in (_ABSENT, None, "") else f"{value}"


def unchanged(text: str) -> str:
    """The text itself."""
    return text


@dataclasses.dataclass(frozen=True)
class Format:
    """A format by its two halves: how its rows lie in files, and what a row means.

    Attributes:
      rows: how its rows lie in files.
      columns: {role: names that a column may have, the first that is there is taken}. Roles are
        text, target, source, references, pictures (roles by the task), mask, group, score,
        key.
      drafts: the examples of a row; raises BadRecord.
      fields: names of fields that `drafts` reads besides.
      words: what an instruction becomes.
      takes_last_text: of a list of texts the last, which is the fullest; else a list is no text.
      licence: of the publisher; '' where it is the user's to know.
      min_score: bound of the publisher's quality filter, if it has one.
      about: for the list of formats.
    """

    rows: Rows
    about: str
    columns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    drafts: Callable[[Row, Job, Format], Iterable[Draft]] = by_columns
    fields: tuple[str, ...] = ()
    words: Callable[[str], str] = unchanged
    takes_last_text: bool = False
    licence: str = ""
    min_score: float | None = None
