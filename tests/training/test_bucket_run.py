"""A stage whose work directory is in a bucket: the same bits, and all its files are there."""

import json
import pathlib

import batches
import numpy as np
import pytest

from qk_jax.base import files, trees
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import run_folder
from qk_jax.data import pipeline
from qk_jax.experiment import config as config_lib
from qk_jax.training import loop
from tests.base import storage

NANO = pathlib.Path(__file__).parent / "nano.py"


class Pipeline(batches.Pipeline):
    """One picture at every step, so that a stage has one program."""

    def batches(self, first):
        for step in range(first, self.config.steps):
            yield self.finish(batches.batch(self.config, step, pictures=1))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with storage.served(tmp_path_factory.mktemp("objects")) as running:
        yield running


def trained(workdir, steps):
    config = config_lib.load(f"{NANO}:stage1", {"steps": str(steps)})
    loop.train(config, workdir)
    return files.Path(workdir) / "stage1"


def test_stopped_and_resumed_in_a_bucket_equals_straight_on_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "Pipeline", Pipeline)
    straight = trained(tmp_path, 4)
    workdir = f"{storage.BUCKET}/run"
    trained(workdir, 2)
    folder = trained(workdir, 4)
    ours, wanted = (run_folder.load(one) for one in (folder, straight))
    assert ours.step == wanted.step == 4
    for name, leaf in trees.named(wanted.params).items():
        np.testing.assert_array_equal(trees.named(ours.params)[name], leaf, err_msg=name)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    found = {file.name for file in folder.iterdir()}
    assert {"checkpoints", "frozen", "tokenizer", "config.json", "metrics.jsonl"} <= found
    assert sum(name.startswith("events.") for name in found) == 2  # one of each start
    assert files.read_json(folder / "config.json")["steps"] == 4
    assert not pathlib.Path("gs:").exists()


@pytest.mark.parametrize(
    ("workdir", "overrides"),
    [
        ("gs://absent/run", {}),
        ("runs/never-made", {"data.records": "gs://absent/records"}),
        ("runs/never-made", {"init.vlm": "gs://absent/vlm"}),
    ],
)
def test_a_bucket_that_does_not_exist_ends_the_run_before_it_begins(
    server, workdir, overrides, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = config_lib.load(f"{NANO}:stage1", overrides)
    with pytest.raises(InputError, match="gs://absent does not exist"):
        loop.train(config, workdir)
    assert not list(tmp_path.iterdir())
