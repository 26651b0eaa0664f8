"""Data workers, as processes of the machine."""

import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
READS = """
import multiprocessing, time
from qk_jax.data import pipeline
from tests.data import stage3

if __name__ == "__main__":
    config = stage3.config({"text_to_image": 1.0}, 4, 4, workers=2)
    batches = pipeline.Pipeline(config, "train", 0, 1).batches()
    next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


def lives(pid):
    try:
        return (
            "Z" not in pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        )
    except OSError:
        return False


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    """They would wait for good with what they hold; a host that is started again has no room."""
    program = tmp_path / "reads.py"
    program.write_text(READS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    reader = subprocess.Popen(
        [sys.executable, str(program)], env=environment, stdout=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    assert len(workers) == 2 and all(map(lives, workers))
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    end = time.monotonic() + 20
    while any(map(lives, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in workers if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
