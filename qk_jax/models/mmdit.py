"""The diffusion transformer: diffusers' QwenImageTransformer2DModel, block by block.

Two streams, text and image, meet in one joint attention per block; the timestep modulates both.
Parameter names are diffusers' names, with the blocks stacked under `transformer_blocks`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qk_jax.base.errors import InputError
from qk_jax.models import layers, rotary
from qk_jax.models.attention import attention
from qk_jax.sharding.rules import Activations
from qk_jax.sharding.specs import constrain

CLASS_NAME = "QwenImageTransformer2DModel"
TIME_CHANNELS = 256

# The text branch after the last attention feeds nothing: these modules of the last block get no
# gradient, and weight decay alone would move them (torch leaves them alone).
UNUSED_IN_LAST_BLOCK = r"transformer_blocks/(attn/to_add_out|txt_mlp/(net_0_proj|net_2))/.*"


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Architecture, named as in diffusers' config.json; the defaults are Qwen-Image's.

    Attributes:
      patch_size: side of a packed patch, in latent pixels.
      in_channels: channels of a packed token.
      out_channels: latent channels; a token's output has out_channels * patch_size^2.
      num_layers: double-stream blocks.
      attention_head_dim: channels per head, the sum of axes_dims_rope.
      num_attention_heads: heads; the model width is heads * head_dim.
      joint_attention_dim: channels of the context (connector output).
      axes_dims_rope: rotary channels of (frame, row, column).
      zero_cond_t: condition pictures are modulated as clean ones, at t = 0 (Qwen-Image-Edit-2511).

    Raises:
      InputError: the rotary axes do not fill a head, or a size is not a positive integer.
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if type(sizes.pop("zero_cond_t")) is not bool:
            raise InputError(f"{CLASS_NAME} config: zero_cond_t must be true or false")
        for name, value in sizes.items():
            for size in value if name == "axes_dims_rope" else (value,):
                if type(size) is not int or size < 1:
                    raise InputError(
                        f"{CLASS_NAME} config: {name} is {value!r}; give positive integers"
                    )
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(d % 2 for d in axes):
            raise InputError(
                f"{CLASS_NAME} config: axes_dims_rope {axes} must be three even numbers "
                f"with the sum attention_head_dim {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        """Channels of both streams."""
        return self.num_attention_heads * self.attention_head_dim


_TINY = MMDiTConfig(
    num_layers=5,  # 6.2 MB in float16: the tiny parts ship inside the package
    attention_head_dim=64,  # narrower heads hardly tell neighbouring positions apart
    num_attention_heads=2,
    joint_attention_dim=192,
    axes_dims_rope=(8, 28, 28),
    zero_cond_t=True,
)
PRESETS = {
    "tiny_head": dataclasses.replace(_TINY, num_layers=2),
    "tiny": _TINY,
    "small": dataclasses.replace(_TINY, num_layers=7, num_attention_heads=3),  # 19 MB in float16
    "0.9b": MMDiTConfig(num_layers=15, num_attention_heads=10),
    "10b": MMDiTConfig(num_layers=30),
    "20b": MMDiTConfig(),
}


def pack(z: Float[Array, "B h w C"], patch: int = 2) -> Float[Array, "B tokens packed"]:
    """Latents -> tokens [B, h/p * w/p, C p p]; channel order (C, row, column)."""
    return rearrange(z, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpack(
    x: Float[Array, "B tokens packed"], h: int, w: int, patch: int = 2
) -> Float[Array, "B h w C"]:
    """The inverse of `pack`."""
    sizes = {"h": h // patch, "w": w // patch, "p": patch, "q": patch}
    return rearrange(x, "b (h w) (c p q) -> b (h p) (w q) c", **sizes)


def timestep_embedding(timestep: Float[Array, " B"]) -> Float[Array, "B 256"]:
    """Sinusoids of t in [0, 1], scaled by 1000, in float32: cosines first."""
    half = TIME_CHANNELS // 2
    # The exponents are rounded as diffusers rounds them: at 1000 rad one bit more moves the output.
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent)
    angle = 1000.0 * (timestep.astype(jnp.float32)[:, None] * frequency)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedder(nn.Module):
    """t -> features in float32 throughout, since bfloat16 moves t by up to 1.7/1000."""

    width: int

    @nn.compact
    def __call__(self, timestep: Float[Array, " B"]) -> Float[Array, "B width"]:
        init = nn.initializers.normal(0.02)
        x = timestep_embedding(timestep)
        x = layers.Dense(self.width, (None, "embed"), kernel_init=init, name="linear_1")(x)
        x = nn.silu(x)
        return layers.Dense(self.width, ("embed", None), kernel_init=init, name="linear_2")(x)


class TimeTextEmbed(nn.Module):
    """Holds the timestep embedder under diffusers' name."""

    width: int

    def setup(self) -> None:
        self.timestep_embedder = TimestepEmbedder(self.width)

    def __call__(self, timestep: Float[Array, " B"]) -> Float[Array, "B width"]:
        return self.timestep_embedder(timestep)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear at four times the width."""

    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B tokens width"]) -> Float[Array, "B tokens width"]:
        width = x.shape[-1]
        x = layers.Dense(4 * width, ("embed", "mlp"), dtype=self.dtype, name="net_0_proj")(x)
        x = checkpoint_name(constrain(x, self.activations, "batch", "sequence", "mlp"), "mlp")
        x = layers.gelu_tanh(x)
        x = layers.Dense(width, ("mlp_in", None), dtype=self.dtype, name="net_2")(x)
        return checkpoint_name(x, "out")


Table = tuple[Array, Array]  # (cos, sin), float32 [(B,) tokens, head_dim / 2]
Image = Float[Array, "B N width"]
Text = Float[Array, "B L width"]
Streams = tuple[Image, Text]


class JointAttention(nn.Module):
    """One attention over [text ; image]; each stream has its own projections and norms."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(
        self,
        image: Image,
        text: Text,
        image_table: Table,
        text_table: Table,
        segments: Int[Array, "B L+N"],
    ) -> Streams:
        """(image, text) after their output projections; tokens attend those of their segment."""
        heads, dim = self.config.num_attention_heads, self.config.attention_head_dim

        def project(x: Array, name: str) -> Array:
            axes = ("embed", "heads")
            x = layers.Dense(heads * dim, axes, dtype=self.dtype, to_heads=heads, name=name)(x)
            x = constrain(x, self.activations, "batch", "sequence", "heads", None)
            return checkpoint_name(x, "qkv")

        def normed(x: Array, name: str, table: Table) -> Array:
            x = layers.RMSNorm(dtype=self.dtype, name=name)(x)
            return rotary.apply_interleaved(x, *table)

        joint = [
            (
                normed(project(text, "add_q_proj"), "norm_added_q", text_table),
                normed(project(image, "to_q"), "norm_q", image_table),
            ),
            (
                normed(project(text, "add_k_proj"), "norm_added_k", text_table),
                normed(project(image, "to_k"), "norm_k", image_table),
            ),
            (project(text, "add_v_proj"), project(image, "to_v")),
        ]
        query, key, value = (jnp.concatenate(pair, axis=1) for pair in joint)
        out = attention(query, key, value, (segments, segments), activations=self.activations)
        text, image = jnp.split(out, [text.shape[1]], axis=1)

        def merged(x: Array, name: str) -> Array:
            dense = layers.Dense(
                heads * dim, ("heads_in", None), dtype=self.dtype, from_heads=True, name=name
            )
            return checkpoint_name(dense(x), "out")

        return merged(image, "to_out_0"), merged(text, "to_add_out")


class Block(nn.Module):
    """One double-stream block with per-stream modulation (shift, scale, gate) x 2."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None

    def setup(self) -> None:
        dtype, activations = self.dtype, self.activations
        self.img_mod_1 = _modulation(6 * self.config.width, dtype)
        self.txt_mod_1 = _modulation(6 * self.config.width, dtype)
        self.attn = JointAttention(self.config, dtype, activations)
        self.img_mlp = FeedForward(dtype, activations)
        self.txt_mlp = FeedForward(dtype, activations)

    def __call__(
        self,
        streams: Streams,
        time: Float[Array, "B width"],
        clean: tuple[Float[Array, "1 width"], Bool[Array, " N"]] | None,
        image_table: Table,
        text_table: Table,
        segments: Int[Array, "B L+N"],
    ) -> tuple[Streams, None]:
        """Both streams after the block.

        `time` is SiLU(embedding) in float32; `clean` is None or (the same at t = 0, True for the
        image tokens that it modulates).
        """
        image, text = (self._sharded(x) for x in streams)
        image_mod = _modulations(self.img_mod_1, time, 6, self.activations)
        if clean is not None:
            zeros = _modulations(self.img_mod_1, clean[0], 6, self.activations)
            pairs = zip(image_mod, zeros, strict=True)
            image_mod = [jnp.where(clean[1][:, None], zero, now) for now, zero in pairs]
        text_mod = _modulations(self.txt_mod_1, time, 6, self.activations)
        image_out, text_out = self.attn(
            self._modulated(image, *image_mod[:2]),
            self._modulated(text, *text_mod[:2]),
            image_table,
            text_table,
            segments,
        )
        image = self._gated(image, image_mod[2], image_out)
        text = self._gated(text, text_mod[2], text_out)
        image_out = self.img_mlp(self._modulated(image, *image_mod[3:5]))
        text_out = self.txt_mlp(self._modulated(text, *text_mod[3:5]))
        image = self._gated(image, image_mod[5], image_out)
        text = self._gated(text, text_mod[5], text_out)
        return (self._sharded(image), self._sharded(text)), None

    def _sharded(self, x: Array) -> Array:
        return constrain(x, self.activations, "batch", "sequence", "embed")

    def _modulated(self, x: Array, shift: Array, scale: Array) -> Array:
        return (layers.layer_norm(x) * (1 + scale) + shift).astype(self.dtype)

    def _gated(self, x: Array, gate: Array, update: Array) -> Array:
        return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(self.dtype)


class NormOut(nn.Module):
    """diffusers' AdaLayerNormContinuous: its Linear gives scale first, then shift."""

    dtype: Any = jnp.float32
    activations: Activations | None = None

    @nn.compact
    def __call__(self, x: Image, time: Float[Array, "B width"]) -> Image:
        linear = _modulation(2 * x.shape[-1], self.dtype, name="linear")
        scale, shift = _modulations(linear, time, 2, self.activations)
        return (layers.layer_norm(x) * (1 + scale) + shift).astype(self.dtype)


class MMDiT(nn.Module):
    """Predicts the velocity of the image tokens.

    Attributes:
      config: the architecture.
      dtype: compute dtype; modulation sums, norms, rotary and softmax stay float32.
      remat: which activations of a block are kept (`layers.remat_policy`).
      activations: their sharding; None leaves it to the compiler.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    activations: Activations | None = None

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.img_in = layers.Dense(config.width, ("patch", "embed"), dtype=dtype)
        self.txt_norm = layers.RMSNorm(dtype=dtype)
        self.txt_in = layers.Dense(config.width, (None, "embed"), dtype=dtype)
        self.time_text_embed = TimeTextEmbed(config.width)
        blocks = layers.scan_blocks(Block, config.num_layers, self.remat, (nn.broadcast,) * 5)
        self.transformer_blocks = blocks(config, dtype, self.activations)
        self.norm_out = NormOut(dtype, self.activations)
        self.proj_out = layers.Dense(
            config.out_channels * config.patch_size**2,
            ("embed", "patch"),
            dtype=dtype,
            kernel_init=nn.initializers.zeros_init(),
        )

    def __call__(
        self,
        hidden_states: Float[Array, "B N in_channels"],
        encoder_hidden_states: Float[Array, "B L J"],
        encoder_mask: Bool[Array, "B L"],
        timestep: Float[Array, " B"],
        image_positions: Int[Array, "B N 3"],
        text_positions: Int[Array, "*B_or_none L 3"],
        hidden_mask: Bool[Array, "B N"] | None = None,
        target_tokens: int | None = None,
    ) -> Float[Array, "B N packed"]:
        """The velocity [B, N, out_channels * patch_size^2] in `dtype`, meant at the target only.

        Args:
          hidden_states: packed [target ; condition pictures].
          encoder_hidden_states: the context.
          encoder_mask: False on padding, which no token attends.
          timestep: t in [0, 1]; 1 is pure noise.
          image_positions: from rotary.image_positions.
          text_positions: from rotary.text_positions.
          hidden_mask: False for image tokens that no other token attends (condition pictures
            dropped from a slot); None attends to all.
          target_tokens: how many of the N are the target's; None for all. The others are modulated
            at t = 0 with `zero_cond_t`.
        """
        axes = self.config.axes_dims_rope
        tables = (rotary.cos_sin(image_positions, axes), rotary.cos_sin(text_positions, axes))
        if hidden_mask is None:
            hidden_mask = jnp.ones(hidden_states.shape[:2], bool)
        segments = jnp.concatenate([encoder_mask, hidden_mask], axis=1).astype(jnp.int32)
        # Every modulation begins with the same SiLU: it is applied once.
        time = nn.silu(self.time_text_embed(timestep))
        time = constrain(time, self.activations, "modulation_batch", "embed")
        count, clean = hidden_states.shape[1], None
        target_tokens = target_tokens or count
        if self.config.zero_cond_t and target_tokens < count:
            zero = nn.silu(self.time_text_embed(jnp.zeros_like(timestep[:1])))
            clean = (zero, jnp.arange(count) >= target_tokens)
        image = self.img_in(hidden_states)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        (image, _), _ = self.transformer_blocks((image, text), time, clean, *tables, segments)
        return self.proj_out(self.norm_out(image, time))

    def example(self) -> tuple[Array, ...]:
        """Arguments of the smallest call that makes all parameters."""
        tokens = jnp.zeros((1, 1, self.config.in_channels))
        context = jnp.zeros((1, 1, self.config.joint_attention_dim))
        positions = jnp.zeros((1, 1, 3), jnp.int32)
        return tokens, context, jnp.ones((1, 1), bool), jnp.zeros((1,)), positions, positions


def _modulation(features: int, dtype: Any, name: str | None = None) -> layers.Dense:
    """A Linear that gives shifts, scales and gates; zero at first, so a fresh block is identity."""
    zeros = nn.initializers.zeros_init()
    axes = (None, "modulation")
    return layers.Dense(features, axes, dtype=dtype, kernel_init=zeros, name=name)


def _modulations(
    linear: layers.Dense, time: Array, parts: int, activations: Activations | None
) -> list[Array]:
    """time [B, width] -> parts times float32 [B, 1, width], to be added to tokens."""
    x = constrain(linear(time), activations, "modulation_batch", "modulation")
    x = constrain(x, activations, "batch", "embed")
    return jnp.split(x.astype(jnp.float32)[:, None], parts, axis=-1)
