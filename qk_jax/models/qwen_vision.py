"""The vision tower of Qwen2.5-VL (Qwen2_5_VisionTransformerPretrainedModel) for still pictures.

The sizes of pictures are in their `Windows`: constants of a program where the sizes are known, data
where one program serves several (`padded_windows`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qk_jax.models import mrope
from qk_jax.models.attention import attention
from qk_jax.models.layers import Dense, RMSNorm, scan_blocks
from qk_jax.models.mrope import Table
from qk_jax.pictures.grids import MERGE, PATCH, Grids
from qk_jax.sharding.rules import Activations
from qk_jax.sharding.specs import constrain

NORM_EPSILON = 1e-6
Heads = Float[Array, "B P heads head_dim"]
Patches = Float[Array, "B P width"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower, named as in transformers' Qwen2_5_VLVisionConfig."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@struct.dataclass
class Windows:
    """How P patches fall into windows of at most `length` patches.

    Numpy constants, the same for all slots; or arrays of each slot, with a leading axis B. Patches
    beyond those of the pictures are padding: of picture -1, in no window, and last in every order.

    Attributes:
      order: merge blocks sorted by window.
      back: the inverse of `order`.
      picture: picture of each sorted patch.
      positions: (row, column) of each sorted patch in its picture.
      slots: sorted patch in each slot of a window.
      valid: whether there is one.
      position: index of each sorted patch in the flattened windows.
      whole: whether all windows are full, and hold the sorted patches in turn.
      alone: whether all patches are of one picture.
    """

    order: Int[Array | np.ndarray, "*B_or_none P//4"]
    back: Int[Array | np.ndarray, "*B_or_none P//4"]
    picture: Int[Array | np.ndarray, "*B_or_none P"]
    positions: Int[Array | np.ndarray, "*B_or_none P 2"]
    slots: Int[Array | np.ndarray, "*B_or_none windows length"]
    valid: Bool[Array | np.ndarray, "*B_or_none windows length"]
    position: Int[Array | np.ndarray, "*B_or_none P"]
    whole: bool = struct.field(pytree_node=False, default=False)
    alone: bool = struct.field(pytree_node=False, default=False)


@functools.lru_cache(maxsize=256)
def windows_of(grids: Grids, window_size: int) -> Windows:
    """Cuts pictures into windows of `window_size` pixels, smaller at the right and lower edges."""
    side = window_size // PATCH // MERGE
    windows, pictures, used = [], [], 0
    for number, (rows, columns) in enumerate(grids):
        rows, columns = rows // MERGE, columns // MERGE
        across = -(-columns // side)
        row, column = np.divmod(np.arange(rows * columns), columns)
        windows.append(used + row // side * across + column // side)
        pictures.append(np.full(rows * columns, number))
        used += across * -(-rows // side)
    window = np.concatenate(windows)
    order = np.argsort(window, kind="stable")
    counts = np.bincount(window) * MERGE**2
    first = np.cumsum(counts) - counts
    valid = np.arange(counts.max()) < counts[:, None]
    slots = np.where(valid, first[:, None] + np.arange(counts.max()), 0)
    picture = np.repeat(np.concatenate(pictures)[order], MERGE**2)
    positions = np.concatenate([mrope.patch_positions(*grid) for grid in grids])
    return Windows(
        order, np.argsort(order), picture, positions[patches_of(order)], slots, valid,
        np.flatnonzero(valid), whole=bool(valid.all()), alone=len(grids) == 1,
    )  # fmt: skip


def patches_of(
    blocks: Int[Array | np.ndarray, "*B blocks"],
) -> Int[Array | np.ndarray, "*B blocks*4"]:
    """Indices of the patches of merge blocks, in their order."""
    return (blocks[..., None] * MERGE**2 + np.arange(MERGE**2)).reshape(*blocks.shape[:-1], -1)


def padded_windows(grids: Grids, window_size: int, patches: int, shape: tuple[int, int]) -> Windows:
    """`windows_of` pictures padded to so many patches and to (windows, length) of `shape`."""
    exact = windows_of(grids, window_size)
    count, length = exact.slots.shape
    real = len(exact.picture)
    table = ((0, shape[0] - count), (0, shape[1] - length))
    valid = np.pad(exact.valid, table)
    blocks = np.arange(real // MERGE**2, patches // MERGE**2)
    padded = Windows(
        order=np.concatenate([exact.order, blocks]),
        back=np.concatenate([exact.back, blocks]),
        picture=np.pad(exact.picture, (0, patches - real), constant_values=-1),
        positions=np.pad(exact.positions, ((0, patches - real), (0, 0))),
        slots=np.pad(exact.slots, table),
        valid=valid,
        position=np.pad(np.flatnonzero(valid), (0, patches - real)),
    )
    return jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.int32), padded)


def _taken(x: Array, index: Array | np.ndarray) -> Array:
    """x [B, tokens, ...] at `index` [n] of all slots alike, or [B, n] of each."""
    if index.ndim == 1:
        return x[:, index]
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _window_attention(
    query: Heads, key: Heads, value: Heads, windows: Windows, activations: Activations | None
) -> Heads:
    batch, _, heads, dim = query.shape
    count, length = windows.slots.shape[-2:]
    slots = windows.slots.reshape(*windows.slots.shape[:-2], count * length)

    def cut(x: Array) -> Array:
        x = x if windows.whole else _taken(x, slots)
        return x.reshape(batch * count, length, heads, dim)

    ids = None
    if not windows.whole:
        valid = jnp.broadcast_to(windows.valid.astype(np.int32), (batch, count, length))
        ids = (valid.reshape(-1, length),) * 2
    out = attention(cut(query), cut(key), cut(value), ids, activations=activations)
    out = out.reshape(batch, count * length, heads, dim)
    return out if windows.whole else _taken(out, windows.position)


def _picture_attention(
    query: Heads, key: Heads, value: Heads, windows: Windows, activations: Activations | None
) -> Heads:
    ids = None
    if not windows.alone:
        ids = (jnp.broadcast_to(windows.picture.astype(np.int32), query.shape[:2]),) * 2
    return attention(query, key, value, ids, activations=activations)


class VisionAttention(nn.Module):
    """Self-attention with fused q|k|v and rotary in float32."""

    config: VisionConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(
        self, x: Patches, cos: Table, sin: Table, windows: Windows, full: Bool[Array, ""]
    ) -> Patches:
        """Attends within windows, or within pictures where `full`; patches sorted by window."""
        cfg = self.config
        fused = Dense(3 * cfg.hidden_size, ("embed", "heads"), dtype=self.dtype, name="qkv")(x)
        fused = checkpoint_name(fused, "qkv")
        fused = fused.reshape(*x.shape[:2], 3, cfg.num_heads, cfg.head_dim)
        query, key, value = (fused[:, :, i] for i in range(3))
        query = mrope.rotate(query.astype(jnp.float32), cos, sin).astype(self.dtype)
        key = mrope.rotate(key.astype(jnp.float32), cos, sin).astype(self.dtype)
        out = jax.lax.cond(
            full,
            functools.partial(_picture_attention, windows=windows, activations=self.activations),
            functools.partial(_window_attention, windows=windows, activations=self.activations),
            query, key, value,
        )  # fmt: skip
        out = out.reshape(x.shape)
        out = Dense(cfg.hidden_size, ("heads", "embed"), dtype=self.dtype, name="proj")(out)
        return checkpoint_name(out, "out")


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); `down` are the axes of the last kernel."""

    hidden: int
    use_bias: bool
    dtype: Any = jnp.float32
    activations: Activations | None = None
    down: tuple[str | None, str | None] = ("mlp", "embed")  # 3420 hidden features divide by little

    @nn.compact
    def __call__(self, x: Float[Array, "B tokens width"]) -> Float[Array, "B tokens width"]:
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)

        def hidden(name: str) -> Array:
            y = dense(self.hidden, ("embed", "mlp"), name=name)(x)
            y = constrain(y, self.activations, "batch", "sequence", "mlp")
            return checkpoint_name(y, "mlp")

        mixed = jax.nn.silu(hidden("gate_proj")) * hidden("up_proj")
        return checkpoint_name(dense(x.shape[-1], self.down, name="down_proj")(mixed), "out")


class VisionBlock(nn.Module):
    """Pre-norm attention and gated MLP."""

    config: VisionConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(
        self, x: Patches, cos: Table, sin: Table, windows: Windows, full: Bool[Array, ""]
    ) -> tuple[Patches, None]:
        cfg, dtype, activations = self.config, self.dtype, self.activations
        x = constrain(x, activations, "batch", "sequence", "embed")
        normed = RMSNorm(NORM_EPSILON, dtype, name="norm1")(x)
        attend = VisionAttention(cfg, dtype, activations, name="attn")
        x = x + attend(normed, cos, sin, windows, full)
        normed = RMSNorm(NORM_EPSILON, dtype, name="norm2")(x)
        mlp = GatedMLP(cfg.intermediate_size, True, dtype, activations, name="mlp")
        return x + mlp(normed), None


class PatchEmbed(nn.Module):
    """The Conv3d of transformers as one matrix product over flattened patches."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, patches: Float[Array, "B P 1176"]) -> Patches:
        axes = ("patch", "embed")
        return Dense(self.features, axes, use_bias=False, dtype=self.dtype, name="proj")(patches)


class Merger(nn.Module):
    """2x2 patches -> one token of the language model's width, with an exact GELU between."""

    config: VisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Patches) -> Float[Array, "B P//4 D"]:
        cfg = self.config
        x = RMSNorm(NORM_EPSILON, self.dtype, name="ln_q")(x)
        x = x.reshape(x.shape[0], -1, cfg.hidden_size * MERGE**2)
        x = Dense(x.shape[-1], ("embed", "mlp"), dtype=self.dtype, name="mlp_0")(x)
        x = jax.nn.gelu(x, approximate=False)
        return Dense(cfg.out_hidden_size, ("mlp", "embed"), dtype=self.dtype, name="mlp_2")(x)


class VisionTower(nn.Module):
    """Pictures as patches -> tokens for the language model.

    `remat` names the activations that are kept (`layers.remat_policy`), `activations` has their
    sharding.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    activations: Activations | None = None

    @nn.compact
    def __call__(
        self, pixel_values: Float[Array, "B P 1176"], pictures: Grids | Windows
    ) -> Float[Array, "B P//4 D"]:
        """Tokens of the pictures in turn, each in row-major order; those of padding follow.

        The patches of a picture are in merge-block order, as Qwen2VLImageProcessor gives them.

        Args:
          pixel_values: patches of the pictures of each slot.
          pictures: their grids, static; or their windows.
        """
        cfg = self.config
        windows = (
            pictures if isinstance(pictures, Windows) else windows_of(pictures, cfg.window_size)
        )
        cos, sin = (
            table.reshape(-1, *table.shape[-2:])
            for table in mrope.vision_rotary(windows.positions, cfg.head_dim)
        )
        x = PatchEmbed(cfg.hidden_size, self.dtype, name="patch_embed")(pixel_values)
        x = _taken(x, patches_of(windows.order))
        full = jnp.asarray([i in cfg.fullatt_block_indexes for i in range(cfg.depth)])
        stack = scan_blocks(VisionBlock, cfg.depth, self.remat, (*(nn.broadcast,) * 3, 0))
        blocks = stack(cfg, self.dtype, self.activations, name="blocks")
        x, _ = blocks(x, cos, sin, windows, full)
        return _taken(Merger(cfg, self.dtype, name="merger")(x), windows.back)
