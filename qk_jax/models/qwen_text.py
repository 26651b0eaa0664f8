"""The language model of Qwen2.5-VL (Qwen2_5_VLTextModel): causal, grouped-query, M-RoPE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

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


# A sequence in consecutive segments [B, S_i, ...]. What precedes the trained queries depends on
# nothing trained when the language model is frozen: a segment of its own without backward pass.
Segments = tuple[Array, ...]
Tables = tuple[tuple[Array, Array], ...]  # (cos, sin) of each segment


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v have biases, o has none.

    With `bidirectional` the second segment, that of the queries, is not causal.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None
    bidirectional: bool = False

    @nn.compact
    def __call__(self, segments: Segments, tables: Tables, present: Int[Array, "B S"]) -> Segments:
        """Segments [B, S_i, D] -> the same, with tables [B, S_i, head_dim]; present is 0 on
        padding."""
        cfg, width = self.config, segments[0].shape[-1]

        def projection(heads: int, axis: str, name: str) -> Callable[[Array], Array]:
            layer = Dense(
                heads * cfg.head_dim, ("embed", axis), dtype=self.dtype, to_heads=heads, name=name
            )

            def project(x: Array) -> Array:
                y = constrain(layer(x), self.activations, "batch", "sequence", axis, None)
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
            causal = not (self.bidirectional and len(keys) > 1)
            y = attention(query, key, value, ids, causal=causal, activations=self.activations)
            out.append(checkpoint_name(o_proj(y), "out"))
        return tuple(out)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP; with `is_read` also returns its output beside the carry."""

    config: TextConfig
    dtype: Any = jnp.float32
    activations: Activations | None = None
    bidirectional: bool = False
    is_read: bool = False

    @nn.compact
    def __call__(
        self, segments: Segments, tables: Tables, present: Int[Array, "B S"]
    ) -> tuple[Segments, Segments]:
        cfg, dtype, activations = self.config, self.dtype, self.activations
        segments = tuple(constrain(x, activations, "batch", "sequence", "embed") for x in segments)
        norm = RMSNorm(cfg.rms_norm_eps, dtype, name="input_layernorm")
        attend = SelfAttention(cfg, dtype, activations, self.bidirectional, name="self_attn")
        attended = attend(tuple(map(norm, segments)), tables, present)
        norm = RMSNorm(cfg.rms_norm_eps, dtype, name="post_attention_layernorm")
        mlp = GatedMLP(
            cfg.intermediate_size, False, dtype, activations, ("mlp_in", None), name="mlp"
        )
        mixed = [x + y for x, y in zip(segments, attended, strict=True)]
        segments = tuple(x + mlp(norm(x)) for x in mixed)
        return segments, segments if self.is_read else ()


class TextModel(nn.Module):
    """Embeddings -> last hidden states after the final norm.

    Attributes:
      config: sizes.
      dtype: of the computation.
      remat: names the activations that are kept (`layers.remat_policy`).
      activations: their sharding.
      bidirectional: whether queries see each other, not only those before them.
      read_layers: numbers of layers, from 1, whose output is returned as well, as it is in
        transformers' `hidden_states`. The outputs of all layers are in memory then.
    """

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    activations: Activations | None = None
    bidirectional: bool = False
    read_layers: tuple[int, ...] = ()

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype)
        stack = scan_blocks(DecoderLayer, cfg.num_hidden_layers, self.remat, (nn.broadcast,) * 2)
        self.layers = stack(
            cfg, self.dtype, self.activations, self.bidirectional, bool(self.read_layers)
        )
        self.norm = RMSNorm(cfg.rms_norm_eps, self.dtype)

    def embed(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return self.embed_tokens(ids)

    def attend(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S vocab"]:
        """Logits with the embedding's weights (tied)."""
        return self.embed_tokens.attend(hidden)

    def __call__(
        self,
        inputs_embeds: Float[Array, "B words D"],
        position_ids: Int[Array, "B 3 S"],
        attention_mask: Bool[Array, "B S"],
        queries: Float[Array, "B K D"] | None = None,
    ) -> Float[Array, "B S states"]:
        """The last hidden states after the final norm; finite and meaningless on padding.

        With `read_layers` the states of those follow along the last axis.

        Args:
          inputs_embeds: of all S positions; with queries, of the S - K before them.
          position_ids: M-RoPE (time, row, column).
          attention_mask: False on padding.
          queries: embeddings of the last K positions: a segment of their own.
        """
        cfg = self.config
        segments = (inputs_embeds,) if queries is None else (inputs_embeds, queries)
        cut = inputs_embeds.shape[1]
        cos, sin = mrope.mrope_cos_sin(
            position_ids, cfg.head_dim, cfg.rope_theta, cfg.mrope_section, self.dtype
        )
        tables = ((cos[:, :cut], sin[:, :cut]), (cos[:, cut:], sin[:, cut:]))[: len(segments)]
        present = attention_mask.astype(jnp.int32)
        segments, read = self.layers(tuple(x.astype(self.dtype) for x in segments), tables, present)
        last = self.norm(jnp.concatenate(segments, axis=1))
        states = [jnp.concatenate([x[i - 1] for x in read], axis=1) for i in self.read_layers]
        return jnp.concatenate([last, *states], axis=-1)
