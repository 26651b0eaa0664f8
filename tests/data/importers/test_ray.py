"""An import over a Ray cluster of two nodes on this machine, one of which is lost in the middle."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from qk_jax.data.importers import importing
from qk_jax.data.importers.job import Job
from tests.data.importers import published
from tests.data.importers.test_importing import content

ROOT = pathlib.Path(__file__).resolve().parents[3]
pytest.importorskip("ray", reason="needs Ray: pip install 'qk_jax[ray]'")


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """(address, the second node) of a cluster of two nodes with a processor each."""
    ray = str(pathlib.Path(sys.executable).with_name("ray"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "0",
           "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", "")
    common = [sys.executable, "-m", "ray.scripts.scripts"] if not os.path.exists(ray) else [ray]
    common += ["start", "--block", "--num-cpus=1", "--object-store-memory=80000000"]
    head = [*common, "--head", f"--port={port}", "--node-ip-address=127.0.0.1"]
    head += ["--include-dashboard=false", f"--temp-dir={tmp_path}/r"]
    started = [subprocess.Popen(head, env=env, start_new_session=True)]
    deadline = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
        time.sleep(0.2)
    address = f"127.0.0.1:{port}"
    second = [*common, f"--address={address}", "--node-ip-address=127.0.0.1"]
    started.append(subprocess.Popen(second, env=env, start_new_session=True))
    yield address, started[1]
    for node in reversed(started):
        end(node)
    shutil.rmtree(tmp_path / "r", ignore_errors=True)


def end(node: subprocess.Popen) -> None:
    """Kills all processes of a node, as when its machine is lost."""
    found = subprocess.run(["ps", "-eo", "pid=,sid="], capture_output=True, text=True).stdout
    for line in found.splitlines():
        pid, session = map(int, line.split())
        if session == node.pid:
            os.kill(pid, 9)
    node.wait()


def test_a_lost_node_changes_nothing(nodes, tmp_path):
    address, second = nodes
    for n in range(24):
        members = []
        for k in range(20):
            data = published.picture(20 * n + k, "PNG", (600, 600))
            members += [(f"{k:03d}.png", data), (f"{k:03d}.txt", f"{n} {k}".encode())]
        published.tar(tmp_path / "in" / f"{n:03d}.tar", members)
    given = {"format": "webdataset", "inputs": (str(tmp_path / "in"),), "task": "text_to_image"}
    importing.run(Job(**given, out=str(tmp_path / "alone")), importing.Engine())
    out = tmp_path / "out"

    def lose() -> None:
        while len(list(out.glob("train-*.array_record"))) < 4:
            time.sleep(0.01)
        lost.append(len(list(out.glob("train-*.array_record"))))
        end(second)

    lost: list[int] = []
    thread = threading.Thread(target=lose)
    thread.start()
    importing.run(Job(**given, out=str(out)), importing.Engine(ray=address))
    thread.join()
    assert 4 <= lost[0] < 24
    assert content(out) == content(tmp_path / "alone")
