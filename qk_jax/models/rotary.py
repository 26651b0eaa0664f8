"""Rotary positions of the diffusion transformer: position laws, and the rotation.

A position is an integer triple (frame, row, column). All pictures of an example share one
coordinate space: a law gives the positions of a picture to be edited (a *source*) and of pictures
of subjects (*references*) relative to the picture that is painted (the *target*).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qk_jax.pictures.roles import REFERENCE

SOURCE_MODES = ("reflect", "reflect_minus_one", "translate")
Grid = tuple[int, int]  # (rows, columns) of a picture in packed tokens (pixels / 16)


@dataclasses.dataclass(frozen=True)
class PositionLaw:
    """Positions of the tokens of each picture.

    Attributes:
      kind: 'shifted' is the shifted 2-D law of Query-Kontext (arXiv 2509.26641, section 5.3);
        'qwen_image' is the law of public Qwen-Image weights (diffusers' QwenEmbedRope).
      source_mode: 'shifted' only. 'reflect' mirrors a source into the negative quadrant,
        (-i, -j); 'reflect_minus_one' does so without sharing an index with the target,
        (-1-i, -1-j); 'translate' moves it there by its own size, which keeps the offset between
        matching tokens constant.
      index_base: 'shifted' only. First row and column index of a picture, 0 or 1.

    Raises:
      ValueError: a field has a value that is none of these.
    """

    kind: Literal["shifted", "qwen_image"] = "shifted"
    source_mode: Literal["reflect", "reflect_minus_one", "translate"] = "reflect"
    index_base: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("shifted", "qwen_image"):
            raise ValueError(f"position law kind {self.kind!r} is not 'shifted' or 'qwen_image'")
        if self.source_mode not in SOURCE_MODES:
            raise ValueError(
                f"source_mode {self.source_mode!r} is not {', '.join(SOURCE_MODES[:-1])} or "
                f"{SOURCE_MODES[-1]}"
            )
        if self.index_base not in (0, 1):
            raise ValueError(f"index_base {self.index_base!r} is not 0 or 1")


def _cells(grid: Grid) -> np.ndarray:
    """(row, column) of a picture's tokens in row-major order: int [rows * columns, 2], from 0."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)


def _centred(frame: int, grid: Grid) -> np.ndarray:
    """Rows and columns around zero, the picture's number as frame: [rows * columns, 3]."""
    cells = _cells(grid) - [side - side // 2 for side in grid]
    return np.pad(cells, ((0, 0), (1, 0)), constant_values=frame)


def _shifted(
    law: PositionLaw, target: Grid, conditions: Sequence[Grid], roles: Array | np.ndarray
) -> Array:
    """The shifted law: rows and columns [B, N, 2].

    The first reference begins where the target ends, each further one where the one before it
    ended, on both axes: for equal sizes that is the paper's (i + w n, j + h n) with n from 1,
    and unequal sizes never overlap. Further sources move on in the negative quadrant likewise.
    """
    batch = roles.shape[0]
    cells = jnp.asarray(_cells(target) + law.index_base, jnp.int32)
    parts = [jnp.broadcast_to(cells, (batch, *cells.shape))]
    past_references = jnp.broadcast_to(jnp.asarray(target, jnp.int32), (batch, 2))
    past_sources = jnp.zeros((batch, 2), jnp.int32)
    for index, grid in enumerate(conditions):
        size = jnp.asarray(grid, jnp.int32)
        cells = jnp.asarray(_cells(grid) + law.index_base, jnp.int32)
        negative = {
            "reflect": -cells,
            "reflect_minus_one": -1 - cells,
            "translate": cells - size,
        }[law.source_mode]
        is_reference = (roles[:, index] == REFERENCE)[:, None]
        parts.append(
            jnp.where(
                is_reference[:, :, None],
                cells + past_references[:, None],
                negative - past_sources[:, None],
            )
        )
        past_references = past_references + jnp.where(is_reference, size, 0)
        past_sources = past_sources + jnp.where(is_reference, 0, size)
    return jnp.concatenate(parts, axis=1)


def image_positions(
    law: PositionLaw,
    target_grid: Grid,
    condition_grids: Sequence[Grid],
    roles: Int[Array | np.ndarray, "B n"],
) -> Int[Array, "B N 3"]:
    """Positions (frame, row, column) of the image tokens [target ; condition pictures].

    Args:
      law: the position law.
      target_grid: that of the target.
      condition_grids: of each condition picture, in the order of their tokens.
      roles: SOURCE or REFERENCE for each condition picture; may be traced, so that a change of
        role needs no compilation. The 'qwen_image' law ignores roles.

    Raises:
      ValueError: the roles are not those of the condition pictures.
    """
    if roles.shape[1] != len(condition_grids):
        raise ValueError(f"roles {roles.shape} are not those of {len(condition_grids)} pictures")
    if law.kind == "qwen_image":
        grids = (target_grid, *condition_grids)
        centred = np.concatenate([_centred(n, grid) for n, grid in enumerate(grids)])
        positions = jnp.asarray(centred, jnp.int32)
        return jnp.broadcast_to(positions, (roles.shape[0], *positions.shape))
    cells = _shifted(law, target_grid, condition_grids, roles)
    return jnp.pad(cells, ((0, 0), (0, 0), (1, 0)))


def text_positions(
    law: PositionLaw,
    mask: Bool[Array | np.ndarray, "B L"],
    target_grid: Grid,
    condition_grids: Sequence[Grid],
) -> Int[Array, "*B_or_none L 3"]:
    """Positions of the context tokens that are real, by their `mask`; those of padding are of no
    meaning.

    Zero in the shifted law, whose references occupy the diagonal of the positive quadrant. In the
    Qwen-Image law the k-th real token has the same index on all axes, k beyond the largest half
    side, wherever the padding is.
    """
    if law.kind == "shifted":
        return jnp.zeros((mask.shape[1], 3), jnp.int32)
    start = max(side // 2 for grid in (target_grid, *condition_grids) for side in grid)
    number = jnp.maximum(jnp.cumsum(jnp.asarray(mask, jnp.int32), axis=1) - 1, 0)
    return jnp.broadcast_to(start + number[..., None], (*mask.shape, 3))


def cos_sin(
    positions: Int[Array, "*any 3"], axes_dims: Sequence[int], theta: float = 10000.0
) -> tuple[Float[Array, "*any half_dim"], Float[Array, "*any half_dim"]]:
    """Rotary tables (cos, sin) of 3-axis positions, float32: [frame ; row ; column] frequencies.

    Args:
      positions: (frame, row, column).
      axes_dims: even channel count of each axis; they sum to the head dimension.
      theta: base of the frequencies theta^(-2k / axis channels).
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        # Frequencies are rounded once, from float64: their error is what grows with the position.
        frequency = np.exp(-math.log(theta) * np.arange(0, dim, 2, dtype=np.float64) / dim)
        position = positions[..., axis, None].astype(jnp.float32)
        angles.append(position * jnp.asarray(frequency, jnp.float32))
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_interleaved(
    x: Float[Array, "B tokens heads head_dim"],
    cos: Float[Array, "*B_or_none tokens head_dim//2"],
    sin: Float[Array, "*B_or_none tokens head_dim//2"],
) -> Float[Array, "B tokens heads head_dim"]:
    """Rotates channel pairs (2k, 2k+1) of x in float32 by the angles of cos, sin; x's dtype."""
    cos, sin = (jnp.repeat(table, 2, axis=-1)[..., None, :] for table in (cos, sin))
    # (a, b) -> (-b, a) as a product with a constant, which is exact: to separate the two halves of
    # each pair would cost a TPU a copy of x in an order that nothing else wants.
    turn = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]]).astype(np.float32)
    turned = jnp.matmul(  # at full precision, or float32 would be rounded to bfloat16
        x, turn.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32
    )
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
