"""Data workers, as processes of the machine."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from qk_jax.data import Writer, pipeline
from tests.data import stage3
from tests.data.stage3 import assert_same

ROOT = pathlib.Path(__file__).parents[2]
READS = """
import multiprocessing, time
from qk_jax.data import Writer, pipeline
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


def test_two_hosts_with_two_workers_each_read_what_one_host_reads(builder, tmp_path):
    """The same bits, from a step at which a run goes on, also where a record is damaged."""
    folder = tmp_path / "set"
    folder.mkdir()
    with Writer(folder / "train.array_record") as writer:
        for number in range(40):
            target = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
            writer.add("text_to_image", f"picture {number}", target)
    data = (folder / "train.array_record").read_bytes()
    middle = len(data) // 2
    (folder / "train.array_record").write_bytes(data[:middle] + bytes(99) + data[middle + 99 :])
    made = {"records": str(folder), "max_bad_share": 1.0, "mixed_batches": False}
    alone = stage3.config({"text_to_image": 1.0}, 8, 4, **made)
    one = pipeline.Pipeline(alone, "train", 0, 1, builder)
    working = stage3.config({"text_to_image": 1.0}, 8, 4, workers=2, **made)
    hosts = [pipeline.Pipeline(working, "train", host, 2, builder) for host in range(2)]
    first = 5
    streams = [host.batches(first) for host in hosts]
    for step in range(first, first + 8):
        halves = [next(stream) for stream in streams]
        assert_same(one.batch(step), joined(*halves))
    assert any(host.bad for host in hosts)
    for host in hosts:
        host.close()


def joined(a, b):
    """The batch of which two hosts have these halves."""
    both = {name: np.concatenate([a[name], b[name]]) for name in a.keys() - {"conditions"}}
    pairs = zip(a["conditions"], b["conditions"], strict=True)
    return both | {"conditions": type(a["conditions"])(map(np.concatenate, pairs))}
