"""Runs a function in a process of its own, whose peak memory is then the function's."""

from __future__ import annotations

import multiprocessing
import pathlib
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def run(function: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """What the function returns, and the most bytes that the process held.

    Raises: EOFError when the process ends without an answer; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, args))
    process.start()
    there.close()
    found: tuple[Any, int] = here.recv()
    process.join()
    return found


def _answer(there: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    result = function(*args)
    # Of this program alone: ru_maxrss would have that of the process which has started it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    there.send((result, 1024 * int(peak)))
