"""PyTorch folders -> parameter trees, through the tables, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from qk_jax import sharding
from qk_jax.base import files
from qk_jax.base.files import PathLike, read_json
from qk_jax.models import layers, mmdit, qwen_vl, vae
from qk_jax.pictures.grids import PATCH_DIM
from qk_jax.weights import imported, leaves, tables
from qk_jax.weights.safetensors import TensorFolder

Params = dict[str, Any]


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """{'a/b/c': shape} of a (boxed or plain) tree of arrays or ShapeDtypeStructs."""
    flat = flatten_dict(meta.unbox(tree), sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def abstract_vlm(config: qwen_vl.VLMConfig) -> Params:
    """Shapes of a VLM's parameters, boxed with logical axes; computes nothing."""
    ids, positions = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 3, 8), jnp.int32)
    pixels = jnp.zeros((1, 4, PATCH_DIM))
    module = qwen_vl.QwenVL(config)
    return layers.abstract_params(module, ids, positions, ids == 0, pixels, ((2, 2),))


def abstract_mmdit(config: mmdit.MMDiTConfig) -> Params:
    """Shapes of a generator's parameters, boxed with logical axes; computes nothing."""
    tokens = jnp.zeros((1, 1, config.in_channels))
    context = jnp.zeros((1, 1, config.joint_attention_dim))
    place = jnp.zeros((1, 1, 3), jnp.int32)
    mask = jnp.ones((1, 1), bool)
    module, time = mmdit.MMDiT(config), jnp.zeros((1,))
    return layers.abstract_params(module, tokens, context, mask, time, place, place)


def abstract_vae(config: vae.VAEConfig) -> Params:
    """Shapes of an autoencoder's parameters, boxed with logical axes; computes nothing."""
    side = 2 * config.downscale
    return layers.abstract_params(vae.VAE(config), jnp.zeros((1, side, side, 3)))


def vlm_shapes(config: qwen_vl.VLMConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of a VLM."""
    return shapes_of(abstract_vlm(config))


def mmdit_shapes(config: mmdit.MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of a generator."""
    return shapes_of(abstract_mmdit(config))


def vae_shapes(config: vae.VAEConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all leaves of an autoencoder."""
    return shapes_of(abstract_vae(config))


class Part(NamedTuple):
    """A model in a folder of transformers or diffusers, checked and not yet read.

    Attributes:
      config: of our module.
      boxed: its abstract parameters with logical axes.
      flat: {'a/b/c': leaves.Leaf or imported.Stored}.
    """

    config: Any
    boxed: Params
    flat: dict[str, Any]


def open_part(part: str, folder: PathLike, dtype: Any = None, ignore: Iterable[str] = ()) -> Part:
    """Checks names and shapes of all tensors of a folder against its config.json.

    Args:
      part: 'vlm', 'mmdit' or 'vae'.
      folder: with config.json and safetensors, in any of the published namings; or an import.
      dtype: of the parameters; None keeps the files'.
      ignore: regexes of torch names that may be left out.

    Raises:
      InputError: a file is missing or broken, or the weights do not fit the config exactly.
    """
    folder = files.Path(folder)
    if imported.is_import(folder):
        values, flat = imported.read(folder, part, dtype)
        config = CONFIGS[part](values)
        return Part(config, ABSTRACT[part](config), flat)
    config = CONFIGS[part](read_json(folder / "config.json"))
    boxed = ABSTRACT[part](config)
    flat = leaves.plan(TABLES[part](config), TensorFolder(folder), shapes_of(boxed), dtype, ignore)
    return Part(config, boxed, flat)


def read(part: str, found: Part, mesh: Mesh | None = None) -> Params:
    """The parameters of `open_part`: numpy arrays, or over `mesh` each device's share only."""
    if mesh is None:
        return unflatten_dict(
            {path: np.asarray(leaf) for path, leaf in found.flat.items()}, sep="/"
        )
    rules = {tower: sharding.Rules() for _, tower in sharding.TOWERS}
    tree = sharding.shardings({part: found.boxed}, rules, mesh)[part]
    places = flatten_dict(tree, sep="/")
    flat = {path: leaves.place(leaf, places[path]) for path, leaf in found.flat.items()}
    return unflatten_dict(flat, sep="/")


def import_vlm(
    folder: PathLike, dtype: Any = None, *, mesh: Mesh | None = None, ignore: Iterable[str] = ()
) -> tuple[qwen_vl.VLMConfig, Params]:
    """A Qwen2.5-VL folder -> (config, parameters of `qwen_vl.QwenVL`).

    Args:
      folder: with config.json and safetensors, in any of the published namings.
      dtype: of the parameters; None keeps the files'.
      mesh: over which the parameters are laid by the default tables; None for numpy arrays.
      ignore: regexes of torch names that may be left out.

    Raises:
      InputError: a file is missing or broken, or the weights do not fit the config exactly.
    """
    found = open_part("vlm", folder, dtype, ignore)
    return found.config, read("vlm", found, mesh)


def import_mmdit(
    folder: PathLike, dtype: Any = None, *, mesh: Mesh | None = None, ignore: Iterable[str] = ()
) -> tuple[mmdit.MMDiTConfig, Params]:
    """A QwenImageTransformer2DModel folder -> (config, parameters of `mmdit.MMDiT`).

    Arguments and errors as `import_vlm`.
    """
    found = open_part("mmdit", folder, dtype, ignore)
    return found.config, read("mmdit", found, mesh)


def import_vae(
    folder: PathLike, dtype: Any = None, *, mesh: Mesh | None = None, ignore: Iterable[str] = ()
) -> tuple[vae.VAEConfig, Params]:
    """An AutoencoderKL or AutoencoderKLQwenImage folder -> (config, parameters of `vae.VAE`).

    Arguments and errors as `import_vlm`.
    """
    found = open_part("vae", folder, dtype, ignore)
    return found.config, read("vae", found, mesh)


def vae_table(config: vae.VAEConfig) -> tables.Table:
    """The table of the autoencoder that `config` describes."""
    if isinstance(config, vae.QwenImageVAEConfig):
        return tables.autoencoder_kl_qwen_image()
    return tables.autoencoder_kl()


CONFIGS = {
    "vlm": qwen_vl.VLMConfig.from_hf,
    "mmdit": mmdit.MMDiTConfig.from_hf,
    "vae": vae.config_from_hf,
}
ABSTRACT = {"vlm": abstract_vlm, "mmdit": abstract_mmdit, "vae": abstract_vae}
TABLES = {
    "vlm": lambda config: tables.vlm(config.tie_word_embeddings),
    "mmdit": lambda config: tables.mmdit(),
    "vae": vae_table,
}


def host(leaf: Any) -> np.ndarray:
    """A leaf as a numpy array on the host."""
    return np.asarray(jax.device_get(leaf))
