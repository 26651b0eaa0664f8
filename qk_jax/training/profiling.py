"""Traces of a few training steps, for TensorBoard's profiler, XProf or Perfetto."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError

log = logging.getLogger(__name__)
AFTER_SIGNAL = 3  # steps


def check(steps: Sequence[int]) -> None:
    """Raises InputError unless `steps` are the first and the last of a trace, or ()."""
    are_two = len(steps) == 2 and all(type(step) is int for step in steps)
    if steps and not (are_two and 1 <= steps[0] <= steps[1]):
        raise InputError(
            f"profile.steps is {tuple(steps)}; give the first and the last step, such as 10,12"
        )


class Profiler:
    """Traces the steps that the config names, and the next few after SIGUSR1.

    Each process writes its own trace; the signal reaches one process.
    """

    def __init__(self, folder: files.Path, steps: Sequence[int]):
        """Traces nothing yet.

        Args:
          folder: gets plugins/profile/TIME/HOST.xplane.pb. JAX writes to disks alone: a bucket's
            trace stays in this machine's temporary folder.
          steps: the first and the last step of a trace, counted from 1; () for none.
        """
        if buckets.is_remote(folder):
            folder = files.Path(tempfile.gettempdir()) / "qk_jax" / folder.name
        self._folder = folder
        self._first, self._last = steps or (0, 0)
        self._tracing = self._asked = False

    def begin(self, step: int) -> None:
        """Call before a step is dispatched."""
        if self._asked and not self._tracing:
            self._asked = False
            self._first, self._last = step, step + AFTER_SIGNAL - 1
        if step == self._first and not self._tracing:  # a step can come twice
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def end(self, step: int, values: Any) -> None:
        """Call when a step was dispatched; waits for `values` of the last one that is traced."""
        if self._tracing and step >= self._last:
            jax.block_until_ready(values)
            self.close()
            log.info("traced steps %d to %d: %s", self._first, step, self._folder)

    def close(self) -> None:
        """Ends a trace that is open."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block SIGUSR1 asks for a trace."""

        def ask(number: int, frame: Any) -> None:
            self._asked = True

        old = signal.signal(signal.SIGUSR1, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, old)
