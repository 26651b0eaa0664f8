"""Processes of `row`: started, killed when they take too long, read when they end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from qk_jax.base import files
from qk_jax.bench import row
from qk_jax.bench.schedule import topologies

MAX_ERROR = 400  # characters


async def ask(
    request: Mapping[str, Any], seconds: float, log: files.Path | None = None
) -> dict[str, Any]:
    """The answer of one process, with the reason as 'error' where it failed.

    Args:
      request: see `row`.
      seconds: after which it is killed.
      log: file for what it has printed if it crashes.
    """
    with tempfile.TemporaryDirectory(prefix="qk-row-") as name:
        folder = files.Path(name)
        asked, answer, printed = (folder / file for file in ("request.json", "answer.json", "log"))
        asked.write_text(json.dumps(request))
        with printed.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", row.__name__, str(asked), str(answer),
                stdout=output, stderr=output, env=environment(request),
            )  # fmt: skip
        late = False
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            late = True
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        code = await process.wait()
        found = json.loads(answer.read_text()) if answer.exists() else {}
        text = printed.read_bytes().decode(errors="replace").strip()
    if code == 2:  # an InputError
        found["error"] = text[text.rfind("\n") + 1 :].removeprefix("error: ")
    elif code:
        if code > 0:
            reason = f"the process failed with status {code}"
        elif late:
            reason = f"it took longer than {seconds / 60:g} minutes, give a longer --timeout"
        else:
            reason = f"the process was killed by signal {-code}"
        if log is not None:
            log.write_text(text)
            reason = f"{reason}; {log}"
        found["error"] = f"{reason}: {last_words(text)}"
    return found


def last_words(printed: str) -> str:
    """The exception that ended a process, or its last line."""
    raised = [found.start() for found in re.finditer(r"^[\w.]+(Error|Exception)\b", printed, re.M)]
    text = printed[raised[-1] if raised else printed.rfind("\n") + 1 :]
    return " ".join(text.split())[:MAX_ERROR]


def environment(request: Mapping[str, Any]) -> dict[str, str]:
    """Variables of a process: one that only compiles for a slice leaves accelerators alone."""
    here = request.get("case", request.get("probe"))["here"]
    if here:
        return dict(os.environ)
    return os.environ | topologies.ENVIRONMENT | {"JAX_PLATFORMS": "cpu"}
