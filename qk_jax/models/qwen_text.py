"""The language model of Qwen2.5-VL (Qwen2_5_VLTextModel): causal, grouped-query, M-RoPE."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qk_jax.models import mrope
from qk_jax.models.attention import attention
from qk_jax.models.layers import Dense, Embed, RMSNorm, scan_blocks
from qk_jax.models.qwen_vision import GatedMLP


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the language model, named as in transformers' Qwen2_5_VLTextConfig."""

    vocab_size: int = 152_064
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 128_000
    bos_token_id: int | None = 151_643
    eos_token_id: int | None = 151_645

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v have biases, o has none."""

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, cos, sin, mask: jax.Array) -> jax.Array:
        """x [B, S, D]; cos, sin [B, S, head_dim]; mask bool [B, 1, 1, S] -> [B, S, D]."""
        cfg = self.config

        def heads(count, axis, name):
            y = Dense(count * cfg.head_dim, ("embed", axis), dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], count, cfg.head_dim)

        query = mrope.rotate(heads(cfg.num_attention_heads, "heads", "q_proj"), cos, sin)
        key = mrope.rotate(heads(cfg.num_key_value_heads, "kv_heads", "k_proj"), cos, sin)
        value = heads(cfg.num_key_value_heads, "kv_heads", "v_proj")
        out = attention(query, key, value, mask, causal=True).reshape(*x.shape[:2], -1)
        axes = ("heads", "embed")
        return Dense(x.shape[-1], axes, use_bias=False, dtype=self.dtype, name="o_proj")(out)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP."""

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, cos, sin, mask: jax.Array):
        """x [B, S, D] -> ([B, S, D], None)."""
        cfg, dtype = self.config, self.dtype
        normed = RMSNorm(cfg.rms_norm_eps, dtype, name="input_layernorm")(x)
        x = x + SelfAttention(cfg, dtype, name="self_attn")(normed, cos, sin, mask)
        normed = RMSNorm(cfg.rms_norm_eps, dtype, name="post_attention_layernorm")(x)
        return x + GatedMLP(cfg.intermediate_size, False, dtype, name="mlp")(normed), None


class TextModel(nn.Module):
    """Embeddings -> last hidden states after the final norm.

    `remat` is the rematerialisation policy of the layers (`layers.scan_blocks`).
    """

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str | None = None

    def setup(self):
        cfg = self.config
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype)
        scanned = scan_blocks(
            DecoderLayer, cfg.num_hidden_layers, self.remat, (nn.broadcast,) * 3
        )  # fmt: skip
        self.layers = scanned(cfg, self.dtype)
        self.norm = RMSNorm(cfg.rms_norm_eps, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids [B, S] -> [B, S, D]."""
        return self.embed_tokens(ids)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, S, D] -> logits [B, S, vocab] with the embedding's weights (tied)."""
        return self.embed_tokens.attend(hidden)

    def __call__(
        self, inputs_embeds: jax.Array, position_ids: jax.Array, attention_mask: jax.Array
    ) -> jax.Array:
        """inputs_embeds [B, S, D], position_ids int [B, 3, S], attention_mask bool [B, S].

        Returns the last hidden states after the final norm [B, S, D]; a padded position holds
        finite numbers without meaning.
        """
        cfg = self.config
        cos, sin = mrope.mrope_cos_sin(
            position_ids, cfg.head_dim, cfg.rope_theta, cfg.mrope_section, self.dtype
        )
        mask = attention_mask.astype(bool)[:, None, None]
        x, _ = self.layers(inputs_embeds.astype(self.dtype), cos, sin, mask)
        return self.norm(x)
