"""Prices of the real sizes, and the command on a small one."""

import dataclasses

import jax
import numpy as np
import pytest

from qk_jax.bench import __main__ as bench
from qk_jax.bench import batches, cost
from qk_jax.data import prompts
from qk_jax.data.example import reference_sizes
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


def sized(spec, **data):
    config = config_lib.load(spec).copy_and_resolve_references()
    with config.unlocked():
        config.data.update(data)
    return config


def test_pictures_are_priced_at_the_sizes_of_the_training():
    """References by their number and the largest of their shapes; a source as its target."""
    ratios, alone = ((4, 5), (2, 3)), {"editing": 0.0, "transformation": 0.0, "reconstruction": 0.0}
    config = sized("configs/stage3.py:20b", reference_ratios=ratios)
    (table,) = reference_sizes(config.data)
    most = max(height * width for height, width in table)
    assert len({height * width for height, width in table}) > 1
    for count in (2, 3):
        shown = batches.condition_sizes(config, (512, 512), count)
        assert [height * width for height, width in shown] == [most] * count
        assert set(shown) <= set(table)
    assert batches.condition_sizes(config, (736, 368), 1) == [(736, 368)]  # the larger: a source
    config.data.update(reference_ratios=(), reference_sizes_by_number=(640, 384, 256))
    assert batches.condition_sizes(config, (512, 512), 0) == []
    for count, side in ((1, 640), (2, 384), (3, 256)):
        assert batches.condition_sizes(config, (512, 512), count) == [(side, side)] * count
    config.data.tasks.update(alone)
    assert batches.condition_sizes(config, (736, 368), 1) == [(640, 640)]
    first = config_lib.load("configs/stage1.py:20b")  # without references
    assert batches.condition_sizes(first, (416, 624), 1) == [(416, 624)]


def test_the_largest_shape_is_that_of_the_most_tokens():
    def largest(spec, **data):
        return batches.largest(sized(spec, **data))

    assert largest("configs/stage3.py:tiny") == ((64, 64), 3)
    assert largest("configs/stage3.py:tiny", reference_sizes_by_number=(64, 48, 32))[1] == 2
    assert largest("configs/stage3.py:tiny", reference_sizes_by_number=(96, 48, 32))[1] == 1
    assert largest("configs/stage3.py:tiny", sizes=("32x32", "64x48")) == ((48, 64), 3)
    assert largest("configs/stage3.py:20b") == ((512, 512), 3)
    assert largest("configs/stage2.py:20b")[1] == 1


def test_cost_prices_the_pictures_of_the_training(capsys):
    words = ["cost", "--config", "configs/stage3.py:tiny", "--rows", "512", "--pictures", "2"]
    prices = []
    for sides in ("64", "64,48"):
        bench.main([*words, f"--config.data.reference_sizes_by_number={sides},"])
        lines = capsys.readouterr().out.splitlines()
        prices.append([line.split()[3] for line in lines if line.startswith("64x64")])
    assert prices[0][:2] == prices[1][:2] and prices[0][2] > prices[1][2]


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
