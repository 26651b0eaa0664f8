"""Qwen2.5-VL: pictures, words and learnable queries in one sequence; its configurations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from qk_jax.models.layers import Dense
from qk_jax.models.qwen_text import TextConfig, TextModel
from qk_jax.models.qwen_vision import VisionConfig, VisionTower, Windows
from qk_jax.pictures.grids import MERGE, PATCH_DIM, Grids
from qk_jax.sharding.rules import Activations
from qk_jax.sharding.specs import constrain


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A whole Qwen2.5-VL; token ids are the published ones unless said otherwise."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    vision_end_token_id: int = 151_653
    tie_word_embeddings: bool = False


def _vision(out: int, intermediate: int) -> VisionConfig:
    return VisionConfig(out_hidden_size=out, intermediate_size=intermediate)


PRESETS: dict[str, VLMConfig] = {
    "tiny": VLMConfig(
        text=TextConfig(
            vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=2, mrope_section=(4, 6, 6),
            max_position_embeddings=2048, bos_token_id=2026, eos_token_id=2028,
        ),
        vision=VisionConfig(
            depth=4, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=192,
            window_size=56, fullatt_block_indexes=(1, 3),
        ),
        image_token_id=2038, video_token_id=2039,
        vision_start_token_id=2035, vision_end_token_id=2036, tie_word_embeddings=True,
    ),
    "3b": VLMConfig(
        text=TextConfig(
            vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2,
        ),
        vision=_vision(2048, 3420), tie_word_embeddings=True,
    ),
    "7b": VLMConfig(),
    "32b": VLMConfig(
        text=TextConfig(
            hidden_size=5120, intermediate_size=27_648, num_hidden_layers=64,
            num_attention_heads=40, num_key_value_heads=8,
        ),
        vision=_vision(5120, 3456),
    ),
    "72b": VLMConfig(
        text=TextConfig(
            hidden_size=8192, intermediate_size=29_568, num_hidden_layers=80,
            num_attention_heads=64, num_key_value_heads=8,
        ),
        vision=_vision(8192, 3456),
    ),
}  # fmt: skip


class QwenVL(nn.Module):
    """The conditioner: last hidden states of words, pictures and queries.

    `remat` names the activations of both towers that are kept (`layers.remat_policy`),
    `vision_activations` and `text_activations` have their sharding; `bidirectional` and
    `read_layers` are those of `TextModel`.
    """

    config: VLMConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    vision_activations: Activations | None = None
    text_activations: Activations | None = None
    bidirectional: bool = False
    read_layers: tuple[int, ...] = ()

    def setup(self) -> None:
        cfg, dtype, remat = self.config, self.dtype, self.remat
        self.visual = VisionTower(cfg.vision, dtype, remat, self.vision_activations)
        self.language_model = TextModel(
            cfg.text, dtype, remat, self.text_activations, self.bidirectional, self.read_layers
        )
        if not cfg.tie_word_embeddings:
            axes = ("embed", "vocab")
            self.lm_head = Dense(cfg.text.vocab_size, axes, use_bias=False, dtype=dtype)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        position_ids: Int[Array, "B 3 S"],
        attention_mask: Bool[Array, "B S"],
        pixel_values: Float[Array, "B P 1176"] | Float[Array, "P 1176"] | Float[Array, "B P 0"],
        pictures: Grids | Windows,
        queries: Float[Array, "K D"] | Float[Array, "B K D"] | None = None,
        features: Float[Array, "B P/4 D"] | None = None,
    ) -> Float[Array, "B S states"]:
        """Last hidden states after the final norm, and those of `read_layers` beside them.

        Args:
          input_ids: every picture has its `<|image_pad|>` tokens, which its features replace in
            order. With pixels [B, P, 1176] a slot may have none: its pictures then go unused.
          position_ids: of `grids.mrope_positions`.
          attention_mask: False on padding.
          pixel_values: patches of the pictures of each slot, or [P, 1176] of the whole batch;
            P = 0 without pictures.
          pictures: their grids (rows, columns) in patches, static: those of every slot alike, or
            all of the batch one after another; or, with pixels of each slot, their windows, of
            pictures with padding behind them.
          queries: replace the last K embeddings (sequences are left-padded), of all slots alike
            or of each.
          features: what `features` made of each slot's pictures before; pixel_values then have no
            values.
        """
        embeds = self.language_model.embed(input_ids)
        if pictures:
            pictured = input_ids == self.config.image_token_id
            last = pixel_values.shape[-2] // MERGE**2 - 1
            if isinstance(pictures, Windows) or pixel_values.ndim == 3:
                seen = self.visual(pixel_values, pictures) if features is None else features
                nth = jnp.clip(jnp.cumsum(pictured, axis=1) - 1, 0, last)
                seen = jnp.take_along_axis(seen.astype(embeds.dtype), nth[..., None], axis=1)
            else:
                nth = jnp.clip(jnp.cumsum(pictured).reshape(pictured.shape) - 1, 0, last)
                seen = self._features(pixel_values, pictures).astype(embeds.dtype)[nth]
            embeds = jnp.where(pictured[..., None], seen, embeds)
        elif self.is_initializing():  # so that a batch without pictures makes the whole tree
            self.visual(jnp.zeros((1, MERGE**2, PATCH_DIM), self.dtype), ((MERGE, MERGE),))
        if queries is not None:
            embeds = embeds[:, : -queries.shape[-2]]
            queries = jnp.broadcast_to(queries, (len(embeds), *queries.shape[-2:]))
        hidden = self.language_model(embeds, position_ids, attention_mask, queries)
        if self.is_initializing():
            self.logits(hidden[..., : self.config.text.hidden_size])
        return hidden

    def _features(self, pixel_values: Array, grids: Grids) -> Array:
        """Tokens of the pictures of a whole batch in order: [P, 1176] -> [P / 4, D].

        Pictures of one grid pass the tower as one batch, so that attention costs what the largest
        picture costs and not what the whole list would.
        """
        ends = np.cumsum([rows * columns for rows, columns in grids])
        pieces = jnp.split(pixel_values, ends[:-1])
        found: dict[int, Array] = {}
        for grid in dict.fromkeys(grids):
            members = [index for index, other in enumerate(grids) if other == grid]
            together = jnp.stack([pieces[index] for index in members])
            together = constrain(together, self.vision_activations, "batch", None, None)
            found |= zip(members, self.visual(together, (grid,)), strict=True)
        return jnp.concatenate([found[index] for index in range(len(grids))])

    def example(self) -> tuple[Any, ...]:
        """Arguments of the smallest call that makes all parameters."""
        ids = jnp.zeros((1, 8), jnp.int32)
        positions, pixels = jnp.zeros((1, 3, 8), jnp.int32), jnp.zeros((1, MERGE**2, PATCH_DIM))
        return ids, positions, ids == 0, pixels, ((MERGE, MERGE),)

    def features(
        self, pixel_values: Float[Array, "B P 1176"], pictures: Grids | Windows
    ) -> Float[Array, "B P/4 D"]:
        """What the vision tower makes of each slot's pictures."""
        return self.visual(pixel_values, pictures)

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S vocab"]:
        """Next-token logits."""
        if self.config.tie_word_embeddings:
            return self.language_model.attend(hidden)
        return self.lm_head(hidden)

    def pool(
        self, pixel_values: Float[Array, "B P 1176"], pictures: Grids | Windows
    ) -> Float[Array, "B D"]:
        """Mean of the pictures' features."""
        features = self.visual(pixel_values, pictures)
        if not isinstance(pictures, Windows):
            return jnp.mean(features, axis=1)
        # Padding is last in either order. Of each picture the mean is over its own tokens.
        real = (pictures.picture[..., :: MERGE**2] >= 0)[..., None]
        total = jnp.sum(jnp.where(real, features, 0), axis=1, dtype=jnp.float32)
        return (total / jnp.sum(real, axis=-2)).astype(features.dtype)
