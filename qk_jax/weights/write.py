"""Parameter trees -> PyTorch folders, through the same tables as the import."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from qk_jax.base import files, trees
from qk_jax.base.errors import InputError
from qk_jax.base.files import GIGABYTE, PathLike, write_json
from qk_jax.base.types import Tree
from qk_jax.models import lora, qwen_vl, vae
from qk_jax.weights import hub_configs, read, tables
from qk_jax.weights.leaves import Leaf, Shapes, cast, widest
from qk_jax.weights.safetensors import Shape, Tensor, TensorFolder, write_tensors

LORA = "pytorch_lora_weights"  # base name of an adapter's file


def torch_tensors(
    table: tables.Table, params: Tree, shapes: Shapes, dtype: Any = None
) -> dict[str, Tensor]:
    """{torch name: tensor} of every leaf of `params`, made one at a time.

    Args:
      table: names and transforms.
      params: arrays, or leaves on disk, which are read layer by layer.
      shapes: of every leaf that the model has.
      dtype: of the tensors; None keeps the leaves'.

    Raises:
      InputError: `params` has other leaves or shapes. Making a tensor raises it for values beyond
        the range of `dtype`.
    """
    flat = trees.flatten(meta.unbox(params))
    for path in sorted(flat.keys() | shapes.keys()):
        found = tuple(flat[path].shape) if path in flat else None
        if found != shapes.get(path):
            raise InputError(
                f"parameter {path} has the shape {found}, the config asks for {shapes.get(path)}; "
                "give the config that these parameters belong to"
            )

    @functools.lru_cache(maxsize=1)  # the layers of a leaf follow each other
    def on_host(path: str) -> np.ndarray:
        return np.asarray(jax.device_get(flat[path]))

    def make(path: str, layer: int | None, name: str, transform: tables.Transform) -> np.ndarray:
        if isinstance(flat[path], Leaf):
            array = flat[path].layer(layer or 0)
        else:
            array = on_host(path) if layer is None else on_host(path)[layer]
        return cast(transform.give(array), dtype or array.dtype, name)

    out = {}
    for path, shape in shapes.items():
        kind = jnp.dtype(dtype or flat[path].dtype)
        for name, layer, row in table.names(path, shape):
            one = row.transform.torch_shape(shape if layer is None else shape[1:])
            out[name] = Tensor(one, kind, functools.partial(make, path, layer, name, row.transform))
    return out


def export_model(
    params: Tree,
    config: hub_configs.Config,
    folder: PathLike,
    dtype: Any = None,
    max_shard_bytes: int = 5 * GIGABYTE,
    original: PathLike | None = None,
) -> None:
    """Writes a folder for `from_pretrained` of the config's class.

    Args:
      params: of our module.
      config: theirs.
      folder: gets config.json and safetensors with the Hub's names; other files there stay.
      dtype: of the tensors; None keeps the leaves'.
      max_shard_bytes: larger models are split.
      original: the folder that the parameters came from. AutoencoderKLQwenImage takes from it the
        temporal taps and convolutions that single pictures never reach; without it they are zero,
        and the export is good for pictures but not for video.

    Raises:
      InputError: params and config do not belong together, `original` is of another model, or
        the folder cannot be written.
    """
    values, base = hub_configs.to_hf(config), "diffusion_pytorch_model"
    tensors = torch_tensors(tables.of(config), params, read.shapes(config), dtype)
    if isinstance(config, qwen_vl.VLMConfig):
        kinds = {leaf.dtype for leaf in trees.flatten(meta.unbox(params)).values()}
        values, base = values | {"dtype": jnp.dtype(dtype or widest(kinds)).name}, "model"
    elif isinstance(config, vae.QwenImageVAEConfig):
        source = None if original is None else TensorFolder(original)
        tensors = _with_time(tensors, config, source, dtype)
    write_tensors(folder, base, tensors, max_shard_bytes)
    write_json(files.Path(folder) / "config.json", values)


def _time_convolutions(config: vae.QwenImageVAEConfig) -> dict[str, Shape]:
    """Names and shapes of AutoencoderKLQwenImage's `time_conv` tensors."""
    widths = [config.base_dim * multiple for multiple in config.dim_mult]
    found: dict[str, Shape] = {}
    for level, is_temporal in enumerate(config.temperal_downsample):
        if is_temporal:
            index = (level + 1) * (config.num_res_blocks + 1) - 1
            found[f"encoder.down_blocks.{index}.time_conv"] = (widths[level], widths[level])
            up, width = len(widths) - 2 - level, widths[level + 1]
            found[f"decoder.up_blocks.{up}.upsamplers.0.time_conv"] = (2 * width, width)
    weights = {f"{name}.weight": (*shape, 3, 1, 1) for name, shape in found.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in found.items()}


def _with_time(
    tensors: dict[str, Tensor],
    config: vae.QwenImageVAEConfig,
    original: TensorFolder | None,
    dtype: Any,
) -> dict[str, Tensor]:
    """Completes 2-D tensors to the 3-D model's, from `original` or with zeros."""

    def make(name: str, shape: Shape, kind: np.dtype, last_tap: Tensor | None) -> np.ndarray:
        if original is None:
            return np.zeros(shape, kind)
        if original.shapes.get(name) != shape:
            raise InputError(
                f"{original.path} has {name} of shape {original.shapes.get(name)}, not {shape}; "
                "give the folder that the VAE was imported from"
            )
        array = cast(original.read(name), kind, name)
        if last_tap is not None:
            array[:, :, -1] = last_tap.make()[:, :, -1]
        return array

    def lazy(name: str, shape: Shape, kind: np.dtype, last_tap: Tensor | None = None) -> Tensor:
        return Tensor(shape, kind, functools.partial(make, name, shape, kind, last_tap))

    table, out = tables.of(config), dict(tensors)
    for name, tensor in tensors.items() if original is not None else ():
        target = table.locate(name)
        if target is not None and target.transform.taps:
            out[name] = lazy(name, tensor.shape, tensor.dtype, tensor)
    for name, shape in _time_convolutions(config).items():
        kind = dtype or (original.dtypes.get(name) if original is not None else None)
        out[name] = lazy(name, shape, jnp.dtype(kind or tensors["decoder.conv_out.bias"].dtype))
    return out


def lora_tensors(
    adapter: Tree, scale: float, dtype: Any = None, tower: str = "mmdit"
) -> dict[str, Tensor]:
    """{torch name: tensor} of an adapter, alpha / rank folded into lora_B.

    Args:
      adapter: of `lora.init`.
      scale: alpha / rank.
      dtype: of the tensors; None keeps the leaves'.
      tower: which it adapts, 'mmdit' or 'vlm'.

    Raises:
      InputError: the adapter is of another model.
    """
    adapter = lora.scaled(adapter, scale)
    try:
        return torch_tensors(tables.lora(tower), adapter, read.shapes_of(adapter), dtype)
    except KeyError as error:
        raise InputError(f"the adapter of {error.args[0]} fits no Linear of this model") from None


def export_lora(
    adapter: Tree, scale: float, folder: PathLike, dtype: Any = None, tower: str = "mmdit"
) -> None:
    """Writes `pytorch_lora_weights.safetensors` as `load_lora_weights` of diffusers reads it.

    alpha is folded in and no metadata is written: then every reader agrees, while a file with
    alpha in its metadata means something else to those that ignore it.

    Args:
      adapter, scale, dtype, tower: as `lora_tensors`.
      folder: gets the file.

    Raises:
      InputError: the adapter is of another model, or the folder cannot be written.
    """
    write_tensors(folder, LORA, lora_tensors(adapter, scale, dtype, tower))
