"""When a run saves, and that a disk which is full for a while costs no more than a few steps."""

import errno
import gc
import os
import shutil
import subprocess
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from qk_jax.base import runtime
from qk_jax.base.errors import Failure, exits
from qk_jax.checkpoints import store as store_lib
from qk_jax.checkpoints.store import SaveError, Store
from qk_jax.training import saving

META = {"stage": "stage1", "size": "nano", "config": {}}
SHAPE = (100, 300)
NAMES = ("x", "y", "z")


def items(step):
    """About 0.4 MB that cannot be compressed."""
    draw = np.random.default_rng(step).normal
    return {"params": {name: jnp.array(draw(size=SHAPE), "float32") for name in NAMES}}


def config_of(every=1, minutes=0.0, max_failures=3, log_every=1, steps=100, grace_s=30.0):
    return ConfigDict({
        "steps": steps, "log": {"every": log_every},
        "checkpoint": {
            "every": every, "minutes": minutes, "max_failures": max_failures, "grace_s": grace_s,
        },
    })  # fmt: skip


def ended(saver):
    """Waits, as a run does by taking steps, until the save is no longer in progress."""
    while saver.store.writing is not None and saver.store.manager.is_saving_in_progress():
        time.sleep(0.01)
    saver.check()


def restored(root):
    target = {"params": dict.fromkeys(NAMES, jax.ShapeDtypeStruct(SHAPE, jnp.float32))}
    return Store(root, write=False).restore(lambda meta: target)


@pytest.fixture
def told(monkeypatch):
    """The errors in the log of the run, and what Orbax logs besides."""
    lines: list = []
    monkeypatch.setattr(saving.log, "error", lambda text, *args: lines.append(text % args))
    return lines


class Full(ocp.future.Future):
    """A write that ends as on a full disk."""

    def result(self, timeout=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(monkeypatch):
    """disk.full = True makes every write fail, in the thread that writes."""
    now = types.SimpleNamespace(full=False)
    save = ocp.PyTreeCheckpointHandler.async_save

    async def async_save(self, *args, **kwargs):
        return [Full()] if now.full else await save(self, *args, **kwargs)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", async_save)
    return now


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here, that needs root; others inject ENOSPC")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_failed_save_is_told_at_the_next_step_and_the_run_goes_on(tmp_path, disk, told):
    saver = saving.Saver(Store(tmp_path, keep=2), config_of())
    for step in (1, 2):
        saver.save(step, items(step), META)
        ended(saver)
    disk.full = True
    saver.save(3, items(3), META)
    assert not told  # it is written while the run goes on
    ended(saver)
    (line,) = told
    assert line.startswith(f"{tmp_path}: step 3 was not saved: the disk is full, ")
    assert " GB are free; free space there. The run goes on, the newest whole step is 2 " in line
    assert line.endswith("(failure 1 of 3 in a row)") and "\n" not in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # nothing half-written
    saver.check()
    assert len(told) == 1  # once
    disk.full = False
    saver.save(4, items(4), META)
    ended(saver)
    assert saver.store.steps() == [2, 4] and saver.failures == 0
    saver.store.close()
    got = restored(tmp_path)
    assert got.step == 4
    np.testing.assert_array_equal(got.items["params"]["x"], items(4)["params"]["x"])


def test_failures_in_a_row_end_the_run_with_one_line_and_status_1(tmp_path, disk, told, capsys):
    saver = saving.Saver(Store(tmp_path), config_of(max_failures=2))

    @exits
    def run():
        for step in range(1, 9):
            disk.full = step not in (1, 3)
            saver.save(step, items(step), META)
            ended(saver)

    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 1
    assert ["step 2" in line for line in told] == [True, False] and "step 4" in told[1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: step 5 was not saved: the disk is full")
    assert "failure 2 in a row (checkpoint.max_failures), and the newest whole step is 3" in line
    saver.store.close()
    assert restored(tmp_path).step == 3


def test_the_last_step_is_tried_again_until_it_is_on_disk(tmp_path, disk, told, monkeypatch):
    saver = saving.Saver(Store(tmp_path), config_of())
    monkeypatch.setattr(saving.log, "error", lambda *args: setattr(disk, "full", False))
    disk.full = True
    saver.save_whole(7, items(7), META)
    assert saver.store.steps() == [7] and saver.failures == 0
    saver.save_whole(7, items(7), META)  # it is there
    disk.full = True
    monkeypatch.undo()
    monkeypatch.setattr(Store, "save", lambda *args: (_ for _ in ()).throw(SaveError("full")))
    with pytest.raises(Failure, match="full. It was failure 3 in a row .* newest whole step is 7"):
        saver.save_whole(8, items(8), META)


def test_a_real_full_disk(small_disk, told, caplog, monkeypatch):
    for name in ("handlers", "level", "propagate"):  # put back afterwards
        monkeypatch.setattr(runtime.log, name, getattr(runtime.log, name))
    runtime.start_logging()  # as a run does: Orbax must not print its tracebacks
    saver = saving.Saver(Store(small_disk / "c", keep=9), config_of(max_failures=9))
    step = 0
    while not told:
        step += 1
        saver.save(step, items(step), META)
        ended(saver)
    (line,) = told
    assert f"step {step} was not saved: the disk is full, 0.00 GB are free; free space" in line
    assert saver.store.steps() == list(range(1, step))
    gc.collect()  # asyncio tells of what nobody asked for
    assert not [record for record in caplog.records if record.exc_info]
    shutil.rmtree(small_disk / "c/1")
    shutil.rmtree(small_disk / "c/2")
    saver.save(step + 1, items(step + 1), META)
    ended(saver)
    saver.store.close()
    assert len(told) == 1 and restored(small_disk / "c").step == step + 1


def test_other_reasons_are_told_in_one_line(tmp_path):
    reason = store_lib._reason(TimeoutError("no answer\nfrom the bucket"), tmp_path)
    assert reason.startswith("TimeoutError: no answer; ")
    quota = store_lib._reason(OSError(errno.EDQUOT, "x"), tmp_path)
    assert quota == "the disk quota is used up; free space there"
    theirs = ValueError(
        'Failed to write 185420 bytes: No space left on device [os_error_code="28"]'
    )
    assert store_lib._reason(theirs, tmp_path).startswith("the disk is full, ")


@pytest.mark.parametrize(("grace_s", "lines"), [(1e-6, 1), (3600.0, 0), (0.0, 0)])
def test_a_save_longer_than_a_preempted_host_has_is_told_once(tmp_path, caplog, grace_s, lines):
    saver = saving.Saver(Store(tmp_path), config_of(grace_s=grace_s))
    for step in (1, 2):
        saver.save_whole(step, items(step), META)
        assert saver.took_s > 0 and saver.is_too_slow() == bool(lines)
    saver.store.close()
    assert caplog.text.count("(checkpoint.grace_s)") == lines


class Away(Exception):
    """An error of a bucket's client."""


def test_a_bucket_that_is_still_away_costs_the_save_alone(tmp_path, disk, told, monkeypatch):
    monkeypatch.setattr(Away, "__module__", "gcsfs.retry")
    saver = saving.Saver(Store(tmp_path), config_of())
    saver.save(1, items(1), META)
    ended(saver)
    disk.full = True
    reload = saver.store.manager.reload
    monkeypatch.setattr(saver.store.manager, "reload", lambda: (_ for _ in ()).throw(Away("503")))
    saver.save(2, items(2), META)
    ended(saver)
    (line,) = told
    assert "The run goes on, which steps are whole cannot be asked now (failure 1 of 3" in line
    saver.save(2, items(2), META)  # it is not taken for saved
    ended(saver)
    assert len(told) == 2 and "(failure 2 of 3" in told[1]
    disk.full = False
    monkeypatch.setattr(saver.store.manager, "reload", reload)
    saver.save(2, items(2), META)
    ended(saver)
    assert saver.store.steps() == [2] and saver.failures == 0
    saver.store.close()


@pytest.mark.parametrize(
    ("every", "minutes", "log_every", "due"),
    [
        (4, 0.0, 1, [4, 8, 11]),
        (0, 0.0, 1, [11]),
        (0, 2.0, 1, [4, 8, 11]),  # a step takes half a minute
        (0, 2.0, 3, [6, 11]),  # only where metrics are logged
        (5, 2.0, 1, [4, 5, 9, 10, 11]),  # counted from the last save of either kind
    ],
)
def test_when_it_saves(every, minutes, log_every, due, monkeypatch, tmp_path):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    store = types.SimpleNamespace(writing=None, save=lambda *args: None)
    saver = saving.Saver(store, config_of(every, minutes, log_every=log_every, steps=11))
    found = []
    for step in range(1, 12):
        now[0] += 30
        if saver.is_due(step):
            saver.save(step, {}, {})
            found.append(step)
    assert found == due
