"""Commands of the cloud: run with patience where that helps, or only printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from qk_jax.base.errors import InputError

# What a second try may cure. Quotas of requests per minute are among it, those of chips are not.
PASSING = re.compile(
    r"per minute|rate.?limit|HttpError 429|\b50[0234]\b|UNAVAILABLE|DEADLINE_EXCEEDED"
    r"|internal error|connection (reset|refused)|timed out",
    re.IGNORECASE,
)
QUOTA = re.compile(
    r"Quota limit '|Quota '[^']+' (exhausted|exceeded)|insufficient quota", re.IGNORECASE
)
ABSENT = re.compile(r"NOT_FOUND|not found|404|does not exist|NotFound", re.IGNORECASE)
TRIES = 5
LONGEST = 100  # columns of a printed command


class CommandError(InputError):
    """A command failed; the message is the line that says why, text and out are all it wrote."""

    def __init__(self, words: Sequence[str], text: str, out: str = ""):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        marked = [line for line in lines if re.match(r"(ERROR|error|Error)\b", line)]
        why = (marked or lines[-1:] or ["no reason given"])[0]
        why = re.sub(r"^(ERROR|error|Error)[: ]+(\([\w.-]+\) )?", "", why)
        mend = "; ask for more, or give another slice" if QUOTA.search(text) else ""
        super().__init__(f"{' '.join(words[:5])}: {why}{mend}")
        self.text, self.out = text, out


class Shell:
    """Runs gcloud and kubectl.

    Args:
      dry: print the commands instead; what they would answer is then what the caller assumes.
    """

    def __init__(self, dry: bool = False):
        self.dry = dry

    def run(self, *words: str, stdin: str | None = None, assumed: str = "") -> str:
        """What a command prints. Failures that pass are tried again, after 2, 4, 8 and 16 s.

        Raises:
          CommandError: it failed.
          InputError: the program is not installed.
        """
        if self.dry:
            print(shown(words, stdin))
            return assumed
        if shutil.which(words[0]) is None:
            raise InputError(f"{words[0]} is not installed; docs/pods.md says what is needed")
        for attempt in range(1, TRIES + 1):
            done = subprocess.run(words, input=stdin or "", capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout
            passes = PASSING.search(done.stderr) and not QUOTA.search(done.stderr)
            if not passes or attempt == TRIES:
                raise CommandError(words, done.stderr, done.stdout)
            time.sleep(2**attempt)
        raise AssertionError

    def json(self, *words: str, assumed: Any = None) -> Any:
        """The same, of a command whose answer is JSON; None if what it describes is not there."""
        form = "--output=json" if words[0] == "kubectl" else "--format=json"
        try:
            return json.loads(self.run(*words, form, assumed=json.dumps(assumed)).strip() or "null")
        except CommandError as error:
            if ABSENT.search(error.text):
                return None
            raise

    def follow(self, *words: str) -> None:
        """Runs a command on our own terminal until it ends or Ctrl-C ends it."""
        if self.dry:
            print(shown(words))
        else:
            subprocess.run(words)

    def say(self, text: str) -> None:
        """A line for the user, with the time; as a comment in a dry run."""
        print(f"# {text}" if self.dry else f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def wait(self, seconds: float) -> None:
        """Sleeps, but not in a dry run."""
        if not self.dry:
            time.sleep(seconds)


def shown(words: Sequence[str], stdin: str | None = None) -> str:
    """A command as it can be pasted, an option a line where it is long."""
    text = shlex.join(words)
    if len(text) > LONGEST:
        lines: list[list[str]] = [[]]
        for word in words:
            if word.startswith("--") and word != "--":
                lines.append([])
            lines[-1].append(word)
        text = " \\\n    ".join(map(shlex.join, lines))
    return f"{text} <<'EOF'\n{stdin.rstrip()}\nEOF" if stdin else text
