"""Low-rank adapters with peft's semantics, applied from outside the model and merged exactly.

An adapter is a tree of its own that mirrors module paths: where the parameters hold
`.../to_q/kernel` [layers, in, out], the adapter holds `.../to_q/lora_a` [layers, in, rank] and
`lora_b` [layers, rank, out]. `layers.Dense` adds x A B when the `lora` collection has these; the
factor alpha / rank is folded into B by `scaled`, so that the trained leaves stay those of peft
(`LoraLayer`).
"""

from __future__ import annotations

import difflib
import re
import zlib
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Key

from qk_jax.base.errors import InputError
from qk_jax.base.trees import flatten, unflatten
from qk_jax.base.types import Tree

# What the VLM adapts in stage 1: every Linear of the language model's blocks.
VLM_TARGETS = r"(.*/)?language_model/layers/(self_attn/[qkvo]_proj|mlp/(gate|up|down)_proj)"
# What the generator adapts in stage 3: attention and MLP Linears of both streams.
MMDIT_TARGETS = (
    r"(.*/)?transformer_blocks/(attn/(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)"
    r"|(img|txt)_mlp/(net_0_proj|net_2))"
)


def _kernels(params: Tree) -> dict[str, Any]:
    """Kernels [..., in, out] by module path 'a/b/c'."""
    paths = ((path.rpartition("/"), leaf) for path, leaf in flatten(meta.unbox(params)).items())
    return {module: leaf for (module, _, name), leaf in paths if name == "kernel"}


def targets(params: Tree, pattern: str | Iterable[str]) -> list[str]:
    """Module paths whose whole name matches the pattern, as peft's string `target_modules`.

    Args:
      params: a parameter tree, of arrays, shapes or boxes.
      pattern: a regular expression, or several that must each match something.

    Raises:
      InputError: a pattern is no regular expression, matches nothing, or matches a convolution.
    """
    kernels = _kernels(params)
    found: set[str] = set()
    for one in [pattern] if isinstance(pattern, str) else pattern:
        try:
            matches = {name for name in kernels if re.fullmatch(one, name)}
        except re.error as error:
            raise InputError(
                f"the LoRA target pattern {one!r} is no regular expression: {error}"
            ) from error
        if not matches:
            near = difflib.get_close_matches(one, kernels, n=4, cutoff=0.0)
            raise InputError(
                f"the LoRA target pattern {one!r} matches no Linear; the nearest are {near}"
            )
        found |= matches
    for name in sorted(found):
        if kernels[name].ndim > 3:
            raise InputError(
                f"the LoRA target {name} is a convolution; narrow the pattern to Linears"
            )
    return sorted(found)


def init(
    rng: Key[Array, ""],
    params: Tree,
    pattern: str | Iterable[str],
    rank: int,
    kind: Literal["kaiming", "gaussian"] = "kaiming",
) -> Tree:
    """A fresh adapter in float32; it changes nothing until it is trained.

    Args:
      rng: key; each module draws from its own name, whatever else is adapted.
      params: the tree to adapt (shapes suffice).
      pattern: see `targets`.
      rank: r >= 1.
      kind: of lora_a: 'kaiming' is peft's default, uniform within 1 / sqrt(in); 'gaussian' has
        standard deviation 1 / r, as diffusers' training scripts. lora_b is zero.

    Raises:
      InputError: as `targets`, or the rank is below 1.
    """
    if rank < 1:
        raise InputError(f"the LoRA rank is {rank}; give 1 or more")
    kernels = _kernels(params)
    flat = {}
    for name in targets(params, pattern):
        *lead, fan_in, fan_out = kernels[name].shape
        key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
        if kind == "gaussian":
            a = jax.random.normal(key, (*lead, fan_in, rank)) / rank
        else:
            bound = fan_in**-0.5
            a = jax.random.uniform(key, (*lead, fan_in, rank), minval=-bound, maxval=bound)
        flat[f"{name}/lora_a"] = a
        flat[f"{name}/lora_b"] = jnp.zeros((*lead, rank, fan_out))
    return unflatten(flat)


def logical_axes(params: Tree, adapter: Tree) -> Tree:
    """Logical axes of every adapter leaf: the kernel's 'embed' or 'adapter', the rank unsharded.

    A factor has one long axis where its kernel has two, so that the mesh axes of the kernel's
    other axis are free: a rule of its own lets 'adapter' be sharded over both.

    Args:
      params: boxed parameters or shapes, as `layers.abstract_params` gives.
      adapter: the adapter; the result has its tree, with a tuple of axis names at each leaf.
    """
    boxes = flatten(params)
    axes = {}
    for path in flatten(adapter):
        name, factor = path.rsplit("/", 1)
        *lead, fan_in, fan_out = boxes[f"{name}/kernel"].names
        long = fan_in if factor == "lora_a" else fan_out
        long = long if long == "embed" else "adapter"
        axes[path] = (*lead, long, None) if factor == "lora_a" else (*lead, None, long)
    return unflatten(axes)


def scaled(adapter: Tree, scale: float | jax.Array) -> Tree:
    """The adapter as the `lora` collection wants it: scale = alpha / rank inside lora_b."""
    flat = flatten(adapter)
    return unflatten({
        path: leaf * scale if path.endswith("/lora_b") else leaf for path, leaf in flat.items()
    })  # fmt: skip


def merge(params: Tree, adapter: Tree, scale: float | jax.Array) -> Tree:
    """W + scale A B for every adapted module; all other leaves are returned as they are.

    The product and the sum are float32 at full precision, rounded once to the kernel's dtype
    (peft's merge_and_unload).

    Raises:
      InputError: the adapter belongs to other parameters.
    """
    flat, factors = flatten(params), flatten(adapter)
    for path, a in factors.items():
        name, _, factor = path.rpartition("/")
        if factor != "lora_a":
            continue
        b, kernel = factors[f"{name}/lora_b"], flat.get(f"{name}/kernel")
        shape = (*a.shape[:-1], b.shape[-1])
        if kernel is None or kernel.shape != shape:
            found = "absent" if kernel is None else list(kernel.shape)
            raise InputError(
                f"the adapter of {name} is for a kernel {list(shape)}, which here is {found}; "
                "give the adapter and the model of the same run"
            )
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        flat[f"{name}/kernel"] = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
    return unflatten(flat)
