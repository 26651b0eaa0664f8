"""An import from a bucket into a bucket gives the bytes of a local one."""

import pathlib

import pytest

from qk_jax.base import files
from qk_jax.data import records
from qk_jax.data.importers import importing, pieces
from qk_jax.data.importers.job import Job
from tests.base import storage
from tests.base.storage import BUCKET
from tests.data.importers import published


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with storage.served(tmp_path_factory.mktemp("objects")) as running:
        yield running


@pytest.mark.parametrize(
    "name", ["webdataset", "folder_of_captions", "sharegpt4o_image", "omniedit", "csv_list"]
)
def test_buckets_are_read_and_written(name, tmp_path, server, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = published.SETS[name](tmp_path / "in")
    there = f"{BUCKET}/{name}"
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file():
            server.put(f"{name}/in/{path.relative_to(tmp_path / 'in')}", path.read_bytes())

    def remote(paths):
        return tuple(path.replace(str(tmp_path), there) for path in paths)

    changed = {key: remote(made.job[key]) for key in ("inputs", "images") if key in made.job}
    job = Job(**{**made.job, **changed}, task=made.task, out=f"{there}/out", shard_records=3)
    importing.run(job, pieces.Engine())
    found = records.RecordSet(files.Path(there) / "out", "train")
    assert [found[n].blobs["target"] for n in range(len(found))] == [x[1] for x in made.examples]
    names = {path.name for path in (files.Path(there) / "out").iterdir()}
    assert not [x for x in names if x.startswith(".")], names
    importing.run(job, pieces.Engine(resume=True))
    assert pathlib.Path(tmp_path / "in").is_dir()
