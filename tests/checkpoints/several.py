"""One process of two, for test_several: python several.py PORT PROCESSES PROCESS WHAT FOLDER.

Prints a line of JSON on stdout.
"""

import argparse
import errno
import faulthandler
import gc
import json
import os
import pathlib
import re
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from qk_jax.base import distributed, errors, runtime
from qk_jax.checkpoints.store import Store
from qk_jax.training import saving

STACKS_S = 170  # before test_several gives up
META = {"stage": "stage1", "size": "nano", "config": {}}


class Full(ocp.future.Future):
    """A write that ends as on a full disk."""

    def result(self, timeout=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def preempted(folder):
    """How many calls after SIGTERM all leave, when a late step was saved before."""
    store = Store(folder)
    distributed.preempted()
    store.save(1000, items(1000), META)
    store.wait()
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(4)  # while all agree when to leave, the next step is taken
    return next((call for call in range(200) if distributed.preempted()), None)


def sharded(axis=0):
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "x"))


def items(step):
    make = jax.jit(lambda: jnp.full((64, 1000), step, jnp.float32), out_shardings=sharded())
    return {"params": {"x": make()}}


def saver_of(folder, every=1, minutes=0.0, max_failures=3):
    config = ConfigDict({
        "steps": 100, "log": {"every": 1},
        "checkpoint": {
            "every": every, "minutes": minutes, "max_failures": max_failures, "grace_s": 0.0,
        },
    })  # fmt: skip
    return saving.Saver(Store(folder, keep=9), config)


def fails(folder, which):
    """Saves 1, 2 and 3; the write of 2 fails on process `which` alone."""
    write, now, said = ocp.PyTreeCheckpointHandler.async_save, [0], []

    async def async_save(self, *args, **kwargs):
        if now[0] == 2 and jax.process_index() == which:
            return [*await write(self, *args, **kwargs), Full()]
        return await write(self, *args, **kwargs)

    ocp.PyTreeCheckpointHandler.async_save = async_save
    saving.log.error = lambda text, *args: said.append(text % args)
    saver = saver_of(folder)
    begun = time.monotonic()
    for step in (1, 2, 3):
        now[0] = step
        saver.save(step, items(step), META)
        while saver.store.writing is not None:
            saver.check()
            time.sleep(0.05)
    seconds = time.monotonic() - begun
    saver.store.close()
    return {"said": said, "seconds": seconds, "steps": Store(folder, write=False).steps()}


def full(folder):
    """Saves 1, 2 and 3; at 2 process 0 finds the disk full before it has made a folder."""
    said = []
    saving.log.error = lambda text, *args: said.append(text % args)
    saver = saver_of(folder)
    write = type(saver.store.root).write_bytes

    def write_bytes(self, data):
        if self.name == "probe" and now == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    type(saver.store.root).write_bytes = write_bytes
    begun = time.monotonic()
    for now in (1, 2, 3):
        saver.save(now, items(now), META)
    saver.check(wait=True)
    seconds = time.monotonic() - begun
    saver.store.close()
    return {"said": said, "seconds": seconds, "steps": Store(folder, write=False).steps()}


def aside(folder):
    """Saves 1 and 2, restores with 2 damaged while process 0 is slow to set it aside, saves 2."""
    saver = saver_of(folder)
    for step in (1, 2):
        saver.save_whole(step, items(step), META)
    distributed.meet("saved", 60)
    if jax.process_index() == 0:
        (folder / "2" / "meta" / "metadata").write_text("{")
    distributed.meet("damaged", 60)
    rename = type(saver.store.root).rename

    def slow(self, target):
        time.sleep(2)
        return rename(self, target)

    type(saver.store.root).rename = slow
    target = {"params": {"x": jax.ShapeDtypeStruct((64, 1000), jnp.float32, sharding=sharded())}}
    step = saver.store.restore(lambda meta: target).step
    saver.save_whole(2, items(2), META)
    saver.store.close()
    return {"restored": step, "steps": Store(folder, write=False).steps()}


def _saved(folder):
    """A store with the steps 1 and 2, and the target that restores them."""
    saver = saver_of(folder)
    for step in (1, 2):
        saver.save_whole(step, items(step), META)
    target = {"params": {"x": jax.ShapeDtypeStruct((64, 1000), jnp.float32, sharding=sharded())}}
    return saver.store, lambda meta: target


def killed(folder):
    """Process 1 is killed while both restore."""
    store, target = _saved(folder)
    if jax.process_index() == 1:
        store._read = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    store.restore(target)


def unlike(folder):
    """Process 1 alone cannot read its arrays of step 2."""
    store, target = _saved(folder)
    if jax.process_index() == 1:
        restore = ocp.StandardCheckpointHandler.restore

        def fails(self, path, args):
            if path.parent.name == "2":
                raise OSError("its own disk")
            return restore(self, path, args=args)

        ocp.StandardCheckpointHandler.restore = fails
    step = store.restore(target).step
    store.close()
    return {"restored": step, "steps": Store(folder, write=False).steps()}


def by_minutes(folder):
    """The steps that are saved by the clock: that of process 0 alone makes them due."""
    saver = saver_of(folder, every=0, minutes=1.0)
    now = [0.0]
    saving.time = types.SimpleNamespace(monotonic=lambda: now[0])
    saver._since = 0.0
    found = []
    for step in range(1, 7):
        now[0] += 35 if jax.process_index() == 0 else 0.5 * 7 ** (step - 1)
        if saver.is_due(step):
            found.append(step)
            saver.save(step, items(step), META)
    saver.check(wait=True)
    saver.store.close()
    return {"due": found, "steps": Store(folder, write=False).steps()}


class Cost:
    """Of the block: MB that this process read, and the most that it held beyond what it held
    before, by the kernel's own high-water mark."""

    def __enter__(self):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the mark back
        self._held, self._read = self._of("status", "VmRSS"), self._of("io", "rchar") / 1000
        return self

    def __exit__(self, *args):
        self.held = (self._of("status", "VmHWM") - self._held) / 1000
        self.read = (self._of("io", "rchar") / 1000 - self._read) / 1000

    def _of(self, file, name):
        text = pathlib.Path(f"/proc/self/{file}").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", text)[1])


def restores(folder, megabytes):
    """What restores of a stack of layers cost here: to the mesh it was saved from, whose devices
    share the layers' rows, and to one whose devices share the columns."""
    saved, other = sharded(1), sharded(2)
    shape = (8, 1024, megabytes * 1000 * 1000 // (4 * 8 * 1024) // 8 * 8)
    draw = lambda: jax.random.bits(jax.random.key(0), shape, jnp.uint32)  # noqa: E731
    make = jax.jit(lambda: {"stack": draw()}, out_shardings=saved)
    store = Store(folder)
    store.save(1, {"params": make()}, META)
    store.wait()
    found = {}
    for name, sharding in (("same", saved), ("other", other)):
        target = {"params": {"stack": jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=sharding)}}
        gc.collect()
        with Cost() as cost:
            got = store.restore(lambda meta, target=target: target).items["params"]["stack"]
            jax.block_until_ready(got)
        found[name] = {"held": cost.held, "read": cost.read}
    store.close()
    mine = sum(x.data.nbytes for x in got.addressable_shards) / 1e6
    return found | {"share": mine, "whole": got.nbytes / 1e6}


@errors.exits
def main(port, processes, process, what, folder):
    runtime.start_logging()
    faulthandler.dump_traceback_later(STACKS_S)  # says where a hang is
    given = argparse.Namespace(
        coordinator=f"127.0.0.1:{port}", processes=int(processes), process=int(process)
    )
    distributed.start(distributed.Given.of(given), timeout_s=60)
    if what.startswith("fails"):
        found = fails(folder, int(what[-1]))
    elif what == "aside":
        found = aside(pathlib.Path(folder))
    elif what == "full":
        found = full(folder)
    elif what == "preempted":
        found = preempted(folder)
    elif what == "killed":
        found = killed(pathlib.Path(folder))
    elif what == "unlike":
        found = unlike(pathlib.Path(folder))
    elif what == "minutes":
        found = by_minutes(folder)
    else:
        found = restores(folder, int(what))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
