"""The config.json of transformers and diffusers, read strictly and written.

Every key is known and every value has the right type. A config that asks for something that the
models here do not compute is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Mapping
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.models import vae
from qk_jax.models.mmdit import CLASS_NAME, MMDiTConfig
from qk_jax.models.qwen_text import TextConfig
from qk_jax.models.qwen_vision import VisionConfig
from qk_jax.models.qwen_vl import VLMConfig
from qk_jax.pictures.grids import MERGE, PATCH

Values = Mapping[str, Any]
Choices = Mapping[str, tuple[Any, ...]]  # {key that is no field: its supported values}
Config = VLMConfig | MMDiTConfig | vae.VAEConfig

MODEL_TYPE, VLM = "qwen2_5_vl", "Qwen2.5-VL"
# Which part a config.json describes, by its `model_type` or `_class_name`.
PARTS = {MODEL_TYPE: "vlm", CLASS_NAME: "mmdit", **dict.fromkeys(vae.KINDS, "vae")}

_TOKEN_IDS = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
)  # fmt: skip
_FROM_ZERO = {*_TOKEN_IDS, "bos_token_id", "eos_token_id", "fullatt_block_indexes"}
_OPTIONAL = {"bos_token_id", "eos_token_id"}
_ELSEWHERE = {"rope_scaling", "rope_parameters", "layer_types", "tie_word_embeddings"}
# Keys of transformers' configs that nothing here is computed from: they belong to generation, to
# training or to the library, or repeat other keys.
_IDLE = frozenset("""
    architectures chunk_size_feed_forward dtype id2label initializer_range is_encoder_decoder
    label2id max_window_layers model_type output_attentions output_hidden_states pad_token_id
    problem_type return_dict sliding_window torch_dtype transformers_version use_cache
    vision_token_id
""".split())  # fmt: skip
_TEXT: Choices = {
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
}
_VISION: Choices = {
    "in_channels": (3,),
    "in_chans": (3,),
    "hidden_act": ("silu",),
    "patch_size": (PATCH,),
    "spatial_patch_size": (PATCH,),
    "spatial_merge_size": (MERGE,),
    "temporal_patch_size": (2,),
    "rope_parameters": (None, {"rope_theta": 10_000.0, "rope_type": "axial"}),
}
# Qwen2_5_VLVisionConfig's own defaults, the same in all versions of transformers. Those up to 4.51
# leave out what equals them when they save a config; no published tower has all of them.
_VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16,
    "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
}  # fmt: skip
_ROPE = {"type", "rope_type", "mrope_section", "rope_theta"}
_MMDIT: Choices = dict.fromkeys(
    ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"), (False, None)
)
_QWEN_VAE = {"attn_scales": [], "dropout": 0.0}


def from_hf(part: str, values: Values) -> Any:
    """The config of one of our models.

    Args:
      part: 'vlm', 'mmdit' or 'vae'.
      values: content of a config.json. Qwen2.5-VL's may be flat, as on the Hub, or nested, as
        transformers 5 and Qwen-Image have it.

    Raises:
      InputError: another class, an unknown or missing key, a value of the wrong type, or one that
        asks for something that is not computed here.
    """
    return {"vlm": _vlm, "mmdit": _mmdit, "vae": _vae}[part](values)


def to_hf(config: Config) -> dict[str, Any]:
    """The content of a config.json; transformers 4 (>= 4.49) and 5 read the same Qwen2.5-VL."""
    if isinstance(config, VLMConfig):
        return _vlm_to_hf(config)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    if isinstance(config, MMDiTConfig):
        if not config.zero_cond_t:  # which diffusers knows since 0.37 only
            del values["zero_cond_t"]
        return {"_class_name": CLASS_NAME, **values, "guidance_embeds": False}
    fixed = _QWEN_VAE
    if isinstance(config, vae.AutoencoderKLConfig):
        fixed = _kl_types(len(config.block_out_channels))
    return {"_class_name": vae.kind(config), **fixed, **values}


def _vlm(values: Values) -> VLMConfig:
    if values.get("model_type") != MODEL_TYPE:
        raise InputError(
            f"model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}; "
            "give the folder of a Qwen2.5-VL model"
        )
    text = _section(values, "text_config") if "text_config" in values else values
    vision = _VISION_DEFAULTS | _section(values, "vision_config")
    prefix = "" if text is values else "text_config."
    sizes = _names(TextConfig)
    known = (sizes | {*_TOKEN_IDS, *_ELSEWHERE}) - {"mrope_section"}
    # A nested config may repeat keys of the language model at the top, where they do not count.
    _check_vlm_keys(values, known | {"text_config", "vision_config"}, _TEXT)
    if text is not values:
        _check_vlm_keys(text, known, _TEXT, prefix)
    _check_vlm_keys(vision, _names(VisionConfig), _VISION, "vision_config.")
    rope = _rope(text, prefix)
    ids = {key: values[key] for key in _TOKEN_IDS if key in values}
    found = VLMConfig(
        **_fields(VLM, VLMConfig, ids),
        tie_word_embeddings=_is_tied(values, "") or _is_tied(text, prefix),
        text=TextConfig(**_fields(VLM, TextConfig, {**rope, **text}, prefix, sizes - _OPTIONAL)),
        vision=VisionConfig(**_fields(VLM, VisionConfig, vision, "vision_config.")),
    )
    _check_sizes(found)
    return found


def _section(values: Values, name: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise InputError(f"the {VLM} config has no {name}; download the config.json again")
    return found


def _vlm_to_hf(config: VLMConfig) -> dict[str, Any]:
    text = dataclasses.asdict(config.text)
    sections = list(text.pop("mrope_section"))
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": sections}
    tied = {"tie_word_embeddings": config.tie_word_embeddings}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        **{name: getattr(config, name) for name in _TOKEN_IDS},
        **tied,
        "dtype": "float32",
        "text_config": text | {
            "model_type": "qwen2_5_vl_text",
            "hidden_act": "silu",
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            **tied,
            "rope_scaling": rope,
        },
        "vision_config": dataclasses.asdict(config.vision) | {
            "model_type": "qwen2_5_vl_vision",
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
            "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
        },
    }  # fmt: skip


def _is_tied(values: Values, prefix: str) -> bool:
    """Whether logits use the embedding table; transformers 4 says it at either level."""
    found = {"tie_word_embeddings": values.get("tie_word_embeddings", False)}
    return _fields(VLM, VLMConfig, found, prefix)["tie_word_embeddings"]


def _check_vlm_keys(
    values: Values, known: Collection[str], choices: Choices, prefix: str = ""
) -> None:
    nothing = {key for key, value in values.items() if value is None}
    _check_keys(VLM, values, known, choices, _IDLE | nothing, prefix)
    layers = values.get("layer_types")
    full = isinstance(layers, list) and all(layer == "full_attention" for layer in layers)
    if layers is not None and not full:
        raise InputError(
            f"{VLM} config: {prefix}layer_types is {layers!r}; only 'full_attention' is supported"
        )


def _rope(text: Values, prefix: str) -> dict[str, Any]:
    """The rotary parameters of the language model, under whichever of two names they are."""
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    where = f"{prefix}rope_scaling"
    if not isinstance(rope, dict):
        raise InputError(f"the {VLM} config has no {where}; download the config.json again")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("mrope", "default"):
        raise InputError(
            f"{VLM} config: {where}.rope_type is {kind!r}; only 'mrope' and 'default' are supported"
        )
    if extra := sorted(rope.keys() - _ROPE):
        raise InputError(f"the {VLM} config has {where}.{extra[0]}, which is not supported")
    return rope


def _check_sizes(config: VLMConfig) -> None:
    """Raises InputError where the sizes contradict each other."""
    text, vision = config.text, config.vision
    ids = {name: getattr(config, name) for name in _TOKEN_IDS}
    ids |= {name: getattr(text, name) for name in sorted(_OPTIONAL)}
    head = text.hidden_size / text.num_attention_heads
    merged = PATCH * MERGE
    for name, value, right, expected in (
        *(
            (name, value, value is None or value < text.vocab_size,
             f"a token below the vocab_size {text.vocab_size}")
            for name, value in ids.items()
        ),
        ("rms_norm_eps", text.rms_norm_eps, text.rms_norm_eps > 0, "a positive number"),
        ("rope_theta", text.rope_theta, text.rope_theta > 0, "a positive number"),
        ("num_key_value_heads", text.num_key_value_heads,
         text.num_attention_heads % text.num_key_value_heads == 0,
         f"a divisor of num_attention_heads, {text.num_attention_heads}"),
        ("mrope_section", text.mrope_section,
         len(text.mrope_section) == 3 and 2 * sum(text.mrope_section) == head,
         f"three numbers whose sum is half of hidden_size / num_attention_heads = {head:g}"),
        ("vision_config.hidden_size", vision.hidden_size,
         vision.hidden_size % (4 * vision.num_heads) == 0,
         f"a multiple of 4 for each of {vision.num_heads} heads"),
        ("vision_config.out_hidden_size", vision.out_hidden_size,
         vision.out_hidden_size == text.hidden_size,
         f"the language model's hidden_size {text.hidden_size}"),
        ("vision_config.window_size", vision.window_size, vision.window_size % merged == 0,
         f"a multiple of {merged}"),
        ("vision_config.fullatt_block_indexes", vision.fullatt_block_indexes,
         all(block < vision.depth for block in vision.fullatt_block_indexes),
         f"blocks below the depth {vision.depth}"),
    ):  # fmt: skip
        if not right:
            raise InputError(f"{VLM} config: {name} is {value!r}; expected {expected}")


def _mmdit(values: Values) -> MMDiTConfig:
    if values.get("out_channels", 16) is None:
        values = {**values, "out_channels": values.get("in_channels", MMDiTConfig.in_channels)}
    name = values.get("_class_name", CLASS_NAME)
    if name != CLASS_NAME:
        raise InputError(f"the transformer config is of class {name!r}; give a {CLASS_NAME}")
    _check_keys(CLASS_NAME, values, _names(MMDiTConfig), _MMDIT, {"pooled_projection_dim"})
    return MMDiTConfig(**_fields(CLASS_NAME, MMDiTConfig, values))


def _vae(values: Values) -> vae.VAEConfig:
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in vae.KINDS:
        raise InputError(f"the VAE config is of class {name!r}; give one of {sorted(vae.KINDS)}")
    cls, fixed, required = vae.KINDS[name], _QWEN_VAE, set()
    if cls is vae.AutoencoderKLConfig:
        channels = values.get("block_out_channels")
        fixed = _kl_types(len(channels) if isinstance(channels, list) else 0)
        # The class has other values where these are absent than any public model.
        required = {"block_out_channels", "layers_per_block", "latent_channels", *fixed}
    found = _fields(name, cls, values, required=required)
    _check_keys(name, values, _names(cls), {key: (value,) for key, value in fixed.items()})
    return cls(**found)


def _kl_types(blocks: int) -> dict[str, Any]:
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _check_keys(
    name: str,
    values: Values,
    known: Collection[str],
    choices: Choices,
    idle: Collection[str] = (),
    prefix: str = "",
) -> None:
    """Raises InputError for a key that is neither known nor idle, or for an unsupported value."""
    for key, value in values.items():
        if key in choices:
            if value not in choices[key]:
                raise InputError(
                    f"{name} config: {prefix}{key} is {value!r}; "
                    f"only {choices[key][0]!r} is supported"
                )
        elif key not in known and key not in idle and not key.startswith("_"):
            raise InputError(
                f"the {name} config has the key {prefix}{key}, which is not supported; "
                f"give the unquantized weights of a plain {name}"
            )


def _fields(
    name: str, cls: type, values: Values, prefix: str = "", required: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments of the dataclass `cls` among `values`, of the types that its fields have.

    Raises:
      InputError: a value has another type, or a required key is missing.
    """
    for key in sorted(required):
        if key not in values:
            raise InputError(f"the {name} config has no {prefix}{key}; download it again")
    found = {}
    for key, kind in typing.get_type_hints(cls).items():
        if key in values:
            value: Any = values[key]
            value = tuple(value) if isinstance(value, list) else value
            if expected := _expected(value, kind, 0 if key in _FROM_ZERO else 1):
                raise InputError(
                    f"{name} config: {prefix}{key} is {values[key]!r}; expected {expected}"
                )
            found[key] = float(value) if kind is float else value
    return found


def _expected(value: Any, kind: Any, least: int) -> str:
    """What `value` should be according to a field's type; '' where it is."""
    item, *others = typing.get_args(kind) or (kind,)
    if type(None) in others:
        return "" if value is None else _expected(value, item, least)
    if item is int:
        noun = "positive integer" if least else "non-negative integer"
    else:
        noun = "finite number" if item is float else "boolean"
    if not others:
        return "" if _fits(value, item, least) else f"a {noun}"
    right = isinstance(value, tuple) and all(_fits(one, item, least) for one in value)
    return "" if right else f"a list of {noun}s"


def _fits(value: Any, kind: Any, least: int) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and (kind is bool or value >= least)
