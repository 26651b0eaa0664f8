"""Where the processes of a run wait for each other during a save, so that none waits for ever.

When the write of one process fails, Orbax lets that one go to its last barrier, and the others wait
for it at the barriers before, for twenty minutes. Here a process that waits sees that another has
gone past it, and its own write fails at once, too: all know of it, and the run goes on alike.
"""

from __future__ import annotations

import time

from qk_jax.base import distributed

PAUSE_S = 0.5  # between two looks at who is there; the training goes on meanwhile
_START, _END = "set_value_start", "set_value_end"  # before and after the others, in every save


class Barrier:
    """Orbax's `barrier_sync_fn`, for one save after the other.

    A save sets a value at its begin and at its end, whether it fails or not, and in between meets
    when all is written and when it is committed.
    """

    def __init__(self) -> None:
        self._number = 0  # of the value that was set last; the same on all processes

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes.

        Raises:
          OSError: another has gone past, as its write has failed; or TimeoutError.
        """
        if not distributed.several():
            return
        if _START in key:
            self._number += 1
            distributed.forget(f"save/{self._number - 2}")  # all have been there
            distributed.arrive(f"save/{self._number}/{_START}")
        if _START in key or _END in key:
            distributed.meet(f"save/{self._number}/{key}", timeout_ms / 1000)
            return
        here, past = f"save/{self._number}/{key}", f"save/{self._number + 1}/{_START}"
        distributed.arrive(here)
        end = time.monotonic() + timeout_ms / 1000
        while True:
            gone = distributed.arrived(past)  # before it looks here, where they were first
            if distributed.everyone() <= (found := distributed.arrived(here)):
                return
            if failed := sorted(gone - found):
                raise OSError(f"{distributed.named(failed[0])} could not write its part")
            if time.monotonic() > end:
                late = sorted(distributed.everyone() - found)
                raise TimeoutError(f"{distributed.named(late[0])} has not written its part")
            time.sleep(PAUSE_S)


barrier = Barrier()
