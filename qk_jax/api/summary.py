"""What the objects of this room print as: one line, without their arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qk_jax.base.types import Tree


def size_of(config: Any, presets: Mapping[str, Any]) -> str:
    """The name of the preset that `config` is, or 'of its own size'."""
    names = (name for name, preset in presets.items() if preset == config)
    return next(names, "of its own size")


def summary(loaded: Any, what: str, params: Tree, dtype: Any) -> str:
    """'LoadedVLM(Qwen2.5-VL 7b, 7,747,... parameters, bfloat16, 8 devices)'."""
    leaves = jax.tree.leaves(params)
    count = sum(leaf.size for leaf in leaves)
    devices = len({one for x in leaves if isinstance(x, jax.Array) for one in x.devices()}) or 1
    plural = "s" if devices > 1 else ""
    held = f"{count:,} parameters, {jnp.dtype(dtype).name}, {devices} device{plural}"
    return f"{type(loaded).__name__}({what}, {held})"
