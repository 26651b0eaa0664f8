"""The batches of a config that no data is needed for: abstract ones, and synthetic ones to time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from qk_jax.base.types import Batch
from qk_jax.data import prompts, templates
from qk_jax.data.batch_sizes import fitting, tokens_of
from qk_jax.data.example import MAX_REFERENCES, reference_sizes
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.grids import PATCH_DIM, grid_of, vision_size
from qk_jax.pictures.sizes import PACKED, for_number, parse_sizes

# Tokens of known system prompts with Qwen's tokenizer, and the characters of a token in an estimate
# of others.
SYSTEMS = {
    templates.PRESETS["query_kontext"].system: 6,
    templates.PRESETS["qwen_image"].system: 26,
    templates.PRESETS["qwen_image"].system_pictures: 56,
}
CHARACTERS = 5
TURN_TOKENS = 8  # around the system prompt, up to the user's turn


def opening_tokens(config: ConfigDict, pictures: int) -> int:
    """Tokens before the first picture, or before the text, with Qwen's tokenizer."""
    system = config.prompt.system_pictures if pictures else config.prompt.system
    return TURN_TOKENS + SYSTEMS.get(system, len(system) // CHARACTERS)


def picture_words(config: ConfigDict) -> int:
    """Tokens around those of one picture: 'Picture', ' ', '1', ':', ' ' and two that mark vision;
    a role in brackets has two more."""
    words = max(config.prompt.source, config.prompt.reference, key=len)
    return 2 + len(re.findall(r"{number}|\w+|[^\w\s]+| (?!\()", words))


def condition_sizes(config: ConfigDict, size: Size, pictures: int) -> list[Size]:
    """(H, W) of so many condition pictures beside a target of `size`, as the config trains them.

    Of the sizes of so many references the one with the most tokens; one picture may be a source,
    which has the target's size.
    """
    if not pictures:
        return []
    tasks = [task for task, weight in config.data.tasks.items() if weight]
    known = list(for_number(reference_sizes(config.data), pictures))
    if pictures == 1 and set(tasks) - MAX_REFERENCES.keys() - {"text_to_image"}:
        known = [size, *known] if set(tasks) & MAX_REFERENCES.keys() else [size]
    return [max(known, key=lambda one: tokens(config, [one]))] * pictures


def tokens(config: ConfigDict, pictures: Sequence[Size]) -> tuple[int, int]:
    """Tokens of pictures of these (H, W) in the generator, and patches in the vision tower."""
    grids = config_lib.model_config(config).vision_grids(pictures)
    return sum(map(math.prod, pictures)) // PACKED**2, sum(map(math.prod, grids))


def largest(config: ConfigDict) -> tuple[Size, int]:
    """(target size, condition pictures) of the shape with the most tokens that a config trains."""
    tasks = [task for task, weight in config.data.tasks.items() if weight]
    most = max(MAX_REFERENCES.get(task, int(task != "text_to_image")) for task in tasks)
    shapes = [
        (size, count)
        for size in parse_sizes(config.data.sizes, "config.data.sizes")
        for count in range(most + 1)
    ]
    return max(
        shapes, key=lambda shape: tokens(config, [shape[0], *condition_sizes(config, *shape)])
    )


def examples_of(config: ConfigDict, size: Size, pictures: int) -> int:
    """Examples of a batch of targets of `size` with so many condition pictures."""
    shown = condition_sizes(config, size, pictures)
    one = abstract(config, size, shown, 1)
    sequence, window = (one[name].shape[1] for name in ("input_ids", "text_mask"))
    tokens = tokens_of(config.model, sequence, window, (size, *shown))
    return fitting(config.data, pictures, tokens)


def abstract(config: ConfigDict, size: Size, pictures: Sequence[Size], examples: int) -> Batch:
    """Abstract batch, not padded, of targets of `size` with condition pictures of these (H, W)."""
    model = config.model
    patches = sum(map(math.prod, config_lib.model_config(config).vision_grids(pictures)))
    shown = picture_words(config) * len(pictures) + patches // 4
    words = prompts.text_tokens(config, len(pictures))
    length = opening_tokens(config, len(pictures)) + shown + words
    length += model.tail_tokens + model.num_queries
    window = words + config.prompt.keep_pictures * shown
    window += config.prompt.keep_tail * model.tail_tokens

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((examples, *shape), dtype)

    batch: Batch = {
        "input_ids": leaf((length,), jnp.int32),
        "attention_mask": leaf((length,), jnp.bool_),
        "position_ids": leaf((3, length), jnp.int32),
        "text_mask": leaf((window,), jnp.bool_),
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
        batch["whole"] = leaf((), jnp.bool_)
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
    batch["input_ids"][:, TURN_TOKENS : TURN_TOKENS + images] = image_token_id
    batch["position_ids"][:] = np.arange(batch["position_ids"].shape[-1])
    batch["task"][:] = 0
    return batch
