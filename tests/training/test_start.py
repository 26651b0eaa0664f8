"""Stages start from public folders, from imports, and from LoRA files, each device by its share."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qk_jax import sharding, train
from qk_jax.base import files, hub
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


def test_stage_1_starts_from_a_converted_pipeline(tmp_path):
    wanted, folder = random_parts(tmp_path), tmp_path / "pipeline"
    index = {"text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
             "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
    files.write_json(folder / hub.INDEX, {"_class_name": "QwenImagePipeline", **index})
    for part in wanted:
        (tmp_path / part).rename(folder / hub.FOLDERS[part])
    from_pytorch.convert(str(folder), str(tmp_path / "converted"))
    init = dict.fromkeys(wanted, tmp_path / "converted")
    params = start.parameters(stage("stage1", **init), tmp_path)
    same({part: params[part] for part in wanted}, wanted)


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
            start._adapter("lora/mmdit", plan.config.init.lora, plan)
        return
    found = flatten_dict(start._adapter("lora/mmdit", plan.config.init.lora, plan), sep="/")
    assert found.keys() == flat.keys()
    for name, leaf in flat.items():
        scale = 0.5 / plan.model.config.lora_scale if name.endswith("lora_b") else 1.0
        np.testing.assert_allclose(found[name], leaf * scale, rtol=1e-6, err_msg=name)


def test_a_run_without_origins_ends_before_anything_is_built(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("built something")

    monkeypatch.setattr(Plan, "build", refuse)
    with pytest.raises(SystemExit) as ended:
        train.main([
            "--config", f"{NANO}:stage1", "--workdir", str(tmp_path / "W"), "--config.init.vlm=",
        ])  # fmt: skip
    assert ended.value.code == 2 and not (tmp_path / "W").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "--config.init.vlm=fresh to draw it at random" in line


def test_every_part_is_told_with_its_origin_size_dtype_and_fate(tmp_path):
    random_parts(tmp_path)
    plan = stage("stage1", vlm=tmp_path / "vlm")
    plan = dataclasses.replace(plan, frozen=jax.tree.map(as_bfloat16, plan.frozen))
    words = dict.fromkeys(plan.stage.parts, "fresh") | {"vlm": str(tmp_path / "vlm")}
    lines = list(start.describe(plan, words))
    assert [line.split()[0] for line in lines] == list(plan.stage.parts)
    assert len({line.index(words[line.split()[0]]) for line in lines}) == 1  # aligned
    counts = {}
    for line in lines:
        part, count, _, dtype, fate, where = line.split()
        counts[part] = int(count.replace(",", ""))
        frozen = part in ("vlm", "vae")
        assert (dtype, fate) == (("bfloat16", "frozen") if frozen else ("float32", "trained"))
        assert where == words[part]
    leaves = jax.tree.leaves(plan.everything)
    assert sum(counts.values()) == sum(leaf.size for leaf in leaves)
    assert counts["queries"] == 4 * 32 and counts["lora/vlm"] > 0


def as_bfloat16(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, jax.numpy.bfloat16, sharding=leaf.sharding)


def test_a_part_that_is_trained_in_part_says_so():
    config = config_lib.load(f"{NANO}:stage2")
    config.rules = ((r"mmdit/img_in/.*", "freeze"), *config.rules)
    config.sharding_limit = 1.0
    plan = Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]))
    (line,) = (line for line in start.describe(plan, dict.fromkeys(plan.stage.parts, "x"))
               if line.startswith("mmdit"))  # fmt: skip
    assert "  in part  " in line


@pytest.mark.parametrize("part", ["vlm", "vae"])
def test_a_leaf_that_an_origin_lacks_is_not_drawn(tmp_path, monkeypatch, part):
    random_parts(tmp_path)
    whole = start._pretrained

    def lacking(name, folder, plan):
        flat = flatten_dict(whole(name, folder, plan), sep="/")
        if name == part:
            del flat[max(flat)]
        return unflatten_dict(flat, sep="/")

    monkeypatch.setattr(start, "_pretrained", lacking)
    init = {"vlm": tmp_path / "vlm", "vae": tmp_path / "vae"}
    words = rf"{part} from {init[part]} lacks {part}/.*and nothing of it is drawn at random"
    with pytest.raises(InputError, match=words):
        start.parameters(stage("stage1", **init), tmp_path)


def test_only_fresh_parts_are_drawn(tmp_path, monkeypatch):
    random_parts(tmp_path)
    drawn, whole = set(), start._fresh

    def noted(plan, parts):
        drawn.update(parts)
        return whole(plan, parts)

    monkeypatch.setattr(start, "_fresh", noted)
    start.parameters(stage("stage1", vlm=tmp_path / "vlm"), tmp_path)
    assert drawn == {"vae", "queries", "connector", "mmdit", "lora/vlm"}


@pytest.mark.parametrize(
    "names, words",
    [
        ("a", "lora/mmdit from style lacks lora/mmdit/b .1 in all., and nothing of it is drawn"),
        ("abc", "lora/mmdit from style has besides lora/mmdit/c .1 in all."),
    ],
)
def test_a_lora_file_that_adapts_something_else_names_the_field(names, words):
    leaf = np.zeros(2, np.float32)
    target = {"lora": {"mmdit": dict.fromkeys("ab", jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))}}
    flat = {f"lora/mmdit/{name}": leaf for name in names}
    with pytest.raises(InputError, match=f"{words}.*set lora.pattern to what it adapts"):
        start._in_shardings(flat, target, {"vlm": "fresh", "lora/mmdit": "style"})
