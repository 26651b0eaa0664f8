"""Errors that the user can correct: one line on stderr and exit status 2, or 1 for a failure.
Ctrl-C is one line, too."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

INTERRUPTED, STOPPED = 130, "stopped by Ctrl-C"  # exit status, as shells give it, and the line


class InputError(Exception):
    """Something given from outside is wrong; the message names the thing and how to correct it."""


class Failure(Exception):
    """Something that a command needs failed while it ran, such as a disk, though nothing that was
    given is wrong; the message names the thing and what to do."""


class BadRecord(InputError):
    """A record that cannot be read or used; bad records are counted by their `kind`."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.kind, str(self))


_endings: list[Callable[[int, str | None], None]] = []


def on_exit(ending: Callable[[int, str | None], None]) -> None:
    """Calls `ending(status, cause)` when a command ends; the cause is None where nothing failed."""
    _endings.append(ending)


def _end(status: int, cause: str | None) -> None:
    for ending in _endings:
        ending(status, cause)


def exits(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: an InputError becomes one line on stderr and exit status 2, a Failure one
    line and exit status 1, and Ctrl-C one line and exit status 130.

    Any other exception is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except (InputError, Failure) as error:
            line, status = " ".join(str(error).split()), 1 if isinstance(error, Failure) else 2
            print(f"error: {line}", file=sys.stderr)
            _end(status, line)
            raise SystemExit(status) from None
        except SystemExit as leaving:
            _end(leaving.code if isinstance(leaving.code, int) else 1, None)
            raise
        except KeyboardInterrupt:
            print(STOPPED, file=sys.stderr)
            _end(INTERRUPTED, "Ctrl-C")
            raise SystemExit(INTERRUPTED) from None
        except BaseException as error:
            if _endings:  # they may end the process before Python prints this
                traceback.print_exc()
            _end(1, f"{type(error).__name__}: {error}")
            raise
        _end(0, None)

    return wrapped


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
