"""Learnable queries and the connector between the VLM and the generator."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qk_jax.models import layers


class Queries(nn.Module):
    """K learnable embeddings that the VLM turns into the kontext (paper, section 3; K = 128).

    embedding [K, D], drawn from a normal of standard deviation `std`.
    """

    num_queries: int
    features: int
    std: float = 0.02

    @nn.compact
    def __call__(self) -> jax.Array:
        init = layers.boxed(nn.initializers.normal(self.std), ("queries", "embed"))
        return self.param("embedding", init, (self.num_queries, self.features), jnp.float32)


class Connector(nn.Module):
    """Two-layer MLP D -> 2 D -> D_out with a tanh GELU, applied to [text ; kontext] token-wise.

    With D = D_out = 3584 it has 51.4 M parameters, the size the paper gives; the output width stays
    that of the VLM so that one connector serves the head and, after it, the large generator, each
    of which normalises and projects its own context (`txt_norm`, `txt_in`).
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        """states [B, T, D] -> [B, T, features]."""
        hidden = 2 * states.shape[-1]
        x = layers.Dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="fc1")(states)
        x = nn.gelu(x, approximate=True)
        return layers.Dense(self.features, ("mlp", "embed"), dtype=self.dtype, name="fc2")(x)
