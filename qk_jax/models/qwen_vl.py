"""Qwen2.5-VL: pictures, words and learnable queries in one sequence; its configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qk_jax.base.errors import InputError
from qk_jax.models.layers import Dense
from qk_jax.models.qwen_text import TextConfig, TextModel
from qk_jax.models.qwen_vision import VisionConfig, VisionTower
from qk_jax.pictures.grids import MERGE, PATCH, PATCH_DIM, Grids, picture_tokens
from qk_jax.sharding.rules import Activations


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
        """From a config.json, flat (Hub) or nested (transformers 5 and Qwen-Image).

        A nested one may repeat keys of the language model at the top; as in transformers they do
        not count. Token ids may be absent, being then those of the class, as everywhere.

        Raises:
          InputError: another kind of model, a size that is missing, or a key or value that this
            implementation does not compute.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise InputError(
                f"model_type is {config.get('model_type')!r}, not 'qwen2_5_vl'; "
                "give the folder of a Qwen2.5-VL model"
            )
        text, vision = config.get("text_config", config), config.get("vision_config")
        for name, part in (("text_config", text), ("vision_config", vision)):
            if not isinstance(part, dict):
                raise InputError(f"the Qwen2.5-VL config has no {name}; download it again")
        _refuse_unknown("", config, _TOKEN_IDS | _TEXT_KEYS | {"text_config", "vision_config"})
        _refuse_unknown("text_config.", text, _TEXT_KEYS if text is not config else config.keys())
        _refuse_unknown("vision_config.", vision, _names(VisionConfig))
        rope = _rope(text)
        found = cls(
            text=TextConfig(
                **{name: _size(text, name, "text_config.") for name in _TEXT_SIZES},
                **{name: text[name] for name in ("bos_token_id", "eos_token_id") if name in text},
                rms_norm_eps=_positive(text, "rms_norm_eps", "text_config."),
                rope_theta=_positive(rope | text, "rope_theta", "text_config."),
                mrope_section=_sizes(rope, "mrope_section", "text_config.rope_scaling."),
            ),
            vision=VisionConfig(
                **{name: _size(vision, name, "vision_config.") for name in _VISION_SIZES},
                fullatt_block_indexes=_sizes(vision, "fullatt_block_indexes", "vision_config.", 0),
            ),
            tie_word_embeddings=_tied(config) or _tied(text),
            **{name: config[name] for name in _TOKEN_IDS & config.keys()},
        )
        _refuse_unfit(found)
        return found

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


# Keys of transformers' configs that nothing here is computed from: what belongs to generation, to
# training or to the library, and what other keys say again.
_IDLE = frozenset("""
    architectures chunk_size_feed_forward dtype id2label initializer_range is_encoder_decoder
    label2id max_window_layers model_type output_attentions output_hidden_states pad_token_id
    problem_type return_dict sliding_window torch_dtype transformers_version use_cache
    vision_token_id
""".split())  # fmt: skip
# Keys that do change the computation, with the values that are computed here.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "vision_config.in_channels": (3,),
    "vision_config.in_chans": (3,),
    "vision_config.hidden_act": ("silu",),
    "vision_config.patch_size": (PATCH,),
    "vision_config.spatial_patch_size": (PATCH,),
    "vision_config.spatial_merge_size": (MERGE,),
    "vision_config.temporal_patch_size": (2,),
    "vision_config.rope_parameters": (None, {"rope_theta": 10_000.0, "rope_type": "axial"}),
}
_ROPE = {"type", "rope_type", "mrope_section", "rope_theta"}
_TOKEN_IDS = {
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
}  # fmt: skip
_TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_VISION_SIZES = (
    "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "window_size",
    "tokens_per_second",
)  # fmt: skip


def _names(kind: type) -> set[str]:
    """The fields of a config class."""
    return {field.name for field in dataclasses.fields(kind)}


_TEXT_KEYS = (
    _names(TextConfig)
    | _TOKEN_IDS
    | {"rope_scaling", "rope_parameters", "layer_types", "tie_word_embeddings"}
)


def _refuse_unknown(place: str, config: dict[str, Any], known: Collection[str]) -> None:
    """Raises InputError for a key that is neither known nor idle, or for an unsupported value."""
    for key, value in config.items():
        name = place + key
        choices = _SUPPORTED.get(name.removeprefix("text_config."))
        if choices is not None and value not in choices:
            raise InputError(f"{name} is {value!r}; only {choices[0]!r} is supported")
        is_idle = key in _IDLE or key.startswith("_") or value is None
        if choices is None and key not in known and not is_idle:
            raise InputError(
                f"the Qwen2.5-VL config has the key {name}, which is not supported; "
                "give the unquantized weights of a plain Qwen2.5-VL model"
            )
        full = isinstance(value, list) and all(kind == "full_attention" for kind in value)
        if key == "layer_types" and value is not None and not full:
            raise InputError(f"{name} is {value!r}; only 'full_attention' is supported")


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of the language model, in whichever of the two places they are."""
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if not isinstance(rope, dict):
        raise InputError("text_config.rope_scaling is missing; download the config.json again")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("mrope", "default"):
        raise InputError(
            f"text_config.rope_scaling.rope_type is {kind!r}; only 'mrope' and 'default' are known"
        )
    if extra := sorted(rope.keys() - _ROPE):
        raise InputError(f"text_config.rope_scaling has the key {extra[0]}, which is not supported")
    return rope


def _size(values: dict[str, Any], name: str, place: str, least: int = 1) -> int:
    """An integer of a config."""
    value = values.get(name)
    if type(value) is not int or value < least:
        raise InputError(f"{place}{name} is {value!r}; an integer of {least} or more is due")
    return value


def _sizes(values: dict[str, Any], name: str, place: str, least: int = 1) -> tuple[int, ...]:
    """A list of integers of a config."""
    found = values.get(name)
    if not isinstance(found, list | tuple):
        raise InputError(f"{place}{name} is {found!r}; a list of integers is due")
    return tuple(_size({name: value}, name, place, least) for value in found)


def _positive(values: dict[str, Any], name: str, place: str) -> float:
    """A positive number of a config."""
    value = values.get(name)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise InputError(f"{place}{name} is {value!r}; a positive number is due")
    return float(value)


def _tied(values: dict[str, Any]) -> bool:
    """Whether logits use the embedding table; transformers 4 says it in either place."""
    value = values.get("tie_word_embeddings", False)
    if type(value) is not bool:
        raise InputError(f"tie_word_embeddings is {value!r}; true or false is due")
    return value


def _refuse_unfit(config: VLMConfig) -> None:
    """Raises InputError where the sizes contradict each other."""
    text, vision = config.text, config.vision
    ids = {name: getattr(config, name) for name in sorted(_TOKEN_IDS)}
    ids |= {f"text_config.{name}": getattr(text, name) for name in ("bos_token_id", "eos_token_id")}
    for name, value in ids.items():
        is_absent = value is None and name.startswith("text_config.")
        if not is_absent and (type(value) is not int or not 0 <= value < text.vocab_size):
            raise InputError(
                f"{name} is {value!r}; a token below the vocab_size {text.vocab_size} is due"
            )
    if text.num_attention_heads % text.num_key_value_heads:
        raise InputError(
            f"text_config.num_key_value_heads is {text.num_key_value_heads}; it must divide "
            f"num_attention_heads, {text.num_attention_heads}"
        )
    sections = sum(text.mrope_section)
    if len(text.mrope_section) != 3 or sections * 2 * text.num_attention_heads != text.hidden_size:
        raise InputError(
            f"mrope_section is {text.mrope_section}; three numbers are due, whose sum is half of "
            f"hidden_size / num_attention_heads = {text.hidden_size / text.num_attention_heads:g}"
        )
    if vision.hidden_size % (4 * vision.num_heads):
        raise InputError(
            f"vision_config.hidden_size is {vision.hidden_size}; a multiple of 4 for each of "
            f"{vision.num_heads} heads is due"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise InputError(
            f"vision_config.out_hidden_size is {vision.out_hidden_size}, but the language model's "
            f"hidden_size is {text.hidden_size}; give the config of one model"
        )
    if vision.window_size % (PATCH * MERGE):
        raise InputError(
            f"vision_config.window_size is {vision.window_size}; "
            f"a multiple of {PATCH * MERGE} is due"
        )
    if any(block >= vision.depth for block in vision.fullatt_block_indexes):
        raise InputError(
            f"vision_config.fullatt_block_indexes is {vision.fullatt_block_indexes}; "
            f"with a depth of {vision.depth} there is no such block"
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

    `remat` says which activations of both towers are kept (`layers.remat_policy`), `vision_places`
    and `text_places` where they lie over a mesh.
    """

    config: VLMConfig
    dtype: Any = jnp.float32
    remat: str | None = None
    vision_places: Activations | None = None
    text_places: Activations | None = None

    def setup(self):
        cfg = self.config
        self.visual = VisionTower(cfg.vision, self.dtype, self.remat, self.vision_places)
        self.language_model = TextModel(cfg.text, self.dtype, self.remat, self.text_places)
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
