"""When a run saves, and what it does when that fails.

A save is written while the run goes on. When it fails, the steps before it are still whole, so the
run tells of it and goes on; it stops when several in a row fail.
"""

from __future__ import annotations

import logging
import time

from ml_collections import ConfigDict

from qk_jax.base import buckets, distributed
from qk_jax.base.errors import Failure
from qk_jax.checkpoints.store import Meta, SaveError, Store, Trees

log = logging.getLogger(__name__)


class Saver:
    """The saves of one run.

    Attributes:
      failures: saves in a row that failed.
      took_s: seconds that the last save took until it was on disk, to within a step.
    """

    def __init__(self, store: Store, config: ConfigDict):
        """`config` is that of the run; the minutes of `checkpoint.minutes` begin now."""
        self.store, self.config = store, config
        self.failures = 0
        self.took_s = 0.0
        self._since = time.monotonic()
        self._asked = 0  # how often process 0 was; a step can come twice

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`; the same on every host.

        By minutes it is process 0's clock that decides. The others hear of it at the steps at
        which metrics are logged, so that no step waits for a message.
        """
        section = self.config.checkpoint
        if step == self.config.steps or (section.every and step % section.every == 0):
            return True
        if not section.minutes or step % self.config.log.every:
            return False
        late = time.monotonic() - self._since >= 60 * section.minutes
        self._asked += 1
        return distributed.told(f"save/{self._asked}", str(late)) == str(True)

    def save(self, step: int, items: Trees, meta: Meta) -> None:
        """Starts to save, as `Store.save`; tells of a failure and goes on.

        Raises:
          Failure: it is the last that `checkpoint.max_failures` allows.
        """
        self.check(wait=True)
        self._since = time.monotonic()
        try:
            self.store.save(step, items, meta)
        except SaveError as error:
            self._failed(error)

    def save_whole(self, step: int, items: Trees, meta: Meta) -> None:
        """Saves and waits until the step is on disk; tries again after a failure.

        Raises:
          Failure: as `save`.
        """
        while True:
            before = self.failures
            self.save(step, items, meta)
            self.check(wait=True)
            if self.failures <= before:
                return

    def check(self, *, wait: bool = False) -> None:
        """Notices that a save has ended, and tells of it when it failed.

        Args:
          wait: for one that is still being written.

        Raises:
          Failure: as `save`.
        """
        if self.store.writing is None:
            return
        try:
            if wait:
                self.store.wait()
            elif not self.store.is_written():
                return
        except SaveError as error:
            self._failed(error)
        else:
            self.failures = 0
            told = self.is_too_slow()
            self.took_s = time.monotonic() - self._since
            if self.is_too_slow() and not told:
                log.warning(
                    "a save takes %.0f s, and a host ends %.0f s after SIGTERM "
                    "(checkpoint.grace_s): a preemption will lose the steps since the last save",
                    self.took_s, self.config.checkpoint.grace_s,
                )  # fmt: skip

    def is_too_slow(self) -> bool:
        """Whether a save that begins at SIGTERM is likely not to be complete in time."""
        return 0 < self.config.checkpoint.grace_s < self.took_s

    def settle(self) -> None:
        """Waits for what is being written because the run ends for another reason: only tells."""
        try:
            self.store.wait()
        except SaveError as error:
            log.error("%s", error)

    def _failed(self, error: SaveError) -> None:
        """Tells of a failure, or raises it as the last one."""
        self.failures += 1
        most, whole = self.config.checkpoint.max_failures, self._whole()
        if self.failures >= most:
            raise Failure(
                f"{error}. It was failure {self.failures} in a row (checkpoint.max_failures), and "
                f"{whole}: run the same command again to go on from there"
            ) from error
        log.error(
            "%s. The run goes on, %s (failure %d of %d in a row)", error, whole, self.failures, most
        )  # fmt: skip

    def _whole(self) -> str:
        """The newest whole step in words."""
        try:
            known = self.store.steps()
        except Exception as error:
            if not buckets.is_failure(error):
                raise
            return "which steps are whole cannot be asked now"
        return f"the newest whole step is {known[-1]}" if known else "no step is whole"
