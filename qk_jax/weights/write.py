"""Parameter trees -> PyTorch folders, through the same tables as the import."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from qk_jax.base import files, hub
from qk_jax.base.errors import InputError
from qk_jax.base.files import GIGABYTE, PathLike, fresh_folder, read_json, write_json
from qk_jax.models import lora, mmdit, qwen_vl, vae
from qk_jax.weights import imported, tables
from qk_jax.weights.leaves import Shapes, cast
from qk_jax.weights.read import (
    host,
    mmdit_shapes,
    open_part,
    shapes_of,
    vae_shapes,
    vae_table,
    vlm_shapes,
)
from qk_jax.weights.safetensors import TensorFolder, write_tensors

Params = Mapping[str, Any]
LORA = "pytorch_lora_weights"  # name of an adapter's file


def spill(
    table: tables.Table, params: Params, shapes: Shapes, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(torch name, array) of every leaf of `params`, one at a time.

    Args:
      table: names and transforms.
      params: a nested dict of arrays, or of leaves on disk, which are read layer by layer.
      shapes: every leaf that the model has.
      dtype: of the arrays; None keeps the leaves'.

    Raises:
      InputError: `params` has other leaves or shapes, or values beyond the range of `dtype`.
    """
    flat = flatten_dict(meta.unbox(params), sep="/")
    for path in sorted(flat.keys() | shapes.keys()):
        found = tuple(flat[path].shape) if path in flat else None
        if found != shapes.get(path):
            raise InputError(
                f"parameter {path} has the shape {found}, the config asks for {shapes.get(path)}; "
                "give the config that these parameters belong to"
            )
    for path, shape in shapes.items():
        parts = list(table.names(path, shape))
        is_stacked = parts[0][1] is not None
        for (name, _, row), array in zip(parts, _layers(flat[path], is_stacked), strict=True):
            array = row.transform.give(array)
            yield name, cast(array, dtype or array.dtype, name)


def _ahead(items: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same items; the next is read and turned while the caller writes the one before."""
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        future = reader.submit(next, items, None)
        while (item := future.result()) is not None:
            future = reader.submit(next, items, None)
            yield item


def _layers(leaf: Any, is_stacked: bool) -> Iterator[np.ndarray]:
    """Each layer of a stacked leaf, or the whole of another, on the host."""
    if not is_stacked:
        yield host(leaf)
    elif isinstance(leaf, imported.Stored):
        yield from leaf.layers()
    else:
        yield from host(leaf)


def specs(
    table: tables.Table, params: Params, shapes: Shapes, dtype: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{torch name: shape and type} of what `spill` with the same arguments gives."""
    flat = flatten_dict(meta.unbox(params), sep="/")
    out = {}
    for path, shape in shapes.items():
        for name, layer, row in table.names(path, shape):
            one = row.transform.torch_shape(shape if layer is None else shape[1:])
            out[name] = jax.ShapeDtypeStruct(one, jnp.dtype(dtype or flat[path].dtype))
    return out


def _dtype_name(params: Params, dtype: Any) -> str:
    """The name of `dtype`, or of the first leaf's type when it is None."""
    leaf = next(iter(flatten_dict(meta.unbox(params)).values()))
    return jnp.dtype(dtype or leaf.dtype).name


def export_vlm(
    params: Params,
    config: qwen_vl.VLMConfig,
    folder: PathLike,
    dtype: Any = None,
    max_shard_bytes: int = 5 * GIGABYTE,
) -> None:
    """Writes a folder for `Qwen2_5_VLForConditionalGeneration.from_pretrained`.

    Args:
      params: of `qwen_vl.QwenVL`.
      config: theirs.
      folder: gets config.json and safetensors with the Hub's names; other files there stay.
      dtype: of the tensors; None keeps the leaves'.
      max_shard_bytes: larger models are split.

    Raises:
      InputError: params and config do not belong together, or the folder cannot be written.
    """
    what = tables.vlm(config.tie_word_embeddings), params, vlm_shapes(config), dtype
    write_tensors(folder, "model", _ahead(spill(*what)), max_shard_bytes, specs(*what))
    values = config.to_hf() | {"dtype": _dtype_name(params, dtype)}
    write_json(files.Path(folder) / "config.json", values)


def export_mmdit(
    params: Params,
    config: mmdit.MMDiTConfig,
    folder: PathLike,
    dtype: Any = None,
    max_shard_bytes: int = 5 * GIGABYTE,
) -> None:
    """Writes a folder for `QwenImageTransformer2DModel.from_pretrained`.

    Arguments and errors as `export_vlm`.
    """
    what = tables.mmdit(), params, mmdit_shapes(config), dtype
    base = "diffusion_pytorch_model"
    write_tensors(folder, base, _ahead(spill(*what)), max_shard_bytes, specs(*what))
    write_json(files.Path(folder) / "config.json", config.to_hf())


def export_vae(
    params: Params,
    config: vae.VAEConfig,
    folder: PathLike,
    dtype: Any = None,
    max_shard_bytes: int = 5 * GIGABYTE,
    original: PathLike | None = None,
) -> None:
    """Writes a folder for `AutoencoderKL` or `AutoencoderKLQwenImage`, as the config says.

    Args:
      params: of `vae.VAE`.
      config: theirs.
      folder: gets config.json and safetensors; other files there stay.
      dtype: of the tensors; None keeps the leaves'.
      max_shard_bytes: larger models are split.
      original: the folder that the parameters came from. AutoencoderKLQwenImage takes from it the
        temporal taps and convolutions that single pictures never reach; without it they are zero,
        and the export is good for pictures but not for video.

    Raises:
      InputError: params and config do not belong together, `original` is of another model, or
        the folder cannot be written.
    """
    tensors = spill(vae_table(config), params, vae_shapes(config), dtype)
    if isinstance(config, vae.QwenImageVAEConfig):
        full = None if original is None else TensorFolder(original)
        tensors = _with_time(tensors, config, full, dtype)
    write_tensors(folder, "diffusion_pytorch_model", tensors, max_shard_bytes)
    write_json(files.Path(folder) / "config.json", config.to_hf())


def time_convolutions(config: vae.QwenImageVAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of AutoencoderKLQwenImage's `time_conv` tensors."""
    widths = [config.base_dim * multiple for multiple in config.dim_mult]
    found: dict[str, tuple[int, ...]] = {}
    for level, is_temporal in enumerate(config.temperal_downsample):
        if is_temporal:
            index = (level + 1) * (config.num_res_blocks + 1) - 1
            found[f"encoder.down_blocks.{index}.time_conv"] = (widths[level], widths[level])
            up, width = len(widths) - 2 - level, widths[level + 1]
            found[f"decoder.up_blocks.{up}.upsamplers.0.time_conv"] = (2 * width, width)
    weights = {f"{name}.weight": (*shape, 3, 1, 1) for name, shape in found.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in found.items()}


def _with_time(
    tensors: Iterator[tuple[str, np.ndarray]],
    config: vae.QwenImageVAEConfig,
    original: TensorFolder | None,
    dtype: Any,
) -> Iterator[tuple[str, np.ndarray]]:
    """Completes 2-D tensors to the 3-D model's, from `original` or with zeros."""
    table = tables.autoencoder_kl_qwen_image()

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if original.shapes.get(name) != shape:
            raise InputError(
                f"{original.path} has {name} of shape {original.shapes.get(name)}, not {shape}; "
                "give the folder that the VAE was imported from"
            )
        array = original.read(name)
        return cast(array, dtype or array.dtype, name)

    last = np.dtype(np.float32)
    for name, array in tensors:
        last = array.dtype
        if original is not None and table.locate(name).transform.taps:
            full = read(name, array.shape).astype(array.dtype)
            full[:, :, -1] = array[:, :, -1]
            array = full
        yield name, array
    for name, shape in time_convolutions(config).items():
        yield name, read(name, shape) if original is not None else np.zeros(shape, last)


def lora_tensors(
    adapter: Params, scale: float, base: tables.Table, dtype: Any = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(torch name, array) of an adapter of the transformer, alpha / rank folded into lora_B.

    Args:
      adapter: of `lora.init`.
      scale: alpha / rank.
      base: the table of the adapted model.
      dtype: of the arrays; None keeps the leaves'.

    Raises:
      InputError: the adapter is of another model.
    """
    adapter = lora.scaled(adapter, scale)
    shapes = shapes_of(adapter)
    table = tables.lora(base, "transformer.")
    try:
        for path, shape in shapes.items():
            list(table.names(path, shape))
    except KeyError as error:
        raise InputError(f"the adapter of {error.args[0]} fits no Linear of this model") from None
    return spill(table, adapter, shapes, dtype)


def export_lora(
    adapter: Params, scale: float, base: tables.Table, folder: PathLike, dtype: Any = None
) -> None:
    """Writes `pytorch_lora_weights.safetensors` as `load_lora_weights` of diffusers reads it.

    alpha is folded in and no metadata is written: then every reader agrees, while a file with
    alpha in its metadata means something else to those that ignore it.

    Args:
      adapter, scale, base, dtype: as `lora_tensors`.
      folder: gets the file.

    Raises:
      InputError: the adapter is of another model, or the folder cannot be written.
    """
    write_tensors(folder, LORA, lora_tensors(adapter, scale, base, dtype))


EXPORTERS = {"vlm": export_vlm, "mmdit": export_mmdit, "vae": export_vae}


def export_import(
    checkpoint: PathLike, out: PathLike, dtype: Any = None, max_shard_bytes: int = 5 * GIGABYTE
) -> None:
    """Writes an import back as the folder that it came from: a model, a pipeline or a LoRA file.

    Args:
      checkpoint: of `imported.write`.
      out: appears when all of it is complete.
      dtype: of the tensors; None keeps the leaves'.
      max_shard_bytes: larger models are split.

    Raises:
      InputError: no import, a damaged one, or `out` cannot be written.
    """
    checkpoint = files.Path(checkpoint)
    values = read_json(checkpoint / imported.FILE)
    is_pipeline = hub.is_pipeline(checkpoint)
    marker = hub.INDEX if is_pipeline else "config.json"
    if "lora" in values["parts"]:
        marker = f"{LORA}.safetensors"
    with fresh_folder(out, marker) as folder:
        for part in values["parts"]:
            if part == "lora":
                adapter = unflatten_dict(imported.read(checkpoint, part)[1], sep="/")
                export_lora(jax.tree.map(np.asarray, adapter), 1.0, tables.mmdit(), folder, dtype)
                continue
            found = open_part(part, checkpoint)
            more = {}
            if part == "vae" and (checkpoint / imported.ORIGINAL).is_dir():
                more["original"] = checkpoint / imported.ORIGINAL
            place = folder / hub.FOLDERS[part] if is_pipeline else folder
            params = unflatten_dict(found.flat, sep="/")
            EXPORTERS[part](params, found.config, place, dtype, max_shard_bytes, **more)
        for inner in imported.SMALL:
            if (checkpoint / inner).is_dir():
                shutil.copytree(
                    checkpoint / inner,
                    folder / inner if is_pipeline else folder,
                    dirs_exist_ok=True,
                )
        if is_pipeline:
            shutil.copyfile(checkpoint / hub.INDEX, folder / hub.INDEX)
