"""Rotary embeddings of Qwen2.5-VL: 2-D for the vision tower, M-RoPE for the language model."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qk_jax.pictures.grids import MERGE

VISION_THETA = 10_000.0
Table = Float[Array | np.ndarray, "B_or_1 tokens head_dim"]  # of cosines or sines


def vision_rotary(
    positions: Int[Array | np.ndarray, "*B_or_none P 2"], head_dim: int
) -> tuple[Float[Array, "*B_or_none P head_dim"], Float[Array, "*B_or_none P head_dim"]]:
    """(cos, sin) in float32 for half-rotation of patches at these (rows, columns).

    Channels are [row angles | column angles] twice (Qwen2_5_VLVisionRotaryEmbedding). The
    frequencies are rounded once, from float64.
    """
    half = head_dim // 2
    inverse = VISION_THETA ** -(np.arange(0, half, 2) / half)
    places = jnp.asarray(positions)[..., None].astype(jnp.float32)
    angles = (places * inverse.astype(np.float32)).reshape(*positions.shape[:-1], half)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def patch_positions(rows: int, columns: int) -> Int[np.ndarray, "P 2"]:
    """(row, column) of each patch of a picture, in merge-block order."""
    positions = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = positions.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def mrope_cos_sin(
    position_ids: Int[Array, "B 3 S"],
    head_dim: int,
    theta: float,
    sections: tuple[int, int, int],
    dtype: Any,
) -> tuple[Float[Array, "B S head_dim"], Float[Array, "B S head_dim"]]:
    """(cos, sin) for half-rotation, computed in float32, cast to `dtype`.

    Frequency j turns with the axis whose section holds j: the first sections[0] with time, then
    rows, then columns (Qwen2_5_VLRotaryEmbedding; contiguous, not interleaved as in Qwen3-VL).
    """
    inverse = (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    axis = np.repeat(np.arange(3), sections)
    positions = position_ids.astype(jnp.float32)[:, axis, :]
    angles = jnp.swapaxes(positions, 1, 2) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(
    x: Float[Array, "B tokens heads head_dim"],
    cos: Table,
    sin: Table,
) -> Float[Array, "B tokens heads head_dim"]:
    """Half-rotation in the common dtype of x, cos and sin."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
