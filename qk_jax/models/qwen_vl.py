"""Qwen2.5-VL: pictures, words and learnable queries in one sequence; its configurations."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qk_jax.errors import InputError
from qk_jax.models.layers import Dense
from qk_jax.models.mrope import MERGE, PATCH, PATCH_DIM, Grids, picture_tokens
from qk_jax.models.qwen_text import TextConfig, TextModel
from qk_jax.models.qwen_vision import VisionConfig, VisionTower

DEFAULT_SECTIONS = (16, 24, 24)  # of transformers, where a config has no mrope_section


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

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> VLMConfig:
        """From a config.json, flat (Hub) or nested (transformers 5); absent keys as transformers.

        Raises:
          InputError: another kind of model, or a value that this implementation does not compute.
        """
        from transformers import Qwen2_5_VLConfig  # slow to import, and only needed here

        if config.get("model_type") != "qwen2_5_vl":
            raise InputError(
                f"model_type is {config.get('model_type')!r}, not 'qwen2_5_vl'; "
                "give the folder of a Qwen2.5-VL model"
            )
        try:
            read = Qwen2_5_VLConfig.from_dict(copy.deepcopy(config))
        except Exception as error:  # transformers' validation raises several unrelated classes
            raise InputError(f"the Qwen2.5-VL config cannot be read: {error}") from error
        _refuse_unsupported(read)
        ids = ("image", "video", "vision_start", "vision_end")
        rope = read.text_config.rope_parameters
        text = _fields(TextConfig, read.text_config) | {
            "rope_theta": float(rope["rope_theta"]),
            "mrope_section": tuple(rope.get("mrope_section", DEFAULT_SECTIONS)),
        }
        return cls(
            text=TextConfig(**text),
            vision=VisionConfig(**_fields(VisionConfig, read.vision_config)),
            tie_word_embeddings=bool(read.tie_word_embeddings),
            **{f"{name}_token_id": getattr(read, f"{name}_token_id") for name in ids},
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 (>= 4.49) and 5 both read to the same model."""
        text = dataclasses.asdict(self.text)
        sections = list(text.pop("mrope_section"))
        rope = {"type": "mrope", "rope_type": "default", "mrope_section": sections}
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": "float32",
            "text_config": text | {
                "model_type": "qwen2_5_vl_text",
                "hidden_act": "silu",
                "use_sliding_window": False,
                "attention_dropout": 0.0,
                "tie_word_embeddings": self.tie_word_embeddings,
                "rope_scaling": rope,
            },
            "vision_config": dataclasses.asdict(self.vision) | {
                "model_type": "qwen2_5_vl_vision",
                "hidden_act": "silu",
                "in_channels": 3,
                "patch_size": PATCH,
                "temporal_patch_size": 2,
                "spatial_merge_size": MERGE,
                "fullatt_block_indexes": list(self.vision.fullatt_block_indexes),
            },
        }  # fmt: skip


def _fields(kind: type, source: Any) -> dict[str, Any]:
    """The fields of a config class that transformers' config `source` has, lists as tuples."""
    names = [f.name for f in dataclasses.fields(kind) if hasattr(source, f.name)]
    values = {name: getattr(source, name) for name in names}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _refuse_unsupported(config: Any) -> None:
    """Raises InputError unless every value that changes the computation is one we implement."""
    text, vision = config.text_config, config.vision_config
    rope = text.rope_parameters
    wanted = {
        "text_config.hidden_act": (text.hidden_act, "silu"),
        "text_config.use_sliding_window": (bool(text.use_sliding_window), False),
        "text_config.attention_dropout": (float(text.attention_dropout or 0), 0.0),
        "text_config.rope_scaling.rope_type": (rope.get("rope_type", "default"), "default"),
        "vision_config.hidden_act": (vision.hidden_act, "silu"),
        "vision_config.in_channels": (vision.in_channels, 3),
        "vision_config.patch_size": (vision.patch_size, PATCH),
        "vision_config.temporal_patch_size": (vision.temporal_patch_size, 2),
        "vision_config.spatial_merge_size": (vision.spatial_merge_size, MERGE),
        "vision_config.out_hidden_size": (vision.out_hidden_size, text.hidden_size),
    }
    for name, (value, supported) in wanted.items():
        if value != supported:
            raise InputError(f"{name} is {value!r}; only {supported!r} is supported")
    sections = sum(rope.get("mrope_section", DEFAULT_SECTIONS))
    if sections * 2 * text.num_attention_heads != text.hidden_size:
        raise InputError(
            f"mrope_section sums to {sections}; it must be half of the head's width "
            f"{text.hidden_size / text.num_attention_heads:g}"
        )


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

    `remat` is the rematerialisation policy of both towers (`layers.scan_blocks`).
    """

    config: VLMConfig
    dtype: Any = jnp.float32
    remat: str | None = None

    def setup(self):
        cfg = self.config
        self.visual = VisionTower(cfg.vision, self.dtype, self.remat)
        self.language_model = TextModel(cfg.text, self.dtype, self.remat)
        if not cfg.tie_word_embeddings:
            axes = ("embed", "vocab")
            self.lm_head = Dense(cfg.text.vocab_size, axes, use_bias=False, dtype=self.dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        attention_mask: jax.Array,
        pixel_values: jax.Array,
        grids: Grids,
        queries: jax.Array | None = None,
    ) -> jax.Array:
        """Last hidden states after the final norm [B, S, D].

        Args:
          input_ids: int [B, S]. In a row either every picture has its `<|image_pad|>` tokens, which
            the pictures' features replace in order, or none has: then the features go unused.
          position_ids: int [B, 3, S] of `mrope.mrope_positions`.
          attention_mask: bool [B, S], False on padding.
          pixel_values: float [B, P, 1176], P = 0 without pictures.
          grids: the pictures (rows, columns) in patches; static, the same for every row.
          queries: [K, D] in the place of the last K embeddings (sequences are left-padded).
        """
        embeds = self.language_model.embed(input_ids)
        if grids:
            features = self.visual(pixel_values, grids).astype(embeds.dtype)
            pictured = input_ids == self.config.image_token_id
            nth = jnp.clip(jnp.cumsum(pictured, axis=1) - 1, 0, picture_tokens(grids) - 1)
            features = jnp.take_along_axis(features, nth[..., None], axis=1)
            embeds = jnp.where(pictured[..., None], features, embeds)
        elif self.is_initializing():  # so that a batch without pictures makes the whole tree
            self.visual(jnp.zeros((1, MERGE**2, PATCH_DIM), self.dtype), ((MERGE, MERGE),))
        if queries is not None:
            embeds = embeds[:, : -len(queries)]
            queries = jnp.broadcast_to(queries, (len(embeds), *queries.shape))
        hidden = self.language_model(embeds, position_ids, attention_mask, queries)
        if self.is_initializing():
            self.logits(hidden)
        return hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, S, D] -> next-token logits [B, S, vocab]."""
        if self.config.tie_word_embeddings:
            return self.language_model.attend(hidden)
        return self.lm_head(hidden)

    def pool(self, pixel_values: jax.Array, grids: Grids) -> jax.Array:
        """Mean of the pictures' features: [B, P, 1176] -> [B, D]."""
        return jnp.mean(self.visual(pixel_values, grids), axis=1)
