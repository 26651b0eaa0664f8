"""PyTorch folders -> parameter trees, through the tables, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from qk_jax import sharding
from qk_jax.base import files, trees
from qk_jax.base.errors import InputError
from qk_jax.base.files import PathLike, read_json
from qk_jax.base.types import Tree
from qk_jax.models import layers, mmdit, qwen_vl, vae
from qk_jax.weights import hub_configs, leaves, tables
from qk_jax.weights.leaves import Leaf, Shapes
from qk_jax.weights.safetensors import TensorFolder

OLD = "qk_jax.json"  # marks a folder of version 0.1's from-pytorch, which is no longer read


def shapes_of(tree: Tree) -> Shapes:
    """{'a/b/c': shape} of a (boxed or plain) tree of arrays or ShapeDtypeStructs."""
    return {path: tuple(leaf.shape) for path, leaf in trees.flatten(meta.unbox(tree)).items()}


def abstract(config: hub_configs.Config) -> Tree:
    """Shapes of a model's parameters, boxed with logical axes; computes nothing."""
    module: Any
    if isinstance(config, qwen_vl.VLMConfig):
        module = qwen_vl.QwenVL(config)
    elif isinstance(config, mmdit.MMDiTConfig):
        module = mmdit.MMDiT(config)
    else:
        module = vae.VAE(config)
    return layers.abstract_params(module, *module.example())


def shapes(config: hub_configs.Config) -> Shapes:
    """{'a/b/c': shape} of a model's parameters."""
    return shapes_of(abstract(config))


class Part(NamedTuple):
    """A model in a folder of transformers or diffusers, checked and not yet read.

    Attributes:
      config: of our module.
      flat: {'a/b/c': Leaf}.
    """

    config: Any
    flat: dict[str, Leaf]


def open_part(part: str, folder: PathLike, dtype: Any = None, ignore: Iterable[str] = ()) -> Part:
    """Checks names and shapes of all tensors of a folder against its config.json.

    Args:
      part: 'vlm', 'mmdit' or 'vae'.
      folder: with config.json and safetensors, in any of the published namings.
      dtype: of the parameters; None keeps the files', of a stack the widest of its layers'.
      ignore: regexes of torch names that may be left out.

    Raises:
      InputError: a file is missing or broken, the weights do not fit the config exactly, or `dtype`
        is no type for parameters.
    """
    folder, dtype = files.Path(folder), leaves.float_dtype(dtype)
    refuse_old(folder)
    config = hub_configs.from_hf(part, read_json(folder / "config.json"))
    source = TensorFolder(folder)
    return Part(config, leaves.plan(tables.of(config), source, shapes(config), dtype, ignore))


def refuse_old(folder: PathLike) -> None:
    """Raises InputError for a folder of version 0.1's from-pytorch."""
    file = files.Path(folder) / OLD
    if file.is_file():
        source = read_json(file).get("source", "the original model")
        raise InputError(
            f"{folder} was written by an older from-pytorch and is no longer read; "
            f"run from-pytorch again on {source}"
        )


def import_model(
    part: str,
    folder: PathLike,
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    ignore: Iterable[str] = (),
) -> tuple[Any, Tree]:
    """(config, parameters) of a model in a folder of transformers or diffusers.

    Args:
      part, folder, dtype, ignore: as `open_part`.
      mesh: over which the parameters are sharded by the default tables; None for numpy arrays.

    Raises:
      InputError: as `open_part`.
    """
    config, flat = open_part(part, folder, dtype, ignore)
    if mesh is None:
        return config, trees.unflatten({path: np.asarray(leaf) for path, leaf in flat.items()})
    rules = {tower: sharding.Rules() for _, tower in sharding.TOWERS}
    where = trees.flatten(sharding.shardings({part: abstract(config)}, rules, mesh)[part])
    params = {path: leaves.shard(leaf, where[path]) for path, leaf in flat.items()}
    return config, trees.unflatten(params)
