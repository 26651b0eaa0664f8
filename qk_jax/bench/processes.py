"""Processes of `row`: started, waited for, killed when they take too long, read when they end."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.bench import row
from qk_jax.bench.schedule import topologies

MOST = 400  # characters of an error


class Process:
    """One process of `row`."""

    def __init__(self, request: Mapping[str, Any], seconds: float, log: pathlib.Path | None = None):
        """Starts it; it is killed after `seconds`. `log` is what it prints, kept if it crashes."""
        self._folder = tempfile.TemporaryDirectory(prefix="qk-row-")
        root = pathlib.Path(self._folder.name)
        self._answer, self._log = root / "answer.json", log or root / "log"
        asked = root / "request.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        self._seconds, self._start = seconds, time.monotonic()
        with open(self._log, "wb") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-m", row.__name__, str(asked), str(self._answer)],
                stdout=printed,
                stderr=printed,
                env=environment(request),
            )

    def ended(self) -> bool:
        """Whether it is over; it is where its time is."""
        if self._process.poll() is None and time.monotonic() - self._start > self._seconds:
            self._process.kill()
            self._process.wait()
        return self._process.poll() is not None

    def answer(self) -> dict[str, Any]:
        """What it wrote, with its last words as 'error' where it failed."""
        code, found = self._process.wait(), {}
        if self._answer.exists():
            found = json.loads(self._answer.read_text(encoding="utf-8"))
        printed = self._log.read_text(encoding="utf-8", errors="replace").strip()
        last = printed[printed.rfind("\n") + 1 :]
        if code == 2:  # of an InputError
            found["error"] = last.removeprefix("error: ")
        elif code != 0:
            found["error"] = f"{self._reason(code)}; {self._log}: {last_words(printed)}"
        if code in (0, 2):
            self._log.unlink()
        self._folder.cleanup()
        return found

    def kill(self) -> None:
        """Ends it now."""
        self._process.kill()
        self._process.wait()
        self._log.unlink()
        self._folder.cleanup()

    def _reason(self, code: int) -> str:
        if code >= 0:
            return f"the process failed with status {code}"
        if time.monotonic() - self._start > self._seconds:
            return f"it took longer than {self._seconds / 60:g} minutes, give a longer --timeout"
        return f"the process was killed by signal {-code}"


def last_words(printed: str) -> str:
    """The exception that ended a process, or its last line."""
    raised = [found.start() for found in re.finditer(r"^[\w.]+(Error|Exception)\b", printed, re.M)]
    text = printed[raised[-1] :] if raised else printed[printed.rfind("\n") + 1 :]
    return " ".join(text.split())[:MOST]


def environment(request: Mapping[str, Any]) -> dict[str, str]:
    """Variables of a process: one that only compiles for a slice leaves accelerators alone."""
    here = request["row"]["here"] if "row" in request else request["probe"]["here"]
    if here:
        return dict(os.environ)
    return os.environ | topologies.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}


def ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of one process.

    Raises:
      InputError: what it raised.
    """
    process = Process(request, 600)
    while not process.ended():
        time.sleep(0.05)
    found = process.answer()
    if "error" in found:
        raise InputError(found["error"])
    return found
