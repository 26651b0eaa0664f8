"""LoRA files of transformer or text encoder -> an adapter of `models.lora`, alpha folded in.

Read are the keys of diffusers and peft (`transformer.`, `text_encoder.`, `base_model.model.` or
nothing, the module, `lora_A.weight`, `lora_A.default.weight`, and `lora_B` likewise), of ComfyUI
(`diffusion_model.`, `lora_down.weight`, `lora_up.weight`, `alpha`) and of kohya (`lora_unet_` and
the module with underscores), in any combination (diffusers: `lora_conversion_utils`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qk_jax.base import files, trees
from qk_jax.base.errors import InputError, some
from qk_jax.base.files import PathLike, read_json
from qk_jax.base.types import Tree
from qk_jax.weights import tables
from qk_jax.weights.leaves import Shapes, cast
from qk_jax.weights.safetensors import TensorFolder

METADATA = "lora_adapter_metadata"  # of diffusers, in the header: a LoraConfig as JSON
CONFIG = "adapter_config.json"  # of peft, in the same folder
PREFIXES = ("transformer.", "text_encoder.", "diffusion_model.", "base_model.model.", "lora_unet_")
PARTS = {
    "lora_A.weight": "a",
    "lora_A.default.weight": "a",
    "lora_down.weight": "a",
    "lora_B.weight": "b",
    "lora_B.default.weight": "b",
    "lora_up.weight": "b",
    "alpha": "alpha",
}
# Initialisations after which the base weights are not those that were published.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


class _Linear(NamedTuple):
    """A Linear of the model: our path without /kernel, its layer or None, and its shape."""

    path: str
    layer: int | None
    kernel: tuple[int, ...]  # [in, out] or, of all layers, [L, in, out]


def import_lora(
    path: PathLike, shapes: Shapes, dtype: Any = None, tower: str = "mmdit"
) -> tuple[Tree, int]:
    """Reads a LoRA file.

    Layers and modules of a stack that the file does not adapt get zeros, and so do the ranks that
    a module has less than the largest: both change nothing.

    Args:
      path: the .safetensors file, or a folder with it (and with peft's adapter_config.json).
      shapes: of all leaves of the adapted model.
      dtype: of the adapter; None keeps the file's, or float32 where it has several.
      tower: which it adapts, 'mmdit' or 'vlm'.

    Returns:
      (tree, rank): leaves `.../lora_a` [L, in, rank] and `lora_b` [L, rank, out], without L where
      nothing is stacked; alpha / rank is folded into lora_b, to be used with the scale 1.

    Raises:
      InputError: no LoRA, a module that the model has not, half a pair, a wrong shape, or anything
        beyond plain LoRA, by the name of its key.
    """
    source = TensorFolder(path)
    linears = _linears(shapes, tower)
    pairs = _pairs(source, linears)
    config = _config(source, files.Path(path))
    ranks = {module: _rank(source, names, linears[module]) for module, names in pairs.items()}
    rank = max(ranks.values())
    kinds = {source.dtypes[name] for names in pairs.values() for name in (names["a"], names["b"])}
    kind = jnp.dtype(dtype or (kinds.pop() if len(kinds) == 1 else np.float32))
    flat: dict[str, np.ndarray] = {}
    for module, names in pairs.items():
        (path, layer, (*stack, fan_in, fan_out)), own = linears[module], ranks[module]
        a = flat.setdefault(f"{path}/lora_a", np.zeros((*stack, fan_in, rank), kind))
        b = flat.setdefault(f"{path}/lora_b", np.zeros((*stack, rank, fan_out), kind))
        index = () if layer is None else (layer,)
        scale = _scale(source, names, config, module, own)
        up = source.read(names["b"]).T.astype(np.float32) * np.float32(scale)
        a[*index, :, :own] = cast(source.read(names["a"]).T, kind, names["a"])
        b[*index, :own, :] = cast(up, kind, names["b"])
    return trees.unflatten(flat), rank


def _linears(shapes: Shapes, tower: str = "mmdit") -> dict[str, _Linear]:
    """{torch module: Linear} of the whole tower."""
    table, found = tables.ADAPTED[tower][1](), {}
    for path, shape in shapes.items():
        for name, layer, row in table.names(path, shape):
            if row.transform is tables.LINEAR:
                linear = _Linear(path.removesuffix("/kernel"), layer, shape)
                found[name.removesuffix(".weight")] = linear
    return found


def _pairs(source: TensorFolder, linears: Mapping[str, _Linear]) -> dict[str, dict[str, str]]:
    """{torch module: {'a': key, 'b': key, and perhaps 'alpha': key}}."""
    flattened = {module.replace(".", "_"): module for module in linears}
    pairs: dict[str, dict[str, str]] = {}
    for key in source.shapes:
        part = next((part for part in PARTS if key.endswith(f".{part}")), None)
        if part is None:
            raise InputError(
                f"{source.path} has the key {key}, which is no part of a plain LoRA (DoRA, biases "
                "and other adapters are not supported); merge it into the model with its own tool"
            )
        name = key.removesuffix(f".{part}")
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        name = name.removeprefix(prefix)
        module = flattened.get(name, "") if prefix == "lora_unet_" else name
        if module not in linears:
            raise InputError(
                f"{source.path} adapts {key}, which is no Linear of this model; give the LoRA and "
                "the model that belong together"
            )
        names = pairs.setdefault(module, {})
        if PARTS[part] in names:
            raise InputError(
                f"{source.path} has {names[PARTS[part]]} and {key} for one module; remove one"
            )
        names[PARTS[part]] = key
    for names in pairs.values():
        if not {"a", "b"} <= names.keys():
            raise InputError(
                f"{source.path} has {some(names.values())} without the other half of the pair; "
                "download it again"
            )
    if not pairs:
        raise InputError(f"{source.path} holds no tensors; give a LoRA file")
    return pairs


def _rank(source: TensorFolder, names: Mapping[str, str], linear: _Linear) -> int:
    """The rank of a pair.

    Raises:
      InputError: its shapes are not those of the Linear.
    """
    down, up = (source.shapes[names[half]] for half in ("a", "b"))
    fan_in, fan_out = linear.kernel[-2:]
    rank = down[0] if down else 0
    if rank < 1 or down != (rank, fan_in) or up != (fan_out, rank):
        raise InputError(
            f"{source.path} has {names['a']} {list(down)} and {names['b']} {list(up)} for a Linear "
            f"from {fan_in} to {fan_out}; give the LoRA of this model"
        )
    return rank


def _config(source: TensorFolder, path: files.Path) -> dict[str, Any]:
    """The LoraConfig of the header or of the folder; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    config: Any = {}
    if METADATA in source.metadata:
        try:
            config = json.loads(source.metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source.path}: {METADATA} is no JSON ({error})") from None
    elif (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{source.path}: {METADATA} holds no JSON object; download it again")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    init = str(config.get("init_lora_weights")).lower()
    refused = {
        "peft_type": str(config.get("peft_type", "LORA")).rpartition(".")[-1] != "LORA",
        "use_dora": bool(config.get("use_dora")),
        "lora_bias": bool(config.get("lora_bias")),
        "init_lora_weights": init.startswith(CHANGED_BASE),
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise InputError(
                f"{source.path} says {name} = {config[name]!r}, which is not supported; merge it "
                "into the model with its own tool"
            )
    if config and not _has_alphas(config):
        raise InputError(
            f"{source.path} has a LoraConfig without numbers as lora_alpha and alpha_pattern; "
            "download it again"
        )
    return config


def _has_alphas(config: Mapping[str, Any]) -> bool:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        return False
    alphas = (config.get("lora_alpha"), *patterns.values())
    return all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas)


def _scale(
    source: TensorFolder,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    module: str,
    rank: int,
) -> float:
    """alpha / rank of a module: its own alpha, the config's, or else 1 (peft, diffusers)."""
    if "alpha" in names:
        value = source.read(names["alpha"])
        if value.size != 1:
            raise InputError(f"{source.path} has {names['alpha']} of shape {value.shape}, not ()")
        return float(value.reshape(())) / rank
    if not config:
        return 1.0
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        except re.error as error:
            raise InputError(f"{source.path}: alpha_pattern {pattern!r}: {error}") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
