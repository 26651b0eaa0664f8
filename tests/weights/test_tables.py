"""Every row of every table, both ways, through the PyTorch classes themselves."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.models import lora, mmdit, qwen_vl, rotary, vae
from qk_jax.pictures.grids import mrope_positions
from qk_jax.weights import hub_configs, safetensors
from qk_jax.weights.write import export_lora, export_model, torch_tensors
from tests.weights import nano

GRID = (4, 6)


@functools.cache
def params_of(name):
    kind = nano.KINDS[name]
    return nano.random_tree(kind.shapes)


@pytest.fixture(params=nano.KINDS)
def name(request):
    return request.param


def test_every_leaf_has_a_row_and_every_row_a_leaf():
    tables = {kind.torch_class: set() for kind in nano.KINDS.values()}
    used = {kind.torch_class: set() for kind in nano.KINDS.values()}
    for kind in nano.KINDS.values():
        tables[kind.torch_class] |= {row.torch for row in kind.table.rows}
        for path, shape in kind.shapes.items():
            for name, layer, row in kind.table.names(path, shape):
                used[kind.torch_class].add(row.torch)
                assert kind.table.locate(name) == (path, layer, row.transform)
    assert used == tables


def test_params_walk_to_torch_and_back_bit_equal(name, tmp_path):
    kind = nano.KINDS[name]
    kind.write(params_of(name), tmp_path / "ours")
    model = nano.load(kind, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        config, params = kind.read(tmp_path / folder)
        assert config == kind.config
        nano.assert_same(params, params_of(name))


@pytest.mark.parametrize("kind_name", ["vlm", "vlm_tied"])
def test_vlm_computes_the_same(kind_name, tmp_path):
    kind = nano.KINDS[kind_name]
    kind.write(params_of(kind_name), tmp_path)
    model = nano.load(kind, tmp_path)
    rng = np.random.default_rng(0)
    pictured = [kind.config.image_token_id] * (GRID[0] * GRID[1] // 4)
    ids = np.array([[3, 4, 52, *pictured, 53, 5, 6]], np.int32)
    mask = np.ones(ids.shape, bool)
    pixels = rng.standard_normal((1, GRID[0] * GRID[1], 1176)).astype(np.float32)
    positions = mrope_positions(ids, mask, (GRID,), kind.config.image_token_id)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch.from_numpy(pixels[0]),
            image_grid_thw=torch.tensor([[1, *GRID]]),
            position_ids=torch.from_numpy(positions).transpose(0, 1).long(),
        ).logits
    module = qwen_vl.QwenVL(kind.config)

    @jax.jit
    def logits(params):
        given = map(jnp.asarray, (ids, positions, mask, pixels))
        hidden = module.apply({"params": params}, *given, (GRID,))
        return module.apply({"params": params}, hidden, method="logits")

    np.testing.assert_allclose(logits(params_of(kind_name)), theirs, atol=2e-5, rtol=1e-5)


def test_mmdit_computes_the_same(tmp_path):
    kind = nano.KINDS["mmdit"]
    kind.write(params_of("mmdit"), tmp_path)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 24, kind.config.in_channels)).astype(np.float32)
    context = rng.standard_normal((1, 5, kind.config.joint_attention_dim)).astype(np.float32)
    t = np.array([0.3], np.float32)
    with torch.no_grad():
        theirs = nano.load(kind, tmp_path)(
            hidden_states=torch.from_numpy(x),
            encoder_hidden_states=torch.from_numpy(context),
            timestep=torch.from_numpy(t),
            img_shapes=[[(1, *GRID)]],
        ).sample
    law = rotary.PositionLaw("qwen_image")
    places = rotary.image_positions(law, GRID, (), jnp.zeros((1, 0), jnp.int32))
    words = rotary.text_positions(law, jnp.ones((1, 5), bool), GRID, ())
    ours = jax.jit(
        lambda p: mmdit.MMDiT(kind.config).apply(
            {"params": p}, *map(jnp.asarray, (x, context, np.ones((1, 5), bool), t)), places, words
        )
    )(params_of("mmdit"))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind_name", ["kl", "kl_plain", "qwen_vae"])
def test_vae_computes_the_same(kind_name, tmp_path):
    kind = nano.KINDS[kind_name]
    kind.write(params_of(kind_name), tmp_path)
    model, module = nano.load(kind, tmp_path), vae.VAE(kind.config)
    frame = (slice(None),) * 2 + ((None,) if kind_name == "qwen_vae" else ())
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 32, 3)).astype(np.float32)
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(x).permute(0, 3, 1, 2)[frame]).latent_dist.mode()
        picture = model.decode(mean).sample
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method="encode")[0])
    decode = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))

    def ours(tensor):
        return tensor.reshape(*tensor.shape[:2], *tensor.shape[-2:]).permute(0, 2, 3, 1).numpy()

    params = params_of(kind_name)
    np.testing.assert_allclose(encode(params, x), ours(mean), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decode(params, ours(mean)), ours(picture), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_small_types_are_written_and_read(name, dtype, tmp_path):
    kind = nano.KINDS[name]
    kind.write(params_of(name), tmp_path, dtype)
    wanted = {path: leaf.astype(dtype) for path, leaf in nano.flat(params_of(name)).items()}
    as_stored, as_float = kind.read(tmp_path)[1], kind.read(tmp_path, np.float32)[1]
    for path, leaf in nano.flat(as_stored).items():
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, wanted[path])
        np.testing.assert_array_equal(nano.flat(as_float)[path], wanted[path].astype(np.float32))
    torch_type = getattr(torch, np.dtype(dtype).name)
    model = nano.load(kind, tmp_path, torch_type)
    assert {weight.dtype for weight in model.parameters()} == {torch_type}


def test_values_beyond_float16_are_refused(tmp_path):
    kind = nano.KINDS["mmdit"]
    params = nano.flat(params_of("mmdit")) | {"img_in/bias": np.full(32, 7e4, np.float32)}
    params = nano.unflatten(params)
    with pytest.raises(InputError, match="img_in.bias has values beyond the range of float16"):
        kind.write(params, tmp_path, np.float16)
    assert not list(tmp_path.iterdir())


def test_shards_are_small_and_leave_nothing_stale(tmp_path):
    kind = nano.KINDS["mmdit"]
    kind.write(params_of("mmdit"), tmp_path, max_shard_bytes=30_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = files.read_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    assert len(shards) > 2 and set(index["weight_map"].values()) == {file.name for file in shards}
    assert all(file.stat().st_size < 34_000 for file in shards)
    nano.load(kind, tmp_path)
    nano.assert_same(kind.read(tmp_path)[1], params_of("mmdit"))
    kind.write(params_of("mmdit"), tmp_path)
    left = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == left


def test_the_qwen_vae_keeps_what_pictures_never_reach(tmp_path):
    kind = nano.KINDS["qwen_vae"]
    torch.manual_seed(0)
    values = {k: v for k, v in hub_configs.to_hf(kind.config).items() if not k.startswith("_")}
    model = kind.torch_class(**values)
    model.save_pretrained(tmp_path / "original")
    config, params = kind.read(tmp_path / "original")
    export_model(params, config, tmp_path / "full", original=tmp_path / "original")
    copy = nano.load(kind, tmp_path / "full").state_dict()
    assert copy.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(copy[name], weight), name
    export_model(params, config, tmp_path / "bare")
    bare = nano.load(kind, tmp_path / "bare").state_dict()
    assert not any(weight.any() for name, weight in bare.items() if "time_conv" in name)


def test_names_of_both_generations_are_known():
    table = nano.KINDS["vlm"].table
    for ours, theirs in (
        ("model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("visual.merger.mlp.0.bias", "model.visual.merger.mlp.0.bias"),
    ):
        assert table.locate(ours) == table.locate(theirs) is not None
    old = nano.KINDS["kl"].table.locate("encoder.mid_block.attentions.0.proj_attn.weight")
    assert old.path == "encoder/mid_block/attentions_0/to_out_0/kernel"


@pytest.mark.parametrize("change", ["layers", "width", "unknown", "missing", "class"])
def test_weights_that_do_not_fit_their_config_are_refused(change, tmp_path):
    kind = nano.KINDS["mmdit"]
    kind.write(params_of("mmdit"), tmp_path)
    config = hub_configs.to_hf(kind.config)
    message = {
        "layers": r"holds tensors .*: transformer_blocks\.1\.",
        "width": "shape",
        "unknown": "this model does not have: extra.weight",
        "missing": "lacks img_in.bias",
        "class": "'FluxTransformer2DModel'; give a QwenImageTransformer2DModel",
    }[change]
    if change == "layers":
        config["num_layers"] = 1
    elif change == "width":
        config["joint_attention_dim"] = 48
    elif change == "class":
        config["_class_name"] = "FluxTransformer2DModel"
    else:
        source = safetensors.TensorFolder(tmp_path)
        tensors = {tensor: source.read(tensor) for tensor in source.shapes}
        if change == "unknown":
            tensors["extra.weight"] = np.zeros(3, np.float32)
        else:
            del tensors["img_in.bias"]
        safetensors.write_tensors(tmp_path, "diffusion_pytorch_model", tensors)
    files.write_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match=message):
        kind.read(tmp_path)


def test_a_tree_of_another_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="quant_conv/bias has the shape"):
        nano.KINDS["kl_plain"].write(params_of("kl"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_ignored_tensors_must_be_named(tmp_path):
    kind = nano.KINDS["mmdit"]
    tensors = torch_tensors(kind.table, params_of("mmdit"), kind.shapes)
    more = {"extra.weight": np.zeros(3, np.float32)}
    safetensors.write_tensors(tmp_path, "model", tensors | more)
    files.write_json(tmp_path / "config.json", hub_configs.to_hf(kind.config))
    with pytest.raises(InputError, match="extra.weight"):
        kind.read(tmp_path)
    _, params = kind.read(tmp_path, ignore=[r"extra\..*"])
    nano.assert_same(params, params_of("mmdit"))


def test_an_adapter_computes_the_same_in_diffusers(tmp_path):
    kind = nano.KINDS["mmdit"]
    params = jax.tree.map(jnp.asarray, params_of("mmdit"))
    adapter = lora.init(jax.random.key(0), params, lora.MMDIT_TARGETS, rank=3)
    adapter = nano.random_tree({k: v.shape for k, v in nano.flat(adapter).items()}, seed=1)
    adapter = jax.tree.map(jnp.asarray, adapter)
    kind.write(lora.merge(params, adapter, 0.5), tmp_path / "merged")
    kind.write(params, tmp_path / "base")
    export_lora(adapter, 0.5, tmp_path / "lora")
    merged, adapted = (nano.load(kind, tmp_path / folder) for folder in ("merged", "base"))
    rng = np.random.default_rng(0)
    given = {
        "hidden_states": torch.from_numpy(rng.standard_normal((1, 24, 16)).astype(np.float32)),
        "encoder_hidden_states": torch.from_numpy(
            rng.standard_normal((1, 5, 24)).astype(np.float32)
        ),
        "timestep": torch.tensor([0.3]),
        "img_shapes": [[(1, *GRID)]],
    }
    with torch.no_grad():
        bare = adapted(**given).sample
        weights = diffusers.QwenImagePipeline.lora_state_dict(str(tmp_path / "lora"))
        adapted.load_lora_adapter(weights, prefix="transformer")
        with_adapter, wanted = adapted(**given).sample, merged(**given).sample
    assert (bare - wanted).abs().max() > 0.1
    np.testing.assert_allclose(with_adapter, wanted, atol=2e-5, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapter = {"img_conv": {"lora_a": np.zeros((3, 2)), "lora_b": np.zeros((2, 3))}}
    with pytest.raises(InputError, match="img_conv.* fits no Linear"):
        export_lora(adapter, 1.0, tmp_path)
