"""One process of a few, for test_distributed: python several.py PORT PROCESSES PROCESS WHAT."""

import argparse
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp

from qk_jax.base import distributed, errors, runtime
from qk_jax.base.errors import InputError

HEARTBEAT_S = 4  # shorter than in earnest


def together():
    """Sums over all processes, of which the last is killed at some moment."""
    devices = jax.sharding.Mesh(jax.devices(), ("x",))
    spec = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec("x"))
    summed = jax.jit(jnp.sum, out_shardings=spec.update(spec=jax.sharding.PartitionSpec()))
    numbers = jax.jit(lambda: jnp.ones(jax.device_count() * 1000), out_shardings=spec)()
    if jax.process_index() == jax.process_count() - 1:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        jax.block_until_ready(summed(numbers))


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
    if what == "preempted":
        if me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)  # all hear of it before their first step
        raise SystemExit(42 if any(distributed.preempted() for _ in range(20)) else 1)
    if what == "collective":
        together()
    if what != "end":
        time.sleep(120)  # as in a collective that never ends


if __name__ == "__main__":
    main(*sys.argv[1:])
