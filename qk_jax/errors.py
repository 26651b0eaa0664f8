"""Errors that a user can mend: one clear line and exit status 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class InputError(Exception):
    """Something given from outside is wrong; the message names the thing and the mend."""


def exits(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: an InputError becomes one line on stderr and exit status 2.

    Any other exception is a defect of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
