"""Checkpoints that notice what Orbax does not, and fall back to what is whole."""

import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import digest
from qk_jax.checkpoints.digest import describe
from qk_jax.checkpoints.store import Store

META = {"stage": "stage1", "size": "nano", "config": {}}


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "a": {"kernel": draw(64, 32), "half": draw(16, 8).astype(jnp.bfloat16)},
        "count": jnp.int32(seed),
    }


def whole(meta):
    del meta
    return {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    """Steps 1, 2, 3 on disk."""
    store = Store(tmp_path / "c", keep=3)
    for step in (1, 2, 3):
        store.save(step, {"params": tree(step)}, META)
    store.close()
    return tmp_path / "c"


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_restores_the_newest_and_any_step_asked_for(saved):
    store = Store(saved, write=False)
    got = store.restore(whole)
    assert got.step == 3 and got.meta["stage"] == "stage1" and set(got.items) == {"params"}
    equal(got.items["params"], tree(3))
    equal(store.restore(whole, step=2).items["params"], tree(2))


def test_keeps_the_newest_and_the_spaced_ones(tmp_path):
    store = Store(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        store.save(step, {"params": {"x": jnp.ones(3)}}, META)
    store.wait()
    assert store.steps() == [4, 6, 7]
    store.close()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "bool"])
def test_digest_sees_every_single_bit(kind):
    x = np.random.default_rng(0).normal(size=(7, 5)) * 3
    x = jnp.array(x > 0) if kind == "bool" else jnp.array(x, kind)
    digest = describe({"x": x})["x"]["digest"]
    assert len(digest) == 16
    raw = np.array(x)
    for place in range(0, raw.nbytes, 3):
        for bit in (0,) if kind == "bool" else range(8):
            changed = raw.copy()
            changed.view(np.uint8).reshape(-1)[place] ^= 1 << bit
            assert describe({"x": jnp.array(changed)})["x"]["digest"] != digest
    moved = np.roll(raw, 1)
    assert describe({"x": jnp.array(moved)})["x"]["digest"] != digest


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int32", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2)])
def test_digest_on_the_host_is_that_on_the_device(kind, shape, monkeypatch):
    x = {"x": jnp.array(np.random.default_rng(1).normal(size=shape) * 9, kind)}
    want = describe(x)
    monkeypatch.setattr(digest, "HOST_SIZE", -1)
    assert describe(x) == want


def test_digest_and_values_do_not_depend_on_the_mesh(tmp_path):
    on = sharding.build_mesh({"fsdp": 4, "tensor": 2})
    place = NamedSharding(on, P("fsdp", "tensor"))
    x = tree(5)["a"]["kernel"]
    spread = jax.device_put(x, place)
    assert describe({"x": x}) == describe({"x": spread})
    store = Store(tmp_path)
    store.save(1, {"params": {"x": spread}}, META)
    other = NamedSharding(sharding.build_mesh({"data": 2, "fsdp": 4}), P(None, "fsdp"))
    wanted = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other)}
    got = store.restore(lambda meta: {"params": wanted})
    store.close()
    assert got.items["params"]["x"].sharding == other
    np.testing.assert_array_equal(got.items["params"]["x"], x)


def flip(folder, place=0.5):
    file = largest(folder / "params" / "ocdbt.process_0")
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 4
    file.write_bytes(data)


def cut(folder):
    file = largest(folder / "params" / "ocdbt.process_0")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def no_metadata(folder):
    next((folder / "meta").rglob("metadata")).write_text("{")


def no_digest(folder):
    """One bit, after which the metadata seems to have no digest."""
    file = next((folder / "meta").rglob("metadata"))
    head, _, tail = file.read_text().rpartition('"digest"')
    file.write_text(f'{head}"digEst"{tail}')
    assert "digEst" in json.loads(file.read_text())


@pytest.mark.parametrize("damage", [flip, cut, empty, no_metadata, no_digest])
def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(saved, damage, caplog):
    damage(saved / "3")
    reader = Store(saved, write=False)
    assert reader.restore(whole).step == 2
    assert (saved / "3").is_dir()  # a reader changes nothing
    store = Store(saved, keep=3)
    got = store.restore(whole)
    assert got.step == 2
    equal(got.items["params"], tree(2))
    assert "step 3 is damaged" in caplog.text
    assert store.steps() == [1, 2] and (saved / "damaged-3").is_dir()
    store.save(3, {"params": tree(3)}, META)  # the run comes by again
    store.close()
    equal(Store(saved, write=False).restore(whole).items["params"], tree(3))


def test_200_flipped_bits_anywhere_in_a_checkpoint_never_pass(tmp_path):
    """Each is found, or has no effect on arrays and metadata: one bit of any file of a step."""
    rng = random.Random(0)
    store = Store(tmp_path)
    store.save(1, {"params": tree(1)}, META)
    store.close()
    wanted = Store(tmp_path, write=False).restore(whole)
    files = sorted(x for x in (tmp_path / "1").rglob("*") if x.is_file() and x.stat().st_size)
    outcomes = collections.Counter()
    for number in range(200):
        file = files[number % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        try:
            got = Store(tmp_path, write=False).restore(whole)
        except InputError as error:
            assert "damaged" in str(error)
            outcomes["found"] += 1
        else:
            equal(got.items["params"], wanted.items["params"])
            assert got.meta == wanted.meta, file
            outcomes["without effect"] += 1
        file.write_bytes(good)
    assert outcomes.total() == 200 and outcomes["found"] > 50, outcomes


def test_nothing_whole_is_an_error_and_never_a_fresh_start(saved):
    for step in (1, 2, 3):
        cut(saved / str(step))
    store = Store(saved)
    with pytest.raises(InputError, match="no whole checkpoint"):
        store.restore(whole)
    assert not store.is_new()
    with pytest.raises(InputError, match="no whole checkpoint"):
        store.restore(whole)
    assert store.steps() == [1, 2, 3]  # where all seem damaged, it may be the disk
    store.close()


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("Gloo: closed")])
def test_steps_stay_where_memory_or_another_process_is_at_fault(saved, error, monkeypatch):
    """A peer that was killed while all restored once made the others set aside every good step."""
    store = Store(saved, keep=3)

    def restore(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
        with pytest.raises(type(error)):
            store.restore(whole)
    assert store.steps() == [1, 2, 3] and not list(saved.glob("damaged-*"))
    assert store.restore(whole).step == 3
    store.close()


def test_an_empty_folder_and_a_missing_one(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Store(tmp_path / "none", write=False)
    store = Store(tmp_path / "new")
    assert store.is_new()
    with pytest.raises(InputError, match="holds no checkpoint"):
        store.restore(whole)
    store.close()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p["a"].pop("half"), "has unknown params: a/half"),
        (lambda p: p["a"].update(more=p["count"]), "lacks params: a/more"),
        (lambda p: p["a"].update(kernel=p["a"]["half"]), "has other params: a/kernel"),
    ],
)
def test_what_cannot_be_restored_in_full_is_named(saved, change, words):
    def other(meta):
        wanted = whole(meta)
        change(wanted["params"])
        return wanted

    store = Store(saved)
    with pytest.raises(InputError, match=words):
        store.restore(other)
    assert store.steps() == [1, 2, 3]  # a mistaken reader damages nothing
    store.close()


KILLED = """
import sys, jax.numpy as jnp, numpy as np
from qk_jax.checkpoints.store import Store
store = Store(sys.argv[1], keep=2)
step = store.steps()[-1] if store.steps() else 0
while True:
    step += 1
    tree = {"x": jnp.full((1024, 1024), float(step)), "step": jnp.int32(step)}
    store.save(step, {"params": tree}, {"stage": "stage1", "size": "nano", "config": {}})
    print(step, flush=True)
"""


def test_kill_minus_9_while_saving_leaves_a_whole_step(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    wanted = {
        "x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    last = 0
    for delay in (0.02, 0.1):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "c")],
            stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        for _ in range(3):
            child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        store = Store(tmp_path / "c", keep=2)
        got = store.restore(lambda meta: {"params": wanted})
        store.close()
        assert got.step > last
        np.testing.assert_array_equal(got.items["params"]["x"], float(got.step))
        assert not list((tmp_path / "c").glob("*tmp*"))
        last = got.step


def test_metadata_is_readable_json(saved):
    text = next((saved / "3" / "meta").rglob("metadata")).read_text()
    meta = json.loads(text)
    assert meta["step"] == 3 and meta["leaves"]["params"]["a/kernel"]["shape"] == [64, 32]
