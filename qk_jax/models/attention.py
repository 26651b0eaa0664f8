"""One attention function for every tower; the device decides which kernel computes it.

On a TPU it is splash attention, on a GPU cuDNN's flash attention (`flash`), elsewhere, and for
sequences too short to be worth a kernel, plain XLA. All of them hide by segments: a query attends
the keys of its own segment, which is how padding, dropped pictures and several pictures in one row
are told apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qk_jax import sharding
from qk_jax.models import flash
from qk_jax.sharding.rules import Activations

NAME = "attention"  # of the result, for rematerialisation policies (`layers.remat_policy`)
_forced: list[str] = []


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """Takes the kernel 'xla', 'splash' or 'cudnn' for what is traced inside, on every device.

    Outside a TPU, splash attention is interpreted. Under 'xla' a traced program shows all matrix
    products that attention needs (`training.flops`).
    """
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choice(query: jax.Array, key: jax.Array) -> str:
    """The kernel for these shapes on the device computed for: 'xla', 'splash' or 'cudnn'."""
    if _forced:
        return _forced[-1]
    platform, kind = sharding.target()
    if max(query.shape[1], key.shape[1]) < flash.MIN_LENGTH:
        return "xla"
    if platform == "tpu" and flash.tpu(kind) is not None:
        return "splash"
    if platform == "gpu" and flash.cudnn_takes(query):
        return "cudnn"
    return "xla"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None = None,
    *,
    causal: bool = False,
    places: Activations | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      query: [B, T, H, D].
      key: [B, S, K, D], H a multiple of K; query head h reads key head h // (H / K).
      value: [B, S, K, D].
      segments: (int32 [B, T], int32 [B, S]); a query attends the keys with its own number. One
        that finds none gives finite numbers without meaning. None: everything is one segment.
      causal: also hide keys after the query; the queries are the last T of the S positions.
      places: the tower's row of the sharding table. Under a mesh the heads lie over 'tensor' and,
        where tokens are cut over 'context', over that too for as long as attention lasts: the
        devices of 'context' exchange tokens for heads (DeepSpeed-Ulysses, arXiv 2309.14509).
        None leaves the lay-out to the compiler.

    Returns:
      [B, T, H, D] in query's dtype.
    """
    name = choice(query, key)
    compute = _KERNELS[name]
    if places is None or sharding.single():
        return checkpoint_name(compute(query, key, value, segments, causal), NAME)
    batch, heads = _split(places, query.shape[0], query.shape[2])
    key, value = (_spread(x, query.shape[2], heads) for x in (key, value))
    tokens, rows = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
    if name == "xla":
        query, key, value = (
            jax.lax.with_sharding_constraint(x, tokens) for x in (query, key, value)
        )
        out = compute(query, key, value, segments, causal)
        out = jax.lax.with_sharding_constraint(out, tokens)
    else:
        given = () if segments is None else (segments,)

        def local(query: jax.Array, key: jax.Array, value: jax.Array, *segments):
            return compute(query, key, value, *(segments or (None,)), causal)

        out = jax.shard_map(
            local,
            in_specs=(tokens,) * 3 + ((rows, rows),) * len(given),
            out_specs=tokens,
            check_vma=False,  # a Pallas call does not say over which axes its result varies
        )(query, key, value, *given)
    return checkpoint_name(out, NAME)


def _split(places: Activations, rows: int, heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes of rows and of heads while attention lasts; those that do not divide are left out.

    Heads that do not divide by 'tensor' x 'context' are computed whole where they cannot be split.
    """
    batch = sharding.fitting(places.batch, rows)
    return batch, sharding.fitting((*places.heads, *places.sequence), heads)


def _spread(x: jax.Array, heads: int, axes: tuple[str, ...]) -> jax.Array:
    """Keys or values [B, S, K, D], every head as often as it takes to split them over `axes`."""
    parts, groups = sharding.size(axes), x.shape[2]
    for times in range(1, heads // groups + 1):
        if groups * times % parts == 0 and heads % (groups * times) == 0:
            return x if times == 1 else jnp.repeat(x, times, axis=2)
    raise AssertionError("heads divide, so keys repeated once per query head do")


def _xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    causal: bool,
) -> jax.Array:
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
