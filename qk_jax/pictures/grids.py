"""Picture sizes as Qwen2.5-VL sees them, and the M-RoPE positions that follow, in numpy.

A *grid* is the (rows, columns) of a picture in 14-pixel patches; a picture token of the language
model covers MERGE x MERGE patches.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Int, Shaped

from qk_jax.base.errors import InputError

PATCH = 14
MERGE = 2
FACTOR = PATCH * MERGE
PATCH_DIM = 3 * 2 * PATCH * PATCH  # values of a patch: 3 channels x the frame twice x 14 x 14
MAX_ASPECT = 200
Grids = tuple[tuple[int, int], ...]


def vision_size(height: int, width: int, pixels: int, multiple: int = 0) -> tuple[int, int]:
    """The (height, width) at which a condition picture is shown to the VLM: static per bucket.

    Multiples of 28 whose area is nearest to `pixels` at the aspect of the picture; with a
    `multiple` those nearest to `rounded_size`, as processors of Qwen2.5-VL bring a picture of that
    size to it.

    Raises:
      InputError: an empty picture, or one side over 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"a picture of {width}x{height} pixels cannot be shown to the VLM; "
            f"crop it to an aspect below {MAX_ASPECT}:1"
        )
    if multiple:
        height, width = rounded_size(height, width, pixels, multiple)
        return max(1, round(height / FACTOR)) * FACTOR, max(1, round(width / FACTOR)) * FACTOR
    scale = math.sqrt(pixels / (height * width)) / FACTOR
    return max(1, round(height * scale)) * FACTOR, max(1, round(width * scale)) * FACTOR


def rounded_size(height: int, width: int, pixels: int, multiple: int) -> tuple[int, int]:
    """(height, width) in multiples of `multiple` whose area is nearest to `pixels` at the aspect
    of a picture (`calculate_dimensions` of diffusers' QwenImageEditPlusPipeline)."""
    ratio = width / height
    wide = math.sqrt(pixels * ratio)
    high = wide / ratio
    return max(1, round(high / multiple)) * multiple, max(1, round(wide / multiple)) * multiple


def grid_of(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) in patches of a picture whose sides are multiples of 28 pixels.

    Raises:
      InputError: a side is no multiple of 28.
    """
    if height % FACTOR or width % FACTOR:
        raise InputError(f"{width}x{height} pixels is no multiple of {FACTOR}; use vision_size")
    return height // PATCH, width // PATCH


def picture_tokens(grids: Grids) -> int:
    """Tokens that the pictures take in the language model's sequence."""
    return sum(rows * columns for rows, columns in grids) // MERGE**2


def mrope_positions(
    input_ids: Int[np.ndarray, "B S"],
    attention_mask: Shaped[np.ndarray, "B S"],
    grids: Grids,
    image_token_id: int,
) -> Int[np.ndarray, "B 3 S"]:
    """M-RoPE positions (time, row, column) as transformers' `get_rope_index` gives them, int32.

    Words advance all three axes by one; a picture whose merged grid is (h, w) occupies
    (cur, cur + row, cur + column) and advances `cur` by max(h, w). Padding gets 0.

    Args:
      input_ids: a slot has the tokens of all pictures of `grids`, or no picture token.
      attention_mask: zero on padding.
      grids: the pictures in patches, in the order of the text.
      image_token_id: the token of pictures.

    Raises:
      InputError: the picture tokens of a slot are neither none nor those of `grids`.
    """
    positions = np.zeros((input_ids.shape[0], 3, input_ids.shape[1]), np.int32)
    masks = np.asarray(attention_mask, bool)
    for slot, (ids, mask) in enumerate(zip(input_ids, masks, strict=True)):
        pictured = ids[mask] == image_token_id
        if pictured.any() and pictured.sum() != picture_tokens(grids):
            raise InputError(
                f"slot {slot} has {pictured.sum()} picture tokens, its pictures give "
                f"{picture_tokens(grids)}; build the prompt from the same picture sizes"
            )
        positions[slot][:, mask] = _positions(pictured, grids if pictured.any() else ())
    return positions


def _positions(pictured: Bool[np.ndarray, " tokens"], grids: Grids) -> Int[np.ndarray, "3 tokens"]:
    """Positions of one sequence without padding; `pictured` marks picture tokens."""
    out = np.zeros((3, len(pictured)), np.int32)
    starts = np.flatnonzero(pictured)
    cursor = done = used = 0
    for rows, columns in grids:
        rows, columns = rows // MERGE, columns // MERGE
        start = int(starts[used])
        out[:, done:start] = cursor + np.arange(start - done)
        cursor += start - done
        used, done = used + rows * columns, start + rows * columns
        cells = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"))
        out[:, start:done] = cursor + cells.reshape(3, -1)
        cursor += max(rows, columns)
    out[:, done:] = cursor + np.arange(len(pictured) - done)
    return out
