"""Parameters, bytes and FLOPs of a config's train step, from shapes alone.

Nothing is allocated, so the real sizes are priced on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base import trees
from qk_jax.data import prompts
from qk_jax.experiment.plan import Plan
from qk_jax.pictures.grids import PATCH_DIM, grid_of, vision_size

# Tokens around pictures and text in a row: system turn and the opening of the user's, with Qwen's
# tokenizer and the default system prompt; and the words around one picture.
PREFIX_TOKENS, PICTURE_WORDS = 14, 7


class Part(NamedTuple):
    """One top-level part of the parameter tree; bytes over all devices."""

    name: str
    trained: int
    frozen: int
    state_bytes: int


def copies(plan: Plan) -> int:
    """What is held of a trained parameter: itself, two moments and, where it is on, the average."""
    return 3 + bool(plan.config.optimizer.ema)


def parts(plan: Plan) -> list[Part]:
    """Parameters of each part, and the bytes held for it between steps.

    A trained parameter is held in float32, in `copies`; a frozen one in its own dtype, once.
    """
    rows: dict[str, list[int]] = {}
    for tree, trained in ((plan.params, True), (plan.frozen, False)):
        for name, leaf in trees.named(tree).items():
            words = name.split("/")
            row = rows.setdefault("/".join(words[: 2 if words[0] == "lora" else 1]), [0, 0, 0])
            row[0 if trained else 1] += leaf.size
            row[2] += leaf.size * leaf.dtype.itemsize * (copies(plan) if trained else 1)
    return [Part(name, *row) for name, row in sorted(rows.items())]


def batch_shapes(
    config: Mapping[str, Any], size: tuple[int, int], pictures: Sequence[tuple[int, int]], rows: int
) -> dict[str, Any]:
    """Abstract batch of `rows` targets of `size` with condition pictures of these (H, W)."""
    model = config["model"]
    shown = [vision_size(*picture, model["vlm_pixels"]) for picture in pictures]
    patches = sum(h * w for h, w in (grid_of(*size) for size in shown))
    length = PREFIX_TOKENS + PICTURE_WORDS * len(pictures) + patches // 4
    words = prompts.text_tokens(config, len(pictures))
    length += words + model["tail_tokens"] + model["num_queries"]

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    batch = {
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
    if config["alignment"]["weight"]:
        h, w = grid_of(*vision_size(*size, model["vlm_pixels"]))
        batch["target_pixel_values"] = leaf((h * w, PATCH_DIM), jnp.float32)
    return batch


def synthetic_batch(shapes: dict[str, Any], image_token_id: int, seed: int = 0) -> dict[str, Any]:
    """Numpy rows of these shapes: random pictures, text of one repeated token, all of it shown."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == jnp.bool_:
            return np.ones(leaf.shape, bool)
        if leaf.dtype == jnp.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        return np.ones(leaf.shape, leaf.dtype)

    batch = jax.tree.map(fill, shapes)
    rows, length = batch["input_ids"].shape
    images = batch["pixel_values"].shape[1] // 4
    batch["input_ids"][:, PREFIX_TOKENS : PREFIX_TOKENS + images] = image_token_id
    batch["position_ids"] = np.broadcast_to(
        np.arange(length, dtype=np.int32), (rows, 3, length)
    ).copy()
    batch["task"][:] = 0
    return batch
