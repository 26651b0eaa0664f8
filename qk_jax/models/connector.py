"""Learnable queries and the connector between the VLM and the generator."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

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


def noisy(
    queries: Float[Array, "K D"], std: float, rng: Key[Array, ""] | None = None, examples: int = 1
) -> Float[Array, "B K D"] | Float[Array, "K D"]:
    """Queries with Gaussian noise (WeMMU, arXiv 2512.02536, draws them anew at every step).

    Args:
      queries: the learnt embeddings.
      std: of the noise.
      rng: of a draw for each of `examples`; None for the one draw that every painter takes.
      examples: B.
    """
    if rng is None:
        return queries + std * jax.random.normal(jax.random.key(0), queries.shape, jnp.float32)
    drawn = jax.random.normal(rng, (examples, *queries.shape), jnp.float32)
    return queries + std * drawn


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

    With `layers` the states of so many other layers of the VLM follow the last ones along the last
    axis. A second MLP, whose output begins at zero, reads them normalised and adds to the first: at
    the start the context is what it is without them (as in DeepGen 1.0, arXiv 2602.12205).
    """

    features: int
    layers: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, states: Float[Array, "B L states"]) -> Float[Array, "B L J"]:
        states, *others = jnp.split(states, 1 + self.layers, axis=-1)
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
        context = fc2(nn.gelu(fc1(states), approximate=True))
        if not self.layers:
            return context
        normed = [
            layers.RMSNorm(1e-6, self.dtype, name=f"layers_norm_{index}")(x)
            for index, x in enumerate(others)
        ]
        fc1 = layers.Dense(2 * width, ("embed", "mlp"), dtype=self.dtype, name="layers_fc1")
        fc2 = layers.Dense(
            self.features, ("mlp", "embed"), dtype=self.dtype,
            kernel_init=nn.initializers.zeros, name="layers_fc2",
        )  # fmt: skip
        added = fc1(jnp.concatenate(normed, axis=-1))
        return context + fc2(nn.gelu(added, approximate=True))
