"""Stages start from public folders, from imports, and from LoRA files, each device by its share."""

import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qk_jax import sharding
from qk_jax.convert import from_pytorch, tables, torch_export, torch_import
from qk_jax.errors import InputError
from qk_jax.training import config as config_lib
from qk_jax.training import initial
from qk_jax.training import state as state_lib

NANO = pathlib.Path(__file__).parent / "nano.py"


def stage(name, mesh=None, **init):
    """(model, config, layout) of a nano stage that starts from `init`."""
    config = config_lib.load(f"{NANO}:{name}", {f"init.{k}": str(v) for k, v in init.items()})
    config.sharding_limit = 1.0  # nano towers have little that divides
    mesh = mesh or sharding.build_mesh({}, jax.devices()[:1])
    model = state_lib.build_model(config)
    return model, config, state_lib.Layout(model, config, mesh)


def random_parts(folder):
    """Folders of a random nano VLM and VAE; their parameters."""
    model, _, _ = stage("stage1")
    params = model.init(jax.random.key(0), ("vlm", "vae"))
    torch_export.export_vlm(params["vlm"], model.config.vlm, folder / "vlm")
    torch_export.export_vae(params["vae"], model.config.vae, folder / "vae")
    return params


def same(tree, other):
    """Bit-equal leaves."""
    tree, other = flatten_dict(tree, sep="/"), flatten_dict(other, sep="/")
    assert tree.keys() == other.keys()
    for name in tree:
        np.testing.assert_array_equal(tree[name], other[name], err_msg=name)


def test_stage_1_starts_from_a_folder_and_from_an_import(tmp_path):
    wanted = random_parts(tmp_path)
    from_pytorch.convert(str(tmp_path / "vae"), str(tmp_path / "imported"))
    mesh = sharding.build_mesh({"fsdp": 2, "data": 4})
    init = {"vlm": tmp_path / "vlm", "vae": tmp_path / "imported"}
    model, config, layout = stage("stage1", mesh, **init)
    params = initial.parameters(model, config, layout, tmp_path)
    same({part: params[part] for part in wanted}, wanted)
    kernel = params["vlm"]["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.mesh.shape == mesh.shape
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_other_sizes_than_the_config_has_are_named(tmp_path):
    random_parts(tmp_path)
    model, config, layout = stage("stage1", vlm=tmp_path / "vlm")
    config.model.vlm.text.num_hidden_layers = 3
    model = state_lib.build_model(config)
    with pytest.raises(InputError, match="num_hidden_layers"):
        initial.parameters(model, config, layout, tmp_path)


@pytest.mark.parametrize("rank", [2, 3])
def test_stage_3_starts_from_a_lora_file(tmp_path, rank):
    """The file's alpha and the config's agree in what the model computes."""
    model, config, _ = stage("stage3")
    shapes = torch_import.mmdit_shapes(model.config.mmdit)
    rng, flat = np.random.default_rng(0), {}
    for path, shape in shapes.items():
        if "/attn/" in path or "_mlp/" in path:
            if path.endswith("/kernel"):
                layers, inner, outer = shape
                module = path.removesuffix("/kernel")
                flat[f"{module}/lora_a"] = rng.standard_normal((layers, inner, rank), np.float32)
                flat[f"{module}/lora_b"] = rng.standard_normal((layers, rank, outer), np.float32)
    torch_export.export_lora(unflatten_dict(flat, sep="/"), 0.5, tables.mmdit(), tmp_path / "lora")
    model, config, _ = stage("stage3", lora=tmp_path / "lora")
    if rank != config.lora.rank:
        with pytest.raises(InputError, match="config.lora.rank=3"):
            initial._adapter(config, model)
        return
    found = flatten_dict(initial._adapter(config, model), sep="/")
    assert found.keys() == flat.keys()
    for name, leaf in flat.items():
        scale = 0.5 / model.config.lora_scale if name.endswith("lora_b") else 1.0
        np.testing.assert_allclose(found[name], leaf * scale, rtol=1e-6, err_msg=name)
