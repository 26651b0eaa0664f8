"""Worker processes, which end with the process that they work for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent(*_: object) -> None:
    """Ends this worker when the process that started it is gone, even by SIGKILL: it would wait for
    good, and hold its memory. An initializer of a pool or of grain's workers, whatever they give
    it."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()


def leave_to_parent(*_: object) -> None:
    """The same, and Ctrl-C, which a terminal sends to all processes, does nothing here: the parent
    needs its workers for what it finishes before it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
