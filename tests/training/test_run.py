"""Three stages of a nano model, straight and interrupted: the same bits, and what stays frozen."""

import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time

import batches
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qk_jax.base import runtime, trees
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import run_folder
from qk_jax.checkpoints.store import Store
from qk_jax.data import pipeline, prompts
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import evals, loop, programs, saving, start

NANO = pathlib.Path(__file__).parent / "nano.py"
STAGES = ("stage1", "stage2", "stage3")


class Pipeline(batches.Pipeline):
    """One picture at every step, so that a stage has one program, whatever the sizes."""

    def batches(self, first):
        for step in range(first, self.config.steps):
            size = ((64, 64), (80, 48))[step % 2]
            yield self.finish(batches.batch(self.config, step, pictures=1, size=size))


def config_of(name, **changes):
    overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return config_lib.load(f"{NANO}:{name}", overrides)


class Reuse(programs.Programs):
    """Programs of one stage, kept between the runs of these tests."""

    kept: dict = {}

    def __init__(self, plan):
        super().__init__(plan)
        self._programs = self.kept.setdefault((plan.stage.name, plan.config.optimizer.lr), {})


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(pipeline, "Pipeline", Pipeline)
    monkeypatch.setattr(programs, "Programs", Reuse)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A work directory in which all three stages ran without a break."""
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Pipeline", Pipeline)
        patch.setattr(programs, "Programs", Reuse)
        for stage in STAGES:
            loop.train(config_of(stage), workdir)
    yield workdir
    Reuse.kept.clear()
    jax.clear_caches()


def copied(straight, tmp_path, stage):
    """A work directory with the stages before `stage`."""
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(straight / before, tmp_path / before)
    return tmp_path


def last(folder):
    """Everything in the newest step, as numpy by name."""
    plan = Plan.build(config_of(folder.name))
    items = {"params": plan.params, "ema": plan.params}
    got = Store(folder / "checkpoints", write=False).restore(lambda meta: items)
    meta = got.meta["leaves"]["optimizer"]
    return got.step, trees.named(got.items), {n: leaf["digest"] for n, leaf in meta.items()}


def assert_same(a, b):
    (step, arrays, moments), (other_step, other, other_moments) = last(a), last(b)
    assert step == other_step and arrays.keys() == other.keys() and moments == other_moments
    for name, leaf in arrays.items():
        np.testing.assert_array_equal(leaf, other[name], err_msg=name)


class Interrupt(evals.Evaluator):
    """Sends SIGTERM after step 2."""

    def run(self, step, params, frozen):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_equals_straight_bit_for_bit(stage, straight, tmp_path, monkeypatch):
    monkeypatch.setitem(evals.EVALUATORS, "sheets", Interrupt)
    workdir = copied(straight, tmp_path, stage)
    config = config_of(stage, evals__sheets__every=2, checkpoint__every=100)
    said: list = []
    monkeypatch.setattr(loop.log, "info", lambda text, *args: said.append(text % args))
    with pytest.raises(SystemExit) as stop:
        loop.train(config, workdir)
    assert stop.value.code == loop.PREEMPTED
    assert re.match(r"step 3 was saved in \d+\.\d s; run the same command", said[-1])
    assert Store(workdir / stage / "checkpoints", write=False).steps() == [3]
    loop.train(config_of(stage), workdir)
    assert_same(workdir / stage, straight / stage)
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    wanted = (straight / stage / "metrics.jsonl").read_text().splitlines()
    ours = re.compile(', "(pictures_per|goodput).*')  # what a clock says
    strip = lambda rows: [ours.sub("", r) for r in rows if '"train"' in r]  # noqa: E731
    assert strip(lines) == strip(wanted)


def test_ctrl_c_saves_too_and_the_bar_says_what_lasts(straight, tmp_path, monkeypatch, capfd):
    class Press(evals.Evaluator):
        phase = "painting"

        def run(self, step, params, frozen):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setitem(evals.EVALUATORS, "sheets", Press)
    config = config_of("stage1", evals__sheets__every=2, evals__loss__every=2)
    with pytest.raises(SystemExit) as stop, runtime.answered(pytest.fail):
        loop.train(config, tmp_path)
    assert stop.value.code == loop.INTERRUPTED == 130
    assert Store(tmp_path / "stage1" / "checkpoints", write=False).steps()[-1] == 3
    told = capfd.readouterr().err
    assert told.count(runtime.STOPPING) == 1
    words = [state for state, _ in itertools.groupby(re.findall(r"\r(stage1[^:]*):", told))]
    for name in ("compiling", "validating", "painting", "saving"):
        at = words.index(f"stage1, {name}")
        assert words[at + 1] == "stage1"  # and no longer
    loop.train(config_of("stage1"), tmp_path)
    assert_same(tmp_path / "stage1", straight / "stage1")


def test_over_several_processes_ctrl_c_is_the_signal_that_all_hear_of(monkeypatch):
    """Of one alone: the others would wait for it for ever."""
    sent = []
    monkeypatch.setattr(loop.distributed, "several", lambda: True)
    trainer = object.__new__(loop.Trainer)
    with trainer.signals():
        monkeypatch.setattr(loop.os, "kill", lambda pid, number: sent.append((pid, number)))
        signal.raise_signal(signal.SIGINT)
    assert sent == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_leaves_keep_their_bits_and_trained_ones_move(stage, straight):
    config = config_of(stage)
    plan = Plan.build(config)
    before = trees.named(start.parameters(plan, straight))
    loaded = run_folder.load(straight / stage, ema=False)
    after = trees.named(loaded.params)
    assert before.keys() == after.keys() and loaded.step == 4
    rules = plan.stage.rules
    for name, leaf in after.items():
        same = np.array_equal(before[name], leaf)
        frozen = rules[trees.first_match(name, rules)][1] == trees.FREEZE
        if frozen:
            assert same, f"{name} is frozen and moved"
        elif leaf.ndim > 1 and not any(part in name for part in ("to_add_out", "txt_mlp")):
            assert not same, f"{name} is trained and did not move"
    assert {n for n in after if n.startswith("vlm/")} == {n for n in before if n.startswith("vlm/")}


def test_a_stage_folder_carries_its_tokenizer(straight, tmp_path):
    """A checkpoint that is moved, or whose tokenizer is gone from where it was, still paints."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(straight / "stage2", moved)
    found = run_folder.load(moved).plan.config.data.tokenizer
    assert found == str(moved / "tokenizer")
    config = config_of("stage3", data__tokenizer="")
    start.inherit(config, straight)
    ours = Plan.build(config).prompts.tokenizer.get_vocab()
    assert ours == prompts.load_tokenizer(found).get_vocab()
    assert config.data.tokenizer == str(straight / "stage3" / "tokenizer")  # begun, so its own


def test_merging_the_adapter_at_the_border_changes_no_output(straight):
    old = run_folder.load(straight / "stage1", ema=True)
    config = config_of("stage2")
    plan, model = Plan.build(config), old.plan.model
    new = start.parameters(plan, straight)
    moved = trees.named(old.params["lora"]["vlm"])
    assert any(np.any(np.asarray(leaf)) for name, leaf in moved.items() if "lora_b" in name)
    assert "lora" not in new
    batch = batches.batch(config, 5, pictures=1)
    want = jax.jit(model.context)(old.params, batch)
    got = jax.jit(plan.model.context)(new, batch)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5, rtol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])
    plain = jax.jit(model.context)({k: v for k, v in old.params.items() if k != "lora"}, batch)
    assert float(jnp.max(jnp.abs(plain[0] - want[0]))) > 1e-3


def test_a_flipped_bit_in_the_newest_checkpoint_costs_only_its_steps(straight, tmp_path):
    shutil.copytree(straight / "stage1", tmp_path / "stage1")
    shutil.rmtree(tmp_path / "stage1/frozen")  # lost too: it is made again from the start
    for file in (tmp_path / "stage1/checkpoints/4/params").rglob("d/*"):  # Orbax keeps copies
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    loop.train(config_of("stage1"), tmp_path)
    assert (tmp_path / "stage1/checkpoints/damaged-4").is_dir()
    assert_same(tmp_path / "stage1", straight / "stage1")


def test_the_same_command_on_a_finished_run_changes_nothing(straight):
    before = last(straight / "stage3")[0]
    loop.train(config_of("stage3"), straight)
    assert last(straight / "stage3")[0] == before


@pytest.mark.parametrize(
    "stage, changes, words",
    [
        ("stage1", {"model__num_queries": 3}, "of another config: model.num_queries: 4 -> 3"),
        ("stage1", {"lora__rank": 3}, "lora.rank: 2 -> 3"),
        ("stage1", {"stage": "stage3"}, "language_model.*matches no Linear"),
        ("stage2", {"init__checkpoint": "none"}, "none holds no checkpoint"),
        ("stage1", {"data__batch": 6}, "6 examples does not divide"),
        ("stage1", {"optimizer__accumulation": 3}, "must divide the batch, 8"),
    ],
)
def test_a_checkpoint_of_another_size_and_other_misfits(stage, changes, words, straight, tmp_path):
    shutil.copytree(straight / "stage1", tmp_path / "stage1")
    with pytest.raises(InputError, match=words):
        loop.train(config_of(stage, **changes), tmp_path)


def test_a_checkpoint_of_another_stage_or_tower(straight, tmp_path):
    wrong = config_of("stage2", init__checkpoint=straight / "stage2")
    with pytest.raises(InputError, match="of stage 'stage2'; stage stage2 starts from stage1"):
        loop.train(wrong, tmp_path)
    other = config_of("stage2", model__vlm__text__num_hidden_layers=3)
    with pytest.raises(InputError, match="vlm of the stage before .size 'nano'."):
        loop.train(other, copied(straight, tmp_path, "stage2"))
    shutil.copytree(straight / "stage2", tmp_path / "odd/stage3")
    with pytest.raises(
        InputError, match="checkpoint of stage 'stage2', the config is of stage 'st"
    ):
        loop.train(config_of("stage3"), tmp_path / "odd")


def test_a_line_of_the_metrics_is_of_all_its_steps_over_a_stop(tmp_path, monkeypatch):
    given = {"log__every": 4, "evals__sheets__every": 2, "checkpoint__every": 100}
    loop.train(config_of("stage1", **given), tmp_path / "whole")
    monkeypatch.setitem(evals.EVALUATORS, "sheets", Interrupt)
    with pytest.raises(SystemExit):
        loop.train(config_of("stage1", **given), tmp_path / "stopped")
    loop.train(config_of("stage1", **given), tmp_path / "stopped")
    lines = []
    for run in ("whole", "stopped"):
        text = (tmp_path / run / "stage1/metrics.jsonl").read_text().splitlines()
        [line] = [x for x in map(json.loads, text) if x["kind"] == "train"]
        lines.append({k: x for k, x in line.items() if k in ("step", "loss", "grad_norm", "lr")})
    assert lines[0] == lines[1] and lines[0]["step"] == 4


def test_what_a_run_leaves_behind(straight):
    folder = straight / "stage3"
    assert (folder / "config.json").is_file() and list(folder.glob("events*"))
    loaded = run_folder.load(folder)
    assert loaded.name == "stage3-nano-4" and loaded.plan.model.config.condition_latents
    averaged = trees.named(loaded.params)
    raw = trees.named(run_folder.load(folder, ema=False).params)
    assert any(not np.array_equal(averaged[name], leaf) for name, leaf in raw.items())
    first = run_folder.load(folder, step=2)
    assert first.step == 2
    with pytest.raises(InputError, match="no step 9"):
        run_folder.load(folder, step=9)
    with pytest.raises(InputError, match="give the folder of a stage"):
        run_folder.load(straight)


class Full(ocp.future.Future):
    """A write that ends as on a full disk."""

    def result(self, timeout=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_one_save_costs_that_save_alone(straight, tmp_path, monkeypatch):
    taken: list = []  # steps whose batch was taken
    told: list = []

    class Slow(Pipeline):
        def batches(self, first):
            for step, batch in enumerate(super().batches(first), start=first + 1):
                while step == 3 and any(t.name == "save_finalize" for t in threading.enumerate()):
                    time.sleep(0.01)  # until the save of step 2 has failed
                taken.append(step)
                yield batch

    save, write = Store.save, ocp.PyTreeCheckpointHandler.async_save
    steps: list = []

    async def fails_at_2(self, *args, **kwargs):
        return [Full()] if steps[-1] == 2 else await write(self, *args, **kwargs)

    monkeypatch.setattr(pipeline, "Pipeline", Slow)
    monkeypatch.setattr(Store, "save", lambda *args: (steps.append(args[1]), save(*args)))
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", fails_at_2)
    monkeypatch.setattr(
        saving.log, "error", lambda text, *args: told.append((taken[-1], text % args))
    )
    loop.train(config_of("stage1"), tmp_path)
    ((when, line),) = told
    assert when == 3 and "step 2 was not saved: the disk is full" in line  # not at the next save
    assert steps == [0, 2, 4, 4]  # the frozen tree; the last step is made sure of
    assert Store(tmp_path / "stage1/checkpoints", write=False).steps() == [4]
    assert_same(tmp_path / "stage1", straight / "stage1")


class Watch(evals.Evaluator):
    """Keeps what an evaluator is given."""

    seen: list = []

    def run(self, step, params, frozen):
        self.seen.append((step, trees.join(params, frozen)))


def test_evaluators_and_alignment(tmp_path, monkeypatch):
    monkeypatch.setitem(evals.EVALUATORS, "sheets", Watch)
    monkeypatch.setattr(Watch, "seen", [])
    monkeypatch.setattr(Reuse, "kept", {})
    config = config_of(
        "stage1", alignment__weight=0.5, evals__loss__every=2, evals__sheets__every=4
    )
    loop.train(config, tmp_path)
    assert [step for step, _ in Watch.seen] == [0, 4]
    parts = {"vlm", "vae", "queries", "connector", "mmdit", "lora", "alignment"}
    assert set(Watch.seen[0][1]) == parts
    text = (tmp_path / "stage1/metrics.jsonl").read_text()
    assert text.count('"validation"') == 3 and text.count('"alignment"') == 7
    kernel = run_folder.load(tmp_path / "stage1").params["alignment"]["proj"]["kernel"]
    assert kernel.shape == (32, 32)


def test_an_evaluator_of_an_unknown_type_is_refused(straight, tmp_path):
    config = config_of("stage2", evals__loss__type="lose")
    with pytest.raises(InputError, match="evals.loss.type is 'lose'; give one of loss, sheets"):
        loop.train(config, copied(straight, tmp_path, "stage2"))


# ---- where a stage starts ----------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """The lines of the log about the start."""
    lines: list = []
    monkeypatch.setattr(start.log, "info", lambda text, *args: lines.append(text % args))
    return lines


def stopped(straight, folder, stage="stage1"):
    """A copy of a stage that stopped after step 2 of 4."""
    shutil.copytree(straight / stage, folder)
    shutil.rmtree(folder / "checkpoints/4")
    return folder


def test_a_stage_that_has_not_taken_its_last_step_is_started_from_only_when_asked(
    straight, tmp_path, told
):
    before = stopped(straight, tmp_path / "stage1")
    words = (
        f"{before} stopped at step 2 of 4; finish stage1 by the command that began it, or start "
        "stage2 from step 2 with --config.init.unfinished=true"
    )
    with pytest.raises(InputError, match=words):
        loop.train(config_of("stage2"), tmp_path)
    assert not told  # nothing was read
    got = start.parameters(Plan.build(config_of("stage2", init__unfinished=True)), tmp_path)
    wanted = run_folder.load(before, ema=config_of("stage2").init.ema).params["queries"]
    np.testing.assert_array_equal(got["queries"]["embedding"], wanted["embedding"])
    assert any("  stage1 step 2" in line for line in told)


@pytest.mark.parametrize("average", [True, False])
def test_a_stage_starts_from_the_moving_average_or_from_the_last_weights(average, straight, told):
    assert config_lib.load("configs/stage2.py:7b").init.ema is True  # the default
    plan = Plan.build(config_of("stage2", init__ema=average))
    got = trees.named(start.parameters(plan, straight))
    want = trees.named(run_folder.load(straight / "stage1", ema=average).params)
    other = trees.named(run_folder.load(straight / "stage1", ema=not average).params)
    for name in want:
        if name.startswith(("queries/", "connector/")):
            np.testing.assert_array_equal(got[name], want[name])
            assert not np.array_equal(got[name], other[name]), name
    said = {
        part: where.replace("(moving average)", "AVERAGE")
        for part, _, _, _, _, where in (line.split(None, 5) for line in told)
    }
    word = " AVERAGE" if average else ""
    assert said == {
        "vlm": f"stage1 step 4{word}, its adapter merged in",
        "vae": "stage1 step 4",  # frozen: it has no average
        "queries": f"stage1 step 4{word}",
        "connector": f"stage1 step 4{word}",
        "mmdit": "fresh",
    }


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_needs_no_origins_and_tells_its_step(lost, straight, tmp_path, told):
    """Neither where the frozen tree is read again, nor where it is lost and made again."""
    stopped(straight, tmp_path / "stage1")
    if lost:
        shutil.rmtree(tmp_path / "stage1/frozen")
    loop.train(config_of("stage1", init__vlm="", init__vae=""), tmp_path)
    assert sum(line.endswith("  stage1 step 2") for line in told) == 6
    assert_same(tmp_path / "stage1", straight / "stage1")


def content(folder):
    return {x.name: x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_a_frozen_tree_stays_where_it_cannot_be_made_again(straight, tmp_path, monkeypatch):
    stopped(straight, tmp_path / "stage1")
    before = content(tmp_path / "stage1/frozen")
    with pytest.raises(InputError, match="dtype.frozen 'float32', the config has 'bfloat16'"):
        loop.train(config_of("stage1", dtype__frozen="bfloat16"), tmp_path)

    def damaged(*args):
        raise InputError("it is damaged")

    monkeypatch.setattr(run_folder, "read_frozen", damaged)
    with pytest.raises(InputError, match="config.init no longer gives the same parameters"):
        loop.train(config_of("stage1", seed=5), tmp_path)
    assert content(tmp_path / "stage1/frozen") == before


def test_a_begun_stage_needs_the_one_before_no_more(straight, tmp_path):
    shutil.copytree(straight / "stage2", tmp_path / "stage2")
    config = config_of("stage2", data__tokenizer="", init__vae="")
    start.inherit(config, tmp_path)
    assert config.data.tokenizer == str(tmp_path / "stage2/tokenizer")
    assert (
        config.init.vae
        == json.loads((tmp_path / "stage2/config.json").read_text())["init"]["vae"]
        != ""
    )


def test_a_run_from_before_the_word_fresh_is_made_again_as_it_was_begun():
    plan = Plan.build(config_of("stage1", init__vlm="moved/vlm", init__vae="moved/vae"))
    begun = {"vlm": "", "vae": "old/vae", "mmdit": "", "ema": True}
    init = start._as_begun({"config": {"init": begun}}, plan).init
    assert (init.vlm, init.vae) == ("fresh", "moved/vae")
    assert (init.ema, init.unfinished) == (True, True)
    assert plan.config.init.vlm == "moved/vlm"  # its own is left alone


def test_a_stage_inherits_the_tokenizer_and_the_name_of_the_autoencoder(straight, tmp_path):
    config = config_of("stage2", data__tokenizer="", init__checkpoint=straight / "stage1")
    start.inherit(config, tmp_path)
    assert config.data.tokenizer == str(straight / "stage1/tokenizer")
    assert config.init.vae == "fresh"
    named = config_of("stage2", init__vae="own/vae")
    start.inherit(named, straight)
    assert named.init.vae == "own/vae"
