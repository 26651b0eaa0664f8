"""The tiny model that the package carries: small, there without a checkpoint, and as good as its
card says."""

import json
import pathlib

import numpy as np
import pytest

import qk_jax
from qk_jax import evaluation, painting
from qk_jax.experiment import config as config_lib
from qk_jax.painting import loading

MB = 10**6
RECORDS = 16


@pytest.fixture(scope="module")
def evaluator():
    extent = evaluation.Extent(records=RECORDS, batch=RECORDS)
    return evaluation.Evaluator(painting.load(batch=RECORDS), extent)


@pytest.fixture(scope="module")
def cases():
    root = pathlib.Path(__file__).parents[2]
    return evaluation.held_out_cases(config_lib.load(f"{root}/configs/stage3.py:tiny"), RECORDS)


def told(task):
    return json.loads((loading.SHIPPED / "metrics.json").read_text())["tasks"][task]


def test_the_shipped_weights_are_small():
    weights = pathlib.Path(qk_jax.__file__).parent / "assets"
    sizes = [path.stat().st_size for path in weights.rglob("*.safetensors")]
    assert max(sizes) < 20 * MB and sum(sizes) < 40 * MB


@pytest.mark.parametrize("task", ["reconstruction", "editing", "customization"])
def test_held_out_subjects_are_painted_as_the_card_says(evaluator, cases, task):
    """Of fewer records than the card is of, within three of the standard errors of so many."""
    figures = evaluator.fidelity(cases[task], evaluator.paint(cases[task]))
    error = np.hypot(figures["psnr_standard_error"], told(task)["psnr_standard_error"])
    assert abs(figures["psnr"] - told(task)["psnr"]) < 3 * error
    if task != "reconstruction":  # whose copy is perfect
        assert figures["gain_over_copy"] > 0


def test_python_paints_without_a_checkpoint():
    model = qk_jax.load()
    assert "stage3" in repr(model)
    (picture,) = model.generate("a red apple on a blue background", steps=2)
    assert picture.size == (64, 64)
