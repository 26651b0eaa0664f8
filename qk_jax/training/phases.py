"""What a run is doing, how much of its time each thing takes, and what happens when one never ends.

Everything that may take long is a phase: start, restore, compile, data, step, save, validation,
painting. Their seconds are the goodput of a run; a phase that lasts far longer than it used to is a
hang, and a hung process of many makes all wait, so the watchdog ends it with the stacks of all its
threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qk_jax.base import files, runtime

POLL_S = 0.5
REMEMBERED = 64  # durations of a phase of which the median is taken


class Limits(NamedTuple):
    """When a phase is a hang.

    Attributes:
      floor_s: no phase is one before so many seconds.
      factor: it is one after so many times the median of its earlier durations.
      first_s: the floor of a phase that has not ended yet, and of start and compile.
    """

    floor_s: float
    factor: float
    first_s: float


class Phase(NamedTuple):
    """What is being done now."""

    name: str
    detail: str
    since: float
    limit: float


class Phases:
    """The phases of one process, nested: an inner one pauses the outer one's time.

    Attributes:
      entered: is called with the name of the phase that begins, or goes on after an inner one, and
        with '' when none does.
      seconds: by phase, all that was spent in it.
      before: seconds from the start of the process to the first phase.
    """

    def __init__(self, limits: Limits, stacks: files.Path | None, hung: Callable[[str], None]):
        """Starts the watchdog.

        Args:
          limits: of all phases; floor_s 0 watches nothing.
          stacks: the file that gets the stacks of a hang, besides stderr.
          hung: is called in the watchdog's thread with a line that names the phase.
        """
        self.entered: Callable[[str], None] = lambda name: None
        self.seconds: dict[str, float] = defaultdict(float)
        self._limits, self._stacks, self._hung = limits, stacks, hung
        self._earlier: dict[str, deque[float]] = {}
        self._open: list[Phase] = []
        self._begun = self._counted = time.monotonic()
        self.before = runtime.age()
        self._closed = threading.Event()
        if limits.floor_s:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def doing(self, name: str, detail: str = "") -> Iterator[None]:
        """The block is the phase `name`; `detail` tells more when it hangs, such as 'step 12'."""
        self._count()
        self._open.append(Phase(name, detail, time.monotonic(), self._limit(name)))
        self.entered(name)
        try:
            yield
        finally:
            self._count()
            ended = self._open.pop()
            taken = time.monotonic() - ended.since
            self._earlier.setdefault(name, deque(maxlen=REMEMBERED)).append(taken)
            if self._open:  # the outer phase begins anew: it was not this that took long
                outer = self._open.pop()
                self._open.append(outer._replace(since=time.monotonic()))
            self.entered(self._open[-1].name if self._open else "")

    def _count(self) -> None:
        """Books the time since the last call on the innermost phase."""
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1].name] += now - self._counted
        self._counted = now

    def _limit(self, name: str) -> float:
        limits, earlier = self._limits, self._earlier.get(name)
        if not earlier:
            return max(limits.first_s, limits.floor_s)
        return max(limits.floor_s, limits.factor * statistics.median(earlier))

    def shares(self) -> dict[str, float]:
        """Part of the time since the beginning that each phase took, 0 to 1."""
        self._count()
        total = max(time.monotonic() - self._begun, 1e-9)
        return {f"goodput/{name}": spent / total for name, spent in self.seconds.items()}

    def report(self) -> str:
        """One line: 'step 81 %, compile 12 %, ...', the largest first."""
        shares = sorted(self.shares().items(), key=lambda pair: -pair[1])
        return ", ".join(f"{name.removeprefix('goodput/')} {100 * x:.1f} %" for name, x in shares)

    def since_start(self, imported_s: float) -> str:
        """One line: 'after 21.5 s: import 4.1, hosts 0.3, start 6.2, ...', in order.

        Args:
          imported_s: age of the process when its imports were done.
        """
        self._count()
        spent = {"import": imported_s, "hosts": self.before - imported_s, **self.seconds}
        each = ", ".join(f"{name} {x:.1f}" for name, x in spent.items() if x >= 0.05)
        return f"after {runtime.age():.1f} s: {each}"

    def close(self) -> None:
        """Ends the watchdog."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            for phase in self._open[-1:]:  # a copy: the other thread goes on
                waited = time.monotonic() - phase.since
                if waited > phase.limit:
                    self._dump()
                    self._hung(
                        f"{phase.name}{f' ({phase.detail})' if phase.detail else ''} has not "
                        f"ended after {waited:.0f} s (the limit is {phase.limit:.0f} s)"
                    )
                    return

    def _dump(self) -> None:
        """Prints the stacks of all threads, to stderr and to the file."""
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._stacks is not None:
            with contextlib.suppress(OSError), open(self._stacks, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
