"""One process of a few, for test_distributed: python several.py PORT PROCESSES PROCESS WHAT."""

import argparse
import os
import signal
import sys
import threading
import time

import jax

from qk_jax.base import distributed, errors, runtime
from qk_jax.base.errors import InputError

HEARTBEAT_S = 4  # shorter than in earnest


@errors.exits
def main(port, processes, process, what):
    runtime.start_logging()
    distributed.HEARTBEAT_S = HEARTBEAT_S
    given = argparse.Namespace(
        coordinator=f"127.0.0.1:{port}", processes=int(processes), process=int(process)
    )
    distributed.start(distributed.Given.of(given), timeout_s=60)
    me = jax.process_index()
    assert distributed.several() and jax.process_count() == int(processes)
    if what == "agree":
        distributed.agree("first", {"lr": "1", "clip": "2"})
        distributed.agree("second", {"lr": "1", "clip": "3" if me == 1 else "2"})
    if what == "end":
        assert distributed.told("number", str(me)) == "0"
    if me == int(processes) - 1:
        if what == "input":
            raise InputError("record 7 is no picture")
        if what == "bug":
            raise RuntimeError("a bug")
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "thread":
            threading.Thread(target=distributed.stop, args=(1, "step 3 has not ended")).start()
    if me == 0 and what == "first":
        raise InputError("the disk is full")
    if what in ("leave", "status"):
        time.sleep(0.3 * me)
        raise SystemExit(42 if what == "status" else 0)
    if what != "end":
        time.sleep(120)  # as in a collective that never ends


if __name__ == "__main__":
    main(*sys.argv[1:])
