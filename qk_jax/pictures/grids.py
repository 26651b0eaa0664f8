"""Picture sizes as Qwen2.5-VL sees them, and the M-RoPE positions that follow; host code in numpy.

A *grid* is the (rows, columns) of a picture in 14-pixel patches; a picture token of the language
model covers MERGE x MERGE patches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qk_jax.base.errors import InputError

PATCH = 14
MERGE = 2
FACTOR = PATCH * MERGE
PATCH_DIM = 3 * 2 * PATCH * PATCH  # values of a patch: 3 channels x the frame twice x 14 x 14
MAX_ASPECT = 200
Grids = tuple[tuple[int, int], ...]


def smart_resize(
    height: int, width: int, min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280
) -> tuple[int, int]:
    """The size at which Qwen2VLImageProcessor shows a picture of [height, width] pixels.

    Multiples of 28 on both sides, the area within [min_pixels, max_pixels], aspect nearly kept.

    Raises:
      InputError: an empty picture, or one side over 200 times the other.
    """
    _check_picture(height, width)
    rows, columns = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR)
        columns = max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / FACTOR) * FACTOR
        columns = math.ceil(width * grow / FACTOR) * FACTOR
    return rows, columns


def vision_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """The size (H, W) at which a condition picture is shown to the VLM: static per bucket.

    Multiples of 28 whose area is nearest to `pixels` at the aspect of [height, width].

    Raises:
      InputError: an empty picture, or one side over 200 times the other.
    """
    _check_picture(height, width)
    scale = math.sqrt(pixels / (height * width)) / FACTOR
    return max(1, round(height * scale)) * FACTOR, max(1, round(width * scale)) * FACTOR


def _check_picture(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"a picture of {height}x{width} pixels cannot be shown to the VLM; "
            f"crop it to an aspect below {MAX_ASPECT}:1"
        )


def grid_of(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) in patches of a picture whose sides are multiples of 28 pixels.

    Raises:
      InputError: a side is no multiple of 28.
    """
    if height % FACTOR or width % FACTOR:
        raise InputError(f"{height}x{width} pixels is no multiple of {FACTOR}; use vision_size")
    return height // PATCH, width // PATCH


def picture_tokens(grids: Grids) -> int:
    """Tokens that the pictures take in the language model's sequence."""
    return sum(rows * columns for rows, columns in grids) // MERGE**2


def mrope_positions(
    input_ids: np.ndarray, attention_mask: np.ndarray, grids: Grids, config: Any
) -> np.ndarray:
    """M-RoPE positions of a batch, equal to transformers' `get_rope_index` for still pictures.

    Words advance all three axes by one; a picture whose merged grid is (h, w) occupies
    (cur, cur + row, cur + column) and advances `cur` by max(h, w). Padding gets 0.

    Args:
      input_ids: [B, S]; a row holds the tokens of all pictures of `grids`, or no picture token.
      attention_mask: [B, S], truthy where a token counts.
      grids: the pictures in patches, in the order of the text.
      config: whatever has `image_token_id`.

    Returns:
      int32 [B, 3, S], axes (time, row, column).

    Raises:
      InputError: a row's picture tokens are neither none nor those of `grids`.
    """
    positions = np.zeros((input_ids.shape[0], 3, input_ids.shape[1]), np.int32)
    masks = np.asarray(attention_mask, bool)
    for row, (ids, mask) in enumerate(zip(input_ids, masks, strict=True)):
        pictured = ids[mask] == config.image_token_id
        if pictured.any() and pictured.sum() != picture_tokens(grids):
            raise InputError(
                f"row {row} has {pictured.sum()} picture tokens, its pictures give "
                f"{picture_tokens(grids)}; build the prompt from the same picture sizes"
            )
        positions[row][:, mask] = _row_positions(pictured, grids if pictured.any() else ())
    return positions


def _row_positions(pictured: np.ndarray, grids: Grids) -> np.ndarray:
    """Positions [3, n] of a row without padding; `pictured` [n] marks picture tokens."""
    out = np.zeros((3, len(pictured)), np.int32)
    slots = np.flatnonzero(pictured)
    cursor = done = used = 0
    for rows, columns in grids:
        rows, columns = rows // MERGE, columns // MERGE
        start = slots[used]
        out[:, done:start] = cursor + np.arange(start - done)
        cursor += start - done
        used, done = used + rows * columns, start + rows * columns
        where = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"))
        out[:, start:done] = cursor + where.reshape(3, -1)
        cursor += max(rows, columns)
    out[:, done:] = cursor + np.arange(len(pictured) - done)
    return out
