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


def _cells(grid: Array, tokens: int) -> Array:
    """(row, column) of a picture's tokens in row-major order, from 0: [*any, tokens, 2].

    Args:
      grid: [*any, 2].
      tokens: of the picture, with its padding, whose cells are below the last row.
    """
    number, columns = jnp.arange(tokens), grid[..., 1, None]
    return jnp.stack([number // columns, number % columns], axis=-1)


def _centred(grids: Array, tokens: Sequence[int]) -> Array:
    """The Qwen-Image law: rows and columns around zero, a picture's number as frame [*any, N, 3]"""
    parts = []
    for frame, count in enumerate(tokens):
        grid = grids[..., frame, :]
        cells = _cells(grid, count) - (grid - grid // 2)[..., None, :]
        parts.append(jnp.concatenate([jnp.full_like(cells[..., :1], frame), cells], axis=-1))
    return jnp.concatenate(parts, axis=-2)


def _shifted(
    law: PositionLaw, grids: Array, tokens: Sequence[int], roles: Array | np.ndarray
) -> Array:
    """The shifted law: rows and columns [B, N, 2].

    The first reference begins where the target ends, each further one where the one before it
    ended, on both axes: for equal sizes that is the paper's (i + w n, j + h n) with n from 1,
    and unequal sizes never overlap. Further sources move on in the negative quadrant likewise.
    """
    grids = jnp.broadcast_to(grids, (roles.shape[0], *grids.shape[-2:]))
    parts = [_cells(grids[:, 0], tokens[0]) + law.index_base]
    past_references, past_sources = grids[:, 0], jnp.zeros_like(grids[:, 0])
    for index, count in enumerate(tokens[1:]):
        size = grids[:, index + 1]
        cells = _cells(size, count) + law.index_base
        negative = {
            "reflect": -cells,
            "reflect_minus_one": -1 - cells,
            "translate": cells - size[:, None],
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
    grids = (target_grid, *condition_grids)
    return padded_positions(law, np.array(grids, np.int32), tuple(map(math.prod, grids)), roles)


def padded_positions(
    law: PositionLaw,
    grids: Int[Array | np.ndarray, "*B_or_none pictures 2"],
    tokens: Sequence[int],
    roles: Int[Array | np.ndarray, "B n"],
) -> Int[Array, "B N 3"]:
    """`image_positions` of pictures whose grids are data, each padded to so many tokens.

    Args:
      law: the position law.
      grids: of the target and of the condition pictures, of all slots alike or of each.
      tokens: of each picture, at least those of its grid; the positions of padding are of no
        meaning.
      roles: of the condition pictures.

    Raises:
      ValueError: the roles are not those of the condition pictures.
    """
    if roles.shape[1] != len(tokens) - 1:
        raise ValueError(f"roles {roles.shape} are not those of {len(tokens) - 1} pictures")
    grids = jnp.asarray(grids, jnp.int32)
    if law.kind == "qwen_image":
        positions = _centred(grids, tokens)
        return jnp.broadcast_to(positions, (roles.shape[0], *positions.shape[-2:]))
    return jnp.pad(_shifted(law, grids, tokens, roles), ((0, 0), (0, 0), (1, 0)))


def real_tokens(
    grids: Int[Array | np.ndarray, "*B_or_none pictures 2"], tokens: Sequence[int]
) -> Bool[Array, "*B_or_none N"]:
    """False on the padding of `padded_positions`."""
    areas = jnp.prod(jnp.asarray(grids), axis=-1)
    parts = [jnp.arange(count) < areas[..., index, None] for index, count in enumerate(tokens)]
    return jnp.concatenate(parts, axis=-1)


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
    return text_positions_after(law, mask, np.array((target_grid, *condition_grids), np.int32))


def text_positions_after(
    law: PositionLaw,
    mask: Bool[Array | np.ndarray, "B L"],
    grids: Int[Array | np.ndarray, "*slots pictures 2"],
) -> Int[Array, "*B_or_none L 3"]:
    """`text_positions` beside pictures whose grids are data, of all slots alike or of each."""
    if law.kind == "shifted":
        return jnp.zeros((mask.shape[1], 3), jnp.int32)
    start = jnp.max(jnp.asarray(grids, jnp.int32) // 2, axis=(-2, -1))
    number = jnp.maximum(jnp.cumsum(jnp.asarray(mask, jnp.int32), axis=1) - 1, 0)
    return jnp.broadcast_to((start[..., None] + number)[..., None], (*mask.shape, 3))


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
