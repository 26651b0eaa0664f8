"""One attention function for every tower; the device decides which kernel computes it.

On a TPU it is splash attention, on a GPU cuDNN's flash attention (`flash`), elsewhere, and for
sequences too short to be worth a kernel, plain XLA. All of them mask by segments: a query attends
the keys of its own segment, which is how padding, dropped pictures and several pictures in one
sequence are told apart.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qk_jax import sharding
from qk_jax.models import flash
from qk_jax.models.flash import Keys, Queries, Segments
from qk_jax.sharding.rules import Activations

NAME = "attention"  # of the result, for rematerialisation policies (`layers.remat_policy`)


def choice(query: Queries, key: Keys) -> str:
    """The kernel for these shapes on the device computed for: 'xla', 'splash' or 'cudnn'."""
    platform, kind = sharding.target()
    if max(query.shape[1], key.shape[1]) < flash.MIN_LENGTH:
        return "xla"
    if platform == "tpu" and kind in flash.BLOCKS:
        return "splash"
    if platform == "gpu" and flash.cudnn_supports(query):
        return "cudnn"
    return "xla"


def attention(
    query: Queries,
    key: Keys,
    value: Keys,
    segments: Segments = None,
    *,
    causal: bool = False,
    activations: Activations | None = None,
) -> Queries:
    """Scaled dot-product attention with grouped key/value heads, in query's dtype.

    Args:
      query: [B, query, heads, head_dim].
      key: [B, key, kv_heads, head_dim], heads a multiple of kv_heads; query head h reads key head
        h // (heads / kv_heads).
      value: as key.
      segments: (int32 [B, query], int32 [B, key]); a query attends the keys with its own number.
        The result of one that finds none is finite and meaningless. None: one segment.
      causal: also hide keys after the query; the queries are the last positions of the keys.
      activations: the sharding of the tower's activations. Under a mesh heads are sharded over
        'tensor' and, where tokens are sharded over 'context', over that too for as long as
        attention lasts: the devices of 'context' exchange tokens for heads (DeepSpeed-Ulysses,
        arXiv 2309.14509). None leaves the sharding to the compiler.
    """
    name = choice(query, key)
    compute = functools.partial(_KERNELS[name], causal=causal)
    if activations is None or sharding.single():
        return checkpoint_name(compute(query, key, value, segments), NAME)
    # Mesh axes that do not divide are left out: what cannot be sharded is computed by all.
    batch = sharding.fitting(activations.batch, query.shape[0])
    heads = sharding.fitting((*activations.heads, *activations.sequence), query.shape[2])
    key, value = (_repeated(x, query.shape[2], sharding.size(heads)) for x in (key, value))
    tokens = PartitionSpec(batch, None, heads, None)
    if name == "xla":
        query, key, value = (
            jax.lax.with_sharding_constraint(x, tokens) for x in (query, key, value)
        )
        out = compute(query, key, value, segments)
        out = jax.lax.with_sharding_constraint(out, tokens)
    else:
        out = jax.shard_map(
            compute,
            in_specs=(tokens, tokens, tokens, PartitionSpec(batch, None)),
            out_specs=tokens,
            check_vma=False,  # a Pallas call does not say over which axes its result varies
        )(query, key, value, segments)
    return checkpoint_name(out, NAME)


def _repeated(x: jax.Array, heads: int, parts: int) -> jax.Array:
    """Keys or values, every head repeated as often as it takes to shard them in `parts`."""
    groups = x.shape[2]
    for times in range(1, heads // groups + 1):
        if groups * times % parts == 0 and heads % (groups * times) == 0:
            return x if times == 1 else jnp.repeat(x, times, axis=2)
    raise AssertionError("heads divide, so keys repeated once per query head do")


def _xla(query: Queries, key: Keys, value: Keys, segments: Segments, causal: bool) -> Queries:
    """The definition, with the softmax in float32."""
    query, key, value = flash.named(query, key, value)
    batch, length, heads, dim = query.shape
    span, groups = key.shape[1:3]
    query = query.reshape(batch, length, groups, heads // groups, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = scores * dim**-0.5
    mask = flash.mask(segments, length, span, causal)
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, value)
    return out.reshape(batch, length, heads, dim)


# What one device computes, by name.
_KERNELS = {"xla": _xla, "splash": flash.splash, "cudnn": flash.cudnn}
