"""Evaluators: what a sheet is made of, on several devices too, and the loss of encoded pictures."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import painters
import pytest

from qk_jax.base import trees
from qk_jax.base.errors import BadRecord
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.painting import sheets
from qk_jax.training import evals


class Examples(list):
    """A source whose example is its number; those of BAD cannot be read."""

    BAD = (4,)
    task = "editing"

    def __init__(self, size_of, pictures_of):
        super().__init__(range(len(size_of)))
        self.size_of, self.pictures_of = np.array(size_of), np.array(pictures_of)
        self.references_of = np.zeros((len(size_of), 0), int)

    def __getitem__(self, number):
        if number in self.BAD:
            raise BadRecord("no text", f"record {number}")
        return number


def test_a_sheet_has_examples_of_one_shape_and_none_that_is_bad(caplog, monkeypatch):
    #         number  0  1  2  3  4  5  6  7
    source = Examples([1, 0, 1, 1, 1, 0, 1, 1], [2, 1, 1, 1, 1, 1, 2, 1])
    assert evals.alike(source, 1, 3) == [2, 3, 7]
    assert "left a bad record out of the sheets: record 4" in caplog.text
    assert evals.alike(source, 1, 2) == [2, 3]
    assert evals.alike(source, 0, 3) == [1, 5]
    assert evals.alike(source, 9, 1) == [2]  # no example has that size: the commonest shape
    monkeypatch.setattr(Examples, "BAD", range(8))
    assert evals.alike(source, 1, 3) == []


class Writers:
    """Keeps what is written."""

    def __init__(self, active=True):
        self.active, self.pictures, self.values = active, {}, []

    def picture(self, step, name, pixels):
        self.pictures[name, step] = pixels

    def write(self, step, kind, values):
        self.values.append(values)


@pytest.fixture(scope="module")
def plan():
    """Nano's stage 3 over eight devices, with two tasks."""
    config = painters.config().copy_and_resolve_references()
    for task in config.data.tasks:
        config.data.tasks[task] = float(task in ("text_to_image", "editing"))
    config.evals.sheets.update({"every": 2, "records": 2, "steps": 1})
    return Plan.build(config)


@pytest.fixture(scope="module")
def parts(plan):
    """(trained, frozen) parameters, sharded."""
    trained, frozen = trees.split(painters.params(), plan.stage.rules)
    return (
        jax.device_put(trained, trees.shardings(plan.params)),
        jax.device_put(frozen, trees.shardings(plan.frozen)),
    )


def test_sheets_are_files_and_pictures_of_tensorboard(plan, parts, tmp_path, monkeypatch):
    slots, shown = [], []
    of_params, of_requests = evals.painting.of_params, sheets.of_requests
    monkeypatch.setattr(
        evals.painting,
        "of_params",
        lambda *a, batch: (slots.append(batch), of_params(*a, batch=batch))[1],
    )
    monkeypatch.setattr(sheets, "of_requests", lambda *a: (shown.append(a[1:]), of_requests(*a))[1])
    writers = Writers()
    made = evals.Sheets(plan, plan.config.evals.sheets, tmp_path, writers)
    with jax.set_mesh(plan.mesh):
        made.run(2, *parts)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["editing_0000002.png", "text_to_image_0000002.png"]
    assert set(writers.pictures) == {("samples/editing", 2), ("samples/text_to_image", 2)}
    assert all(pixels.shape[2] == 3 for pixels in writers.pictures.values())
    assert slots == [8]  # a picture or a copy for each device
    for requests, painted, truths in shown:
        assert len(requests) == 2 and len({request.size for request in requests}) == 1
        assert [x.shape for x in painted] == [x.shape for x in truths]

    # Other hosts paint too, as a program runs on all, but write nothing.
    silent = Writers(active=False)
    made.writers, made.folder = silent, tmp_path / "other"
    with jax.set_mesh(plan.mesh):
        made.run(2, *parts)
    assert not silent.pictures and not (tmp_path / "other").exists()

    # The devices' shares are those of one device.
    requests, painted, _ = shown[-1]
    alone = painters.painter(batch=2).paint(requests, made.settings)
    for ours, theirs in zip(painted, alone, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_the_validation_loss_is_of_pictures_encoded_before(plan, parts, tmp_path, monkeypatch):
    """By the train step's encoder; as many at once as there are, whatever the accumulation."""
    config = plan.config.copy_and_resolve_references()
    config.optimizer.accumulation = 4  # micro-batches of two would not divide over the devices
    config.data.batch = 32
    plan, writers = Plan.build(config), Writers()
    loss = evals.ValidationLoss(plan, config.evals.loss, tmp_path, writers)
    seen, step = [], loss.eval_step

    def eval_step(params, frozen, batch, number):
        seen.append((batch, step(params, frozen, batch, number)["loss"]))
        return seen[-1][1], {}

    monkeypatch.setattr(loss, "eval_step", eval_step)
    monkeypatch.setattr(evals.metrics, "Window", lambda: types.SimpleNamespace(add=print, steps=0))
    with jax.set_mesh(plan.mesh):
        loss.run(0, *parts)
        batch, target = seen[0][0], next(loss.data.fixed())["target"]
        tokens = batch["posterior"][0].shape[1]
        wanted = plan.model.posterior_tokens(parts[1], jnp.asarray(target), tokens)
    for found, one in zip(batch["posterior"], wanted, strict=True):
        np.testing.assert_allclose(found, one, atol=1e-4)
    loss.close()


@pytest.mark.parametrize("most", [1, 2])
def test_validation_has_its_own_bound_of_shapes(plan, most, tmp_path):
    config = plan.config.copy_and_resolve_references()
    config.data.sizes, config.data.max_groups = ("32x32", "48x32", "32x48"), 3
    config.validation.max_groups = most
    loss = evals.ValidationLoss(Plan.build(config), config.evals.loss, tmp_path, Writers())
    shapes = {(group.task, group.size) for group in loss.data.groups}
    assert len(shapes) == 2 * most
    loss.close()


@pytest.mark.parametrize("size", ["tiny", "tiny_long", "smoke", "7b"])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3", "highres"])
def test_every_run_is_evaluated_at_its_ends_and_between(stage, size):
    config = config_lib.load(f"{stage}:{size}")
    for entry in config.evals.values():
        assert 0 < entry.every <= config.steps
        assert size == "smoke" or 2 <= config.steps / entry.every, (stage, size, entry.type)
    assert config.evals.sheets.records <= 4 and config.evals.sheets.steps <= 20
