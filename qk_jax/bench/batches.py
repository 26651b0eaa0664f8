"""The batches of a config that no data is needed for: abstract ones, and synthetic ones to time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qk_jax.base.types import Batch
from qk_jax.data import prompts
from qk_jax.pictures.grids import PATCH_DIM, grid_of, vision_size

# Tokens around pictures and text: the system's turn and the opening of the user's, with Qwen's
# tokenizer and the default system prompt; and the words around one picture.
PREFIX_TOKENS, PICTURE_WORDS = 14, 7


def abstract(
    config: ConfigDict, size: tuple[int, int], pictures: Sequence[tuple[int, int]], examples: int
) -> Batch:
    """Abstract batch of targets of `size` with condition pictures of these (H, W)."""
    model = config.model
    shown = [vision_size(*picture, model.vlm_pixels) for picture in pictures]
    patches = sum(h * w for h, w in (grid_of(*size) for size in shown))
    words = prompts.text_tokens(config, len(pictures))
    length = PREFIX_TOKENS + PICTURE_WORDS * len(pictures) + patches // 4
    length += words + model.tail_tokens + model.num_queries

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((examples, *shape), dtype)

    batch: Batch = {
        "input_ids": leaf((length,), jnp.int32),
        "attention_mask": leaf((length,), jnp.bool_),
        "position_ids": leaf((3, length), jnp.int32),
        "text_mask": leaf((words,), jnp.bool_),
        "pixel_values": leaf((patches, PATCH_DIM), jnp.float32),
        "target": leaf((*size, 3), jnp.uint8),
        "conditions": tuple(leaf((*picture, 3), jnp.uint8) for picture in pictures),
        "condition_mask": leaf((), jnp.bool_),
        "roles": leaf((len(pictures),), jnp.int32),
        "task": leaf((), jnp.int32),
    }
    if config.alignment.weight:
        h, w = grid_of(*vision_size(*size, model.vlm_pixels))
        batch["target_pixel_values"] = leaf((h * w, PATCH_DIM), jnp.float32)
    return batch


def synthetic(shapes: Batch, image_token_id: int, seed: int = 0) -> Batch:
    """Numpy arrays of these shapes: random pictures, text of one repeated token without padding."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == jnp.bool_:
            return np.ones(leaf.shape, bool)
        if leaf.dtype == jnp.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        return np.ones(leaf.shape, leaf.dtype)

    batch = jax.tree.map(fill, shapes)
    images = batch["pixel_values"].shape[1] // 4
    batch["input_ids"][:, PREFIX_TOKENS : PREFIX_TOKENS + images] = image_token_id
    batch["position_ids"][:] = np.arange(batch["position_ids"].shape[-1])
    batch["task"][:] = 0
    return batch
