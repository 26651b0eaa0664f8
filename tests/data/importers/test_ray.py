"""An import over a Ray cluster of two nodes on this machine, one of which is lost in the middle."""

import pathlib
import threading
import time

import pytest

from qk_jax.data.importers import importing, pieces
from qk_jax.data.importers.job import Job
from tests import needs
from tests.data.importers import published
from tests.data.importers.test_importing import content

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a processor each: the head, and another."""
    cluster_utils = needs.module("ray.cluster_utils")

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def tars(folder, count, size):
    """Arguments of a job that imports so many tars with 20 captioned pictures each."""
    for n in range(count):
        members = []
        for k in range(20):
            data = published.picture(20 * n + k, "PNG", size)
            members += [(f"{k:03d}.png", data), (f"{k:03d}.txt", f"{n} {k}".encode())]
        published.tar(folder / f"{n:03d}.tar", members)
    return {"format": "webdataset", "inputs": (str(folder),), "task": "text_to_image"}


def test_an_index_is_made_by_it_too(cluster, tmp_path):
    given = tars(tmp_path / "in", 4, (40, 30))
    importing.run(Job(**given, out=str(tmp_path / "alone"), in_place=True), pieces.Engine())
    engine = pieces.Engine(ray=cluster.address)
    importing.run(Job(**given, out=str(tmp_path / "out"), in_place=True), engine)
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_a_lost_node_changes_nothing(cluster, tmp_path):
    second = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    given = tars(tmp_path / "in", 24, (600, 600))
    importing.run(Job(**given, out=str(tmp_path / "alone")), pieces.Engine())
    out = tmp_path / "out"

    def lose() -> None:
        while len(list(out.glob("train-*.array_record"))) < 4:
            time.sleep(0.01)
        lost.append(len(list(out.glob("train-*.array_record"))))
        cluster.remove_node(second, allow_graceful=False)

    lost: list[int] = []
    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    importing.run(Job(**given, out=str(out)), pieces.Engine(ray=cluster.address))
    thread.join()
    assert 4 <= lost[0] < 24
    assert content(out) == content(tmp_path / "alone")
