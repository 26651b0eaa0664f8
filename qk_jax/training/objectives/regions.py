"""Weights of the tokens of an edit: those that changed count more."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from qk_jax.data.synthesis.scenes import VISIBLE
from qk_jax.pictures.roles import SOURCE
from qk_jax.pictures.sizes import PACKED


def region(batch: Any, strength: float) -> Float[np.ndarray, "B N"]:
    """Weights of the target's tokens: larger where an edit changed its source.

    A token of which a pixel changed weighs 1 + strength log2(N / changed tokens), as in UniWorld-V1
    (arXiv 2506.03147, strength 1, there for every pixel of a dilated mask); others weigh 1, as do
    all tokens of an example without a source, or whose first picture has another size.
    """
    target, source = batch["target"], batch["conditions"][0]
    examples, height, width = target.shape[:3]
    rows, columns = height // PACKED, width // PACKED
    if source.shape != target.shape:
        return np.ones((examples, rows * columns), np.float32)
    difference = np.abs(target.astype(np.int16) - source.astype(np.int16))
    pixels = np.max(difference, axis=-1).reshape(examples, rows, PACKED, columns, PACKED)
    changed = (np.max(pixels, axis=(2, 4)) > VISIBLE).reshape(examples, -1)
    changed &= batch["roles"][:, :1] == SOURCE
    share = np.maximum(np.mean(changed, axis=1, keepdims=True), 1 / changed.shape[1])
    return np.where(changed, 1 - strength * np.log2(share), 1.0).astype(np.float32)
