"""What a step of the tiny generator reads: drawn examples with the latents of their pictures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import mmdit_examples  # beside this file
import numpy as np
from common import SIZES
from mmdit_examples import Drawn

from qk_jax.base import files
from qk_jax.models import mmdit, rotary, vae
from qk_jax.pictures.roles import SOURCE
from qk_jax.weights.read import import_model

LAWS = {mode: rotary.PositionLaw("shifted", mode) for mode in rotary.SOURCE_MODES}
LAWS["qwen_image"] = rotary.PositionLaw("qwen_image")
TOKENS = 16  # of the largest size; the others are padded to it, so that one batch holds all


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded examples; arrays have a leading axis of length n.

    Attributes:
      prompts, size, shown, text, mask: as in `Drawn`.
      mean, std: float16 [n, TOKENS, 64], posterior of the packed latents, normalised.
      source: float16 [n, TOKENS, 64], the same of the picture that is given, without noise; no
        token attends it where none is given.
    """

    prompts: np.ndarray
    size: np.ndarray
    shown: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    source: np.ndarray
    text: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, chosen: np.ndarray) -> Examples:
        """The examples with these numbers."""
        return Examples(*(array[chosen] for array in vars(self).values()))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a step reads."""
        return {name: x for name, x in vars(self).items() if name != "prompts"}


def join(parts: Iterable[Examples]) -> Examples:
    """Examples one after another."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Examples(*(np.concatenate(column) for column in columns))


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Packed tokens (rows, columns) of a picture of (height, width) pixels."""
    return size[0] // 16, size[1] // 16


@functools.cache
def token_positions(law: rotary.PositionLaw) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a target and of a source of its size, int32 [sizes, 2 TOKENS, 3], and which of
    a picture's tokens are real, bool [sizes, TOKENS]."""
    positions, real = [], []
    for size in SIZES:
        grid = grid_of(size)
        with jax.ensure_compile_time_eval():  # the first call may come while a step is traced
            found = rotary.image_positions(law, grid, (grid,), jnp.full((1, 1), SOURCE))
            at = np.split(np.asarray(found[0]), 2)
        rest = ((0, TOKENS - len(at[0])), (0, 0))
        positions.append(np.concatenate([np.pad(part, rest) for part in at]))
        real.append(np.arange(TOKENS) < len(at[0]))
    return np.stack(positions), np.stack(real)


class Autoencoder:
    """The frozen VAE of a folder: pictures to packed latents and back."""

    def __init__(self, folder: files.Path):
        config, params = import_model("vae", folder)
        model = vae.VAE(config)

        def packed(x: jax.Array) -> jax.Array:
            x = mmdit.pack(x).astype(jnp.float16)
            return jnp.pad(x, ((0, 0), (0, TOKENS - x.shape[1]), (0, 0)))

        @functools.partial(jax.jit, static_argnums=2)
        def encode(params, pictures, size):
            x = pictures[:, : math.prod(size) * 3].reshape(-1, *size, 3)
            x = x.astype(jnp.float32) / 127.5 - 1
            mean, logvar = model.apply({"params": params}, x, method="encode")
            edge = vae.normalize(mean + jnp.exp(0.5 * logvar), config)
            mean = vae.normalize(mean, config)
            return packed(mean), packed(edge - mean)

        @functools.partial(jax.jit, static_argnums=2)
        def decode(params, tokens, size):
            height, width = size
            real = tokens[:, : math.prod(grid_of(size))].astype(jnp.float32)
            z = vae.denormalize(mmdit.unpack(real, height // 8, width // 8), config)
            return model.apply({"params": params}, z, method="decode")

        self.channels = 4 * config.latent_channels
        self.encode = functools.partial(encode, jax.device_put(params))
        self.pixels = functools.partial(decode, jax.device_put(params))

    def latents(self, pictures: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures in rows, uint8 [n, VALUES], of sizes [n] -> mean and std [n, TOKENS, 64]."""
        slots = mmdit_examples.SLOTS
        mean, std = np.zeros((2, len(size), TOKENS, self.channels), np.float16)
        for index in np.unique(size):
            (same,) = np.nonzero(size == index)
            for start in range(0, len(same), slots):
                chosen = same[start : start + slots]
                part = np.resize(pictures[chosen], (slots, pictures.shape[1]))
                found = self.encode(part, SIZES[index])  # of one compiled shape
                mean[chosen], std[chosen] = (np.asarray(x)[: len(chosen)] for x in found)
        return mean, std

    def decode(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Normalised packed latents [n, TOKENS, 64] of one size -> uint8 [n, H, W, 3]."""
        x = np.asarray(self.pixels(tokens, SIZES[size]))
        return np.clip((x + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def encoded(autoencoder: Autoencoder, drawn: Drawn) -> Examples:
    """Drawn examples with their latents."""
    size, shown = np.asarray(drawn.size), np.asarray(drawn.shown)
    mean, std = autoencoder.latents(drawn.target, size)
    source = np.zeros_like(mean)
    if shown.any():
        source[shown] = autoencoder.latents(drawn.source[shown], size[shown])[0]
    prompts, text, mask = (np.asarray(x) for x in (drawn.prompts, drawn.text, drawn.mask))
    return Examples(prompts, size, shown, mean, std, source, text, mask)
