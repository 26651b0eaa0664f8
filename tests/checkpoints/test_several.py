"""Checkpoints of two processes: failures that all hear of, one clock, and memory of a restore."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / "several.py"
ROOT = SCRIPT.parents[2]
PROCESSES, DEVICES = 2, 2
LIMIT_S = 200  # Orbax alone waits 1,200 s for a process whose write failed


def ended(what, folder):
    """Status, stdout and stderr of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), port, str(PROCESSES), str(i), what, str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    outputs = []
    for process in running:
        try:
            outputs.append(process.communicate(timeout=LIMIT_S))
        except subprocess.TimeoutExpired:  # its stacks are on stderr
            process.send_signal(signal.SIGKILL)
            outputs.append(process.communicate())
    return [(x.returncode, *texts) for x, texts in zip(running, outputs, strict=True)]


def found(what, folder):
    """What each process prints."""
    outputs = ended(what, folder)
    for status, _, errors in outputs:
        assert status == 0, errors
    return [json.loads(out.splitlines()[-1]) for _, out, _ in outputs]


@pytest.mark.parametrize("which", [0, 1])
def test_a_write_that_fails_on_one_process_fails_on_all_at_once(which, tmp_path):
    ours = found(f"fails{which}", tmp_path)
    for number, one in enumerate(ours):
        (line,) = one["said"]
        assert "step 2 was not saved: " in line and "the newest whole step is 1" in line
        cause = "the disk is full" if number == which else f"process {which} ("
        assert cause in line and ("could not write its part" in line) == (number != which)
        assert one["steps"] == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_full_disk_that_process_0_finds_fails_on_all(tmp_path):
    for one in found("full", tmp_path):
        (line,) = one["said"]
        assert "step 2 was not saved: the disk is full" in line
        assert one["steps"] == [1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_damaged_step_that_one_process_still_sees_is_saved_again_by_all(tmp_path):
    for one in found("aside", tmp_path):
        assert one == {"restored": 1, "steps": [1, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "damaged-2"]


def test_a_process_that_is_killed_in_a_restore_damages_nothing(tmp_path):
    """The other once took every step for damaged, and set it aside."""
    (status, _, errors), (killed, _, _) = ended("killed", tmp_path)
    assert (status, killed) == (42, -signal.SIGKILL), errors
    assert errors.splitlines()[-1].startswith("error: process 1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_step_that_one_process_cannot_use_is_used_by_none(tmp_path):
    for one in found("unlike", tmp_path):
        assert one == {"restored": 1, "steps": [1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "damaged-2"]


def test_all_leave_at_once_when_a_late_step_was_saved_before(tmp_path):
    """JAX compares the numbers by which it is asked whether to leave; Orbax asks by the step."""
    first, second = found("preempted", tmp_path)
    assert first == second == 0


def test_minutes_are_those_of_process_0(tmp_path):
    """Whose steps take 35 s, while the other's clock runs quite another way."""
    for one in found("minutes", tmp_path):
        assert one == {"due": [2, 4, 6], "steps": [2, 4, 6]}


def test_each_process_reads_its_share_and_holds_no_whole_leaf(tmp_path):
    """A stack of layers, which two processes share. To other devices' shares, pieces on disk are
    read that hold more than is wanted, and dropped again; two devices that want parts of one piece
    read it once or twice, as they meet it."""
    for one in found("200", tmp_path):
        share, whole = one["share"], one["whole"]
        assert share == pytest.approx(whole / 2) and whole > 190
        assert one["same"]["read"] < 1.02 * share
        assert one["other"]["read"] < 1.05 * DEVICES * whole
        # The share itself, on a CPU two numbers beside each of its own for the digest, and the
        # piece that is on its way; with a whole leaf it would be five shares.
        for name in ("same", "other"):
            assert one[name]["held"] < 4.2 * share, one
