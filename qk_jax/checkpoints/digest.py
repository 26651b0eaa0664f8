"""Digests, which tell a flipped bit: of every leaf, however it is sharded, and of metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base.trees import named

HOST_SIZE = 2**22  # leaves with no more elements are digested on the host


def _terms(x: Any, xp: Any) -> tuple[Any, Any]:
    """The terms of two uint32 sums over the bits of `x` (uint32, any shape), weighted by position.

    Integer sums do not depend on how `x` is sharded. The weights of the first sum are odd, so that
    one flipped bit always changes it; the second mixes bits and position (murmur3's finaliser).
    `xp` is numpy or jax.numpy, with the same result.
    """
    position = xp.zeros(x.shape, xp.uint32)
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype=xp.uint32).reshape(-1, *(1,) * (x.ndim - axis - 1))
        position = position * xp.uint32(size) + along
    linear = x * (position * xp.uint32(0x3C6EF362) + xp.uint32(0x85EBCA6B))
    mixed = x ^ (position * xp.uint32(0x27D4EB2F))
    mixed = (mixed ^ (mixed >> 16)) * xp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * xp.uint32(0xC2B2AE35)
    return linear, mixed ^ (mixed >> 16)


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@jax.jit
def device_digests(leaves: list[jax.Array]) -> list[jax.Array]:
    """The sums of leaves on their devices, however they are sharded; one program for a tree."""

    def digest(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
        terms = _terms(bits.astype(jnp.uint32), jnp)
        # One reduction for both: two of them are many times slower on CPUs.
        axes, zeros = tuple(range(x.ndim)), (np.uint32(0), np.uint32(0))
        return jnp.stack(jax.lax.reduce(terms, zeros, _add, axes))

    return list(map(digest, leaves))


def _add(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
    return a[0] + b[0], a[1] + b[1]


def _host_digest(x: jax.Array) -> np.ndarray:
    """The same sums with numpy: many small leaves would take long to compile for."""
    bits = np.ascontiguousarray(jax.device_get(x)).view(_UNSIGNED[x.dtype.itemsize])
    with np.errstate(over="ignore"):
        terms = _terms(bits.astype(np.uint32).reshape(x.shape), np)
        return np.array([np.sum(term, dtype=np.uint32) for term in terms])


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{name: {'shape', 'dtype', 'digest'}} of every leaf; the digest is 16 hex digits."""
    leaves = named(tree)
    small = {name: x.is_fully_addressable and x.size <= HOST_SIZE for name, x in leaves.items()}
    large = device_digests([x for name, x in leaves.items() if not small[name]])
    placed = iter(jax.device_get(large))
    sums = [_host_digest(x) if small[name] else next(placed) for name, x in leaves.items()]
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": "".join(f"{int(part):08x}" for part in pair),
        }
        for (name, leaf), pair in zip(leaves.items(), sums, strict=True)
    }


def of_metadata(meta: Mapping[str, Any]) -> str:
    """16 hex digits of JSON values, but for their own entry 'digest'."""
    own = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
