"""PyTorch folders -> parameter trees, through the tables, one tensor at a time."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from qk_jax.convert import tables
from qk_jax.convert.safetensors_io import Path, TensorFolder, read_json, some
from qk_jax.errors import InputError
from qk_jax.models import layers, mmdit, mrope, qwen_vl, vae

Params = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """{'a/b/c': shape} of a (boxed or plain) tree of arrays or ShapeDtypeStructs."""
    flat = flatten_dict(meta.unbox(tree), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def vlm_shapes(config: qwen_vl.VLMConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of a VLM; computes nothing."""
    ids, positions = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 3, 8), jnp.int32)
    pixels = jnp.zeros((1, 4, mrope.PATCH_DIM))
    module = qwen_vl.QwenVL(config)
    return _shapes(module, ids, positions, ids == 0, pixels, ((2, 2),))


def mmdit_shapes(config: mmdit.MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of a generator; computes nothing."""
    tokens = jnp.zeros((1, 1, config.in_channels))
    context = jnp.zeros((1, 1, config.joint_attention_dim))
    place = jnp.zeros((1, 1, 3), jnp.int32)
    mask = jnp.ones((1, 1), bool)
    return _shapes(mmdit.MMDiT(config), tokens, context, mask, jnp.zeros((1,)), place, place)


def vae_shapes(config: vae.VAEConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of an autoencoder; computes nothing."""
    side = 2 * config.downscale
    return _shapes(vae.VAE(config), jnp.zeros((1, side, side, 3)))


def _shapes(module: nn.Module, *args: Any) -> dict[str, tuple[int, ...]]:
    return shapes_of(layers.abstract_params(module, *args))


def fill(
    table: tables.Table,
    source: TensorFolder,
    shapes: Shapes,
    dtype: Any = None,
    ignore: Iterable[str] = (),
) -> Params:
    """Reads every tensor of `source` into its leaf.

    Args:
      table: names and transforms.
      source: the tensors.
      shapes: every leaf to be filled.
      dtype: of the leaves; None keeps the type of the files.
      ignore: regexes of torch names that may be left out, beyond the table's own.

    Returns:
      A nested dict of numpy arrays.

    Raises:
      InputError: a tensor that no leaf takes, a leaf that no tensor fills, or a wrong shape.
    """
    flat: dict[str, np.ndarray] = {}
    open_layers = {path: set(_layers(table, path, shape)) for path, shape in shapes.items()}
    unknown = []
    for name in source.by_file():
        slot = table.locate(name)
        if slot is None or slot.layer not in open_layers.get(slot.path, ()):
            if not table.is_ignored(name) and not any(re.fullmatch(p, name) for p in ignore):
                unknown.append(name)
            continue
        open_layers[slot.path].remove(slot.layer)
        _place(flat, slot, name, source, shapes[slot.path], dtype)
    missing = [
        name
        for path, shape in shapes.items()
        for name, layer, _ in table.names(path, shape)
        if layer in open_layers[path]
    ]
    if unknown:
        raise InputError(
            f"{source.path} holds tensors that this model has no place for: {some(unknown)}; "
            "check that its config.json belongs to these weights"
        )
    if missing:
        raise InputError(
            f"{source.path} lacks {some(missing)}; download it again, or check its config.json"
        )
    return unflatten_dict(flat, sep="/")


def _layers(table: tables.Table, path: str, shape: tuple[int, ...]) -> Iterable[int | None]:
    """The layers that fill the leaf `path`: numbers, or one None for a leaf that is not stacked."""
    return [layer for _, layer, _ in table.names(path, shape)]


def _place(
    flat: dict[str, np.ndarray],
    slot: tables.Slot,
    name: str,
    source: TensorFolder,
    shape: tuple[int, ...],
    dtype: Any,
) -> None:
    """Puts one tensor into its leaf (of `shape`), which is made when its first layer comes."""
    array = source.read(name)
    wanted = shape if slot.layer is None else shape[1:]
    try:
        ours = slot.transform.take(array)
    except (ValueError, IndexError):
        ours = None
    if ours is None or ours.shape != wanted:
        raise InputError(
            f"tensor {name} of {source.path} has the shape {array.shape}, which does not give the "
            f"shape {wanted} that its config.json asks for ({slot.transform.name})"
        )
    ours = cast(ours, dtype or array.dtype, name)
    if slot.layer is None:
        flat[slot.path] = np.array(ours, order="C")
        return
    if slot.path not in flat:
        flat[slot.path] = np.empty(shape, ours.dtype)
    flat[slot.path][slot.layer] = ours


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in `dtype`.

    Raises:
      InputError: a finite value is beyond the range of `dtype`.
    """
    dtype = jnp.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
        if not np.isfinite(out).all():
            raise InputError(f"{name} has values beyond the range of {dtype}; use bfloat16")
    return out


def import_vlm(folder: Path, dtype: Any = None) -> tuple[qwen_vl.VLMConfig, Params]:
    """A Qwen2.5-VL folder -> (config, parameters of `qwen_vl.QwenVL`).

    Args:
      folder: with config.json and safetensors, in any of the published namings.
      dtype: of the parameters; None keeps the files'.

    Raises:
      InputError: a file is missing or broken, or the weights do not fit the config exactly.
    """
    folder = pathlib.Path(folder)
    config = qwen_vl.VLMConfig.from_hf(read_json(folder / "config.json"))
    table = tables.vlm(config.tie_word_embeddings)
    return config, fill(table, TensorFolder(folder), vlm_shapes(config), dtype)


def import_mmdit(folder: Path, dtype: Any = None) -> tuple[mmdit.MMDiTConfig, Params]:
    """A QwenImageTransformer2DModel folder -> (config, parameters of `mmdit.MMDiT`).

    Arguments and errors as `import_vlm`.
    """
    folder = pathlib.Path(folder)
    config = mmdit.MMDiTConfig.from_hf(read_json(folder / "config.json"))
    return config, fill(tables.mmdit(), TensorFolder(folder), mmdit_shapes(config), dtype)


def import_vae(folder: Path, dtype: Any = None) -> tuple[vae.VAEConfig, Params]:
    """An AutoencoderKL or AutoencoderKLQwenImage folder -> (config, parameters of `vae.VAE`).

    Arguments and errors as `import_vlm`.
    """
    folder = pathlib.Path(folder)
    config = vae.config_from_hf(read_json(folder / "config.json"))
    return config, fill(vae_table(config), TensorFolder(folder), vae_shapes(config), dtype)


def vae_table(config: vae.VAEConfig) -> tables.Table:
    """The table of the autoencoder that `config` describes."""
    if isinstance(config, vae.QwenImageVAEConfig):
        return tables.autoencoder_kl_qwen_image()
    return tables.autoencoder_kl()


def host(leaf: Any) -> np.ndarray:
    """A leaf as a numpy array on the host."""
    return np.asarray(jax.device_get(leaf))
