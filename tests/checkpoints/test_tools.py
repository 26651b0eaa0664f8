"""python -m qk_jax.checkpoints on a small stage folder: what a user sees, what is on disk."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qk_jax.checkpoints import __main__ as command
from qk_jax.checkpoints import run_folder, steps
from qk_jax.checkpoints.digest import describe
from qk_jax.checkpoints.store import Store

FROZEN = {"vae": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
PRINT = run_folder.fingerprint(describe(FROZEN))
META = {"stage": "stage1", "size": "nano", "config": {"steps": 3}, "revision": "abc"}


def params(step):
    draw = np.random.default_rng(step).normal
    return {
        "a": {"kernel": jnp.array(draw(size=(64, 32)), jnp.float32)},
        "half": jnp.array(draw(size=(16, 8)), jnp.bfloat16),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A stage folder with steps 1, 2, 3, as a run writes it."""
    folder = tmp_path_factory.mktemp("made") / "stage1"
    with contextlib.closing(Store(folder / "frozen")) as store:
        store.save(0, {"frozen": FROZEN}, META)
    with contextlib.closing(Store(folder / "checkpoints", keep=3)) as store:
        for step in (1, 2, 3):
            state = optax.adamw(1e-3).init(params(step))
            items = {"params": params(step), "optimizer": state, "ema": params(step + 10)}
            store.save(step, items, META | {"frozen": PRINT})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("one\n")
    return folder


@pytest.fixture
def stage(made, tmp_path):
    return shutil.copytree(made, tmp_path / "stage1")


def run(capsys, *args):
    """(status, lines printed, lines of stderr)."""
    status = 0
    try:
        command.main([str(arg) for arg in args])
    except SystemExit as end:
        status = end.code
    out = capsys.readouterr()
    return status, out.out.splitlines(), out.err.splitlines()


def flip(folder, item="params"):
    """One bit of every file with values of an item."""
    for file in (folder / item).rglob("d/*"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 4
        file.write_bytes(raw)


def held(folder):
    """{name: bytes} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read(folder, step, like):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    return Store(folder / "checkpoints", write=False).restore(lambda m: {"params": target}, step)


def test_ls_tells_every_step_and_what_was_set_aside(stage, capsys):
    (stage / "checkpoints/2").rename(stage / "checkpoints/damaged-2")
    (stage / "checkpoints/3/meta/metadata").write_text("{")
    for folder in (stage, stage / "checkpoints"):
        status, (_, one, three, aside), _ = run(capsys, "ls", folder)
        assert status == 0
        assert one.split()[0] == "1" and " MB  stage1 " in one
        assert one.endswith("ema, optimizer, params")
        assert three.split()[0] == "3" and "damaged: its metadata cannot be read" in three
        assert aside == "damaged-2  was found damaged and set aside"
    saved = steps.chosen(stage / "checkpoints", 1).saved()
    assert f"{saved:%Y-%m-%d %H:%M}" in one


@pytest.mark.parametrize(
    ("item", "leaf"), [("params", "params/"), ("optimizer", "optimizer/0/"), ("ema", "ema/")]
)
def test_verify_names_the_leaf_that_differs_and_sets_nothing_aside(stage, capsys, item, leaf):
    status, lines, _ = run(capsys, "verify", stage)
    assert status == 0
    assert lines == ["frozen: whole, 1 leaves", *(f"step {n}: whole, 9 leaves" for n in (1, 2, 3))]
    # values that TensorStore reads without complaint
    other = stage / "checkpoints/1" / item
    shutil.rmtree(stage / "checkpoints/2" / item)
    shutil.copytree(other, stage / "checkpoints/2" / item)
    before = held(stage)
    status, lines, _ = run(capsys, "verify", stage)
    if item == "optimizer":  # fresh: that of every step is the same
        assert status == 0
        return
    assert status == 1 and f"step 2: damaged: the digest of {leaf}" in lines[2]
    assert lines[3] == "step 3: whole, 9 leaves" and held(stage) == before
    assert run(capsys, "verify", stage, "--step", 3)[:2] == (0, [lines[0], lines[3]])


def test_verify_finds_flipped_bits_lost_files_and_another_frozen_tree(stage, capsys):
    flip(stage / "checkpoints/1")
    shutil.rmtree(stage / "checkpoints/2/ema")
    status, (frozen, one, two, three), err = run(capsys, "verify", stage)
    assert (status, err) == (1, [])
    assert "step 1: damaged: params cannot be read (" in one
    assert "step 2: damaged: ema cannot be read (" in two and "whole" in frozen + three
    shutil.rmtree(stage / "frozen")
    with contextlib.closing(Store(stage / "frozen")) as store:
        store.save(0, {"frozen": jax.tree.map(lambda x: x + 1, FROZEN)}, META)
    status, lines, _ = run(capsys, "verify", stage, "--step", 3)
    assert status == 1 and lines[1] == "step 3: it was trained with other frozen parameters"


def test_inspect_tells_leaves_norms_and_metadata(stage, capsys):
    _, lines, _ = run(capsys, "inspect", stage, "--step", 2, "--norms", "--config")
    text = "\n".join(lines)
    assert "stage     stage1" in lines and "step      2" in lines and '"steps": 3' in text
    assert "params: 2 leaves, 2,176 values" in lines
    (line,) = [line for line in lines if "64x32" in line][:1]
    name, dtype, shape, digest, norm = line.split()
    told = describe(params(2))["a/kernel"]
    assert (name, dtype, digest) == ("a/kernel", "float32", told["digest"])
    wanted = np.linalg.norm(np.asarray(params(2)["a"]["kernel"], np.float64))
    np.testing.assert_allclose(float(norm), wanted, rtol=1e-5)
    plain = run(capsys, "inspect", stage)[1]
    assert "step      3" in plain
    assert {len(line.split()) for line in plain if "64x32" in line} == {4}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep", 1], [3]),
        (["--keep", 2], [2, 3]),
        (["--keep", 1, "--keep-every", 2], [2, 3]),
        (["--keep", 5], [1, 2, 3]),
    ],
)
def test_prune(stage, capsys, options, left):
    before = held(stage)
    dry = run(capsys, "prune", stage, *options, "--dry-run")
    assert held(stage) == before
    status, lines, _ = run(capsys, "prune", stage, *options)
    assert status == dry[0] == 0
    assert [line.replace("would be", "was") for line in dry[1]] == lines
    assert lines[-1] == f"kept: {', '.join(map(str, left))}"
    assert Store(stage / "checkpoints", write=False).steps() == left
    assert sorted(p.name for p in (stage / "checkpoints").iterdir()) == list(map(str, left))


def test_prune_deletes_nothing_when_what_would_stay_is_damaged(stage, capsys):
    flip(stage / "checkpoints/3")
    before = held(stage)
    status, lines, (error,) = run(capsys, "prune", stage, "--keep", 1)
    assert status == 2 and not lines and held(stage) == before
    assert error.startswith(f"error: {stage}/checkpoints/3 is damaged: params cannot be read")
    assert run(capsys, "prune", stage, "--keep", 0)[0] == 2


def test_average_is_the_mean_and_another_stage_can_start_from_it(stage, capsys, tmp_path):
    out = tmp_path / "mean"
    status, lines, _ = run(capsys, "average", stage, "--steps", "3,1,2", "--out", out)
    assert status == 0
    assert lines[-1] == f"{out}: step 3, the mean of params of steps 1, 2, 3"
    got = read(out, None, params(1))
    assert got.step == 3 and got.meta["averaged"] == [1, 2, 3] and got.meta["stage"] == "stage1"
    assert set(got.meta["leaves"]) == {"params"} and got.meta["frozen"] == PRINT
    for name in ("a", "half"):
        leaf = [jax.tree.leaves(params(n)[name])[0] for n in (1, 2, 3)]
        want = np.mean([np.asarray(x, np.float32) for x in leaf], axis=0, dtype=np.float32)
        mine = jax.tree.leaves(got.items["params"][name])[0]
        assert mine.dtype == leaf[0].dtype
        np.testing.assert_allclose(mine, want.astype(mine.dtype), rtol=1e-6, atol=1e-7)
    assert (out / "tokenizer/tokenizer.json").is_file() and (out / "config.json").is_file()
    assert not (out / "metrics.jsonl").exists()
    assert run(capsys, "verify", out)[0] == 0
    ema = tmp_path / "ema"
    assert run(capsys, "average", stage, "--steps", "1,2", "--out", ema, "--ema")[0] == 0
    mine = read(ema, 2, params(1)).items["params"]["a"]["kernel"]
    want = (params(11)["a"]["kernel"] + params(12)["a"]["kernel"]) / 2
    np.testing.assert_allclose(mine, want, rtol=1e-6, atol=1e-7)


def test_what_has_no_mean(stage, capsys, tmp_path):
    def refused(words, *args):
        status, _, (error,) = run(capsys, "average", *args)
        assert status == 2 and words in error, error
        assert not list(tmp_path.glob(".*.part"))

    out = ["--out", tmp_path / "mean"]
    refused("name two steps or more", stage, "--steps", "2", *out)
    refused("holds no step 7; it holds [1, 2, 3]", stage, "--steps", "2,7", *out)
    refused("--steps is 'a', expected step numbers", stage, "--steps", "a", *out)
    refused("exists and is no empty folder", stage, "--steps", "1,2", "--out", stage)
    refused("give the folder of a stage", stage / "tokenizer", "--steps", "1,2", *out)
    with contextlib.closing(Store(stage / "checkpoints", keep=9)) as store:
        store.save(4, {"params": params(4)}, META | {"frozen": "another"})
        small = jax.tree.map(lambda x: x[:1], params(5))
        store.save(5, {"params": small}, META | {"frozen": PRINT})
    refused("steps 1 and 4 differ in frozen parameters", stage, "--steps", "1,4", *out)
    refused("steps 1 and 5 differ in ", stage, "--steps", "1,5", *out)
    refused("step 4 keeps no ema; it keeps params", stage, "--steps", "3,4", "--ema", *out)
    flip(stage / "checkpoints/2")
    refused("params cannot be read", stage, "--steps", "1,2", *out)


def test_a_copy_is_whole_and_copying_again_changes_nothing(stage, capsys, tmp_path):
    out = tmp_path / "other/stage1"
    (stage / "checkpoints/damaged-7").mkdir()
    (stage / "checkpoints/8.orbax-checkpoint-tmp").mkdir()
    status, lines, _ = run(capsys, "copy", stage, "--out", out)
    assert status == 0
    assert lines == ["frozen: copied", *(f"step {n}: copied" for n in (1, 2, 3))]
    assert held(out) == held(stage)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["1", "2", "3"]
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = run(capsys, "copy", stage, "--out", out)[1]
    assert again == [line.replace("copied", "was there") for line in lines]
    assert times == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    flip(out / "checkpoints/2")
    (stage / "metrics.jsonl").write_text("one\ntwo\n")
    third = run(capsys, "copy", stage, "--out", out)[1]
    assert third[2].startswith("step 2: copied again, what was there was damaged: params")
    assert held(out) == held(stage)


def test_one_step_is_copied_with_what_it_needs(stage, capsys, tmp_path):
    assert run(capsys, "copy", stage, "--out", tmp_path / "one", "--step", 2)[0] == 0
    kept = {name.split("/")[0] for name in held(tmp_path / "one")}
    assert kept == {"checkpoints", "frozen", "tokenizer", "config.json"}
    assert read(tmp_path / "one", None, params(1)).step == 2


def test_copies_that_are_refused_leave_nothing_half_written(stage, capsys, tmp_path):
    out = tmp_path / "out"
    flip(stage / "checkpoints/2")
    status, _, (error,) = run(capsys, "copy", stage, "--out", out)
    assert status == 2 and error.startswith(f"error: the copy of {stage}/checkpoints/2 is damaged")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["1"]
    assert "lies in" in run(capsys, "copy", stage, "--out", stage / "x")[2][0]
    with contextlib.closing(Store(tmp_path / "run/frozen")) as store:
        store.save(0, {"frozen": jax.tree.map(lambda x: x + 1, FROZEN)}, META)
    before = held(tmp_path / "run")
    error = run(capsys, "copy", stage, "--out", tmp_path / "run")[2][0]
    assert "is a step of another run" in error and held(tmp_path / "run") == before


def test_a_folder_without_checkpoints_is_named(tmp_path, capsys):
    for verb in ("ls", "verify", "inspect"):
        status, _, (error,) = run(capsys, verb, tmp_path)
        assert status == 2
        assert error == (
            f"error: {tmp_path} holds no checkpoints; give the folder of a stage, W/stage3"
        )


def test_leaves_are_read_in_groups(stage, monkeypatch):
    """However small the groups are, all leaves come, each once."""
    step = steps.chosen(stage / "checkpoints", 3)
    meta = step.meta()
    want = dict(steps.leaves(step, meta, "optimizer"))
    monkeypatch.setattr(steps, "GROUP_BYTES", 1000)
    reads = []
    read_group = steps._read
    monkeypatch.setattr(steps, "_read", lambda *args: reads.append(args[3]) or read_group(*args))
    got = list(steps.leaves(step, meta, "optimizer"))
    assert [name for name, _ in got] == list(want) and len(reads) > 2
    for name, leaf in got:
        np.testing.assert_array_equal(leaf, want[name])
