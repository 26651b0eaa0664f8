"""The supervisor of the trainer: signals, exit statuses, and starts that bring nothing."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "pods" / "supervise.py"


def words(folder, code, restarts=3):
    return [
        sys.executable, str(SCRIPT), "--checkpoints", str(folder / "W/stage1/checkpoints"),
        "--starts", str(folder / "W/launch/starts-stage1.json"), "--restarts", str(restarts),
        "--", "-c", code,
    ]  # fmt: skip


def run(folder, code="pass", restarts=3, **env):
    return subprocess.run(
        words(folder, code, restarts), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(42)", 42),
        ("raise SystemExit(2)", 2),
        ("import os; os.abort()", 134),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_exit_status_is_the_trainers(tmp_path, code, status):
    assert run(tmp_path, code).returncode == status


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path({folder!r}, "saved").touch()
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
pathlib.Path({folder!r}, "ready").touch()
time.sleep(60)
"""


def test_sigterm_reaches_the_trainer(tmp_path):
    command = words(tmp_path, SAVES.format(folder=str(tmp_path)))
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 42
    assert (tmp_path / "saved").exists()


def test_sigterm_before_the_trainer_is_there_is_not_lost():
    """While Python imports, process 1 of a container would otherwise drop it."""
    code = (
        "import os, sys; from pods import supervise; child = supervise.Child(); "
        "os.kill(os.getpid(), 15); "
        "sys.exit(child.run([sys.executable, '-c', 'import time; time.sleep(60)']))"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=50).returncode == 143


def test_orphans_of_the_trainer_do_not_end_it(tmp_path):
    code = (
        "import os, time\nif os.fork() == 0:\n    os._exit(7)\ntime.sleep(0.3)\nraise SystemExit(5)"
    )
    assert run(tmp_path, code).returncode == 5


def test_fruitless_starts_are_bounded(tmp_path):
    for number in (1, 2, 3):
        done = run(tmp_path, "raise SystemExit(42)", restarts=2)
        assert done.returncode == 42 and f"start {number} from step 0" in done.stdout
    done = run(tmp_path, restarts=2)
    assert done.returncode == 3
    assert "error: 3 starts from step 0 brought no new checkpoint" in done.stderr


def test_a_new_checkpoint_begins_the_count_anew(tmp_path):
    for step in (0, 100, 200, 1000):
        (tmp_path / f"W/stage1/checkpoints/{step}").mkdir(parents=True)
        (tmp_path / "W/stage1/checkpoints/damaged-9999").mkdir(exist_ok=True)
        assert run(tmp_path, "raise SystemExit(42)", restarts=0).returncode == 42
    assert run(tmp_path, "raise SystemExit(42)", restarts=0).returncode == 3


def test_only_the_first_host_counts(tmp_path):
    for others in (
        {"QK_SLICE": "0", "QK_HOST": "1"}, {"QK_SLICE": "1", "QK_HOST": "0"},
        {"TPU_WORKER_ID": "15"}, {"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "1"},
    ):  # fmt: skip
        assert run(tmp_path, "raise SystemExit(42)", restarts=0, **others).returncode == 42
    assert not (tmp_path / "W").exists()
    first = {"QK_SLICE": "0", "QK_HOST": "0", "TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "0"}
    assert "start 1 from step 0" in run(tmp_path, **first).stdout


@pytest.mark.parametrize("text", ["", "[]", '{"step": 0}', '{"step": 0, "starts": "x"}'])
def test_a_damaged_count_begins_anew(tmp_path, text):
    (tmp_path / "W/launch").mkdir(parents=True)
    (tmp_path / "W/launch/starts-stage1.json").write_text(text)
    assert run(tmp_path, restarts=0).returncode == 0
    assert json.loads((tmp_path / "W/launch/starts-stage1.json").read_text()) == {
        "step": 0, "starts": 1
    }  # fmt: skip
