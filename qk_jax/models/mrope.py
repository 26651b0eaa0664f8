"""Where pictures and words stand for Qwen2.5-VL: picture sizes, vision rotary, M-RoPE.

Everything but `mrope_cos_sin` runs on the host in numpy: it depends on shapes and token ids only.
A *grid* is the (rows, columns) of a picture in 14-pixel patches; a picture token of the language
model covers MERGE x MERGE patches.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.pictures.grids import MERGE, Grids

VISION_THETA = 10_000.0


@functools.lru_cache(maxsize=256)
def vision_rotary(grids: Grids, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) float32 [P, head_dim] of the vision tower, patches in merge-block order.

    Layout [row angles | column angles] twice, for half-rotation
    (Qwen2_5_VLVisionRotaryEmbedding). The angles are float32 like everywhere; the frequencies are
    float64 rounded once.
    """
    half = head_dim // 2
    inverse = VISION_THETA ** -(np.arange(0, half, 2) / half)
    positions = np.concatenate([_patch_positions(*grid) for grid in grids])
    angles = positions[:, :, None].astype(np.float32) * inverse.astype(np.float32)
    angles = np.tile(angles.reshape(len(positions), half), 2)
    return np.cos(angles), np.sin(angles)


def _patch_positions(rows: int, columns: int) -> np.ndarray:
    """(row, column) of each patch [rows * columns, 2], merge blocks first."""
    where = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    where = where.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return where.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def mrope_cos_sin(
    position_ids: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [B, S, head_dim] for half-rotation, computed in float32, cast to `dtype`.

    Frequency j turns with the axis whose section holds j: the first sections[0] with time, then
    rows, then columns (Qwen2_5_VLRotaryEmbedding; contiguous, not interleaved as in Qwen3-VL).

    Args:
      position_ids: int [B, 3, S].
    """
    inverse = (theta ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    axis = np.repeat(np.arange(len(sections)) % 3, sections)
    positions = position_ids.astype(jnp.float32)[:, axis, :]
    angles = jnp.swapaxes(positions, 1, 2) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Half-rotation of x [B, S, H, D] by cos, sin [B or 1, S, D], in their common dtype."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
