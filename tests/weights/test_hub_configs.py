"""The published config.json files: what they mean, and that nothing else is taken for them."""

import copy
import json
import math

import diffusers
import pytest
import transformers

from qk_jax.base.errors import InputError
from qk_jax.base.files import read_json
from qk_jax.models import mmdit, qwen_vl, vae
from qk_jax.weights.hub_configs import from_hf, to_hf
from qk_jax.weights.read import shapes

SECTIONS = [16, 24, 24]
VISION = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
    "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
}  # fmt: skip
TEXT_7B = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": SECTIONS},
}  # fmt: skip
TOP = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "vision_token_id": 151654, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2",
}  # fmt: skip


def hub(text, vision):
    """A flat config.json, as the Qwen2.5-VL repositories have it."""
    return copy.deepcopy(TOP | TEXT_7B | text | {"vision_config": VISION | vision})


FLAT = {
    "3b": hub(
        {"hidden_size": 2048, "intermediate_size": 11008, "max_window_layers": 70,
         "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
         "tie_word_embeddings": True, "vocab_size": 151936},
        {"out_hidden_size": 2048},
    ),
    "7b": hub({}, {}),
    "32b": hub(
        {"hidden_size": 5120, "intermediate_size": 27648, "max_window_layers": 64,
         "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8,
         "pad_token_id": 151643, "transformers_version": "4.49.0",
         "rope_scaling": {"mrope_section": SECTIONS, "rope_type": "default", "type": "default"}},
        {"out_hidden_size": 5120, "intermediate_size": 3456, "in_channels": 3,
         "model_type": "qwen2_5_vl"},
    ),
    "72b": hub(
        {"hidden_size": 8192, "intermediate_size": 29568, "max_window_layers": 80,
         "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8},
        {"out_hidden_size": 8192, "intermediate_size": 3456},
    ),
}  # fmt: skip
# The text encoder of Qwen-Image: nested, with a flat copy beside it.
QWEN_IMAGE_TEXT_ENCODER = hub(
    {"rope_scaling": {"mrope_section": SECTIONS, "rope_type": "default", "type": "default"}},
    {"in_channels": 3, "initializer_range": 0.02, "model_type": "qwen2_5_vl",
     "torch_dtype": "float32"},
) | {
    "transformers_version": "4.53.1",
    "text_config": TEXT_7B | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "image_token_id": None,
        "layer_types": ["full_attention"] * 28, "model_type": "qwen2_5_vl_text",
        "rope_scaling": {"mrope_section": SECTIONS, "rope_type": "default", "type": "default"},
        "sliding_window": None, "torch_dtype": "float32", "video_token_id": None,
        "vision_end_token_id": 151653, "vision_start_token_id": 151652,
        "vision_token_id": 151654,
    },
}  # fmt: skip
COUNTS = {"3b": 3_754_622_976, "7b": 8_292_166_656, "32b": 33_452_718_336, "72b": 73_410_777_344}

QWEN_IMAGE = {
    "_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False,
    "in_channels": 64, "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60,
    "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 768,
}  # fmt: skip
EDIT = {k: v for k, v in QWEN_IMAGE.items() if k != "pooled_projection_dim"}
TRANSFORMERS = {
    "Qwen-Image": QWEN_IMAGE,
    "Qwen-Image-Edit": EDIT | {"_diffusers_version": "0.35.0.dev0"},
    "Qwen-Image-Edit-2509": EDIT | {"_diffusers_version": "0.36.0.dev0"},
    "Qwen-Image-Edit-2511": EDIT | {"_diffusers_version": "0.37.0.dev0", "zero_cond_t": True},
    "saved by diffusers": EDIT | {
        "zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False,
        "_name_or_path": "Qwen/Qwen-Image",
    },
}  # fmt: skip

SDXL_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SD3_VAE = SDXL_VAE | {
    "_diffusers_version": "0.29.0.dev0", "latent_channels": 16, "latents_mean": None,
    "latents_std": None, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
FLUX_VAE = SD3_VAE | {
    "_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev",
    "mid_block_add_attention": True, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip
QWEN_IMAGE_VAE = {
    "_class_name": "AutoencoderKLQwenImage", "_diffusers_version": "0.34.0.dev0",
    "attn_scales": [], "base_dim": 96, "dim_mult": [1, 2, 4, 4], "dropout": 0.0,
    "latents_mean": [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ],
    "latents_std": [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    ],
    "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16,
}  # fmt: skip
VAES = {
    "sdxl": (SDXL_VAE, 83_653_863),
    "sd3": (SD3_VAE, 83_819_683),
    "flux": (FLUX_VAE, 83_819_683),
    "qwen_image": (QWEN_IMAGE_VAE, 44_599_603),
}


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def edited(config, path, value):
    """A copy in which the key 'a.b' has another value; `...` takes it away."""
    config = copy.deepcopy(config)
    *parents, key = path.split(".")
    part = config
    for parent in parents:
        part = part[parent]
    if value is ...:
        del part[key]
    else:
        part[key] = value
    return config


@pytest.mark.parametrize("size", sorted(FLAT))
def test_published_vlms(size):
    config = from_hf("vlm", FLAT[size])
    assert config == qwen_vl.PRESETS[size]
    assert count(shapes(config)) == COUNTS[size]


@pytest.mark.parametrize("size", sorted(FLAT))
def test_published_vlms_saved_again(size, tmp_path):
    transformers.Qwen2_5_VLConfig.from_dict(copy.deepcopy(FLAT[size])).save_pretrained(tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert "rope_parameters" in saved["text_config"]
    assert from_hf("vlm", saved) == qwen_vl.PRESETS[size]


# What transformers 4.49 to 4.51 leave of the vision section when they save a published model.
SAVED_BY_449 = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl",
                "spatial_patch_size": 14, "tokens_per_second": 2}  # fmt: skip
LEFT_BY_449 = {
    "3b": {"out_hidden_size": 2048},
    "7b": {},
    "32b": {"intermediate_size": 3456, "out_hidden_size": 5120},
    "72b": {"intermediate_size": 3456, "out_hidden_size": 8192},
}
DEFAULTS = transformers.Qwen2_5_VLConfig().vision_config.to_dict()


@pytest.mark.parametrize("size", sorted(FLAT))
def test_published_vlms_saved_by_transformers_4_49(size):
    left = SAVED_BY_449 | LEFT_BY_449[size]
    for key, value in FLAT[size]["vision_config"].items():
        assert key == "model_type" or left.get(key, DEFAULTS.get(key)) == value
    config = from_hf("vlm", FLAT[size] | {"vision_config": left})
    assert config == qwen_vl.PRESETS[size]


@pytest.mark.parametrize("key", sorted(vars(qwen_vl.VisionConfig())))
def test_what_a_vision_section_leaves_out_is_the_class_default(key):
    """Which is not always what the published models have."""
    for values in (FLAT["7b"], QWEN_IMAGE_TEXT_ENCODER):
        changed = edited(values, f"vision_config.{key}", ...)
        theirs = transformers.Qwen2_5_VLConfig.from_dict(copy.deepcopy(changed))
        config = from_hf("vlm", changed)
        assert config == from_hf("vlm", theirs.to_dict())
        default = DEFAULTS[key]
        assert getattr(config.vision, key) == (tuple(default) if key[0] == "f" else default)


@pytest.mark.parametrize("size", sorted(qwen_vl.PRESETS))
def test_vlms_survive_the_round_trip_through_transformers(size):
    config = qwen_vl.PRESETS[size]
    assert from_hf("vlm", to_hf(config)) == config
    read = transformers.Qwen2_5_VLConfig.from_dict(to_hf(config))
    assert from_hf("vlm", read.to_dict()) == config
    assert hash(config) == hash(from_hf("vlm", to_hf(config)))


def test_the_text_encoder_of_qwen_image():
    before = copy.deepcopy(QWEN_IMAGE_TEXT_ENCODER)
    assert from_hf("vlm", QWEN_IMAGE_TEXT_ENCODER) == qwen_vl.PRESETS["7b"]
    assert before == QWEN_IMAGE_TEXT_ENCODER
    tied = edited(QWEN_IMAGE_TEXT_ENCODER, "text_config.tie_word_embeddings", True)
    assert from_hf("vlm", tied).tie_word_embeddings


VLM_CHANGES = {
    "model_type": ["qwen2_vl", "qwen3_vl", None, [], ...],
    "quantization_config": [{"quant_method": "awq", "bits": 4}],
    "text_config.quantization_config": [{"quant_method": "fp8"}],
    "text_config.head_dim": [64],
    "text_config.attention_bias": [False],
    "text_config.use_sliding_window": [True, "no"],
    "text_config.layer_types": [["full_attention", "sliding_attention"], [["full_attention"]], 7],
    "text_config.hidden_act": ["gelu", None],
    "text_config.attention_dropout": [0.1],
    "text_config.hidden_size": [..., 0, -1, 3584.0, "3584", True, None, 3592],
    "text_config.num_hidden_layers": [..., 0],
    "text_config.num_key_value_heads": [..., None, 3],
    "text_config.vocab_size": [..., 1000],
    "text_config.rms_norm_eps": [..., 0.0, -1e-6, "small", math.inf, True],
    "text_config.rope_theta": [..., 0, "1e6"],
    "text_config.rope_scaling": [..., None, "mrope", []],
    "text_config.rope_scaling.rope_type": ["yarn", "linear", "dynamic", "llama3", None],
    "text_config.rope_scaling.mrope_section": [..., [16, 24], [16, 24, 25], [64], 64, [16, 48, 0]],
    "text_config.rope_scaling.factor": [4.0],
    "text_config.rope_scaling.mrope_interleaved": [True],
    "text_config.eos_token_id": [[151645], -1, 10**6],
    "vision_config": [..., None, []],
    "vision_config.depth": [None, 0, 16],
    "vision_config.hidden_size": [None, 1281],
    "vision_config.out_hidden_size": [None, 2048],
    "vision_config.in_channels": [1],
    "vision_config.in_chans": [4],
    "vision_config.patch_size": [16],
    "vision_config.spatial_patch_size": [16],
    "vision_config.spatial_merge_size": [1],
    "vision_config.temporal_patch_size": [1],
    "vision_config.hidden_act": ["gelu", "quick_gelu"],
    "vision_config.window_size": [None, 100],
    "vision_config.fullatt_block_indexes": [None, [7, 32], [-1], ["7"]],
    "vision_config.tokens_per_second": [None, 0],
    "vision_config.rope_parameters": [{"rope_theta": 1e6, "rope_type": "axial"}],
    "vision_config.deepstack_visual_indexes": [[8, 16, 24]],
    "vision_config.num_position_embeddings": [2304],
    "image_token_id": [None, -1, 10**6, "151655"],
    "deepstack": [True],
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(VLM_CHANGES))
def test_vlms_that_are_not_computed_are_refused_by_name(path):
    for value in VLM_CHANGES[path]:
        with pytest.raises(InputError, match=path.split(".")[-1].removesuffix("s")):
            from_hf("vlm", edited(QWEN_IMAGE_TEXT_ENCODER, path, value))
    flat = path.removeprefix("text_config.")
    if flat != path:
        for value in VLM_CHANGES[path]:
            with pytest.raises(InputError, match=flat.split(".")[-1]):
                from_hf("vlm", edited(FLAT["7b"], flat, value))


@pytest.mark.parametrize(
    "path",
    ["transformers_version", "use_cache", "initializer_range", "max_window_layers", "dtype",
     "architectures", "pad_token_id", "_name_or_path", "_attn_implementation", "return_dict"],
)  # fmt: skip
def test_keys_of_vlms_that_change_nothing(path):
    for place in ("", "text_config.", "vision_config."):
        changed = edited(QWEN_IMAGE_TEXT_ENCODER, place + path, 7)
        assert from_hf("vlm", changed) == qwen_vl.PRESETS["7b"]
    assert from_hf("vlm", edited(FLAT["7b"], "quantization_config", None))


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_published_transformers(name):
    config = from_hf("mmdit", TRANSFORMERS[name])
    assert config.zero_cond_t == (name == "Qwen-Image-Edit-2511")
    assert config == mmdit.MMDiTConfig(zero_cond_t=config.zero_cond_t)
    assert count(shapes(config)) == 20_430_401_088


def test_transformers_survive_the_round_trip():
    for config in mmdit.PRESETS.values():
        assert from_hf("mmdit", json.loads(json.dumps(to_hf(config)))) == config
    assert from_hf("mmdit", {"out_channels": None}).out_channels == 64


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("_class_name", ["QwenImageControlNetModel", "FluxTransformer2DModel", None, []]),
        ("guidance_embeds", [True]),
        ("use_additional_t_cond", [True]),
        ("use_layer3d_rope", [True]),
        ("causal_condition", [True, False, None]),
        ("quantization_config", [{"bits": 4}]),
        ("zero_cond_t", ["yes", 1, None]),
        ("num_layers", ["60", 60.0, 0, None, True]),
        ("axes_dims_rope", [[16, 56, 58], [64, 64], [16, 56, "56"], 128, None, [16, 57, 55]]),
        ("out_channels", [0, "16"]),
    ],
)
def test_transformers_that_are_not_computed_are_refused_by_name(path, values):
    for value in values:
        with pytest.raises(InputError, match=path if path != "_class_name" else "class"):
            from_hf("mmdit", QWEN_IMAGE | {path: value})


@pytest.mark.parametrize("name", sorted(VAES))
def test_published_vaes(name):
    values, parameters = VAES[name]
    config = from_hf("vae", values)
    assert config == vae.PRESETS[name]
    assert count(shapes(config)) == parameters


@pytest.mark.parametrize("name", sorted(VAES))
def test_published_vaes_saved_again(name, tmp_path):
    values = VAES[name][0]
    kind = getattr(diffusers, values["_class_name"])
    small = {"block_out_channels": [32] * 4} if name != "qwen_image" else {"base_dim": 4}
    kind.from_config(values | small).save_config(tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert from_hf("vae", saved) == from_hf("vae", values | small)


@pytest.mark.parametrize("name", sorted(vae.PRESETS))
def test_vaes_survive_the_round_trip_and_diffusers_reads_them_completely(name):
    config = vae.PRESETS[name]
    values = to_hf(config)
    assert from_hf("vae", values) == config
    theirs = getattr(diffusers, values.pop("_class_name")).from_config(values).config
    assert {key: theirs[key] for key in values} == values


KL_CHANGES = {
    "_class_name": ["AutoencoderKLFlux2", "AutoencoderDC", "AutoencoderKLWan", None, []],
    "block_out_channels": [..., [], [128, 100], [128, 256, 512], "128", [128, 256, 512, 512.0]],
    "layers_per_block": [..., 0, "2", True],
    "latent_channels": [..., -4],
    "norm_num_groups": [0, 7],
    "scaling_factor": ["1.5", math.inf, True, None, 0, -1.5],
    "shift_factor": ["0"],
    "latents_mean": [[0.0] * 16, 0.5],
    "act_fn": ["relu", ...],
    "down_block_types": [..., ["DownEncoderBlock2D"] * 3, ["AttnDownEncoderBlock2D"] * 4],
    "up_block_types": [..., ["UpDecoderBlock2D"] * 5, "UpDecoderBlock2D"],
    "use_quant_conv": ["no", 0],
    "mid_block_add_attention": [1],
    "batch_norm_eps": [1e-4],
    "patch_size": [[2, 2]],
}
QWEN_CHANGES = {
    "attn_scales": [[0.5]],
    "dropout": [0.1],
    "base_dim": [0, "96"],
    "dim_mult": [[1, 2, 4], 4, [1, 2, 4, 4.5]],
    "temperal_downsample": [[True, True], [0, 1, 1]],
    "latents_mean": [None, [0.0] * 15, "zero"],
    "latents_std": [None, [1.0, "1"] * 8, [0.0] + [1.0] * 15, [-1.0] + [1.0] * 15],
    "z_dim": [8],
    "is_residual": [True],
    "patch_size": [2],
}


@pytest.mark.parametrize(
    ("values", "path", "changes"),
    [(SD3_VAE, path, changes) for path, changes in KL_CHANGES.items()]
    + [(QWEN_IMAGE_VAE, path, changes) for path, changes in QWEN_CHANGES.items()],
)
def test_vaes_that_are_not_computed_are_refused_by_name(values, path, changes):
    words = {"_class_name": "class", "block_out_channels": "block_"}  # of as many block types
    for value in changes:
        with pytest.raises(InputError, match=words.get(path, path)):
            from_hf("vae", edited(values, path, value))
