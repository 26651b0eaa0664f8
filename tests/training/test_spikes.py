"""Loss spikes: found, gone back from, and decided alike wherever a run is stopped."""

import json
import os
import signal

import batches
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.checkpoints.store import Store
from qk_jax.data import pipeline
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import loop, programs, spikes
from qk_jax.training import step as step_lib

NANO = "tests/training/nano.py:stage1"
HUGE, NAN = 3, 4  # records whose loss is huge, or no number
STEPS, BAD = 15, 13
# Checkpoints are of 3, 6, 9, 12: of the last nothing is known before the spike, so 9 is good.
GIVEN = {"steps": STEPS, "checkpoint__every": 3, "spike__zscore": 20, "spike__window": 8}


class Pipeline(batches.Pipeline):
    """Text alone; the steps of `planted`, counted from 1, have a record in one slot."""

    planted: dict = {}
    killed: tuple = ()  # (step, how)

    def batches(self, first):
        for step in range(first, self.config.steps):
            if self.killed and self.killed[0] == step + 1:
                how, type(self).killed = self.killed[1], ()
                how()
            made = batches.batch(self.config, step)
            made["record"] += 100
            made["task"][:] = 0
            if step + 1 in self.planted:
                made["record"][5] = self.planted[step + 1]
            yield self.finish(made)

    def records(self, step):
        return [f"text_to_image {HUGE if i == 5 else 100 + i}" for i in range(8)]


def loss_fn(plan):
    """The real loss, but for the planted records."""
    whole = real(plan)

    def loss(params, batch, rng):
        values, aux = whole(params, batch, rng)
        values = jnp.where(batch["record"] == HUGE, 1e6 * values, values)
        values = jnp.where(batch["record"] == NAN, jnp.nan, values)
        return values, aux | {"flow": values}

    return loss


real = step_lib.loss_fn


class Reuse(programs.Programs):
    """Programs, kept between the runs of these tests."""

    kept: dict = {}

    def __init__(self, plan):
        super().__init__(plan)
        self._programs = self.kept


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setattr(pipeline, "Pipeline", Pipeline)
    monkeypatch.setattr(step_lib, "loss_fn", loss_fn)
    monkeypatch.setattr(programs, "Programs", Reuse)
    monkeypatch.setattr(Pipeline, "planted", {BAD: HUGE})
    monkeypatch.setattr(Pipeline, "killed", ())


def config_of(**changes):
    overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return config_lib.load(NANO, overrides)


def last(workdir):
    """Everything in the newest step by name, and its metadata."""
    plan = Plan.build(config_of())
    items = {"params": plan.params, "ema": plan.params, "optimizer": plan.state.opt_state}
    store = Store(workdir / "stage1/checkpoints", write=False)
    got = store.restore(lambda meta: items)
    assert got.step == STEPS
    return trees.named(got.items), got.meta


def lines(workdir):
    """The metrics of the run, but for what a clock says."""
    found = map(json.loads, (workdir / "stage1/metrics.jsonl").read_text().splitlines())
    clocks = ("goodput", "pictures_per", "data_wait", "model_tflops")
    return [{k: v for k, v in x.items() if not k.startswith(clocks)} for x in found]


def assert_same(ours, wanted):
    (arrays, _), (others, _) = last(ours), last(wanted)
    assert arrays.keys() == others.keys()
    for name, leaf in arrays.items():
        np.testing.assert_array_equal(leaf, others[name], err_msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The work directory of a run with a spike, without a break, and its log."""
    workdir, said = tmp_path_factory.mktemp("straight"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Pipeline", Pipeline)
        patch.setattr(step_lib, "loss_fn", loss_fn)
        patch.setattr(programs, "Programs", Reuse)
        patch.setattr(Pipeline, "planted", {BAD: HUGE})
        patch.setattr(loop.log, "warning", lambda text, *args: said.append(text % args))
        loop.train(config_of(**GIVEN), workdir)
    yield workdir, said
    Reuse.kept.clear()


def test_a_spike_is_told_with_its_records_and_its_step(straight):
    workdir, [line] = straight
    assert line.startswith(f"the loss of text_to_image at step {BAD} is ")
    assert (
        f"going back to the state of step 9, the data of steps 10 to {BAD} is skipped; records of "
        f"step {BAD}: text_to_image 100, text_to_image 101, " in line
    )
    assert f"text_to_image {HUGE}" in line
    assert {"step": BAD, "kind": "rollback", "to": 9} in lines(workdir)
    arrays, meta = last(workdir)
    assert meta["spikes"]["rollbacks"] == [[9, BAD]]
    assert all(np.isfinite(leaf).all() for leaf in arrays.values())


def test_the_run_ends_as_if_the_steps_between_had_changed_nothing(straight, tmp_path, monkeypatch):
    """An update that is not finite changes nothing but the counts, by another path."""
    monkeypatch.setattr(Pipeline, "planted", dict.fromkeys(range(10, BAD + 1), NAN))
    loop.train(config_of(**GIVEN | {"spike__zscore": 0}), tmp_path)
    assert_same(straight[0], tmp_path)
    assert "spikes" not in last(tmp_path)[1]


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise ConnectionResetError("gone")


@pytest.mark.parametrize(
    "stops",
    [
        # Before the spike, and when it is known; the steps saved there push out none that is gone
        # back to.
        [(10, sigterm), (11, sigterm), (12, sigterm), (BAD, sigterm)],
        [(BAD + 1, sigterm), (BAD + 2, crash)],
        [(BAD, crash)],
    ],
)
def test_stopped_anywhere_and_resumed_it_is_the_same_bit_for_bit(
    stops, straight, tmp_path, monkeypatch
):
    config = config_of(**GIVEN, checkpoint__keep=1)
    for stop in stops:
        monkeypatch.setattr(Pipeline, "killed", stop)
        with pytest.raises((SystemExit, ConnectionResetError)):
            loop.train(config, tmp_path)
    loop.train(config, tmp_path)
    assert_same(tmp_path, straight[0])
    assert lines(tmp_path) == lines(straight[0])


def test_a_spike_soon_after_goes_back_to_the_same_step_and_too_many_stop_the_run(
    tmp_path, monkeypatch
):
    """Step 12, saved just before the first spike and never proven, is not what it goes back to."""
    monkeypatch.setattr(Pipeline, "planted", {BAD: HUGE, BAD + 1: HUGE})
    words = rf"at step {BAD + 1} is .* after 1 rollbacks .spike.max_rollbacks.: run again with a lo"
    with pytest.raises(InputError, match=words):
        loop.train(config_of(**GIVEN, spike__max_rollbacks=1), tmp_path / "spikes")
    loop.train(config_of(**GIVEN, spike__max_rollbacks=2), tmp_path / "spikes")  # the advice
    assert last(tmp_path / "spikes")[1]["spikes"]["rollbacks"] == [[9, BAD], [9, BAD + 1]]
    monkeypatch.setattr(Pipeline, "planted", dict.fromkeys(range(10, BAD + 2), NAN))
    loop.train(config_of(**GIVEN | {"spike__zscore": 0}), tmp_path / "skipped")
    assert_same(tmp_path / "spikes", tmp_path / "skipped")


def test_without_a_checkpoint_to_go_back_to_the_run_goes_on(tmp_path, caplog):
    loop.train(config_of(**GIVEN | {"checkpoint__every": 12}), tmp_path)
    [line] = [x.message for x in caplog.records if "to go back to" in x.message]
    assert f"at step {BAD} " in line and last(tmp_path)[1]["spikes"]["rollbacks"] == []


# ---- what is a spike ---------------------------------------------------------------------------


def detector(zscore=5.0, window=8, state=None):
    section = {"zscore": zscore, "window": window, "max_rollbacks": 1}
    return spikes.Detector(ConfigDict({"spike": section, "checkpoint": {"every": 10}}), state)


def losses(**means):
    """The metrics of a step with two examples of each task of `means`."""
    count = np.array([2.0 * (task in means) for task in spikes.TASKS], np.float32)
    total = np.array([2 * means.get(task, 0) for task in spikes.TASKS], np.float32)
    return {"task_sum": total, "task_count": count}


def test_the_robust_zscore_by_hand():
    found = detector()
    for step, loss in enumerate([1, 2, 3, 4, 5, 6, 7, 100]):  # one of them is far out
        assert found.judge(step, losses(editing=loss)) is None
    # median 4.5, deviations 3.5 2.5 1.5 0.5 0.5 1.5 2.5 95.5, their median 2
    assert found.judge(9, losses(editing=4.5 + 4.9 * 2 * 1.4826)) is None
    assert found.judge(10, losses(editing=-1000)) is None  # only what is too much
    found = detector()
    for step, loss in enumerate([1, 2, 3, 4, 5, 6, 7, 100]):
        found.judge(step, losses(editing=loss))
    spike = found.judge(9, losses(editing=4.5 + 5.1 * 2 * 1.4826))
    assert (spike.step, spike.task, spike.usual) == (9, "editing", 4.5)
    assert spike.zscore == pytest.approx(5.1, rel=1e-5)
    assert found.judge(10, losses(editing=50)).usual == 4.5  # no spike joins what is usual


def test_each_task_is_judged_by_its_own_losses_once_there_are_enough():
    found = detector()
    for step in range(8):
        assert found.judge(step, losses(editing=1.0, reconstruction=100.0)) is None
        assert found.judge(step, losses(composition=10.0**step)) is None  # not yet full
    assert found.judge(9, losses(reconstruction=100.5)) is None  # less than 1 % is no deviation
    assert found.judge(10, losses(reconstruction=100.0, editing=1.2)).task == "editing"
    assert found.judge(11, losses(text_to_image=1e9)) is None


def test_what_is_known_survives_json():
    found = detector()
    for step in range(9):
        found.judge(step, losses(editing=step / 3))
    found.count(spikes.Spike(9, "editing", 1, 1, 1), 4)
    again = detector(state=json.loads(json.dumps(found.meta()["spikes"])))
    assert again.meta() == found.meta() and again.rollbacks == [(4, 9)]
    assert detector(zscore=0).meta() == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint__every": 0, "spike__zscore": 5}, "of checkpoint.every, which is 0; set it"),
        ({"spike__window": 3}, "spike.window is 3; give at least 8"),
        ({"spike__zscore": -1}, "'spike.zscore' is -1.0, expected a number 0 or more"),
    ],
)
def test_what_cannot_work_is_refused(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        loop.train(config_of(**changes), tmp_path)
