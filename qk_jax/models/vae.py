"""KL autoencoders: AutoencoderKL (SD3, FLUX.1, SDXL) and the image path of AutoencoderKLQwenImage.

Pictures are NHWC in [-1, 1], latents [B, H/8, W/8, C] for the public configs. The modules equal
`diffusers`; a list element `name.3` of PyTorch is the module `name_3` here, so that every PyTorch
name can be derived from a path.

For single pictures the causal 3-D convolutions of AutoencoderKLQwenImage see two frames of zeros
before the picture: only the last temporal tap of each kernel counts, and the `time_conv`s are
never reached. The parameter tree holds that 2-D view.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from qk_jax.base.errors import InputError
from qk_jax.models.vae_blocks import Conv, MidBlock, Resample, ResnetBlock, Stage, norm
from qk_jax.sharding.rules import Activations
from qk_jax.sharding.specs import constrain

LOGVAR_RANGE = (-30.0, 20.0)
Pictures = Float[Array, "B H W 3"]
Latents = Float[Array, "B h w C"]


def _check_scales(name: str, **scales: Any) -> None:
    """Raises InputError for a scale of latents that is not positive: nothing comes back from 0."""
    for key, value in scales.items():
        if value is not None and not np.all(np.asarray(value) > 0):
            raise InputError(f"{key} of {name} is {value}; give positive numbers")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Fields of diffusers' AutoencoderKL that change its function or its normalisation."""

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    in_channels: int = 3
    out_channels: int = 3
    sample_size: int = 32
    force_upcast: bool = True

    def __post_init__(self) -> None:
        bad = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if bad or not self.block_out_channels:
            raise InputError(
                f"block_out_channels {self.block_out_channels} of AutoencoderKL must be multiples"
                f" of norm_num_groups {self.norm_num_groups}; change one of them"
            )
        sizes = {len(v) for v in (self.latents_mean, self.latents_std) if v is not None}
        if (self.latents_mean is None) != (self.latents_std is None) or sizes - {
            self.latent_channels
        }:
            raise InputError(
                "latents_mean and latents_std of AutoencoderKL need latent_channels = "
                f"{self.latent_channels} entries each, or both none"
            )
        _check_scales(
            "AutoencoderKL", scaling_factor=self.scaling_factor, latents_std=self.latents_std
        )

    @property
    def downscale(self) -> int:
        """Picture pixels per latent position along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def shift_and_scale(self) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
        """(shift, scale) in float32: model space is (z - shift) * scale."""
        shift = np.full(self.latent_channels, self.shift_factor or 0.0)
        scale = np.full(self.latent_channels, self.scaling_factor)
        if self.latents_mean is not None and self.latents_std is not None:
            shift, scale = np.asarray(self.latents_mean), scale / np.asarray(self.latents_std)
        return shift.astype(np.float32), scale.astype(np.float32)


QWEN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
QWEN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QwenImageVAEConfig:
    """Fields of diffusers' AutoencoderKLQwenImage (`temperal_downsample` is its spelling)."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    input_channels: int = 3
    latents_mean: tuple[float, ...] = QWEN_MEAN
    latents_std: tuple[float, ...] = QWEN_STD

    # What AutoencoderKL's config chooses is fixed here.
    norm_num_groups: ClassVar[None] = None
    use_quant_conv: ClassVar[bool] = True
    use_post_quant_conv: ClassVar[bool] = True
    mid_block_add_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise InputError(
                f"temperal_downsample {self.temperal_downsample} of AutoencoderKLQwenImage needs"
                f" one entry less than dim_mult {self.dim_mult}"
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise InputError(
                f"latents_mean and latents_std of AutoencoderKLQwenImage need z_dim = {self.z_dim}"
                f" entries; they have {len(self.latents_mean)} and {len(self.latents_std)}"
            )
        _check_scales("AutoencoderKLQwenImage", latents_std=self.latents_std)

    @property
    def latent_channels(self) -> int:
        return self.z_dim

    @property
    def out_channels(self) -> int:
        return self.input_channels

    @property
    def layers_per_block(self) -> int:
        return self.num_res_blocks

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        return tuple(self.base_dim * multiple for multiple in self.dim_mult)

    @property
    def downscale(self) -> int:
        """Picture pixels per latent position along one side."""
        return 2 ** (len(self.dim_mult) - 1)

    def shift_and_scale(self) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
        """(shift, scale) in float32: model space is (z - shift) * scale."""
        scale = 1.0 / np.asarray(self.latents_std)
        return np.asarray(self.latents_mean, np.float32), scale.astype(np.float32)


VAEConfig = AutoencoderKLConfig | QwenImageVAEConfig
# The autoencoders by diffusers' class name.
KINDS: dict[str, type[VAEConfig]] = {
    "AutoencoderKL": AutoencoderKLConfig,
    "AutoencoderKLQwenImage": QwenImageVAEConfig,
}
_SDXL = AutoencoderKLConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    scaling_factor=0.13025,
    sample_size=1024,
)
_SD3 = dataclasses.replace(
    _SDXL,
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
PRESETS: dict[str, VAEConfig] = {
    "tiny": AutoencoderKLConfig(
        block_out_channels=(24, 48, 96, 144),
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
    ),
    "sd3": _SD3,
    "flux": dataclasses.replace(_SD3, scaling_factor=0.3611, shift_factor=0.1159),
    "sdxl": _SDXL,
    "qwen_image": QwenImageVAEConfig(),
}


def kind(config: VAEConfig) -> str:
    """diffusers' class name of the autoencoder."""
    return next(name for name, cls in KINDS.items() if type(config) is cls)


class Encoder(nn.Module):
    """AutoencoderKL's encoder: pictures -> moments [B, H/8, W/8, 2 C]."""

    config: AutoencoderKLConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Pictures) -> Float[Array, "B h w moments"]:
        config, dtype, groups = self.config, self.dtype, self.config.norm_num_groups
        widths, attends = config.block_out_channels, config.mid_block_add_attention
        x = Conv(widths[0], dtype=dtype, name="conv_in")(x)
        for index, width in enumerate(widths):
            resampled = width if index + 1 < len(widths) else None
            stage = Stage(
                width, config.layers_per_block, groups, resampled, dtype=dtype,
                name=f"down_blocks_{index}",
            )  # fmt: skip
            x = stage(x)
        x = MidBlock(widths[-1], groups, attends, dtype, self.activations, name="mid_block")(x)
        x = nn.silu(norm(groups, dtype, "conv_norm_out")(x))
        return Conv(2 * config.latent_channels, dtype=dtype, name="conv_out")(x)


class QwenEncoder(nn.Module):
    """QwenImageEncoder3d for one frame; its down_blocks are one flat list."""

    config: QwenImageVAEConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Pictures) -> Float[Array, "B h w moments"]:
        config, dtype, widths = self.config, self.dtype, self.config.block_out_channels
        names = map("down_blocks_{}".format, itertools.count())
        x = Conv(config.base_dim, dtype=dtype, name="conv_in")(x)
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                x = ResnetBlock(width, None, dtype, name=next(names))(x)
            if level + 1 < len(widths):
                x = Resample(width, "resample_1", False, dtype, name=next(names))(x)
        x = MidBlock(widths[-1], None, True, dtype, self.activations, name="mid_block")(x)
        x = nn.silu(norm(None, dtype, "norm_out")(x))
        return Conv(2 * config.z_dim, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """AutoencoderKL's decoder, or QwenImageDecoder3d for one frame: latents -> pictures.

    Nothing is clamped. Each upsampling convolution of the latter halves the channels.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, z: Latents) -> Pictures:
        config, dtype, groups = self.config, self.dtype, self.config.norm_num_groups
        widths, attends = config.block_out_channels[::-1], config.mid_block_add_attention
        x = Conv(widths[0], dtype=dtype, name="conv_in")(z)
        x = MidBlock(widths[0], groups, attends, dtype, self.activations, name="mid_block")(x)
        conv, shrink, last = "conv", 1, "conv_norm_out"
        if isinstance(config, QwenImageVAEConfig):
            conv, shrink, last = "resample_1", 2, "norm_out"
        for index, width in enumerate(widths):
            resampled = width // shrink if index + 1 < len(widths) else None
            stage = Stage(
                width, config.layers_per_block + 1, groups, resampled, conv, True, dtype,
                name=f"up_blocks_{index}",
            )  # fmt: skip
            x = stage(x)
        x = nn.silu(norm(groups, dtype, last)(x))
        return Conv(config.out_channels, dtype=dtype, name="conv_out")(x)


class VAE(nn.Module):
    """diffusers' AutoencoderKL, or the image path of AutoencoderKLQwenImage, as `config` says.

    `encode` and `decode` are the methods to apply; `activations` has the sharding of activations.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    def setup(self) -> None:
        config, channels = self.config, self.config.latent_channels
        self.encoder: nn.Module = (
            QwenEncoder(config, self.dtype, self.activations)
            if isinstance(config, QwenImageVAEConfig)
            else Encoder(config, self.dtype, self.activations)
        )
        self.decoder = Decoder(config, self.dtype, self.activations)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, size=1, dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, size=1, dtype=self.dtype)

    def encode(self, x: Pictures) -> tuple[Latents, Latents]:
        """Pictures in [-1, 1] -> (mean, log variance) of latents, float32."""
        h = self.encoder(constrain(x, self.activations, "batch", None, None, None))
        h = self.quant_conv(h) if self.config.use_quant_conv else h
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, z: Latents) -> Pictures:
        """Latents -> pictures, about [-1, 1]; AutoencoderKLQwenImage clamps, AutoencoderKL not."""
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        x = self.decoder(z)
        return jnp.clip(x, -1.0, 1.0) if isinstance(self.config, QwenImageVAEConfig) else x

    def __call__(self, x: Pictures) -> Pictures:
        """Pictures through the posterior mean and back; used to make the parameters."""
        return self.decode(self.encode(x)[0])

    def example(self) -> tuple[Array]:
        """Arguments of the smallest call that makes all parameters."""
        side = 2 * self.config.downscale
        return (jnp.zeros((1, side, side, 3)),)


def sample(
    mean: Float[Array, "*any"], logvar: Float[Array, "*any"], rng: Key[Array, ""]
) -> Float[Array, "*any"]:
    """A draw from the posterior, float32."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(rng, mean.shape, jnp.float32)


def normalize(z: Float[Array, "*any C"], config: VAEConfig) -> Float[Array, "*any C"]:
    """Latents -> the space that the diffusion model works in, float32."""
    shift, scale = config.shift_and_scale()
    return (z.astype(jnp.float32) - shift) * scale


def denormalize(z: Float[Array, "*any C"], config: VAEConfig) -> Float[Array, "*any C"]:
    """The inverse of `normalize`, float32."""
    shift, scale = config.shift_and_scale()
    return z.astype(jnp.float32) / scale + shift
