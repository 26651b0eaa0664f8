"""Prices of the real sizes, and the command on a small one."""

import dataclasses

import jax
import numpy as np
import pytest

from qk_jax.base import trees
from qk_jax.bench import __main__ as bench
from qk_jax.bench import cost
from qk_jax.data import prompts
from qk_jax.data.example import TASKS
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import flops
from qk_jax.training import step as step_lib
from qk_jax.training.objectives.flow_matching import loss_fn

NANO = "tests/training/nano.py:stage3"


def plan_of(spec):
    return Plan.build(config_lib.load(spec), check=False)


def test_parts_of_the_real_size():
    parts = {part.name: part for part in cost.parts(plan_of("configs/stage2.py:20b"))}
    assert parts["mmdit"].trained == 20_430_401_088
    assert parts["vlm"].frozen == 8_292_166_656
    assert parts["connector"].trained == pytest.approx(51.4e6, rel=1e-3)
    # float32 weights, two moments and the average; the frozen tower once in bfloat16
    assert parts["mmdit"].state_bytes == 16 * 20_430_401_088
    assert parts["vlm"].state_bytes == 2 * 8_292_166_656


def test_batch_shapes_are_those_of_the_prompt_layout():
    config = config_lib.load("configs/stage3.py:tiny")
    model = config.model
    layout = prompts.PromptLayout(
        prompts.load_tokenizer(config.data.tokenizer),
        model.max_text, model.num_queries, model.vlm_pixels,
    )  # fmt: skip
    for pictures in ((), ((64, 64),), ((64, 64), (48, 80))):
        shapes = cost.batch_shapes(config, (64, 64), pictures, rows=2)
        patches = sum(h * w for h, w in layout.grids(pictures))
        assert shapes["pixel_values"].shape == (2, patches, 1176)
        few = dataclasses.replace(layout, max_text=shapes["text_mask"].shape[1])
        words = shapes["input_ids"].shape[1] - few.length(pictures)
        assert abs(words) <= 12 + 4 * len(pictures)  # the words around differ with the tokenizer


def test_flops_grow_with_pictures_and_rows_do_not_matter():
    plan = plan_of(NANO)
    count = lambda pictures, n: flops.of_step(  # noqa: E731
        plan, cost.batch_shapes(plan.config, (64, 64), pictures, n)
    )
    assert 0 < count((), 2) < count(((64, 64),), 2)
    assert count((), 4) == 2 * count((), 2)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3", "highres"])
def test_flops_of_towers_are_those_of_the_whole_step(stage):
    """The step as it is trained, counted as one, and each tower by what the stage does with it."""
    config = config_lib.load(
        f"tests/training/nano.py:{stage}", {"alignment.weight": "0.5" if stage == "stage1" else "0"}
    )
    plan, rows = Plan.build(config), 8
    shapes = cost.batch_shapes(config, (64, 64), ((64, 64),), rows)
    towers = flops.by_tower_of_step(plan, shapes)
    step = step_lib.make_train_step(plan)
    with jax.set_mesh(plan.mesh):
        traced = step.trace(plan.state, plan.frozen, shapes)
    whole = flops.of_jaxpr(traced.jaxpr.jaxpr)
    other = towers.pop("other", 0)  # the alignment term's projection of the kontext
    summaries = 2 * rows * (len(TASKS) + config.log.t_bins)  # of the losses, for the log
    assert sum(towers.values()) + other + summaries == whole
    assert (other > 0) == (stage == "stage1") and other < 1e-3 * whole

    rng = jax.random.key(0)
    loss = loss_fn(plan)
    forward = jax.make_jaxpr(lambda p, f, b: loss(trees.join(p, f), b, rng)[0])
    once = flops.by_tower(forward(plan.params, plan.frozen, shapes).jaxpr)
    passes = {tower: work / once[tower] for tower, work in towers.items()}
    assert passes["vision"] == passes["vae"] == 1  # frozen, without a gradient
    assert passes["connector"] == 3  # trained, behind trained queries
    if stage == "stage2":
        assert 2.9 < passes["mmdit"] <= 3  # the first layers need no gradient of what comes in
        assert 1 < passes["text"] < 2  # runs backward through the queries alone
    if stage in ("stage3", "highres"):
        assert 2 < passes["mmdit"] < 3  # frozen, with an adapter
    if stage == "stage1":
        assert 2 < passes["text"] < 3


def test_command_measures_on_the_devices_at_hand(capsys):
    bench.main(["cost", "--config", NANO, "--pictures", "1", "--rows", "8", "--measure", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"{jax.device_count()} x cpu")
    rows = [line.split() for line in lines if line.startswith("64x64")]
    assert [row[1] for row in rows] == ["0", "1"]
    assert all(float(row[4]) > 0 and float(row[5]) > 0 for row in rows)


def test_command_refuses_negative_counts(capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.main(["cost", "--config", NANO, "--rows", "-1"])
    assert leaving.value.code == 2
    assert "at least 0" in capsys.readouterr().err


def test_synthetic_rows_show_every_picture():
    shapes = cost.batch_shapes(config_lib.load(NANO), (64, 64), ((64, 64),), 3)
    batch = cost.synthetic_batch(shapes, image_token_id=7)
    shown = (batch["input_ids"] == 7).sum(axis=1)
    assert np.array_equal(shown, [batch["pixel_values"].shape[1] // 4] * 3)
