"""The first batches of the shipped configs, so that a change of the plan is made on purpose.

The digests are of everything but the pixels, which follow the versions of Pillow and its decoders.
"""

import hashlib

import numpy as np
import pytest

from qk_jax.data import pipeline
from qk_jax.experiment import config as config_lib

PIXELS = {"target", "conditions", "pixel_values"}
FIRST = {
    "stage1": "f38a6a4c 7666081e e5945f47 7a870320 bf69ea4b e5f193dc",
    "stage3": "f38a6a4c 7666081e 74c709e6 842b5a7e 0c99aae6 60911b3b",
}


def digest(batch):
    """Eight letters for names, types, shapes and values of a batch."""
    found = hashlib.sha256()
    for name in sorted(batch.keys() - PIXELS):
        value = np.ascontiguousarray(batch[name])
        found.update(f"{name}{value.dtype}{value.shape}".encode() + value.tobytes())
    return found.hexdigest()[:8]


@pytest.mark.parametrize("stage", FIRST)
def test_the_first_batches_stay(stage):
    pipe = pipeline.Pipeline(config_lib.load(f"configs/{stage}.py:tiny"), "train", 0, 1)
    assert [digest(pipe.batch(step)) for step in range(6)] == FIRST[stage].split()
