"""Errors that the user can correct: one line on stderr and exit status 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any


class InputError(Exception):
    """Something given from outside is wrong; the message names the thing and how to correct it."""


class BadRecord(InputError):
    """A record that can be read but not used; bad records are counted by their `kind`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.kind, str(self))


def exits(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: an InputError becomes one line on stderr and exit status 2.

    Any other exception is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
