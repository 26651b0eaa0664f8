"""LoRA files as peft, diffusers, ComfyUI and kohya write them, against diffusers' own reading."""

import json

import diffusers
import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch

from qk_jax.base.errors import InputError
from qk_jax.models import lora
from qk_jax.weights import lora_files
from qk_jax.weights.write import export_lora
from tests.weights import nano

KIND = nano.KINDS["mmdit"]
SHAPES = KIND.shapes
PARAMS = nano.random_tree(SHAPES)
MODULES = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q",
    "transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2",
    "transformer_blocks.0.img_mod.1", "img_in", "proj_out", "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
)  # fmt: skip
GRID = (4, 6)
WIDTHS = lora_files._linears(SHAPES)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    KIND.write(PARAMS, folder)
    return folder


def outputs(model):
    rng = np.random.default_rng(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.from_numpy(rng.standard_normal((1, 24, 16)).astype(np.float32)),
            encoder_hidden_states=torch.from_numpy(
                rng.standard_normal((1, 5, 24)).astype(np.float32)
            ),
            timestep=torch.tensor([0.3]),
            img_shapes=[[(1, *GRID)]],
        ).sample.numpy()


def ours(path, tmp_path):
    """Outputs of the model into which we merged the file."""
    adapter, rank = lora_files.import_lora(path, SHAPES)
    for name, leaf in nano.flat(adapter).items():
        kernel = SHAPES[f"{name.rpartition('/')[0]}/kernel"]
        ends = (kernel[-2], rank) if name.endswith("lora_a") else (rank, kernel[-1])
        assert leaf.shape == (*kernel[:-2], *ends)
    merged = jax.tree.map(np.asarray, lora.merge(PARAMS, adapter, 1.0))
    KIND.write(merged, tmp_path / "merged")
    return outputs(nano.load(KIND, tmp_path / "merged"))


def compare(path, model, tmp_path, base):
    wanted, bare = outputs(model), outputs(nano.load(KIND, base))
    assert np.abs(wanted - bare).max() > 0.05
    np.testing.assert_allclose(ours(path, tmp_path), wanted, atol=1e-5, rtol=1e-5)


def with_peft(base, **options):
    """A torch model with a random adapter."""
    model = nano.load(KIND, base)
    config = peft.LoraConfig(target_modules=list(MODULES), **options)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * 0.5 / parameter.shape[1] ** 0.5
    return model


PEFT_OPTIONS = {
    "alpha": {"r": 4, "lora_alpha": 8},
    "patterns": {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2, "img_in": 7},
        "alpha_pattern": {"transformer_blocks.1.attn.to_q": 3, "net.2": 1},
    },
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("options", sorted(PEFT_OPTIONS))
def test_files_of_save_lora_weights(options, base, tmp_path):
    model = with_peft(base, **PEFT_OPTIONS[options])
    diffusers.QwenImagePipeline.save_lora_weights(
        tmp_path / "lora",
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    compare(tmp_path / "lora", model, tmp_path, base)


@pytest.mark.parametrize("options", sorted(PEFT_OPTIONS))
def test_folders_of_peft(options, base, tmp_path):
    target = peft.LoraConfig(target_modules=list(MODULES), **PEFT_OPTIONS[options])
    model = peft.get_peft_model(nano.load(KIND, base), target)
    adapted = with_peft(base, **PEFT_OPTIONS[options])
    state = peft.get_peft_model_state_dict(adapted)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in state.items()})
    model.save_pretrained(tmp_path / "lora")
    keys = safetensors.numpy.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in keys)
    compare(tmp_path / "lora", adapted, tmp_path, base)


def pair(module, rank, rng, dtype=np.float32):
    fan_in, fan_out = WIDTHS[module].kernel[-2:]
    down = rng.standard_normal((rank, fan_in)) / fan_in**0.5
    up = rng.standard_normal((fan_out, rank)) / rank**0.5
    return down.astype(dtype), up.astype(dtype)


def tensors(style, rank=3, alpha=None, modules=MODULES, dtype=np.float32):
    """A file's tensors: style is the keys before the module, of both halves, and flattening."""
    prefix, down, up = style
    rng, found = np.random.default_rng(0), {}
    for module in modules:
        name = prefix + (module.replace(".", "_") if prefix == "lora_unet_" else module)
        found[f"{name}.{down}.weight"], found[f"{name}.{up}.weight"] = pair(
            module, rank, rng, dtype
        )
        if alpha is not None:
            found[f"{name}.alpha"] = np.array(alpha, np.float32)
    return found


STYLES = {
    "comfyui": ("diffusion_model.", "lora_down", "lora_up"),
    "lightning": ("", "lora_down", "lora_up"),
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
    "comfyui peft": ("diffusion_model.", "lora_A", "lora_B"),
    "diffsynth": ("", "lora_A.default", "lora_B.default"),
    "diffusers": ("transformer.", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("style", sorted(STYLES))
def test_files_of_other_tools(style, base, tmp_path):
    alpha = 1.5 if "lora_down" in STYLES[style] else None
    file = tmp_path / "my lora.safetensors"
    safetensors.numpy.save_file(tensors(STYLES[style], alpha=alpha), file)
    weights = diffusers.QwenImagePipeline.lora_state_dict(str(tmp_path), weight_name=file.name)
    model = nano.load(KIND, base)
    model.load_lora_adapter(weights, prefix="transformer")
    compare(file, model, tmp_path, base)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "diffusion_model.", ""])
@pytest.mark.parametrize("halves", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_every_combination_means_the_same(prefix, halves, tmp_path):
    safetensors.numpy.save_file(tensors(STYLES["comfyui"], 4, 2.0), tmp_path / "a.safetensors")
    safetensors.numpy.save_file(tensors((prefix, *halves), 4, 2.0), tmp_path / "b.safetensors")
    one, other = (lora_files.import_lora(tmp_path / f"{x}.safetensors", SHAPES) for x in "ab")
    assert one[1] == other[1] == 4
    nano.assert_same(one[0], other[0])


def test_what_is_not_adapted_is_zero(tmp_path):
    file = tmp_path / "a.safetensors"
    more = tensors(STYLES["diffusers"], 5, modules=MODULES[:1])
    less = tensors(STYLES["diffusers"], 2, modules=MODULES[2:3])
    safetensors.numpy.save_file(more | less, file)
    adapter, rank = lora_files.import_lora(file, SHAPES)
    flat = nano.flat(adapter)
    assert rank == 5 and len(flat) == 4
    a, b = (flat[f"transformer_blocks/attn/to_q/lora_{half}"] for half in "ab")
    assert a[0].any() and b[0].any() and not a[1].any() and not b[1].any()
    a, b = (flat[f"transformer_blocks/attn/to_out_0/lora_{half}"] for half in "ab")
    assert not a[0].any() and a[1, :, :2].all() and not a[1, :, 2:].any() and not b[1, 2:].any()
    key = "transformer.transformer_blocks.1.attn.to_out.0.lora_A.weight"
    np.testing.assert_array_equal(a[1, :, :2], less[key].T)


@pytest.mark.parametrize(
    ("files", "dtype", "wanted"),
    [
        (np.float32, None, np.float32),
        (ml_dtypes.bfloat16, None, ml_dtypes.bfloat16),
        (np.float16, np.float32, np.float32),
        (np.float32, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    ],
)
def test_types(files, dtype, wanted, tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors(STYLES["comfyui"], 4, 2.0, dtype=files), file)
    adapter, _ = lora_files.import_lora(file, SHAPES, dtype)
    assert {leaf.dtype for leaf in nano.flat(adapter).values()} == {np.dtype(wanted)}


def test_what_we_write_we_read(tmp_path):
    adapter = lora.init(jax.random.key(0), PARAMS, lora.MMDIT_TARGETS, rank=3)
    adapter = nano.random_tree({k: v.shape for k, v in nano.flat(adapter).items()}, seed=1)
    export_lora(adapter, 0.25, tmp_path / "a")
    found, rank = lora_files.import_lora(tmp_path / "a", SHAPES)
    assert rank == 3
    nano.assert_same(found, jax.tree.map(np.asarray, lora.scaled(adapter, 0.25)))
    export_lora(found, 1.0, tmp_path / "b")
    one, other = (
        (tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes() for name in "ab"
    )
    assert one == other


Q = "transformer.transformer_blocks.0.attn.to_q"
ZEROS = np.zeros((32, 3), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": ZEROS}, "to_q.lora_magnitude_vector, which is no part"),
        ({f"{Q}.dora_scale": ZEROS}, "to_q.dora_scale"),
        ({f"{Q}.lora_B.bias": ZEROS}, "to_q.lora_B.bias"),
        ({f"{Q}.diff": ZEROS}, "to_q.diff"),
        ({f"{Q}.lokr_w1": ZEROS}, "to_q.lokr_w1"),
        ({f"{Q}.lora_A.other.weight": ZEROS}, "lora_A.other.weight"),
        ({f"{Q}.lora_down.weight": ZEROS}, "lora_A.weight and .*lora_down.weight for one module"),
        ({"diffusion_model" + Q[11:] + ".lora_A.weight": ZEROS}, "for one module"),
        ({f"{Q}.lora_B.weight": None}, "to_q.lora_A.weight without the other half"),
        ({f"{Q}.lora_A.weight": None}, "to_q.lora_B.weight without the other half"),
        ({f"{Q}.lora_A.weight": ZEROS.T[:2]}, r"to_q.lora_A.weight \[2, 32\]"),
        ({f"{Q}.lora_A.weight": ZEROS}, r"from 32 to 32"),
        ({f"{Q}.lora_A.weight": ZEROS[0, 0]}, r"to_q.lora_A.weight \[\]"),
        ({f"{Q}.lora_A.weight": np.zeros((3, 32, 1, 1), np.float32)}, r"\[3, 32, 1, 1\]"),
        ({f"{Q}.alpha": np.ones(2, np.float32)}, r"to_q.alpha of shape \(2,\)"),
        ({f"{Q}.lora_A.weight": ZEROS.T * np.nan}, "not finite"),
        ({f"{Q}.lora_A.weight": ZEROS.T.astype(np.int32)}, "unsupported type"),
        ({f"{Q.replace('.0.', '.2.')}.lora_A.weight": ZEROS}, "blocks.2.attn.to_q.* is no Linear"),
        ({"transformer.img_on.lora_A.weight": ZEROS}, "img_on.* is no Linear"),
        ({"text_encoder.layers.0.q_proj.lora_A.weight": ZEROS}, "text_encoder.* is no Linear"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ZEROS}, "is no Linear"),
        ({"transformer.txt_norm.lora_A.weight": ZEROS}, "txt_norm.* is no Linear"),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused(change, message, tmp_path):
    found = tensors(STYLES["diffusers"]) | change
    found = {key: np.array(a, order="C") for key, a in found.items() if a is not None}
    safetensors.numpy.save_file(found, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        lora_files.import_lora(tmp_path / "a.safetensors", SHAPES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ({"r": 3}, "lora_alpha"),
        ({"transformer.lora_alpha": "8"}, "lora_alpha"),
        (
            {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": "x"}},
            "alpha_pattern",
        ),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q(": 1}}, "alpha_pattern 'to_q\\('"),
        ({"lora_alpha": 8, "use_dora": True}, "use_dora"),
        ({"lora_alpha": 8, "lora_bias": True}, "lora_bias"),
        ({"lora_alpha": 8, "peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    ],
)
@pytest.mark.parametrize("place", ["header", "folder"])
def test_configs_that_cannot_be_followed_are_refused(config, message, place, tmp_path):
    text = config if isinstance(config, str) else json.dumps(config)
    metadata = {"lora_adapter_metadata": text} if place == "header" else {}
    file = tmp_path / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors(STYLES["diffusers"]), file, metadata)
    if place == "folder":
        (tmp_path / "adapter_config.json").write_text(text)
        message = message.replace("no JSON object", "JSON").replace("no JSON", "JSON")
    with pytest.raises(InputError, match=message):
        lora_files.import_lora(tmp_path, SHAPES)


def test_a_file_without_tensors_and_no_file(tmp_path):
    safetensors.numpy.save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no tensors"):
        lora_files.import_lora(tmp_path / "a.safetensors", SHAPES)
    with pytest.raises(InputError, match="does not exist"):
        lora_files.import_lora(tmp_path / "b.safetensors", SHAPES)
