"""Training on rows that the frozen towers made before equals training that runs the towers."""

import json
import pathlib
import pickle
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from qk_jax.base import trees
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import pipeline
from qk_jax.data.__main__ import main
from qk_jax.data.cache import MOMENTS, VISION, Cache, Writer, digest_of
from qk_jax.data.example import TASKS
from qk_jax.data.synthesis import tasks
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import plan as plan_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import cached, flops, loop, start
from qk_jax.training.objectives.flow_matching import loss_fn
from qk_jax.training.padding import Padding
from tests.data import written
from tests.training import batches

NANO = pathlib.Path(__file__).parent / "nano.py"


def config_of(stage, records, **changes):
    fields = {"data.records": str(records), "data.sizes": "64x64,80x48", "steps": "3"}
    changes = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return config_lib.load(f"{NANO}:{stage}", fields | changes)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A small set of every task, so that all of it is encoded in seconds."""
    folder = tmp_path_factory.mktemp("records")
    for split in ("train", "validation"):
        some = [x for task in TASKS for x in tasks.examples(split, task, 12)]
        written.write(folder / f"{split}.array_record", some)
    return folder


@pytest.fixture(scope="module", params=["stage1", "stage3"])
def made(request, records, tmp_path_factory):
    """(config, plan, parameters, folder of rows) of a stage with fresh towers."""
    config = config_of(request.param, records)
    plan = Plan.build(config)
    with jax.set_mesh(plan.mesh):
        fresh = plan_lib.fresh(plan, jax.random.key(0), tuple(plan.stage.parts))
    out = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "parameters", lambda *args, only: {x: fresh[x] for x in only})
        patch.setattr(start, "inherit", lambda *args: None)
        said = cached.encode(config, out, tmp_path_factory.mktemp("none"), "0/1")
        again = cached.encode(config, out, tmp_path_factory.mktemp("none"), "0/1")
    assert "rows made" in said and "0 of moments, 0 of vision" in again
    return config, plan, fresh, out


def test_loss_and_gradients_are_those_of_the_towers(made):
    config, plan, params, folder = made
    data = pipeline.Pipeline(config, "train", 0, 1, plan.prompts)
    run, kept = (
        Padding.from_config(config),
        cached.CachedPadding(Padding.from_config(config), Cache(folder)),
    )
    loss, seen = loss_fn(plan), set()
    trained = trees.split(params, plan.stage.rules)[0]
    frozen = trees.split(params, plan.stage.rules)[1]

    def value(trained, batch):
        values, aux = loss(trees.join(trained, frozen), batch, jax.random.key(1))
        return values.mean(), aux["flow"]

    both = jax.jit(jax.value_and_grad(value, has_aux=True))
    for step in range(6):
        batch = data.batch(step)
        if (count := len(batch["conditions"])) in seen:
            continue
        seen.add(count)
        with jax.set_mesh(plan.mesh):
            towers = batches.encoded(plan, frozen, batch, run)
            rows = kept(batch)
            assert rows["target"].size == 0 and rows["pixel_values"].size * count == 0
            rows = {name: x for name, x in rows.items() if name not in ("target", "conditions")}
            (a, flow), grads = both(trained, towers)
            (b, other), gradients = both(trained, jax.device_put(rows, plan.batch_sharding))
        np.testing.assert_allclose(flow, other, rtol=1e-5)
        assert abs(a - b) < 1e-5 * abs(a)
        wanted = trees.flatten(grads)
        for name, leaf in trees.flatten(gradients).items():
            scale = np.abs(wanted[name]).max() + 1e-6
            np.testing.assert_allclose(leaf / scale, wanted[name] / scale, atol=1e-4, err_msg=name)
    assert len(seen) > 1


def test_shapes_are_known_before_anything_is_read(made):
    config, plan, _, folder = made
    kept = cached.CachedPadding(Padding.from_config(config), Cache(folder))
    data = pipeline.Pipeline(config, "train", 0, 1, plan.prompts)
    kinds = lambda one: {name: (x.shape, str(x.dtype)) for name, x in trees.named(one).items()}  # noqa: E731
    canonical = lambda x: np.asarray(x).astype(jax.dtypes.canonicalize_dtype(x.dtype))  # noqa: E731
    known = [kinds(kept.abstract(one)) for one in data.abstract()]
    for step in range(4):
        assert kinds(jax.tree.map(canonical, kept(data.batch(step)))) in known


def test_towers_that_do_not_run_are_no_work(made):
    config, plan, _, folder = made
    data = pipeline.Pipeline(config, "train", 0, 1, plan.prompts)
    kept = cached.CachedPadding(Padding.from_config(config), Cache(folder))
    for batch in data.abstract():
        run = flops.by_tower_of_step(plan, Padding.from_config(config).abstract(batch))
        rows = flops.by_tower_of_step(plan, kept.abstract(batch))
        assert run["vae"] > 0 == rows["vae"]
        assert rows["vision"] == 0 <= run["vision"] and rows["mmdit"] == run["mmdit"]


def test_rows_of_other_towers_are_refused(made):
    config, plan, params, folder = made
    kept = cached.CachedPadding(Padding.from_config(config), Cache(folder))
    frozen = {name: params[name] for name in ("vae", "vlm")}
    cached.check(plan, kept, frozen)
    cached.check(plan, Padding.from_config(config), {})  # without a cache there is nothing to check
    for part, kind in (("vae", MOMENTS), ("vlm", VISION)):
        changed = {**frozen, part: jax.tree.map(lambda x: x + 1, frozen[part])}
        with pytest.raises(InputError, match=f"has the {kind} of other weights"):
            cached.check(plan, kept, changed)
    with pytest.raises(InputError, match="what other weights or settings made"):
        Writer(folder, {MOMENTS: "other"}, {MOMENTS: np.float32})


def test_a_whole_run_is_the_same(records, tmp_path, monkeypatch):
    """By the command line; a run with rows takes the same steps, and goes on from a run without."""
    monkeypatch.chdir(tmp_path)
    fields = [f"--config.{name}={value}" for name, value in {
        "data.records": records, "data.sizes": "64x64", "data.max_groups": 1,
        "data.tasks.transformation": 0, "data.tasks.text_to_image": 0,
    }.items()]  # fmt: skip
    main(["encode", "--config", f"{NANO}:stage1", "--out", "rows", *fields])
    losses = []
    for name, more in (("towers", {}), ("rows", {"data.cache": "rows"})):
        overrides = dict(x.removeprefix("--config.").split("=", 1) for x in fields) | more
        loop.train(config_lib.load(f"{NANO}:stage1", overrides), tmp_path / name)
        lines = (tmp_path / name / "stage1/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(x)["loss"] for x in lines if "loss" in json.loads(x)])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert len(losses[0]) == 4


def test_parts_share_the_examples_and_bad_records_are_left_out():
    def read(number):
        if number == 3:
            raise BadRecord("undecodable", "number 3")
        return SimpleNamespace(target=picture(number), pictures=[picture(100 + number)])

    source = type("Source", (), {"__getitem__": lambda self, number: read(number)})()
    groups = [SimpleNamespace(numbers=np.arange(0, 4)), SimpleNamespace(numbers=np.arange(4, 9))]
    pipe = SimpleNamespace(
        loader=SimpleNamespace(sources=[source, source]), groups=groups,
        config={"model": {"condition_latents": True}, "data": {"threads": 1}},
    )  # fmt: skip
    whole = list(cached._shown(pipe, 0, 1, True))
    assert [len(x) for x in whole] == [2, 2, 2, 0, 2, 2, 2, 2, 2]
    assert whole[8][0].digest == digest_of(picture(8)) and whole[8][0].kinds == (MOMENTS,)
    assert whole[8][1].kinds == (MOMENTS, VISION)
    parts = [x for part in range(2) for x in cached._shown(pipe, part, 2, False)]
    digests = lambda found: sorted(x.digest for one in found for x in one)  # noqa: E731
    assert digests(parts) == digests(whole) and parts[0][1].kinds == (MOMENTS,)


def picture(seed, size=(32, 48)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def rows_of(folder, count=5, part=(0, 1)):
    writer = Writer(folder, {MOMENTS: "a"}, {MOMENTS: np.float32}, part)
    pictures = [picture(seed) for seed in range(count)]
    rows = np.random.default_rng(9).standard_normal((count, 2, 3)).astype(np.float32)
    writer.add(MOMENTS, [digest_of(x) for x in pictures], rows)
    writer.close()
    return pictures, rows


def test_rows_come_back_by_the_pixels(tmp_path):
    pictures, rows = rows_of(tmp_path)
    found = pickle.loads(pickle.dumps(Cache(tmp_path)))
    for one, row in zip(pictures, rows, strict=True):
        np.testing.assert_array_equal(found.get(MOMENTS, one.copy()), row)
    assert len(found) == 5
    changed = pictures[0].copy()
    changed[0, 0, 0] ^= 1
    for other in (changed, pictures[0].reshape(48, 32, 3), picture(99)):
        with pytest.raises(InputError, match="lacks the moments of a picture of"):
            found.get(MOMENTS, other)


def test_several_writers_share_a_folder(tmp_path):
    rows_of(tmp_path, 3, (0, 2))
    pictures, rows = rows_of(tmp_path, 5, (1, 2))
    assert len(Cache(tmp_path)) == 8
    Cache(tmp_path).check_whole()
    np.testing.assert_array_equal(Cache(tmp_path).get(MOMENTS, pictures[4]), rows[4])


def test_what_is_half_made_is_refused(tmp_path, records):
    """A run says so before its weights are read, not at the first picture that is missing."""
    Writer(tmp_path, {MOMENTS: "a"}, {MOMENTS: np.float32})
    with pytest.raises(InputError, match="is half made: of its parts 0/1 did not come to the end"):
        cached.padding_of(config_of("stage1", records, data__cache=tmp_path))
    rows_of(tmp_path)
    Cache(tmp_path).check_whole()
    rows_of(tmp_path, 5, (1, 3))
    with pytest.raises(InputError, match="of its parts 0/3, 2/3 did not"):
        Cache(tmp_path).check_whole()


def test_a_file_that_was_deleted_is_made_again_beside_the_others(tmp_path):
    for _ in range(3):
        rows_of(tmp_path)
    first = sorted(tmp_path.glob("moments-*-00000*.npy"))
    assert len(first) == 2
    for path in first:
        path.unlink()
    rows_of(tmp_path)
    numbers = {x.name.split("-")[-1][:5] for x in tmp_path.glob("moments-*.npy")}
    assert numbers == {"00001", "00002", "00003"} and len(Cache(tmp_path)) == 15


def test_a_damaged_row_is_never_used(tmp_path):
    pictures, _ = rows_of(tmp_path)
    (path,) = [x for x in tmp_path.glob("moments-*.npy") if "index" not in x.name]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    with pytest.raises(InputError, match="row 4 of .* is damaged"):
        Cache(tmp_path).get(MOMENTS, pictures[4])
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="missing or damaged"):
        Cache(tmp_path).get(MOMENTS, pictures[4])


def test_bfloat16_keeps_its_bits(tmp_path):
    rows = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    writer = Writer(tmp_path, {VISION: "a"}, {VISION: ml_dtypes.bfloat16})
    writer.add(VISION, [digest_of(picture(x)) for x in range(2)], rows)
    writer.close()
    found = Cache(tmp_path).get(VISION, picture(1))
    assert found.dtype == ml_dtypes.bfloat16 and found.tolist() == [3, 4, 5]


def test_what_is_no_cache_and_no_part(tmp_path, records):
    with pytest.raises(InputError, match="holds no encoded pictures"):
        cached.padding_of(config_of("stage1", records, data__cache=tmp_path))
    for part in ("2/2", "1", "a/b", "-1/2"):
        with pytest.raises(InputError, match="--part is"):
            cached.encode(config_of("stage1", records), tmp_path, tmp_path, part)
