"""Learnable queries and the connector between the VLM and the generator."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qk_jax.models import layers


class Queries(nn.Module):
    """K learnable embeddings that the VLM turns into the kontext (paper, section 3; K = 128).

    They are drawn from a normal of standard deviation `std`.
    """

    num_queries: int
    features: int
    std: float = 0.02

    @nn.compact
    def __call__(self) -> Float[Array, "K D"]:
        init = layers.boxed(nn.initializers.normal(self.std), ("queries", "embed"))
        return self.param("embedding", init, (self.num_queries, self.features), jnp.float32)


def _plus_minus(axis: int) -> layers.Initializer:
    """[I, -I] along `axis`: two such layers around a GELU are the identity."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        del key
        eye = jnp.eye(min(shape), dtype=dtype)
        return jnp.concatenate([eye, -eye], axis=axis)

    return init


class Connector(nn.Module):
    """Two-layer MLP D -> 2 D -> J with a tanh GELU, applied to [text ; kontext] token-wise.

    With D = J it starts as the identity, since gelu(x) - gelu(-x) = x: a generator that was
    pretrained on the VLM's own states (Qwen-Image) understands the text from the first step, and
    what stage 1 adds is a change to it. With another width the start is random.

    With D = J = 3584 it has 51.4 M parameters, the size the paper gives; the output width stays
    that of the VLM so that one connector serves the head and, after it, the large generator, each
    of which normalises and projects its own context (`txt_norm`, `txt_in`).
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "B L D"]) -> Float[Array, "B L J"]:
        width = states.shape[-1]
        first, second = layers.lecun, layers.lecun
        if self.features == width:
            first, second = _plus_minus(axis=1), _plus_minus(axis=0)
        fc1 = layers.Dense(
            2 * width, ("embed", "mlp"), dtype=self.dtype, kernel_init=first, name="fc1"
        )
        fc2 = layers.Dense(
            self.features, ("mlp", "embed"), dtype=self.dtype, kernel_init=second, name="fc2"
        )
        return fc2(nn.gelu(fc1(states), approximate=True))
