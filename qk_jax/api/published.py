"""Published models from Python: Qwen2.5-VL, Qwen-Image's transformer and autoencoders as functions.

Arguments are named as in transformers and diffusers and may be numpy or JAX arrays; results are
JAX arrays. Every call is compiled, once for each combination of architecture, dtype, array shapes
and picture grids, whichever object is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from qk_jax import sharding
from qk_jax.api.summary import size_of, summary
from qk_jax.base import runtime
from qk_jax.base.errors import InputError
from qk_jax.base.hub import component_folder
from qk_jax.base.types import Tree
from qk_jax.models import mmdit, qwen_vl, rotary, vae
from qk_jax.pictures.grids import MERGE, PATCH_DIM, Grids, mrope_positions, picture_tokens
from qk_jax.weights.read import import_model

QWEN_IMAGE_LAW = rotary.PositionLaw("qwen_image")


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedVLM:
    """Qwen2.5-VL up to its last hidden state (transformers' Qwen2_5_VLModel).

    Attributes:
      config: the architecture.
      params: the tree of `qwen_vl.QwenVL`, without `lm_head`.
      dtype: of the computation and the result.
      mesh: over which the parameters are sharded; None for one device.
    """

    config: qwen_vl.VLMConfig
    params: Tree
    dtype: Any
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        what = f"Qwen2.5-VL {size_of(self.config, qwen_vl.PRESETS)}"
        return summary(self, what, self.params, self.dtype)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
    ) -> jax.Array:
        """The last hidden states after the final norm [B, S, D] in `dtype`.

        Ids, mask and grids are read on the host, where the M-RoPE positions are computed: of these
        arguments, only `pixel_values` may be traced by `jax.grad` or `jax.jit`.

        Args:
          input_ids: int [B, S], padded on either side; `<|image_pad|>` once for each 2 x 2 patches
            of a picture.
          attention_mask: [B, S], zero on padding, whose states mean nothing; None for no padding.
          pixel_values: float [P, 1176], the patches of all pictures of the batch in the order of
            their tokens, as Qwen2VLImageProcessor gives them; None without pictures.
          image_grid_thw: int [n, 3], each picture's (1, rows, columns) in patches.

        Raises:
          InputError: a wrong shape, or ids, grids and patches that do not belong together.
        """
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise _wrong("input_ids", input_ids, "whole numbers [batch, tokens]")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.text.vocab_size:
            raise InputError(
                f"input_ids has values from {ids.min()} to {ids.max()}, the vocabulary has "
                f"{self.config.text.vocab_size} entries; use the tokenizer of this model"
            )
        mask = np.ones(ids.shape, bool)
        if attention_mask is not None:
            mask = np.asarray(attention_mask).astype(bool)
        if mask.shape != ids.shape:
            raise _wrong("attention_mask", mask, f"{ids.shape}, the shape of input_ids")
        grids = _picture_grids(pixel_values, image_grid_thw)
        positions = _positions(self.config, ids, mask, grids)
        if not grids:
            pixel_values = np.zeros((0, PATCH_DIM), np.float32)
        elif self.mesh is not None:
            pixel_values = jax.device_put(pixel_values, sharding.replicated(self.mesh))
        rows = (ids.astype(np.int32), positions, mask)
        activations = None if self.mesh is None else sharding.Activations()
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            return _states(
                self.params,
                *(_by_batch(x, self.mesh) for x in rows),
                jnp.asarray(pixel_values),
                module=qwen_vl.QwenVL(self.config, self.dtype, vision_activations=activations),
                grids=grids,
            )


def _picture_grids(pixel_values: Any, image_grid_thw: Any) -> Grids:
    """(rows, columns) in patches of every picture of a batch.

    Raises:
      InputError: grids of no still pictures, or other patches than the grids tell of.
    """
    if (pixel_values is None) != (image_grid_thw is None):
        missing = "pixel_values" if pixel_values is None else "image_grid_thw"
        raise InputError(f"{missing} is missing; pixel_values and image_grid_thw go together")
    if image_grid_thw is None:
        return ()
    thw = np.asarray(image_grid_thw)
    if thw.ndim != 2 or thw.shape[1] != 3 or not np.issubdtype(thw.dtype, np.integer):
        raise _wrong("image_grid_thw", thw, "whole numbers [pictures, 3]")
    for frames, rows, columns in thw.tolist():
        if frames != 1 or min(rows, columns) < MERGE or rows % MERGE or columns % MERGE:
            raise InputError(
                f"image_grid_thw has the row {(frames, rows, columns)}; give (1, rows, columns) of "
                f"still pictures, both multiples of {MERGE} patches"
            )
    patches = int(thw[:, 1:].prod(axis=1).sum())
    if np.shape(pixel_values) != (patches, PATCH_DIM):
        wanted = f"({patches}, {PATCH_DIM}), as the grids of image_grid_thw sum up"
        raise _wrong("pixel_values", pixel_values, wanted)
    return tuple((rows, columns) for _, rows, columns in thw.tolist())


def _positions(
    config: qwen_vl.VLMConfig, ids: np.ndarray, mask: np.ndarray, grids: Grids
) -> np.ndarray:
    """M-RoPE positions, int32 [B, 3, S], for ids and mask [B, S].

    Raises:
      InputError: the picture tokens of a slot are not those of whole pictures, in the order of
        `grids`, or padding hides some.
    """
    pictured = ids == config.image_token_id
    total, wanted = int(pictured.sum()), picture_tokens(grids)
    if total != wanted:
        raise InputError(
            f"input_ids has {total} <|image_pad|> tokens ({config.image_token_id}), the "
            f"{len(grids)} pictures of image_grid_thw need {wanted}; use the processor of this "
            "model, or repeat the token rows x columns / 4 times for each picture"
        )
    positions = np.zeros((len(ids), 3, ids.shape[1]), np.int32)
    rest = list(grids)
    for row, count in enumerate(pictured.sum(axis=1)):
        own: list[tuple[int, int]] = []
        while rest and picture_tokens(tuple(own)) < count:
            own.append(rest.pop(0))
        if picture_tokens(tuple(own)) != count or (pictured[row] & ~mask[row]).any():
            raise InputError(
                f"row {row} of input_ids has {count} <|image_pad|> tokens, which are not those of "
                "whole pictures, or attention_mask hides some; order the pictures of "
                "image_grid_thw by row and pad with another token"
            )
        one = slice(row, row + 1)
        positions[one] = mrope_positions(ids[one], mask[one], tuple(own), config.image_token_id)
    return positions


@functools.partial(jax.jit, static_argnames=("module", "grids"))
def _states(
    params: Tree,
    ids: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    pixels: jax.Array,
    *,
    module: qwen_vl.QwenVL,
    grids: Grids,
) -> jax.Array:
    return _apply(module, params, ids, positions, mask, pixels, grids)


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedMMDiT:
    """Qwen-Image's diffusion transformer (diffusers' QwenImageTransformer2DModel).

    Attributes:
      config: the architecture.
      params: the tree of `mmdit.MMDiT`.
      dtype: of the computation and the result.
      mesh: over which the parameters are sharded; None for one device.
    """

    config: mmdit.MMDiTConfig
    params: Tree
    dtype: Any
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        like = {  # Qwen-Image and its Edit-2511 differ in what no size depends on
            name: dataclasses.replace(preset, zero_cond_t=self.config.zero_cond_t)
            for name, preset in mmdit.PRESETS.items()
        }
        what = f"{mmdit.CLASS_NAME} {size_of(self.config, like)}"
        return summary(self, what, self.params, self.dtype)

    def __call__(
        self,
        hidden_states: Any,
        encoder_hidden_states: Any,
        encoder_hidden_states_mask: Any,
        timestep: Any,
        img_shapes: Sequence[Any],
    ) -> jax.Array:
        """The velocity [B, N, out_channels * 4] in `dtype`; arrays may be traced.

        Args:
          hidden_states: [B, N, in_channels], packed latents: the target's tokens, then those of the
            condition pictures (`models.mmdit.pack`).
          encoder_hidden_states: [B, T, joint_attention_dim], the context.
          encoder_hidden_states_mask: [B, T], zero on padding; None for no padding.
          timestep: [B] or one number, in [0, 1]; 1 is pure noise (the scheduler's timestep / 1000).
          img_shapes: [(1, height, width), ...] of the target and the condition pictures in packed
            tokens (pixels / 16), once, or for every row the same.

        Raises:
          InputError: a wrong shape, or pictures that do not sum up to the tokens.
        """
        cfg, hidden, context = self.config, hidden_states, encoder_hidden_states
        shape, seen = np.shape(hidden), np.shape(context)
        if len(shape) != 3 or shape[2] != cfg.in_channels:
            raise _wrong("hidden_states", hidden, f"[batch, tokens, {cfg.in_channels}]")
        if len(seen) != 3 or seen[::2] != (shape[0], cfg.joint_attention_dim):
            wanted = f"[{shape[0]}, tokens, {cfg.joint_attention_dim}]"
            raise _wrong("encoder_hidden_states", context, wanted)
        mask = encoder_hidden_states_mask
        if mask is None:
            mask = np.ones(seen[:2], bool)
        if np.shape(mask) != seen[:2]:
            raise _wrong("encoder_hidden_states_mask", mask, f"{seen[:2]} of encoder_hidden_states")
        if np.shape(timestep) not in ((), shape[:1]):
            raise _wrong("timestep", timestep, f"{shape[:1]} or one number")
        grids = _token_grids(img_shapes, shape[0])
        tokens = sum(math.prod(grid) for grid in grids)
        if tokens != shape[1]:
            raise InputError(
                f"img_shapes {grids} has {tokens} tokens, hidden_states has {shape[1]}; name the "
                "target and every condition picture in packed tokens (pixels / 16)"
            )
        mask = (mask if isinstance(mask, jax.Array) else np.asarray(mask)) != 0
        time = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), shape[:1])
        return _velocity(
            self.params,
            *(_by_batch(x, self.mesh) for x in (hidden, context, mask, time)),
            module=mmdit.MMDiT(cfg, self.dtype),
            grids=grids,
        )


def _token_grids(img_shapes: Sequence[Any], batch: int) -> Grids:
    """(rows, columns) in packed tokens of the pictures of a row, the target first.

    Raises:
      InputError: no such list, rows that differ, or more than one frame.
    """
    try:
        rows = img_shapes if np.ndim(img_shapes[0]) == 2 else [img_shapes]
        found = {tuple((int(f), int(h), int(w)) for f, h, w in row) for row in rows}
    except (TypeError, ValueError, IndexError, KeyError):
        raise InputError(
            f"img_shapes is {img_shapes!r:.80}; give [(1, height, width), ...], the target first, "
            "once or for every row"
        ) from None
    if len(found) != 1 or len(rows) not in (1, batch):
        raise InputError(
            f"img_shapes has {len(rows)} rows, {len(found)} different, for a batch of {batch}; "
            "all rows of a batch need the same pictures, others belong into another call"
        )
    (shapes,) = found
    for frames, height, width in shapes:
        if frames != 1 or min(height, width) < 1:
            raise InputError(
                f"img_shapes has {(frames, height, width)}; give (1, height, width) of still "
                "pictures"
            )
    return tuple((height, width) for _, height, width in shapes)


@functools.partial(jax.jit, static_argnames=("module", "grids"))
def _velocity(
    params: Tree,
    hidden: jax.Array,
    context: jax.Array,
    mask: jax.Array,
    time: jax.Array,
    *,
    module: mmdit.MMDiT,
    grids: Grids,
) -> jax.Array:
    """The generator with positions of the Qwen-Image law, which does not know roles."""
    target, *conditions = grids
    roles = jnp.zeros((hidden.shape[0], len(conditions)), jnp.int32)
    return _apply(
        module,
        params,
        hidden,
        context,
        mask,
        time,
        rotary.image_positions(QWEN_IMAGE_LAW, target, conditions, roles),
        rotary.text_positions(QWEN_IMAGE_LAW, mask, target, conditions),
        target_tokens=math.prod(target),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedVAE:
    """A KL autoencoder (diffusers' AutoencoderKL or AutoencoderKLQwenImage) for pictures.

    Attributes:
      config: the architecture and the normalisation of latents.
      params: the tree of `vae.VAE`.
      dtype: of the convolutions; latents and pictures are float32.
      mesh: over which the parameters are sharded; None for one device.
    """

    config: vae.VAEConfig
    params: Tree
    dtype: Any
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        what = f"{vae.kind(self.config)} {size_of(self.config, vae.PRESETS)}"
        return summary(self, what, self.params, self.dtype)

    def encode(self, x: Any, *, rng: jax.Array | None = None) -> jax.Array:
        """Pictures -> normalised latents, float32 [B, H / 8, W / 8, C].

        Normalised is what the diffusion model works in: (z - shift) * scale, or with mean and
        standard deviation of each channel, as the config has it.

        Args:
          x: float [B, H, W, 3] in [-1, 1].
          rng: a key of `jax.random` to draw from the posterior; None for its mode.

        Raises:
          InputError: another shape, whole numbers, or sides that are no multiples of 8.
        """
        shape, side = np.shape(x), self.config.downscale
        if len(shape) != 4 or shape[3] != 3:
            raise _wrong("x", x, "[batch, height, width, 3]")
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise InputError(f"x is {jnp.result_type(x)}; give floats in [-1, 1]: x / 127.5 - 1")
        if shape[1] % side or shape[2] % side or not min(shape):
            raise _wrong("x", x, f"sides that are multiples of {side} pixels")
        return _encode(self.params, _by_batch(x, self.mesh), rng, module=self._module)

    def decode(self, z: Any) -> jax.Array:
        """Normalised latents [B, h, w, C] -> pictures, float32 [B, 8 h, 8 w, 3], about [-1, 1].

        AutoencoderKL may leave the range by a little, as it does in diffusers.

        Raises:
          InputError: another shape.
        """
        shape, channels = np.shape(z), self.config.latent_channels
        if len(shape) != 4 or shape[3] != channels:
            raise _wrong("z", z, f"[batch, height / 8, width / 8, {channels}]")
        return _decode(self.params, _by_batch(z, self.mesh), module=self._module)

    @property
    def _module(self) -> vae.VAE:
        return vae.VAE(self.config, self.dtype)


@functools.partial(jax.jit, static_argnames="module")
def _encode(params: Tree, x: jax.Array, rng: jax.Array | None, *, module: vae.VAE) -> jax.Array:
    mean, logvar = _apply(module, params, x, method="encode")
    z = mean if rng is None else vae.sample(mean, logvar, rng)
    return vae.normalize(z, module.config)


@functools.partial(jax.jit, static_argnames="module")
def _decode(params: Tree, z: jax.Array, *, module: vae.VAE) -> jax.Array:
    z = vae.denormalize(z, module.config)
    return _apply(module, params, z, method="decode").astype(jnp.float32)


def _apply(module: nn.Module, params: Tree, *args: Any, **kwargs: Any) -> Any:
    return module.apply({"params": params}, *args, **kwargs)


def _wrong(name: str, given: Any, wanted: str) -> InputError:
    """The error of an argument with a wrong shape."""
    return InputError(f"{name} has the shape {np.shape(given)}; give {wanted}")


def _row_sharding(x: Any, mesh: Mesh) -> jax.sharding.NamedSharding:
    """Rows over (data, fsdp) where they divide, else one copy on every device."""
    parts = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    return sharding.replicated(mesh) if len(x) % parts else sharding.batch_sharding(mesh)


def _by_batch(x: Any, mesh: Mesh | None) -> jax.Array:
    """An argument of a call on its devices."""
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    return jax.device_put(x, None if mesh is None else _row_sharding(x, mesh))


def _imported(
    model: str | os.PathLike, part: str, dtype: Any, mesh: Mesh | None
) -> tuple[Any, Tree]:
    """(config, parameters on their devices) of a part of a published model."""
    runtime.skip_absent_tpu()
    folder = component_folder(model, part)
    config, params = import_model(part, folder, dtype, mesh=mesh)
    return config, params if mesh is not None else jax.device_put(params)


def _dtype(params: Tree, dtype: Any) -> np.dtype:
    """The compute dtype: the given one, or that which holds the values of all parameters."""
    return jnp.dtype(jnp.result_type(*jax.tree.leaves(params)) if dtype is None else dtype)


def load_vlm(model: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None) -> LoadedVLM:
    """A Qwen2.5-VL.

    Args:
      model: its folder, the folder of a diffusers pipeline with such a text encoder, or the id of
        one of the two on the Hugging Face Hub.
      dtype: of parameters and computation; None for that of the files.
      mesh: of `sharding.build_mesh`: every device then holds its share of the parameters by the
        default tables, and the batch of a call is sharded over (data, fsdp) where it divides.

    Raises:
      InputError: no such model, a file is missing or broken, or another architecture.
    """
    config, params = _imported(model, "vlm", dtype, mesh)
    params.pop("lm_head", None)  # 1 GB of a 7b, and the last hidden states do not need it
    return LoadedVLM(config, params, _dtype(params, dtype), mesh)


def load_mmdit(
    model: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None
) -> LoadedMMDiT:
    """A QwenImageTransformer2DModel; arguments and errors as `load_vlm`."""
    config, params = _imported(model, "mmdit", dtype, mesh)
    return LoadedMMDiT(config, params, _dtype(params, dtype), mesh)


def load_vae(model: str | os.PathLike, *, dtype: Any = None, mesh: Mesh | None = None) -> LoadedVAE:
    """An AutoencoderKL or AutoencoderKLQwenImage; arguments and errors as `load_vlm`."""
    config, params = _imported(model, "vae", dtype, mesh)
    return LoadedVAE(config, params, _dtype(params, dtype), mesh)
