"""Kernels that never write the scores to memory: splash attention on TPUs, cuDNN's on GPUs.

Both see what one device holds, without a mesh. Shapes are those of `attention.attention`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qk_jax import sharding

MIN_LENGTH = 256  # tokens; below, scores are small and a kernel pads them to whole blocks
LANES = 128  # of a TPU's vector registers: blocks of tokens are multiples
PADDED = -1  # segment of the tokens that fill the last block
Queries = Float[Array, "B query heads head_dim"]
Keys = Float[Array, "B key kv_heads head_dim"]
Segments = tuple[Int[Array, "B query"], Int[Array, "B key"]] | None


class Blocks(NamedTuple):
    """Largest blocks in tokens for heads of 128, by the VMEM that a TensorCore lends to a kernel.

    Attributes:
      query: queries at a time.
      key: keys and values fetched at a time.
      compute: keys and values multiplied at a time.
      backward: the three of the backward pass.
    """

    query: int
    key: int
    compute: int
    backward: tuple[int, int, int]

    def of(self, head_dim: int) -> Blocks:
        """Those for heads of `head_dim`: wider ones, as the autoencoder's, take more VMEM."""
        parts = -(-head_dim // LANES)
        return jax.tree.map(lambda size: max(LANES, size // parts // LANES * LANES), self)


# By JAX's device_kind. v5e, v5p and v4 lend 16 MiB by default, v6e and TPU7x 32 MiB.
# The backward pass writes queries' gradients once for each block of keys, so these are large.
_SMALL = Blocks(1024, 1024, 512, (512, 3584, 512))
_LARGE = Blocks(2048, 2048, 1024, (1024, 4096, 1024))
BLOCKS = {
    "TPU v4": _SMALL._replace(backward=(512, 2048, 512)),  # has no more than the 16 MiB in all
    "TPU v5 lite": _SMALL,
    "TPU v5e": _SMALL,
    "TPU v5": _SMALL,
    "TPU v5p": _SMALL,
    "TPU v6 lite": _LARGE,
    "TPU v6e": _LARGE,
    "TPU7x": _LARGE,
}


def block(length: int, most: int) -> int:
    """The block of at most `most` tokens that pads `length` least; the largest such.

    A multiple of LANES. Among blocks of half of `most` or more, so that few are started.
    """
    whole = _padded(length, LANES)
    if whole <= most:
        return whole
    sizes = range(most - most % LANES, most // 2 - 1, -LANES)
    return min(sizes, key=lambda size: _padded(length, size))


def _part(size: int, most: int) -> int:
    """The largest block of at most `most` tokens that divides `size`."""
    return max(part for part in range(LANES, most + 1, LANES) if size % part == 0)


def _padded(length: int, size: int) -> int:
    return -(-length // size) * size


def splash(query: Queries, key: Keys, value: Keys, segments: Segments, causal: bool) -> Queries:
    """Splash attention (jax.experimental.pallas.ops.tpu); interpreted outside a TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import

    platform, kind = sharding.target()
    batch, length, heads, dim = query.shape
    span = key.shape[1]
    most = BLOCKS.get(kind, _SMALL).of(dim)
    query_block, key_block = block(length, most.query), block(span, most.key)
    padded = (_padded(length, query_block), _padded(span, key_block))
    back_key = _part(padded[1], most.backward[1])  # divides what the forward pass padded
    one_head = (
        splash_attention.CausalMask(padded, offset=span - length)
        if causal
        else splash_attention.FullMask(padded)
    )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([one_head] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_kv_compute=_part(key_block, most.compute),
            block_q_dkv=_part(padded[0], most.backward[0]),
            block_kv_dkv=back_key,
            block_kv_dkv_compute=_part(back_key, most.backward[2]),
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=platform != "tpu",
    )
    if segments is None and padded != (length, span):
        segments = (jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, span), jnp.int32))

    def heads_first(x: jax.Array, count: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count - x.shape[1]), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)

    ids = None
    if segments is not None:
        ids = splash_attention.SegmentIds(*(
            jnp.pad(x, ((0, 0), (0, count - x.shape[1])), constant_values=PADDED)
            for x, count in zip(segments, padded, strict=True)
        ))  # fmt: skip
    inputs = named(
        heads_first(query * dim**-0.5, padded[0]),
        heads_first(key, padded[1]),
        heads_first(value, padded[1]),
    )
    out = jax.vmap(kernel)(*inputs, ids)
    return jnp.swapaxes(out, 1, 2)[:, :length].astype(query.dtype)


def named(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    """The inputs of attention under the name by which rematerialisation policies know them."""
    return tuple(checkpoint_name(x, "joint") for x in inputs)


def cudnn_supports(query: Queries) -> bool:
    """Whether cuDNN's flash attention computes this: half precision, heads of up to 128."""
    return query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128


def cudnn(query: Queries, key: Keys, value: Keys, segments: Segments, causal: bool) -> Queries:
    """cuDNN's flash attention."""
    query, key, value = named(query, key, value)
    hidden = mask(segments, query.shape[1], key.shape[1], causal)
    return jax.nn.dot_product_attention(query, key, value, mask=hidden, implementation="cudnn")


def mask(
    segments: Segments, length: int, span: int, causal: bool
) -> Bool[Array, "B_or_1 1 query key"] | None:
    """True where a query may attend; None where everything may."""
    found = None
    if segments is not None:
        found = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    if causal:
        before = jnp.tril(jnp.ones((length, span), bool), k=span - length)[None, None]
        found = before if found is None else found & before
    return found
