"""Stages start from public folders, from imports, and from LoRA files, each device by its share."""

import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import start
from qk_jax.weights import from_pytorch
from qk_jax.weights import read as weights_read
from qk_jax.weights.write import export_lora, export_model

NANO = pathlib.Path(__file__).parent / "nano.py"


def stage(name, mesh=None, **init):
    """The plan of a nano stage that starts from `init`."""
    config = config_lib.load(f"{NANO}:{name}", {f"init.{k}": str(v) for k, v in init.items()})
    config.sharding_limit = 1.0  # nano towers have little that divides
    mesh = mesh or sharding.build_mesh({}, jax.devices()[:1])
    return Plan.build(config, mesh)


def random_parts(folder):
    """Folders of a random nano VLM and VAE; their parameters."""
    model = stage("stage1").model
    params = model.init(jax.random.key(0), ("vlm", "vae"))
    export_model(params["vlm"], model.config.vlm, folder / "vlm")
    export_model(params["vae"], model.config.vae, folder / "vae")
    return params


def same(tree, other):
    """Bit-equal leaves."""
    tree, other = flatten_dict(tree, sep="/"), flatten_dict(other, sep="/")
    assert tree.keys() == other.keys()
    for name in tree:
        np.testing.assert_array_equal(tree[name], other[name], err_msg=name)


def test_stage_1_starts_from_a_folder_and_from_a_converted_one(tmp_path):
    wanted = random_parts(tmp_path)
    from_pytorch.convert(str(tmp_path / "vae"), str(tmp_path / "converted"))
    mesh = sharding.build_mesh({"fsdp": 2, "data": 4})
    init = {"vlm": tmp_path / "vlm", "vae": tmp_path / "converted"}
    params = start.parameters(stage("stage1", mesh, **init), tmp_path)
    same({part: params[part] for part in wanted}, wanted)
    kernel = params["vlm"]["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.mesh.shape == mesh.shape
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_other_sizes_than_the_config_has_are_named(tmp_path):
    random_parts(tmp_path)
    plan = stage("stage1", vlm=tmp_path / "vlm")
    plan.config.model.vlm.text.num_hidden_layers = 3
    with pytest.raises(InputError, match="num_hidden_layers"):
        start.parameters(Plan.build(plan.config, plan.mesh), tmp_path)


@pytest.mark.parametrize("rank", [2, 3])
def test_stage_3_starts_from_a_lora_file(tmp_path, rank):
    """The file's alpha and the config's agree in what the model computes."""
    shapes = weights_read.shapes(stage("stage3").model.config.mmdit)
    rng, flat = np.random.default_rng(0), {}
    for path, shape in shapes.items():
        if "/attn/" in path or "_mlp/" in path:
            if path.endswith("/kernel"):
                layers, inner, outer = shape
                module = path.removesuffix("/kernel")
                flat[f"{module}/lora_a"] = rng.standard_normal((layers, inner, rank), np.float32)
                flat[f"{module}/lora_b"] = rng.standard_normal((layers, rank, outer), np.float32)
    export_lora(unflatten_dict(flat, sep="/"), 0.5, tmp_path / "lora")
    plan = stage("stage3", lora=tmp_path / "lora")
    if rank != plan.config.lora.rank:
        with pytest.raises(InputError, match="config.lora.rank=3"):
            start._adapter(plan)
        return
    found = flatten_dict(start._adapter(plan), sep="/")
    assert found.keys() == flat.keys()
    for name, leaf in flat.items():
        scale = 0.5 / plan.model.config.lora_scale if name.endswith("lora_b") else 1.0
        np.testing.assert_allclose(found[name], leaf * scale, rtol=1e-6, err_msg=name)
