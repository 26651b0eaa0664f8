"""Prices of the real sizes, and the command on a small one."""

import dataclasses

import jax
import numpy as np
import pytest

from qk_jax.bench import __main__ as bench
from qk_jax.bench import batches, cost
from qk_jax.data import prompts
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.pictures.roles import SOURCE

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


def test_batch_shapes_are_those_of_the_prompts():
    config = config_lib.load("configs/stage3.py:tiny")
    model = config.model
    builder = prompts.PromptBuilder(
        prompts.load_tokenizer(config.data.tokenizer),
        model.max_text, model.num_queries, model.vlm_pixels,
    )  # fmt: skip
    for pictures in ((), ((64, 64),), ((64, 64), (48, 80))):
        shapes = batches.abstract(config, (64, 64), pictures, examples=2)
        patches = sum(h * w for h, w in builder.grids(pictures))
        assert shapes["pixel_values"].shape == (2, patches, 1176)
        few = dataclasses.replace(builder, max_text=shapes["text_mask"].shape[1])
        words = (
            shapes["input_ids"].shape[1]
            - few.build("", pictures, (SOURCE,) * len(pictures))["input_ids"].size
        )
        assert abs(words) <= 12 + 4 * len(pictures)  # the words around differ with the tokenizer


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
    shapes = batches.abstract(config_lib.load(NANO), (64, 64), ((64, 64),), 3)
    batch = batches.synthetic(shapes, image_token_id=7)
    shown = (batch["input_ids"] == 7).sum(axis=1)
    assert np.array_equal(shown, [batch["pixel_values"].shape[1] // 4] * 3)
