"""The language model of Qwen2.5-VL (Qwen2_5_VLTextModel): causal, grouped-query, M-RoPE."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from qk_jax.models import mrope
from qk_jax.models.attention import attention
from qk_jax.models.layers import Dense, Embed, RMSNorm, scan_blocks
from qk_jax.models.qwen_vision import GatedMLP
from qk_jax.sharding.rules import Activations
from qk_jax.sharding.specs import constrain


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


# A row in consecutive pieces. What precedes the trained queries depends on nothing trained when the
# language model is frozen; as a piece of its own it has no backward pass.
Segments = tuple[jax.Array, ...]


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v have biases, o has none."""

    config: TextConfig
    dtype: Any = jnp.float32
    places: Activations | None = None

    @nn.compact
    def __call__(self, segments: Segments, tables, present: jax.Array) -> Segments:
        """Segments [B, S_i, D]; (cos, sin) [B, S_i, head_dim] of each; present int32 [B, S], 0 on
        padding."""
        cfg, width, places = self.config, segments[0].shape[-1], self.places

        def projection(count, axis, name):
            axes, width = ("embed", axis), count * cfg.head_dim
            layer = Dense(width, axes, dtype=self.dtype, to_heads=count, name=name)

            def project(x):
                y = constrain(layer(x), places, "batch", "sequence", axis, None)
                return checkpoint_name(y, "qkv")

            return project

        q_proj = projection(cfg.num_attention_heads, "heads", "q_proj")
        k_proj = projection(cfg.num_key_value_heads, "kv_heads", "k_proj")
        v_proj = projection(cfg.num_key_value_heads, "kv_heads", "v_proj")
        o_proj = Dense(
            width, ("heads_in", None), use_bias=False, dtype=self.dtype, from_heads=True,
            name="o_proj",
        )  # fmt: skip
        keys, values, out = [], [], []
        for x, (cos, sin) in zip(segments, tables, strict=True):
            keys.append(mrope.rotate(k_proj(x), cos, sin))
            values.append(v_proj(x))
            key, value = jnp.concatenate(keys, 1), jnp.concatenate(values, 1)
            query, seen = mrope.rotate(q_proj(x), cos, sin), present[:, : key.shape[1]]
            ids = (seen[:, -x.shape[1] :], seen)
            y = attention(query, key, value, ids, causal=True, places=places)
            out.append(checkpoint_name(o_proj(y), "out"))
        return tuple(out)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP."""

    config: TextConfig
    dtype: Any = jnp.float32
    places: Activations | None = None

    @nn.compact
    def __call__(self, segments: Segments, tables, present: jax.Array):
        """Segments [B, S_i, D] -> (segments, None)."""
        cfg, dtype, places = self.config, self.dtype, self.places
        segments = tuple(constrain(x, places, "batch", "sequence", "embed") for x in segments)
        norm = RMSNorm(cfg.rms_norm_eps, dtype, name="input_layernorm")
        attend = SelfAttention(cfg, dtype, places, name="self_attn")
        attended = attend(tuple(map(norm, segments)), tables, present)
        norm = RMSNorm(cfg.rms_norm_eps, dtype, name="post_attention_layernorm")
        down = ("mlp_in", None)
        mlp = GatedMLP(cfg.intermediate_size, False, dtype, places, down, name="mlp")
        mixed = [x + y for x, y in zip(segments, attended, strict=True)]
        return tuple(x + mlp(norm(x)) for x in mixed), None


class TextModel(nn.Module):
    """Embeddings -> last hidden states after the final norm.

    `remat` says which activations are kept (`layers.remat_policy`), `places` where they lie.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    places: Activations | None = None

    def setup(self):
        cfg = self.config
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype)
        scanned = scan_blocks(
            DecoderLayer, cfg.num_hidden_layers, self.remat, (nn.broadcast,) * 2
        )  # fmt: skip
        self.layers = scanned(cfg, self.dtype, self.places)
        self.norm = RMSNorm(cfg.rms_norm_eps, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """ids [B, S] -> [B, S, D]."""
        return self.embed_tokens(ids)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, S, D] -> logits [B, S, vocab] with the embedding's weights (tied)."""
        return self.embed_tokens.attend(hidden)

    def __call__(
        self,
        inputs_embeds: jax.Array,
        position_ids: jax.Array,
        attention_mask: jax.Array,
        queries: jax.Array | None = None,
    ) -> jax.Array:
        """The last hidden states after the final norm [B, S, D].

        A padded position holds finite numbers without meaning.

        Args:
          inputs_embeds: [B, S, D]; with queries, of the S - K positions before them.
          position_ids: int [B, 3, S].
          attention_mask: bool [B, S].
          queries: [B, K, D], embeddings of the last K positions: a segment of their own.
        """
        cfg = self.config
        segments = (inputs_embeds,) if queries is None else (inputs_embeds, queries)
        cut = inputs_embeds.shape[1]
        cos, sin = mrope.mrope_cos_sin(
            position_ids, cfg.head_dim, cfg.rope_theta, cfg.mrope_section, self.dtype
        )
        tables = ((cos[:, :cut], sin[:, :cut]), (cos[:, cut:], sin[:, cut:]))[: len(segments)]
        present = attention_mask.astype(bool).astype(jnp.int32)
        segments, _ = self.layers(tuple(x.astype(self.dtype) for x in segments), tables, present)
        return self.norm(jnp.concatenate(segments, axis=1))
