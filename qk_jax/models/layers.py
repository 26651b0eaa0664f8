"""The few layers that every tower shares, with logical axes attached in one place."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.sharding.rules import Rules

LOGICAL_AXES = frozenset(field.name for field in dataclasses.fields(Rules))

Axes = tuple[str | None, ...]
Initializer = Callable[..., Any]
lecun = nn.initializers.lecun_normal()


def boxed(init: Initializer, axes: Axes) -> Initializer:
    """An initializer whose parameter carries logical `axes`.

    Raises:
      ValueError: an axis is not in LOGICAL_AXES; Linen would silently replicate it.
    """
    unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXES]
    if unknown:
        raise ValueError(
            f"logical axes {unknown} are unknown; the known are {sorted(LOGICAL_AXES)}"
        )
    return nn.with_logical_partitioning(init, axes)


class Dense(nn.Module):
    """y = x W + b, plus x A B when the `lora` collection holds this module's factors.

    kernel [in, out], bias [out]; lora_a [in, r], lora_b [r, out] with the scale alpha / r already
    in lora_b (`lora.scaled`), so that no model knows whether it is adapted (peft's LoraLayer).

    With `to_heads` the output is [..., heads, out / heads], with `from_heads` the input
    [..., heads, in / heads]. The product itself then has the axis of heads, so that a compiler may
    order it before that of the tokens, as attention wants it, without a copy.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    to_heads: int | None = None
    from_heads: bool = False
    dtype: Any = jnp.float32
    kernel_init: Initializer = lecun
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*any"]) -> Float[Array, "*features"]:
        entering = x.shape[-2:] if self.from_heads else x.shape[-1:]
        leaving: tuple[int, ...] = (self.features,)
        if self.to_heads:
            leaving = (self.to_heads, self.features // self.to_heads)
        shape = (math.prod(entering), self.features)
        kernel = self.param("kernel", boxed(self.kernel_init, self.axes), shape, jnp.float32)
        x = x.astype(self.dtype)
        kernel = kernel.astype(self.dtype).reshape(entering + leaving)
        y = jnp.tensordot(x, kernel, len(entering))
        if self.has_variable("lora", "lora_a"):
            a: jax.Array = self.get_variable("lora", "lora_a").astype(self.dtype)
            b: jax.Array = self.get_variable("lora", "lora_b").astype(self.dtype)
            low = jnp.tensordot(x, a.reshape(*entering, -1), len(entering))
            low = checkpoint_name(low, "lora")
            y = y + jnp.tensordot(low, b.reshape(-1, *leaving), 1)
        if self.use_bias:
            bias = self.param("bias", boxed(self.bias_init, self.axes[1:]), shape[1:], jnp.float32)
            y = y + bias.astype(self.dtype).reshape(leaving)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale; statistics in float32, cast, then scaled (Qwen2RMSNorm's order)."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*any width"]) -> Float[Array, "*any width"]:
        ones = nn.initializers.ones_init()
        scale = self.param("scale", boxed(ones, ("norm",)), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Embed(nn.Module):
    """A table [vocab, D] of token embeddings."""

    num_embeddings: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = boxed(nn.initializers.normal(0.02), ("vocab", "embed"))
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return jnp.take(self.embedding.astype(self.dtype), ids, axis=0)

    def attend(self, x: Float[Array, "B S D"]) -> Float[Array, "B S vocab"]:
        """Logits with tied weights."""
        return x @ self.embedding.astype(self.dtype).T


def layer_norm(x: Float[Array, "*any width"], epsilon: float = 1e-6) -> Float[Array, "*any width"]:
    """LayerNorm without parameters over the last axis; statistics in float32, float32 out."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


@jax.custom_jvp
def gelu_tanh(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Tanh-approximated GELU (jax.nn.gelu) that keeps its derivative for the backward pass.

    As large as x, which is kept otherwise, and saves computing the tanh anew for each gradient
    that reads the result.
    """
    return jax.nn.gelu(x, approximate=True)


@gelu_tanh.defjvp
def _gelu_tanh_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    plain = functools.partial(jax.nn.gelu, approximate=True)
    y, slope = jax.jvp(plain, (x,), (jnp.ones_like(x),))
    return y, slope * tangent


# What a block may keep for its backward pass, by the name that its tensors carry: projections of
# queries, keys and values before their norms; the inputs of attention, after norms and rotation;
# the result of attention (and the softmax statistics of splash attention); what each residual
# branch adds; the MLP before its activation; adapters' inputs at their low rank.
REMAT_NAMES = ("qkv", "joint", "attention", "out", "mlp", "lora")
ON_HOST = "host:"


def remat_policy(name: str) -> Any:
    """The policy of jax.checkpoint called `name`; None recomputes the whole block.

    Args:
      name: 'full', which keeps nothing but a block's input; some of REMAT_NAMES, joined by '+',
        which are kept, those that begin with 'host:' in the host's memory
        ('attention+out+host:mlp'); or an attribute of jax.checkpoint_policies.

    Raises:
      InputError: none of these.
    """
    if name == "full":
        return None
    policy = getattr(jax.checkpoint_policies, name, None)
    if policy is not None:
        return policy
    parts = name.split("+")
    kept = [part for part in parts if not part.startswith(ON_HOST)]
    moved = [part.removeprefix(ON_HOST) for part in parts if part.startswith(ON_HOST)]
    unknown = sorted(set(kept + moved) - set(REMAT_NAMES))
    if unknown:
        raise InputError(
            f"remat {name!r}: {', '.join(map(repr, unknown))} unknown; give 'full', some of "
            f"{', '.join(REMAT_NAMES)} joined by '+', each with '{ON_HOST}' before it to keep it "
            "in the host's memory, or a name of jax.checkpoint_policies"
        )
    if not moved:
        return jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=moved,
        offload_src="device",
        offload_dst="pinned_host",
    )


def scan_blocks(
    block: type[nn.Module], layers: int, policy: str | None, in_axes: Sequence[Any]
) -> Callable[..., Any]:
    """`block` scanned over parameters [layers, ...], rematerialised by `policy`.

    Args:
      block: a module whose __call__(carry, *inputs) returns (carry, output); outputs are stacked.
      layers: length of the scan; parameters get a leading axis 'layers' of that size.
      policy: None keeps every activation; else see `remat_policy`.
      in_axes: per input after the carry: nn.broadcast, or 0 for a per-layer input [layers, ...].
    """
    if policy is not None:
        block = nn.remat(block, policy=remat_policy(policy), prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=tuple(in_axes),
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def init_params(module: nn.Module, rng: jax.Array, *args: Any, **kwargs: Any) -> Tree:
    """Plain-dict parameters of `module` (boxes removed)."""
    return meta.unbox(module.init(rng, *args, **kwargs)["params"])


def abstract_params(module: nn.Module, *args: Any, **kwargs: Any) -> Tree:
    """Shapes of `module`'s parameters without computing any: a tree of LogicallyPartitioned boxes.

    flax.core.meta.unbox gives ShapeDtypeStructs.
    """
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    return shapes["params"]
