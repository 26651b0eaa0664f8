"""Kernels that never write the scores to memory: splash attention on TPUs, cuDNN's on GPUs.

Both see what one device holds, without a mesh. Block sizes are a table by TPU generation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention

from qk_jax import sharding

MIN_LENGTH = 256  # tokens; below, scores are small and a kernel pads them to whole blocks
LANES = 128  # of a TPU's vector registers: blocks of tokens are multiples
PADDED = -1  # segment of the tokens that fill the last block
Segments = tuple[jax.Array, jax.Array] | None


class Blocks(NamedTuple):
    """Most tokens of a block for heads of 128, by how much VMEM a TensorCore lends to a kernel.

    Attributes:
      query: rows of scores at a time.
      key: keys and values fetched at a time.
      compute: keys and values multiplied at a time.
      backward: the three of the backward pass.
    """

    query: int
    key: int
    compute: int
    backward: tuple[int, int, int]

    def of(self, dim: int) -> Blocks:
        """Those for heads of `dim` channels: wider ones, as the autoencoder's, take more VMEM."""
        parts = -(-dim // LANES)
        sizes = (*self[:3], *self.backward)
        most = [max(LANES, size // parts // LANES * LANES) for size in sizes]
        return Blocks(*most[:3], tuple(most[3:]))


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


def tpu(kind: str) -> Blocks | None:
    """The blocks of a kind of TPU, or None for one without."""
    return BLOCKS.get(kind)


def block(length: int, most: int) -> int:
    """The block of at most `most` tokens that fills up `length` with the fewest; the largest such.

    A multiple of LANES. Among blocks of half of `most` or more, so that few are started.
    """
    whole = -(-length // LANES) * LANES
    if whole <= most:
        return whole
    sizes = range(most - most % LANES, most // 2 - 1, -LANES)
    return min(sizes, key=lambda size: -(-length // size) * size)


def _part(size: int, most: int) -> int:
    """The largest block of at most `most` tokens that divides `size`."""
    return max(part for part in range(LANES, most + 1, LANES) if size % part == 0)


def _padded(length: int, size: int) -> int:
    """`length` filled up to whole blocks."""
    return -(-length // size) * size


def _kernel(query: jax.Array, key: jax.Array, causal: bool):
    """(the kernel for shapes [B, T, H, D] and [B, S, K, D], its padded numbers of either)."""
    platform, kind = sharding.target()
    _, length, heads, dim = query.shape
    span = key.shape[1]
    table = BLOCKS.get(kind, _SMALL).of(dim)
    rows, columns = block(length, table.query), block(span, table.key)
    length_padded, span_padded = _padded(length, rows), _padded(span, columns)
    # Blocks of the backward pass divide what the forward pass padded.
    back_query = _part(length_padded, table.backward[0])
    back_key = _part(span_padded, table.backward[1])
    sizes = splash_attention.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=_part(columns, table.compute),
        block_q_dkv=back_query,
        block_kv_dkv=back_key,
        block_kv_dkv_compute=_part(back_key, table.backward[2]),
        use_fused_bwd_kernel=True,
    )
    shape = (length_padded, span_padded)
    one = (
        splash_attention.CausalMask(shape, offset=span - length)
        if causal
        else splash_attention.FullMask(shape)
    )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=platform != "tpu",
    )
    return kernel, length_padded, span_padded


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments, causal: bool
) -> jax.Array:
    """Splash attention (jax.experimental.pallas.ops.tpu); shapes as `attention.attention`.

    Outside a TPU it is interpreted.
    """
    rows, length, _, dim = query.shape
    span = key.shape[1]
    kernel, padded, span_padded = _kernel(query, key, causal)
    if segments is None and (padded, span_padded) != (length, span):
        segments = (jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, span), jnp.int32))

    def heads_first(x: jax.Array, count: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count - x.shape[1]), (0, 0), (0, 0)))
        return jnp.swapaxes(x, 1, 2)

    if segments is not None:
        counts = (padded, span_padded)
        segments = splash_attention.SegmentIds(*(
            jnp.pad(ids, ((0, 0), (0, count - ids.shape[1])), constant_values=PADDED)
            for ids, count in zip(segments, counts, strict=True)
        ))  # fmt: skip
    taken = named(
        heads_first(query * dim**-0.5, padded),
        heads_first(key, span_padded),
        heads_first(value, span_padded),
    )
    out = jax.vmap(kernel)(*taken, segments)
    return jnp.swapaxes(out, 1, 2)[:, :length].astype(query.dtype)


def named(*taken: jax.Array) -> tuple[jax.Array, ...]:
    """What attention takes, by the name that rematerialisation policies know it by."""
    return tuple(checkpoint_name(x, "joint") for x in taken)


def cudnn_takes(query: jax.Array) -> bool:
    """Whether cuDNN's flash attention computes this: half precision, heads of up to 128."""
    return query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments, causal: bool
) -> jax.Array:
    """cuDNN's flash attention; shapes as `attention.attention`."""
    query, key, value = named(query, key, value)
    hidden = mask(segments, query.shape[1], key.shape[1], causal)
    return jax.nn.dot_product_attention(query, key, value, mask=hidden, implementation="cudnn")


def mask(segments: Segments, length: int, span: int, causal: bool) -> jax.Array | None:
    """bool [B or 1, 1, T, S], True where a query may attend; None where everything may."""
    found = None
    if segments is not None:
        found = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    if causal:
        before = jnp.tril(jnp.ones((length, span), bool), k=span - length)[None, None]
        found = before if found is None else found & before
    return found
