"""The programs of a stage: compiled at once before the first step, or taken from a folder."""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import pytest

from qk_jax import sharding
from qk_jax.base import files, trees
from qk_jax.base.errors import InputError
from qk_jax.data import pipeline, settings
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import ahead, programs
from qk_jax.training.padding import Padding

ROOT = pathlib.Path(__file__).parents[2]
NANO = pathlib.Path(__file__).parent / "nano.py"


def config_of(stage="stage1", **changes):
    overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return config_lib.load(f"{NANO}:{stage}", overrides)


def kinds(batch):
    """{name: (shape, dtype as JAX has it)} of a batch."""
    canonical = jax.dtypes.canonicalize_dtype
    return {name: (x.shape, canonical(x.dtype)) for name, x in trees.named(batch).items()}


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_every_batch_of_the_data_has_a_shape_that_is_known_before(stage):
    config = config_of(stage, data__max_groups=8, loss__region_weight=2.0, alignment__weight=0.1)
    plan = Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]))
    pad = Padding.from_config(config)
    data = pipeline.Pipeline(config, "train", prompts=plan.prompts, finish=pad)
    known = [kinds(pad.abstract(one)) for one in data.abstract()]
    assert all(kinds(data.batch(step)) in known for step in range(40))
    assert len(known) > 3
    anyhow = [
        kinds(pad.abstract(pipeline.abstract(config, plan.prompts, shape, plan.batch_sizes)))
        for shape in settings.shapes(config)
    ]
    assert all(one in anyhow for one in known)  # what is compiled ahead is enough


def test_a_config_has_only_the_shapes_of_its_tasks():
    numbers = lambda config: {len(shape) - 1 for shape in settings.shapes(config)}  # noqa: E731
    assert numbers(config_of("stage1")) == {0, 1}
    assert numbers(config_of("stage3")) == {0, 1, 2, 3}
    config = config_of("stage3", data__tasks__composition=0.0, data__tasks__text_to_image=0.0)
    assert numbers(config) == {1}
    assert (48, 80) in {shape[0] for shape in settings.shapes(config)}
    phases = config_of("stage1", data__curriculum="((2, ('32x32',)),)")
    assert (32, 32) in {shape[0] for shape in settings.shapes(phases)}


@pytest.mark.parametrize("at_once", [1, 2])
def test_programs_are_compiled_at_once(at_once, monkeypatch):
    config = config_of(programs__at_once=at_once)
    plan = Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]))
    pad = Padding.from_config(config)
    shapes = [(64, 64)], [(64, 64), (64, 64)], [(80, 48)]
    together, running = [], []

    def compiled(name, lowered, digests, skip):
        running.append(name)
        threading.Event().wait(0.5)
        together.append(len(running))
        running.remove(name)
        return programs.Program(name, None, 0.5, False)

    monkeypatch.setattr(programs, "_compiled", compiled)
    stage = programs.Programs(plan)
    monkeypatch.setattr(jax.stages.Traced, "lower", lambda self: None)
    examples = plan.batch_sizes
    batches = [
        pad.abstract(pipeline.abstract(config, plan.prompts, shape, examples)) for shape in shapes
    ]
    with jax.set_mesh(plan.mesh):
        assert all(map(stage.is_new, batches))
        names = [one.name for one in stage.compile(batches)]
        assert not any(map(stage.is_new, batches)) and not stage.compile(batches)
    assert sorted(names) == [
        "encoder 48x80", "encoder 64x64",
        "step with 0 condition pictures", "step with 1 condition picture",
    ]  # fmt: skip
    assert names[0].startswith("step")
    assert max(together) == at_once


# ---- a folder of programs -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a manifest of one file, and JAX's cache beside it."""
    cache, made = tmp_path / "cache", tmp_path / "made"
    cache.mkdir()
    monkeypatch.setattr(ahead, "_cache", lambda: files.Path(cache))
    (cache / "jit_step-1-cache").write_bytes(b"program")
    plan = plan_of(tmp_path)
    nothing = ahead.kept(files.Path(made), plan)
    assert not nothing.programs
    ahead.keep(files.Path(made), plan, {"abc": "step"}, nothing)
    (cache / "jit_step-1-cache").unlink()
    return made


def plan_of(tmp_path, **changes):
    config = config_of(programs__folder=tmp_path / "made", **changes)
    return Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]))


def changed(folder, part, name, value):
    """Sets a field of the manifest."""
    path = next(folder.glob("*.json"))
    manifest = json.loads(path.read_text())
    manifest[part][name] = value
    path.write_text(json.dumps(manifest))


def taken(tmp_path, monkeypatch, **changes):
    """(what is taken, names of the files in the cache, lines of the log)."""
    said = []
    monkeypatch.setattr(ahead.log, "warning", lambda text, *args: said.append(text % args))
    found = ahead.take(plan_of(tmp_path, **changes))
    return found.programs, [x.name for x in (tmp_path / "cache").iterdir()], said


def test_programs_of_the_same_devices_are_taken(folder, tmp_path, monkeypatch):
    assert taken(tmp_path, monkeypatch) == ({"abc": "step"}, ["jit_step-1-cache"], [])
    ahead.check(plan_of(tmp_path).config)


def test_what_is_kept_is_compiled_once_and_added_to(folder, tmp_path):
    plan, cache = plan_of(tmp_path), tmp_path / "cache"
    old = ahead.kept(files.Path(folder), plan)
    assert old.programs == {"abc": "step"}
    (cache / "jit_encode-2-cache").write_bytes(b"another")
    ahead.keep(files.Path(folder), plan, {"def": "encoder"}, old)
    new = ahead.kept(files.Path(folder), plan)
    assert set(new.programs) == {"abc", "def"} and len(new.digests) == 2
    (folder / "jit_step-1-cache").unlink()
    assert not ahead.kept(files.Path(folder), plan).programs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("the version of jax", "0.1.0"),
        ("the number of devices", "64"),
        ("the kind of devices", "TPU v5"),
        ("the mesh", "data=2"),
        ("XLA_FLAGS", "--xla_wish=true"),
        ("config.compiler of the step", "xla_wish=true"),
    ],
)
def test_programs_of_others_are_not_taken(name, value, folder, tmp_path, monkeypatch):
    changed(folder, "facts", name, value)
    found, copied, said = taken(tmp_path, monkeypatch)
    assert (found, copied, len(said)) == ({}, [], 1)
    assert "are not used" in said[0] and f"{name} '{value}', here it is" in said[0]


def test_other_flags_of_the_run_are_seen(folder, tmp_path, monkeypatch):
    found, copied, said = taken(tmp_path, monkeypatch, compiler__cpu="('xla_cpu_use_fusion=1',)")
    assert (found, copied) == ({}, [])
    assert "config.compiler of the encoder" in said[-1]


def test_damaged_files_are_not_taken(folder, tmp_path, monkeypatch):
    (folder / "jit_step-1-cache").write_bytes(b"progrbm")
    assert taken(tmp_path, monkeypatch)[1:] == (
        [], [f"{folder / 'jit_step-1-cache'} is not used: it is damaged"],
    )  # fmt: skip
    (folder / "jit_step-1-cache").unlink()
    assert "it cannot be read" in taken(tmp_path, monkeypatch)[2][0]
    for text in ("{", "[]", '{"facts": {}}', '{"facts": {"a": 1}, "programs": {}, "digests": {}}'):
        next(folder.glob("*.json")).write_text(text)
        found, copied, said = taken(tmp_path, monkeypatch)
        assert (found, copied) == ({}, []) and "is damaged" in said[0]


def test_a_manifest_cannot_name_files_of_other_folders(folder, tmp_path, monkeypatch):
    (tmp_path / "other").write_bytes(b"program")
    changed(folder, "digests", "../other", ahead._digest(b"program"))
    assert "is damaged" in taken(tmp_path, monkeypatch)[2][0]


def test_a_damaged_file_in_the_cache_is_mended(folder, tmp_path, monkeypatch):
    (tmp_path / "cache/jit_step-1-cache").write_bytes(b"prog")
    assert not taken(tmp_path, monkeypatch)[2]
    assert (tmp_path / "cache/jit_step-1-cache").read_bytes() == b"program"


def test_a_folder_without_programs_is_refused(tmp_path):
    for changes, words in (({}, "holds no programs"), ({"compilation_cache": "false"}, "needs")):
        with pytest.raises(InputError, match=words):
            ahead.check(config_of(programs__folder=tmp_path, **changes))


def test_what_had_to_be_compiled_is_said():
    found = ahead.Ahead("D", {"a": "step", "b": "encoder"})
    assert list(found.missed({"a": True, "b": True})) == []
    (line,) = found.missed({"a": True, "c": False})
    assert "1 of 2 programs are not in D" in line
    (line,) = found.missed({"a": True, "b": False})
    assert "D has encoder but JAX could not use it" in line


# ---- two processes ------------------------------------------------------------------------------

FEW = (
    f"--config={NANO}:stage1", "--config.data.sizes=64x64", "--config.steps=1",
    "--config.optimizer.warmup=0", "--config.data.tasks.reconstruction=0.0",
    "--config.data.tasks.transformation=0.0",
)  # fmt: skip


def command(*words):
    """stderr of a command in a process of its own, with one device."""
    env = {name: text for name, text in os.environ.items() if "CACHE" not in name}
    env |= {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *words], env=env, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def programs_in(folder):
    """Files of encoder and step in a folder of JAX's cache."""
    return {x.name for x in folder.iterdir() if re.match(r"jit_(encode|step)-.*-cache", x.name)}


def test_a_run_compiles_nothing_that_was_compiled_ahead(tmp_path):
    made, own = tmp_path / "made", f"--config.programs.folder={tmp_path / 'made'}"
    said = command("qk_jax.bench", "precompile", *FEW, "--out", str(made))
    assert re.search(r"2 programs in .*, 0 of them loaded", said)
    whole = programs_in(made)
    assert len(whole) == 2

    said = command("qk_jax.train", *FEW, own, "--workdir", str(tmp_path / "run"))
    assert re.search(r"2 programs in .*, 2 of them loaded", said)
    assert programs_in(tmp_path / "run/compilation_cache") == whole  # JAX keeps what it compiles
    times = re.search(r"the first step ended after ([\d.]+) s: (.*)", said)
    parts = dict(part.rsplit(" ", 1) for part in times[2].split(", "))
    assert {"import", "start", "index", "compile", "step"} <= parts.keys()
    assert sum(map(float, parts.values())) == pytest.approx(float(times[1]), rel=0.05, abs=0.6)

    for path in made.iterdir():
        if path.name.startswith("jit_step-"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    said = command("qk_jax.train", *FEW, own, "--workdir", str(tmp_path / "again"))
    assert said.count("is not used: it is damaged") == 1
    assert re.search(r"2 programs in .*, 1 of them loaded", said)
    assert "has step with 0 condition pictures but JAX could not use it" in said
