"""Checkpoints in a bucket: kept, restored, set aside, and saved while the bucket is away."""

import contextlib
import os
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import copying, tools
from qk_jax.checkpoints.store import Store
from tests.base import storage


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with storage.served(tmp_path_factory.mktemp("objects")) as running:
        yield running


@pytest.fixture
def root(request, server):
    name = request.node.name.replace("[", "-").rstrip("]")  # Orbax globs
    return files.Path(storage.BUCKET) / name / "checkpoints"


def tree(step):
    return {"a": jnp.full((64, 33), step, jnp.float32), "b": jnp.arange(5.0) * step}


def save(root, *steps, **options):
    with contextlib.closing(Store(root, **options)) as store:
        for step in steps:
            store.save(step, {"params": tree(step)}, {"stage": "stage1"})


def restored(root, **options):
    with contextlib.closing(Store(root, **options)) as store:
        got = store.restore(lambda meta: {"params": tree(0)})
    np.testing.assert_array_equal(got.items["params"]["a"], tree(got.step)["a"])
    return got.step


def test_steps_are_kept_pruned_and_restored(root):
    save(root, 1, 2, 3, 4, keep=1, keep_every=2)
    with contextlib.closing(Store(root, write=False)) as store:
        assert store.steps() == [2, 4]
    assert restored(root, write=False) == 4
    assert {file.name for file in root.iterdir()} == {"2", "4"}


def test_a_connection_that_is_dead_is_given_up(root, server):
    """It hears the request and never answers; TensorStore alone waits for good."""
    code = f"from tests.checkpoints.test_buckets import save; save({str(root)!r}, 1)"
    limits = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2"}
    with storage.deaf(server, 3) as url:
        environment = os.environ | limits | {"TENSORSTORE_GCS_HTTP_URL": url}
        subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)
    assert restored(root) == 1
    assert os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == str(buckets.SILENCE_S)


def test_a_damaged_step_is_set_aside(root, server):
    save(root, 1, 2, keep=2)
    inside = f"{root}/2/params".removeprefix(f"{storage.BUCKET}/")
    data = [name for name in server.names(inside) if "/d/" in name]
    assert data
    for name in data:
        server.put(name, b"not what was written")
    assert restored(root, keep=2) == 1
    assert {file.name for file in root.iterdir()} == {"1", "damaged-2"}
    with contextlib.closing(Store(root, keep=2)) as store:
        assert store.steps() == [1]


def test_a_step_without_its_mark_was_never_finished(root, server):
    """A killed save leaves objects under the step's name, and no commit_success.txt."""
    save(root, 1, 2, keep=2)
    (root / "2" / "commit_success.txt").unlink()
    assert restored(root, keep=2) == 1


def test_a_save_waits_for_a_bucket_that_is_away(root, server):
    save(root, 1, keep=2)
    with contextlib.closing(Store(root, keep=2)) as store:
        server.stop()
        again = threading.Timer(6, server.start)
        again.start()
        store.save(2, {"params": tree(2)}, {"stage": "stage1"})
        store.wait()
        again.join()
    assert restored(root, write=False) == 2


@pytest.mark.parametrize("there", ["bucket", "disk"])
def test_a_stage_is_copied_from_a_bucket_and_looked_after_there(there, root, tmp_path):
    save(root, 1, 2, keep=2)
    (root.parent / "samples").mkdir()
    (root.parent / "samples/a.png").write_bytes(b"a picture")
    out = files.Path(tmp_path if there == "disk" else f"{storage.BUCKET}/{tmp_path.name}") / "safe"
    assert list(copying.copy(root.parent, out)) == ["step 1: copied", "step 2: copied"]
    assert list(copying.copy(root.parent, out))[0] == "step 1: was there"
    assert (out / "samples/a.png").read_bytes() == b"a picture"
    assert [whole for whole, _ in tools.verify(out)] == [True, True]
    lines = list(tools.listing(out))
    assert len(lines) == 3 and " 0.0 MB" in lines[1]
    assert list(tools.prune(out, keep=1))[0] == "step 1 was deleted"
    with contextlib.closing(Store(out / "checkpoints", write=False)) as store:
        assert store.steps() == [2]


def test_s3_is_refused_for_checkpoints_with_the_mend():
    with pytest.raises(InputError, match="s3://b/run: checkpoints .* mount the s3:// bucket"):
        Store("s3://b/run")
    with pytest.raises(InputError, match="s3://b/e: checkpoints and exported folders lie on"):
        with files.fresh_folder("s3://b/e", "config.json"):
            pass
