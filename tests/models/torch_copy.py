"""Weights of a torch module in the layout of a qk_jax parameter tree, for parity tests.

A path is matched with the torch name that has the same words: `to_out_0/kernel` is
`to_out.0.weight`. Leaves under a scanned container (`layers`, `blocks`, ...) are stacked over the
numbered torch modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util
from flax.core import meta

STACKED = ("layers", "blocks", "transformer_blocks")
LEAVES = {
    "kernel": ("weight",),
    "scale": ("weight", "gamma"),
    "embedding": ("weight",),
    "bias": ("bias",),
}


def randomize(module, seed: int = 0, scale: float = 0.3):
    """Random parameters for a torch module in place: norms off one, biases off zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 or name.endswith("gamma"):
                is_scale = "gamma" in name or ("norm" in name and "weight" in name)
                weight.copy_(is_scale + scale * noise)
            else:
                weight.copy_(noise / np.sqrt(max(weight[0].numel(), 1)))
    return module


def copy(state: Mapping[str, object], shapes: dict, prefix: str = "", stacked=STACKED) -> dict:
    """The tree `shapes` (arrays, ShapeDtypeStructs or boxes of them) filled from a state dict.

    Args:
      state: torch names to tensors, e.g. module.state_dict().
      shapes: the parameter tree to fill.
      prefix: of the torch names, ending in a dot, e.g. "model.visual.".
      stacked: names of scanned containers, whose leaves have a leading layer axis.

    Raises:
      KeyError: a leaf has no torch tensor. ValueError: shapes differ.
    """
    tensors = {
        re.sub(r"[./]", "_", name.removeprefix(prefix)): np.asarray(value.detach().float().numpy())
        for name, value in state.items()
        if name.startswith(prefix)
    }
    flat = traverse_util.flatten_dict(meta.unbox(shapes))
    return traverse_util.unflatten_dict(
        {path: _leaf(tensors, path, leaf.shape, stacked) for path, leaf in flat.items()}
    )


def _leaf(tensors: Mapping, path: tuple[str, ...], shape: tuple[int, ...], stacked) -> np.ndarray:
    """One array of the tree."""
    for index, part in enumerate(path):
        if part in stacked:
            numbered = [(*path[:index], f"{part}_{n}", *path[index + 1 :]) for n in range(shape[0])]
            return np.stack([_leaf(tensors, p, shape[1:], ()) for p in numbered])
    stem = "_".join(path[:-1])
    names = [f"{stem}_{leaf}" if stem else leaf for leaf in LEAVES[path[-1]]]
    names.append(stem)  # a bare torch parameter
    name = next((name for name in names if name in tensors), None)
    if name is None:
        raise KeyError(f"no torch tensor for {'/'.join(path)}; tried {names}")
    value = tensors[name]
    if path[-1] == "kernel" and len(shape) == 4:
        value = value[:, :, -1] if value.ndim == 5 else value  # the tap that sees a still picture
        value = value.transpose(2, 3, 1, 0)
    elif path[-1] == "kernel":
        value = value.reshape(len(value), -1).T
    elif path[-1] in ("scale", "bias"):
        value = value.reshape(-1)
    if value.shape != shape:
        raise ValueError(f"{'/'.join(path)} has shape {shape}, {name} gives {value.shape}")
    return np.ascontiguousarray(value)
