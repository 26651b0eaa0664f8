"""Worker processes, which end with the process that they work for."""

from __future__ import annotations

import multiprocessing
import os
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
