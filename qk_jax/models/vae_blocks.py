"""Convolutions, norms and blocks of both autoencoders, over pictures [B, height, width, C]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qk_jax.models import layers
from qk_jax.models.attention import attention
from qk_jax.sharding.rules import Activations

Map = Float[Array, "B height width channels"]


class Conv(nn.Module):
    """torch.nn.Conv2d over NHWC: kernel [k, k, in, out], bias [out].

    Stride 1 pads k // 2 on every side; stride 2 pads one pixel below and one to the right, as the
    downsampling layers of both VAEs do.
    """

    features: int
    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Float[Array, "B _height _width features"]:
        axes = (None, None, "conv_in", "conv_out")
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", layers.boxed(layers.lecun, axes), shape, jnp.float32)
        zeros = layers.boxed(nn.initializers.zeros_init(), ("conv_out",))
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        pad = (0, 1) if self.stride == 2 else (self.size // 2, self.size // 2)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=(pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )
        # Rounded once, after the bias, as in PyTorch: twice is a seventh farther from the truth.
        return (y + bias.astype(jnp.float32)).astype(self.dtype)


class GroupNorm(nn.Module):
    """torch.nn.GroupNorm over [B, ..., C], eps 1e-6; statistics in float32."""

    groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Map:
        channels = x.shape[-1]
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", layers.boxed(ones, ("norm",)), (channels,), jnp.float32)
        bias = self.param("bias", layers.boxed(zeros, ("norm",)), (channels,), jnp.float32)
        flat = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        flat = flat - self._group_mean(flat)
        flat = flat * jax.lax.rsqrt(self._group_mean(jnp.square(flat)) + 1e-6)
        return (flat * scale + bias).reshape(x.shape).astype(self.dtype)

    def _group_mean(self, flat: Array) -> Array:
        """[B, positions, C] -> the mean of each channel's group, [B, 1, C].

        Positions are summed before channels: a reduction over both at once, with the channels
        split in two axes, is several times slower on a CPU.
        """
        batch, _, channels = flat.shape
        mean = jnp.mean(jnp.mean(flat, axis=1).reshape(batch, self.groups, -1), axis=-1)
        return jnp.repeat(mean, channels // self.groups, axis=-1)[:, None]


class ChannelNorm(nn.Module):
    """QwenImageRMS_norm: x / max(|x|, 1e-12) * sqrt(C) * scale, |x| over channels in float32."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Map:
        ones = nn.initializers.ones_init()
        scale = self.param("scale", layers.boxed(ones, ("norm",)), (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        # max(|x|, 1e-12) through the square, whose gradient is finite at zero.
        length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
        return (x / length).astype(self.dtype) * (x.shape[-1] ** 0.5 * scale).astype(self.dtype)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input (1x1 conv when the width changes).

    `groups` chooses GroupNorm; None is ChannelNorm (AutoencoderKLQwenImage).
    """

    features: int
    groups: int | None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Float[Array, "B height width features"]:
        h = nn.silu(norm(self.groups, self.dtype, "norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(norm(self.groups, self.dtype, "norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


def norm(groups: int | None, dtype: Any, name: str) -> nn.Module:
    """GroupNorm (AutoencoderKL), or ChannelNorm without groups (AutoencoderKLQwenImage)."""
    if groups is None:
        return ChannelNorm(dtype=dtype, name=name)
    return GroupNorm(groups, dtype=dtype, name=name)


class AttentionBlock(nn.Module):
    """AutoencoderKL's attention of one head over all positions, plus the input."""

    groups: int
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Map) -> Map:
        batch, height, width, channels = x.shape

        def dense(name: str, h: Array) -> Array:
            axes = ("conv_in", "conv_out")
            return layers.Dense(channels, axes=axes, dtype=self.dtype, name=name)(h)

        h = GroupNorm(self.groups, dtype=self.dtype, name="group_norm")(x)
        h = h.reshape(batch, height * width, 1, channels)
        query, key, value = (dense(name, h) for name in ("to_q", "to_k", "to_v"))
        h = attention(query, key, value, activations=self.activations)
        return x + dense("to_out_0", h).reshape(x.shape)


class QwenAttentionBlock(nn.Module):
    """QwenImageAttentionBlock: one head with a fused projection, plus the input."""

    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Map) -> Map:
        batch, height, width, channels = x.shape
        h = ChannelNorm(dtype=self.dtype, name="norm")(x)
        h = Conv(3 * channels, size=1, dtype=self.dtype, name="to_qkv")(h)
        h = h.reshape(batch, height * width, 1, 3 * channels)
        query, key, value = jnp.split(h, 3, axis=-1)
        h = attention(query, key, value, activations=self.activations).reshape(x.shape)
        return x + Conv(channels, size=1, dtype=self.dtype, name="proj")(h)


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block, at the lowest resolution."""

    features: int
    groups: int | None
    attends: bool = True
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Map) -> Map:
        x = ResnetBlock(self.features, self.groups, self.dtype, name="resnets_0")(x)
        if self.attends:
            settings = {"dtype": self.dtype, "activations": self.activations}
            if self.groups is None:
                x = QwenAttentionBlock(**settings, name="attentions_0")(x)
            else:
                x = AttentionBlock(self.groups, **settings, name="attentions_0")(x)
        return ResnetBlock(self.features, self.groups, self.dtype, name="resnets_1")(x)


class Resample(nn.Module):
    """A convolution that halves the picture, or doubles it (nearest) before convolving.

    `conv` is the PyTorch name of the convolution inside.
    """

    features: int
    conv: str
    upsamples: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Float[Array, "B _height _width features"]:
        if self.upsamples:
            b, h, w, c = x.shape
            x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
            x = x.reshape(b, 2 * h, 2 * w, c)
        stride = 1 if self.upsamples else 2
        return Conv(self.features, stride=stride, dtype=self.dtype, name=self.conv)(x)


class Stage(nn.Module):
    """Residual blocks of one resolution, then a resampling layer where `resampled`, its width, is
    given; `conv` is the PyTorch name of the convolution in it."""

    features: int
    count: int
    groups: int | None
    resampled: int | None = None
    conv: str = "conv"
    upsamples: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Map) -> Float[Array, "B _height _width _features"]:
        for index in range(self.count):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f"resnets_{index}")(x)
        if self.resampled is not None:
            name = "upsamplers_0" if self.upsamples else "downsamplers_0"
            resample = Resample(self.resampled, self.conv, self.upsamples, self.dtype, name=name)
            x = resample(x)
        return x
