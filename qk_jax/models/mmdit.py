"""The diffusion transformer: diffusers' QwenImageTransformer2DModel, block by block.

Two streams, text and image, meet in one joint attention per block; the timestep modulates both.
Parameter names are diffusers' names, with the blocks stacked under `transformer_blocks`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from qk_jax.base.errors import InputError
from qk_jax.models import layers, rotary
from qk_jax.models.attention import attention
from qk_jax.sharding.rules import Activations
from qk_jax.sharding.specs import constrain

CLASS_NAME = "QwenImageTransformer2DModel"
TIME_CHANNELS = 256
# Keys of the config that diffusers ignores, and features that a public config may say it has not.
UNUSED = {"pooled_projection_dim"}
ABSENT = {"guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"}

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

    def __post_init__(self):
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

    @classmethod
    def from_hf(cls, config: dict) -> MMDiTConfig:
        """Reads diffusers' config.json.

        Raises:
          InputError: the config is of another class, or asks for something this model has not
            (guidance embeddings, additional t condition, 3-D layer rotary).
        """
        kind = config.get("_class_name", CLASS_NAME)
        if kind != CLASS_NAME:
            raise InputError(f"the transformer config is of class {kind!r}; give a {CLASS_NAME}")
        names = {field.name for field in dataclasses.fields(cls)}
        for name, value in config.items():
            if name not in names and name not in UNUSED and not name.startswith("_"):
                if name not in ABSENT or value not in (False, None):
                    raise InputError(
                        f"{CLASS_NAME} config: {name} = {value!r} is not supported; "
                        "use weights of the plain Qwen-Image or Qwen-Image-Edit architecture"
                    )
        values = {name: config[name] for name in names & config.keys()}
        if values.get("out_channels", 16) is None:
            values["out_channels"] = values.get("in_channels", cls.in_channels)
        axes = values.get("axes_dims_rope", cls.axes_dims_rope)
        if not isinstance(axes, list | tuple):
            raise InputError(f"{CLASS_NAME} config: axes_dims_rope is {axes!r}; give a list of 3")
        values["axes_dims_rope"] = tuple(axes)
        return cls(**values)

    def to_hf(self) -> dict:
        """The content of diffusers' config.json."""
        values = dataclasses.asdict(self)
        values["axes_dims_rope"] = list(self.axes_dims_rope)
        if not self.zero_cond_t:  # which diffusers knows since 0.36 only
            del values["zero_cond_t"]
        return {"_class_name": CLASS_NAME, **values, "guidance_embeds": False}


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
    "0.9b": MMDiTConfig(num_layers=15, num_attention_heads=10),
    "10b": MMDiTConfig(num_layers=30),
    "20b": MMDiTConfig(),
}


def pack(z: jax.Array, patch: int = 2) -> jax.Array:
    """Latents [B, h, w, C] -> tokens [B, h/p * w/p, C p p]; channel order (C, row, column)."""
    return rearrange(z, "b (h p) (w q) c -> b (h w) (c p q)", p=patch, q=patch)


def unpack(x: jax.Array, h: int, w: int, patch: int = 2) -> jax.Array:
    """Tokens [B, h/p * w/p, C p p] -> latents [B, h, w, C]; h and w count latent pixels."""
    sizes = {"h": h // patch, "w": w // patch, "p": patch, "q": patch}
    return rearrange(x, "b (h w) (c p q) -> b (h p) (w q) c", **sizes)


def timestep_embedding(timestep: jax.Array) -> jax.Array:
    """Sinusoids of t in [0, 1], scaled by 1000: float32 [B, 256], cosines first."""
    half = TIME_CHANNELS // 2
    # The exponents are rounded as diffusers rounds them: at 1000 rad one bit more moves the output.
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent)
    angle = 1000.0 * (timestep.astype(jnp.float32)[:, None] * frequency)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedder(nn.Module):
    """t [B] -> float32 [B, width]; float32 throughout, since bfloat16 moves t by up to 1.7/1000."""

    width: int

    @nn.compact
    def __call__(self, timestep: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        x = timestep_embedding(timestep)
        x = layers.Dense(self.width, (None, "embed"), kernel_init=init, name="linear_1")(x)
        x = nn.silu(x)
        return layers.Dense(self.width, ("embed", None), kernel_init=init, name="linear_2")(x)


class TimeTextEmbed(nn.Module):
    """Holds the timestep embedder under diffusers' name."""

    width: int

    def setup(self):
        self.timestep_embedder = TimestepEmbedder(self.width)

    def __call__(self, timestep: jax.Array) -> jax.Array:
        return self.timestep_embedder(timestep)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear at four times the width: [B, S, D] -> [B, S, D]."""

    dtype: Any = jnp.float32
    places: Activations | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = layers.Dense(4 * width, ("embed", "mlp"), dtype=self.dtype, name="net_0_proj")(x)
        x = checkpoint_name(constrain(x, self.places, "batch", "sequence", "mlp"), "mlp")
        x = layers.gelu_tanh(x)
        x = layers.Dense(width, ("mlp_in", None), dtype=self.dtype, name="net_2")(x)
        return checkpoint_name(x, "out")


class JointAttention(nn.Module):
    """One attention over [text ; image]; each stream has its own projections and norms."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    places: Activations | None = None

    @nn.compact
    def __call__(self, image, text, image_table, text_table, segments):
        """Attends.

        Args:
          image: [B, N, D].
          text: [B, T, D].
          image_table: (cos, sin), each float32 [B, N, head_dim / 2].
          text_table: the same for the text, [T, ...] or [B, T, ...].
          segments: int32 [B, T + N]; tokens attend those with their own number.

        Returns:
          (image [B, N, D], text [B, T, D]) after their output projections.
        """
        heads, dim = self.config.num_attention_heads, self.config.attention_head_dim

        def project(x, name):
            axes = ("embed", "heads")
            x = layers.Dense(heads * dim, axes, dtype=self.dtype, to_heads=heads, name=name)(x)
            x = constrain(x, self.places, "batch", "sequence", "heads", None)
            return checkpoint_name(x, "qkv")

        def normed(x, name, table):
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
        out = attention(query, key, value, (segments, segments), places=self.places)
        text, image = jnp.split(out, [text.shape[1]], axis=1)

        def merged(x, name):
            axes = ("heads_in", None)
            dense = layers.Dense(
                self.config.width, axes, dtype=self.dtype, from_heads=True, name=name
            )
            return checkpoint_name(dense(x), "out")

        return merged(image, "to_out_0"), merged(text, "to_add_out")


class Block(nn.Module):
    """One double-stream block with per-stream modulation (shift, scale, gate) x 2."""

    config: MMDiTConfig
    dtype: Any = jnp.float32
    places: Activations | None = None

    def setup(self):
        dtype, places = self.dtype, self.places
        self.img_mod_1 = _modulation(6 * self.config.width, dtype)
        self.txt_mod_1 = _modulation(6 * self.config.width, dtype)
        self.attn = JointAttention(self.config, dtype, places)
        self.img_mlp, self.txt_mlp = FeedForward(dtype, places), FeedForward(dtype, places)

    def __call__(self, streams, time, clean, image_table, text_table, segments):
        """(image, text) -> ((image, text), None).

        time [B, D] is SiLU(embedding), float32; clean is None or (the same at t = 0 [1, D], bool
        [N], True for the image tokens that it modulates).
        """
        image, text = (self._laid(x) for x in streams)
        image_mod = _modulations(self.img_mod_1, time, 6, self.places)
        if clean is not None:
            zeros = _modulations(self.img_mod_1, clean[0], 6, self.places)
            pairs = zip(image_mod, zeros, strict=True)
            image_mod = [jnp.where(clean[1][:, None], zero, now) for now, zero in pairs]
        text_mod = _modulations(self.txt_mod_1, time, 6, self.places)
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
        return (self._laid(image), self._laid(text)), None

    def _laid(self, x):
        return constrain(x, self.places, "batch", "sequence", "embed")

    def _modulated(self, x, shift, scale):
        return (layers.layer_norm(x) * (1 + scale) + shift).astype(self.dtype)

    def _gated(self, x, gate, update):
        return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(self.dtype)


class NormOut(nn.Module):
    """diffusers' AdaLayerNormContinuous: its Linear gives scale first, then shift."""

    dtype: Any = jnp.float32
    places: Activations | None = None

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """x [B, N, D], time [B, D] = SiLU(embedding) -> [B, N, D]."""
        linear = _modulation(2 * x.shape[-1], self.dtype, name="linear")
        scale, shift = _modulations(linear, time, 2, self.places)
        return (layers.layer_norm(x) * (1 + scale) + shift).astype(self.dtype)


class MMDiT(nn.Module):
    """Predicts the velocity of the image tokens.

    Attributes:
      config: the architecture.
      dtype: compute dtype; modulation sums, norms, rotary and softmax stay float32.
      remat: which activations of a block are kept (`layers.remat_policy`).
      places: where activations lie over a mesh; None leaves that to the compiler.
    """

    config: MMDiTConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    places: Activations | None = None

    def setup(self):
        config, dtype = self.config, self.dtype
        self.img_in = layers.Dense(config.width, ("patch", "embed"), dtype=dtype)
        self.txt_norm = layers.RMSNorm(dtype=dtype)
        self.txt_in = layers.Dense(config.width, (None, "embed"), dtype=dtype)
        self.time_text_embed = TimeTextEmbed(config.width)
        blocks = layers.scan_blocks(Block, config.num_layers, self.remat, (nn.broadcast,) * 5)
        self.transformer_blocks = blocks(config, dtype, self.places)
        self.norm_out = NormOut(dtype, self.places)
        self.proj_out = layers.Dense(
            config.out_channels * config.patch_size**2,
            ("embed", "patch"),
            dtype=dtype,
            kernel_init=nn.initializers.zeros_init(),
        )

    def __call__(
        self,
        hidden_states: jax.Array,
        encoder_hidden_states: jax.Array,
        encoder_mask: jax.Array,
        timestep: jax.Array,
        image_positions: jax.Array,
        text_positions: jax.Array,
        hidden_mask: jax.Array | None = None,
        target_tokens: int | None = None,
    ) -> jax.Array:
        """Runs all blocks.

        Args:
          hidden_states: [B, N, in_channels], packed [target ; condition pictures].
          encoder_hidden_states: [B, T, joint_attention_dim], the context.
          encoder_mask: bool [B, T], False for padding: it is attended by nobody.
          timestep: [B], t in [0, 1]; 1 is pure noise.
          image_positions: int [B, N, 3], from rotary.image_positions.
          text_positions: int [T, 3] or [B, T, 3], from rotary.text_positions.
          hidden_mask: bool [B, N], False for image tokens that nobody may attend (condition
            pictures dropped from a row); None attends to all.
          target_tokens: how many of the N are the target's; None for all. The others are modulated
            at t = 0 with `zero_cond_t`.

        Returns:
          [B, N, out_channels * patch_size^2] in `dtype`; only the target's tokens mean something.
        """
        axes = self.config.axes_dims_rope
        tables = (rotary.cos_sin(image_positions, axes), rotary.cos_sin(text_positions, axes))
        if hidden_mask is None:
            hidden_mask = jnp.ones(hidden_states.shape[:2], bool)
        segments = jnp.concatenate([encoder_mask, hidden_mask], axis=1).astype(jnp.int32)
        # Every modulation begins with the same SiLU: it is applied once.
        time = nn.silu(self.time_text_embed(timestep))
        time = constrain(time, self.places, "modulation_batch", "embed")
        count, clean = hidden_states.shape[1], None
        if self.config.zero_cond_t and (target_tokens or count) < count:
            zero = nn.silu(self.time_text_embed(jnp.zeros_like(timestep[:1])))
            clean = (zero, jnp.arange(count) >= target_tokens)
        image = self.img_in(hidden_states)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        (image, _), _ = self.transformer_blocks((image, text), time, clean, *tables, segments)
        return self.proj_out(self.norm_out(image, time))


def _modulation(features: int, dtype: Any, name: str | None = None) -> layers.Dense:
    """A Linear that gives shifts, scales and gates; zero at first, so a fresh block is identity."""
    zeros = nn.initializers.zeros_init()
    axes = (None, "modulation")
    return layers.Dense(features, axes, dtype=dtype, kernel_init=zeros, name=name)


def _modulations(
    linear: layers.Dense, time: jax.Array, parts: int, places: Activations | None
) -> list[jax.Array]:
    """time [B, D] -> parts times float32 [B, 1, D], ready for sums with tokens."""
    x = constrain(linear(time), places, "modulation_batch", "modulation")
    x = constrain(x, places, "batch", "embed")
    return jnp.split(x.astype(jnp.float32)[:, None], parts, axis=-1)
