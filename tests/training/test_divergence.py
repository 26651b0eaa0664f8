"""Updates that are not finite: none is applied or saved, and every message's advice works."""

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.checkpoints.store import Store
from qk_jax.data import pipeline
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import loop, programs
from qk_jax.training import step as step_lib
from qk_jax.training.padding import Padding

NANO = "tests/training/nano.py:stage1"
POISON = 3  # a record whose loss is not a number


class Pipeline(batches.Pipeline):
    """Text alone; the steps of `poisoned`, counted from 1, have the record POISON in one slot."""

    poisoned: tuple[int, ...] = ()

    def batches(self, first):
        for step in range(first, self.config.steps):
            made = batches.batch(self.config, step)
            made["record"] += 100
            if step + 1 in self.poisoned:
                made["record"][5] = POISON
            yield self.finish(made)

    def records(self, step):
        return [f"text_to_image {i if i == 5 else 100 + i}" for i in range(8)]


def loss_fn(plan):
    """The real loss, but for the record POISON."""
    whole = real(plan)

    def loss(params, batch, rng):
        values, aux = whole(params, batch, rng)
        values = jnp.where(batch["record"] == POISON, jnp.nan, values)
        return values, aux | {"flow": values}

    return loss


real = step_lib.loss_fn


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setattr(pipeline, "Pipeline", Pipeline)
    monkeypatch.setattr(step_lib, "loss_fn", loss_fn)


def config_of(**changes):
    overrides = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return config_lib.load(NANO, overrides)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    plan = Plan.build(config_of(), sharding.build_mesh({}, jax.devices()[:1]))
    drawn = lambda tree: jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), tree)  # noqa: E731
    state, frozen = drawn(plan.state), drawn(plan.frozen)
    made = batches.batch(plan.config, 0)
    made["record"] = np.array([0, 1, 2, 4, 4, POISON, 6, 7])
    with jax.set_mesh(plan.mesh):
        padded = Padding.from_config(plan.config)(made)
        left, values, _ = programs.Programs(plan)(jax.device_put(state), frozen, padded)
    assert not values["applied"] and np.flatnonzero(~values["finite"]).tolist() == [5]
    for name, leaf in trees.named(left).items():
        counted = np.issubdtype(leaf.dtype, np.integer)
        np.testing.assert_array_equal(leaf, trees.named(state)[name] + counted, err_msg=name)


def test_a_bad_record_is_named_and_its_step_skipped(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Pipeline, "poisoned", (2,))
    loop.train(config_of(log__every=4, checkpoint__every=0), tmp_path)
    [line] = [x.message for x in caplog.records if "skipped" in x.message]
    assert "step 2 is skipped" in line and line.endswith("records: text_to_image 5")
    log = (tmp_path / "stage1/metrics.jsonl").read_text()
    assert '"skipped": 1' in log and "NaN" not in log
    assert Store(tmp_path / "stage1/checkpoints", write=False).steps() == [4]


def test_many_in_a_row_stop_the_run_and_the_advice_goes_on_from_the_last_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Pipeline, "poisoned", (3, 4))
    given = {"checkpoint__every": 2, "optimizer__max_skipped": 2, "optimizer__clip": 0}
    with pytest.raises(InputError, match="2 updates in a row.*step 4 .*checkpoint is of step 2"):
        loop.train(config_of(**given), tmp_path)
    monkeypatch.setattr(Pipeline, "poisoned", ())
    loop.train(config_of(**given | {"optimizer__clip": 1.0, "optimizer__lr": 1e-3}), tmp_path)


def test_ruined_weights_are_not_saved(tmp_path):
    given = {"optimizer__lr": 1e25, "optimizer__clip": 0, "checkpoint__every": 1}
    with pytest.raises(InputError, match="weights are not finite after step 1 .*of step none"):
        loop.train(config_of(**given), tmp_path)
    assert Store(tmp_path / "stage1/checkpoints", write=False).steps() == []
