"""One attention function for every tower; softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads.

    Args:
      query: [B, T, H, D].
      key: [B, S, K, D], H a multiple of K; query head h reads key head h // (H / K).
      value: [B, S, K, D].
      mask: bool, broadcastable to [B, H, T, S]; True may be attended. A query that may attend
        nothing gives finite numbers without meaning.
      causal: also hide keys after the query; the queries are the last T of the S positions.

    Returns:
      [B, T, H, D] in query's dtype.
    """
    batch, length, heads, dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = scores * dim**-0.5
    if mask is not None:
        rows, per_head = mask.shape[0], mask.shape[1] != 1
        mask = mask.reshape(rows, groups, -1, *mask.shape[2:]) if per_head else mask[:, :, None]
    if causal:
        span = key.shape[1]
        before = jnp.tril(jnp.ones((length, span), bool), k=span - length)[None, None, None]
        mask = before if mask is None else mask & before
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, value)
    return out.reshape(batch, length, heads, dim)
