"""Public weights -> checked folders: complete, exact, in the published form; slices by device."""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qk_jax import convert as command
from qk_jax import load_mmdit, load_vae, load_vlm, sharding
from qk_jax.base import files, hub, trees
from qk_jax.base.errors import InputError
from qk_jax.bench import conversion
from qk_jax.weights import from_pytorch, hub_configs, leaves, safetensors
from qk_jax.weights.read import OLD, import_model, open_part
from qk_jax.weights.write import export_lora, export_model
from tests.weights import nano

PARTS = {"vlm": "vlm", "mmdit": "mmdit", "vae": "qwen_vae"}
FOLDERS = {"vlm": "text_encoder", "mmdit": "transformer", "vae": "vae"}


def write(part, folder, dtype=None):
    """The folder of a small random model; its parameters."""
    kind = nano.KINDS[PARTS[part]]
    params = nano.random_tree(kind.shapes)
    kind.write(params, folder, dtype)
    return params


def convert(tmp_path, *words):
    """Runs from-pytorch from a to b; folder b."""
    command.main(
        ["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *words]
    )
    return tmp_path / "b"


def refused(tmp_path, capsys, *words):
    """The message of a from-pytorch that ends with one line and leaves nothing."""
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path, *words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert not (tmp_path / "b").exists()
    return error


@pytest.mark.parametrize("part", PARTS)
def test_a_model_becomes_the_same_model(tmp_path, part):
    params = write(part, tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/model.safetensors.index.json.old").write_text("{}")
    out = convert(tmp_path)
    nano.assert_same(import_model(part, out)[1], params)
    assert conversion.differing(tmp_path / "a", out) == []
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    (weights,) = out.glob("*.safetensors*")
    assert weights.read_bytes() == (tmp_path / "a" / weights.name).read_bytes()


def test_a_pipeline_becomes_the_same_pipeline(tmp_path):
    for part, folder in FOLDERS.items():
        write(part, tmp_path / "a" / folder)
    others = ("model_index.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json")
    for name in others:
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text('{"_class_name": "QwenImagePipeline"}')
    out = convert(tmp_path)
    for folder in FOLDERS.values():
        assert conversion.differing(tmp_path / "a" / folder, out / folder) == []
    for name in others:
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


CLASSES = {
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
}


def pipeline(folder, **more):
    """A pipeline of small random models; their parameters."""
    params = {part: write(part, folder / name) for part, name in FOLDERS.items()}
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    files.write_json(folder / hub.INDEX, {"_class_name": "QwenImagePipeline", **CLASSES, **more})
    return params


def test_an_imported_pipeline_is_read_part_by_part(tmp_path):
    wanted = pipeline(tmp_path / "a", image_encoder=[None, None], is_distilled=False)
    out = convert(tmp_path)
    lm_head = wanted["vlm"].pop("lm_head")
    for part, load in (("vlm", load_vlm), ("mmdit", load_mmdit), ("vae", load_vae)):
        nano.assert_same(load(out).params, wanted[part])
    wanted["vlm"]["lm_head"] = lm_head
    for part in PARTS:
        found = open_part(part, hub.component_folder(str(out), part))
        nano.assert_same(trees.unflatten(found.flat), wanted[part])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"_class_name": ["pipeline", "QueryKontextPipeline"], "kontext": ["kontext", "Kontext"]},
         "is an export of to-pytorch, whose queries and connector"),
        ({"_class_name": "QueryKontextPipeline"}, "is an export of to-pytorch"),
        ({"controlnet": ["diffusers", "QwenImageControlNetModel"]}, "has the part controlnet"),
        ({"processor": ["transformers", "Qwen2VLProcessor"]}, "lacks processor/"),
    ],
)  # fmt: skip
def test_a_pipeline_that_would_lose_a_part_is_refused(tmp_path, capsys, more, message):
    pipeline(tmp_path / "a", **more)
    assert message in refused(tmp_path, capsys)


def rewrite(folder, change):
    """Every tensor of a folder as `change(name, array)` gives it; None takes it away."""
    source = safetensors.TensorFolder(folder)
    (file,) = folder.glob("*.safetensors")
    changed = {name: change(name, source.read(name)) for name in source.shapes}
    more = {name: array for name, array in changed.items() if array is not None}
    safetensors.write_tensors(folder, file.name.removesuffix(".safetensors"), more)


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        (("bfloat16", "float32"), "float32"),
        (("float32", "bfloat16"), "float32"),
        (("bfloat16", "float16"), "float32"),
        (("bfloat16", "bfloat16"), "bfloat16"),
    ],
)
def test_a_stack_has_the_widest_dtype_of_its_layers(tmp_path, kinds, wanted):
    """Layer by layer the values are those of the file, after an import and after an export."""
    for part, stem in (("mmdit", "transformer_blocks."), ("vlm", "model.layers.")):
        folder, out = tmp_path / part, tmp_path / f"{part}_out"
        write(part, folder)
        dtypes = {f"{stem}{layer}.": jnp.dtype(kind) for layer, kind in enumerate(kinds)}
        narrow = jnp.dtype(jnp.bfloat16)

        def change(name, array, dtypes=dtypes, narrow=narrow):
            return array.astype(next((v for k, v in dtypes.items() if name.startswith(k)), narrow))

        rewrite(folder, change)
        leaves_of = nano.flat(import_model(part, folder)[1])
        stack = "language_model/layers/mlp/up_proj/kernel" if part == "vlm" else (
            "transformer_blocks/attn/to_q/kernel"
        )  # fmt: skip
        assert leaves_of[stack].dtype == jnp.dtype(wanted)
        assert {leaf.dtype for path, leaf in leaves_of.items() if "layers" not in path
                and "transformer_blocks" not in path} == {narrow}  # fmt: skip
        from_pytorch.convert(str(folder), str(out))
        source, copy = safetensors.TensorFolder(folder), safetensors.TensorFolder(out)
        for name in source.shapes:
            given, got = source.read(name), copy.read(name)
            np.testing.assert_array_equal(got.astype(np.float64), given.astype(np.float64), name)
        if part == "vlm":
            assert files.read_json(out / "config.json")["dtype"] == wanted


@pytest.mark.parametrize("part", PARTS)
def test_every_leaf_must_be_there(tmp_path, capsys, part):
    """One tensor less, of each kind of leaf in turn, and the import names it."""
    write(part, tmp_path / "a")
    table = nano.KINDS[PARTS[part]].table
    names = [n for n in safetensors.TensorFolder(tmp_path / "a").shapes if table.locate(n)]
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    for name in (names[0], names[len(names) // 2], names[-1]):
        rewrite(tmp_path / "a", lambda n, array, gone=name: None if n == gone else array)
        for load in (lambda: open_part(part, tmp_path / "a"),
                     lambda: import_model(part, tmp_path / "a")):  # fmt: skip
            with pytest.raises(InputError, match=f"lacks {re.escape(name)}"):
                load()
        assert f"lacks {name}" in refused(tmp_path, capsys)
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(tmp_path / "whole", tmp_path / "a")


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "bool", "floats", 3])
def test_parameters_are_floats(tmp_path, dtype):
    write("vae", tmp_path / "a")
    for read in (
        lambda: load_vae(tmp_path / "a", dtype=dtype),
        lambda: import_model("vae", tmp_path / "a", dtype),
        lambda: from_pytorch.convert(str(tmp_path / "a"), str(tmp_path / "b"), dtype=dtype),
    ):
        with pytest.raises(InputError, match=f"dtype is {dtype!r}; parameters are float32"):
            read()
    assert not (tmp_path / "b").exists()


def test_other_names_become_the_hubs(tmp_path):
    """transformers 5 calls the towers `model.language_model` and `model.visual`."""
    params = write("vlm", tmp_path / "a")
    names = {"model.": "model.language_model.", "visual.": "model.visual."}
    file = tmp_path / "a/model.safetensors"
    renamed = {}
    for name, array in load_file(file).items():
        old = next((old for old in names if name.startswith(old)), "")
        renamed[names.get(old, "") + name.removeprefix(old)] = array
    save_file(renamed, file, {"format": "pt"})
    out = convert(tmp_path)
    nano.assert_same(import_model("vlm", out)[1], params)
    nano.load(nano.KINDS["vlm"], out)
    assert "visual.patch_embed.proj.weight" in load_file(out / "model.safetensors")


def test_shards_with_an_index_become_one_file(tmp_path):
    kind = nano.KINDS["mmdit"]
    params = nano.random_tree(kind.shapes)
    kind.write(params, tmp_path / "a", max_shard_bytes=60_000)
    out = convert(tmp_path)
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    nano.assert_same(import_model("mmdit", out)[1], params)


def test_video_layers_of_the_autoencoder_survive(tmp_path):
    """Single pictures do not use them, but who gets the folder back may."""
    values = hub_configs.to_hf(nano.QWEN_VAE)
    model = nano.KINDS["qwen_vae"].torch_class.from_config(values)
    model.save_pretrained(tmp_path / "a")
    assert conversion.differing(tmp_path / "a", convert(tmp_path)) == []


def test_dtype_is_that_of_the_command(tmp_path):
    params = write("vlm", tmp_path / "a")
    _, found = import_model("vlm", convert(tmp_path, "--dtype", "bfloat16"))
    nano.assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    assert files.read_json(tmp_path / "b/config.json")["dtype"] == "bfloat16"


def test_each_device_reads_its_share_only(tmp_path, monkeypatch):
    params = write("mmdit", tmp_path / "a")
    read, sizes = safetensors.TensorFolder.read, []

    def counted(self, name, index=()):
        array = read(self, name, index)
        sizes.append(array.size)
        return array

    monkeypatch.setattr(safetensors.TensorFolder, "read", counted)
    found = open_part("mmdit", tmp_path / "a")
    path = "transformer_blocks/img_mlp/net_0_proj/kernel"
    mesh = sharding.build_mesh({"fsdp": 4, "tensor": 2})
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    array = leaves.shard(found.flat[path], spec)
    share = found.flat[path].size // 8
    assert sum(sizes) == found.flat[path].size
    assert max(sizes) == share // found.flat[path].shape[0]
    np.testing.assert_array_equal(array, nano.flat(params)[path])
    assert {shard.data.size for shard in array.addressable_shards} == {share}


@pytest.mark.parametrize("part", PARTS)
def test_a_mesh_of_eight_gives_the_same_model(tmp_path, part):
    write(part, tmp_path / "a")
    one = import_model(part, tmp_path / "a")[1]
    mesh = sharding.build_mesh({"fsdp": 8} if part != "vae" else {"data": 8})
    eight = import_model(part, tmp_path / "a", mesh=mesh)[1]
    nano.assert_same(one, eight)
    if part != "vae":
        leaf = next(x for x in jax.tree.leaves(eight) if x.ndim == 3)
        assert leaf.addressable_shards[0].data.size == leaf.size // 8
    export_model(eight, nano.KINDS[PARTS[part]].config, tmp_path / "b")
    assert conversion.differing(tmp_path / "a", tmp_path / "b") == []


def test_an_extra_tensor_must_be_allowed(tmp_path, capsys):
    write("mmdit", tmp_path / "a")
    source = safetensors.TensorFolder(tmp_path / "a")
    more = {name: source.read(name) for name in source.shapes} | {"extra.bias": np.ones(3)}
    safetensors.write_tensors(tmp_path / "a", "diffusion_pytorch_model", more)
    assert "extra.bias" in refused(tmp_path, capsys)
    convert(tmp_path, "--ignore", r"extra\..*")
    assert "left out: extra.bias" in capsys.readouterr().out


def test_a_lora_file_gets_the_names_of_diffusers(tmp_path, capsys):
    write("mmdit", tmp_path / "base")
    rank, path = 3, "transformer_blocks/attn/to_q"
    stack, inner, outer = nano.KINDS["mmdit"].shapes[f"{path}/kernel"]
    adapter = nano.random_tree(
        {f"{path}/lora_a": (stack, inner, rank), f"{path}/lora_b": (stack, rank, outer)}
    )
    export_lora(adapter, 2.0, tmp_path / "wanted")
    file = "pytorch_lora_weights.safetensors"
    kohya = {}
    for name, array in load_file(tmp_path / "wanted" / file).items():
        module, half, _ = name.removeprefix("transformer.").rsplit(".", 2)
        module = f"lora_unet_{module.replace('.', '_')}"
        kohya[f"{module}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = array
        kohya[f"{module}.alpha"] = np.array(rank, np.float32)
    (tmp_path / "a").mkdir()
    save_file(kohya, tmp_path / "a/style.safetensors")
    base = "--base", str(tmp_path / "base")
    assert "drop it" in refused(tmp_path, capsys, *base, "--ignore", "lora.*")
    out = convert(tmp_path, *base)
    assert (out / file).read_bytes() == (tmp_path / "wanted" / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        (lambda c: c | {"guidance_embeds": True}, "guidance_embeds"),
        (lambda c: c | {"num_layers": 3}, "lacks"),
        (lambda c: c | {"num_layers": 10**5}, "100000 layers"),
        (lambda c: c | {"joint_attention_dim": 32}, "shape"),
    ],
)
def test_another_config_is_refused_by_name(tmp_path, capsys, change, message):
    write("mmdit", tmp_path / "a")
    file = tmp_path / "a/config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert message in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "fsdp=8"], "--mesh"),
        (["--ignore", "("], "no regular expression"),
        (["--ignore", "extra"], "is the whole name of no tensor, such as "),
        (["--base", "."], "is for a LoRA"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, words, message):
    write("vae", tmp_path / "a")
    assert message in refused(tmp_path, capsys, *words)


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files acts as the disk: the first block beyond it fails."""
    write("mmdit", tmp_path / "a")
    words = ["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    program = (
        "import resource, sys\n"
        "from qk_jax import convert\n"
        "from qk_jax.weights import from_pytorch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "convert.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_an_older_from_pytorch_names_its_source(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    files.write_json(tmp_path / "a" / OLD, {"format": 1, "source": "owner/name"})
    remedy = "run from-pytorch again on owner/name"
    assert remedy in refused(tmp_path, capsys)
    with pytest.raises(InputError, match=remedy):
        import_model("vae", tmp_path / "a")
    with pytest.raises(SystemExit):
        command.main(["to-pytorch", "--checkpoint", str(tmp_path / "a"), "--out", "b"])
    assert remedy in capsys.readouterr().err


def test_what_is_no_model_is_named(tmp_path, capsys):
    write("vae", tmp_path / "vae")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"pickle")
    for name, words in (("empty", "config.json is missing"), ("model.bin", "--base")):
        (tmp_path / name).rename(tmp_path / "a")
        assert words in refused(tmp_path, capsys)
        (tmp_path / "a").rename(tmp_path / name)
    with pytest.raises(InputError, match="is the model itself"):
        from_pytorch.convert(str(tmp_path / "vae"), str(tmp_path / "vae"))
    with pytest.raises(SystemExit):
        command.main(["to-pytorch", "--checkpoint", str(tmp_path / "vae"), "--out", "b"])
    error = capsys.readouterr().err
    assert "holds no checkpoints/" in error and error.count("\n") == 1


def test_bench_measures_a_small_model(capsys, tmp_path):
    conversion.run("tiny", str(tmp_path))
    out = capsys.readouterr().out
    assert "bit-equal" in out and "from-pytorch" in out
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_shards_are_powers_of_1000():
    assert [command.size(text) for text in ("5GB", "500MB", "1.5 kb")] == [
        5 * 10**9,
        5 * 10**8,
        1500,
    ]
    with pytest.raises(InputError, match="5GiB"):
        command.size("5GiB")
