"""What the tests of the data's plan share: stage 3 at its tiny size, and batches compared."""

import numpy as np

from configs import stage3
from qk_jax.data.example import TASKS
from tests.painting.painters import TOKENIZER


def config(weights, batch, validation, **data):
    """The config with these tasks, batch, validation batches of so many, and fields of `data`."""
    out = stage3.get_config("tiny")
    with out.unlocked():
        out.data.tokenizer = str(TOKENIZER)
        out.data.batch = batch
        out.data.tasks = {name: weights.get(name, 0.0) for name in TASKS}
        out.validation.batch = out.validation.batches = validation
        out.data.update(data)
    return out


def assert_same(a, b):
    """Batches of the same arrays."""
    assert a.keys() == b.keys()
    for name in a.keys() - {"conditions"}:
        np.testing.assert_array_equal(a[name], b[name])
    for x, y in zip(a["conditions"], b["conditions"], strict=True):
        np.testing.assert_array_equal(x, y)
