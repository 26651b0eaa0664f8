"""Public weights -> imports: complete, exact, sliced by device, and back again."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from qk_jax import convert as command
from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench import conversion
from qk_jax.weights import imported, leaves, safetensors, tables
from qk_jax.weights import read as read_lib
from qk_jax.weights.read import import_mmdit, import_vlm, mmdit_shapes, open_part, read
from qk_jax.weights.write import export_lora, specs, spill
from tests.weights import nano

PARTS = {"vlm": "vlm", "mmdit": "mmdit", "vae": "qwen_vae"}


def write(part, folder, dtype=None):
    """The folder of a small random model; its parameters."""
    kind = nano.KINDS[PARTS[part]]
    params = nano.random_tree(kind.shapes(kind.config))
    kind.write(params, kind.config, folder, dtype)
    return params


def pipeline(folder):
    """A small pipeline folder of diffusers; {part: parameters}."""
    places = {"vlm": "text_encoder", "mmdit": "transformer", "vae": "vae"}
    params = {part: write(part, folder / place) for part, place in places.items()}
    (folder / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    return params


@pytest.mark.parametrize("part", PARTS)
def test_model_goes_in_and_comes_back(tmp_path, part):
    params = write(part, tmp_path / "a")
    out = tmp_path / "imported"
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(out)])
    found = open_part(part, out)
    nano.assert_same(read(part, found), params)
    command.main(["to-pytorch", "--checkpoint", str(out), "--out", str(tmp_path / "b")])
    assert conversion.differing(tmp_path / "a", tmp_path / "b") == []
    assert json.loads((tmp_path / "b/config.json").read_text()) == json.loads(
        (tmp_path / "a/config.json").read_text()
    )


def test_pipeline_goes_in_and_comes_back(tmp_path):
    params = pipeline(tmp_path / "a")
    out = tmp_path / "imported"
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(out)])
    for part, tree in params.items():
        nano.assert_same(read(part, open_part(part, out)), tree)
    command.main(["to-pytorch", "--checkpoint", str(out), "--out", str(tmp_path / "b")])
    for place in ("text_encoder", "transformer", "vae"):
        assert conversion.differing(tmp_path / "a" / place, tmp_path / "b" / place) == []
    for name in ("model_index.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_video_layers_of_the_autoencoder_survive(tmp_path):
    """Single pictures do not use them, but who gets the folder back may."""
    model = nano.KINDS["qwen_vae"].torch_class.from_config(nano.QWEN_VAE.to_hf())
    model.save_pretrained(tmp_path / "a")
    out = tmp_path / "imported"
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(out)])
    command.main(["to-pytorch", "--checkpoint", str(out), "--out", str(tmp_path / "b")])
    assert conversion.differing(tmp_path / "a", tmp_path / "b") == []


def test_orbax_alone_reads_an_import(tmp_path):
    import orbax.checkpoint as ocp

    params = write("mmdit", tmp_path / "a")
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    nano.assert_same(reader.restore(tmp_path / "b" / imported.PARAMS)["mmdit"], params)


def test_dtype_is_that_of_the_command(tmp_path):
    params = write("vlm", tmp_path / "a")
    words = ["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--dtype", "bfloat16"]
    command.main(["from-pytorch", *words])
    _, found = import_vlm(tmp_path / "b")
    nano.assert_same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_each_device_reads_its_share_only(tmp_path, monkeypatch):
    params = write("mmdit", tmp_path / "a")
    read, sizes = safetensors.TensorFolder.read, []

    def counted(self, name, index=None):
        array = read(self, name, index)
        sizes.append(array.size)
        return array

    monkeypatch.setattr(safetensors.TensorFolder, "read", counted)
    found = open_part("mmdit", tmp_path / "a")
    path = "transformer_blocks/img_mlp/net_0_proj/kernel"
    mesh = sharding.build_mesh({"fsdp": 4, "tensor": 2})
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    array = leaves.place(found.flat[path], spec)
    share = found.flat[path].size // 8
    assert sum(sizes) == found.flat[path].size
    assert max(sizes) == share // found.flat[path].shape[0]
    np.testing.assert_array_equal(array, nano.flat(params)[path])
    assert {shard.data.size for shard in array.addressable_shards} == {share}


@pytest.mark.parametrize("part", PARTS)
def test_mesh_of_eight_gives_the_same_model(tmp_path, part):
    write(part, tmp_path / "a")
    one = getattr(read_lib, f"import_{part}")(tmp_path / "a")[1]
    mesh = sharding.build_mesh({"fsdp": 8} if part != "vae" else {"data": 8})
    eight = getattr(read_lib, f"import_{part}")(tmp_path / "a", mesh=mesh)[1]
    nano.assert_same(one, eight)
    if part != "vae":
        leaf = next(x for x in jax.tree.leaves(eight) if x.ndim == 3)
        assert leaf.addressable_shards[0].data.size == leaf.size // 8


def test_mesh_of_the_command_writes_the_same(tmp_path):
    params = write("mmdit", tmp_path / "a")
    words = ["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--mesh", "fsdp=8"]
    command.main(["from-pytorch", *words])
    nano.assert_same(import_mmdit(tmp_path / "b")[1], params)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_import_is_found(tmp_path, damage):
    write("mmdit", tmp_path / "a")
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    leaf = "mmdit.transformer_blocks.attn.to_q.kernel"
    file = tmp_path / "b" / imported.PARAMS / leaf / "c/1/0/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data if damage == "flip" else data[:50])
    if damage == "gone":
        file.unlink()
    with pytest.raises(InputError, match="is damaged"):
        import_mmdit(tmp_path / "b")


def test_zeros_are_not_mistaken_for_missing(tmp_path):
    kind = nano.KINDS["mmdit"]
    zeros = jax.tree.map(np.zeros_like, nano.random_tree(kind.shapes(kind.config)))
    kind.write(zeros, kind.config, tmp_path / "a")
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    nano.assert_same(import_mmdit(tmp_path / "b")[1], zeros)


def test_extra_tensor_must_be_allowed(tmp_path, capsys):
    write("mmdit", tmp_path / "a")
    tensors = safetensors.TensorFolder(tmp_path / "a")
    more = {name: tensors.read(name) for name in tensors.shapes} | {"extra.bias": np.ones(3)}
    safetensors.write_tensors(tmp_path / "a", "diffusion_pytorch_model", more.items())
    words = ["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2 and "extra.bias" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    command.main([*words, "--ignore", r"extra\..*"])
    assert "left out: extra.bias" in capsys.readouterr().out


def test_lora_file_becomes_an_adapter(tmp_path):
    write("mmdit", tmp_path / "base")
    rank, shape = 3, mmdit_shapes(nano.MMDIT)
    path = "transformer_blocks/attn/to_q"
    layers, inner, outer = shape[f"{path}/kernel"]
    adapter = nano.random_tree(
        {f"{path}/lora_a": (layers, inner, rank), f"{path}/lora_b": (layers, rank, outer)}
    )
    export_lora(adapter, 2.0, tables.mmdit(), tmp_path / "lora")
    command.main(
        ["from-pytorch", "--model", str(tmp_path / "lora"), "--base", str(tmp_path / "base"),
         "--out", str(tmp_path / "b")]
    )  # fmt: skip
    config, flat = imported.read(tmp_path / "b", "lora")
    assert config == {"rank": rank}
    found = unflatten_dict({name: np.asarray(leaf) for name, leaf in flat.items()}, sep="/")
    wanted = dict(nano.flat(adapter))
    wanted[f"{path}/lora_b"] = wanted[f"{path}/lora_b"] * 2
    nano.assert_same(found, unflatten_dict(wanted, sep="/"))
    command.main(["to-pytorch", "--checkpoint", str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    assert conversion.differing(tmp_path / "lora", tmp_path / "c") == []


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
def test_other_config_is_refused_by_name(tmp_path, capsys, change, message):
    write("mmdit", tmp_path / "a")
    file = tmp_path / "a/config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(SystemExit) as stopped:
        command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("words", [["--mesh", "fsdp"], ["--mesh", "speed=8"], ["--ignore", "("]])
def test_bad_arguments_are_one_line(tmp_path, capsys, words):
    write("vae", tmp_path / "a")
    with pytest.raises(SystemExit) as stopped:
        command.main(
            ["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), *words]
        )
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: the first layer beyond it fails."""
    write("mmdit", tmp_path / "a")
    words = ["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    program = (
        "import resource, sys\n"
        "from qk_jax.convert import __main__ as command, from_pytorch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "command.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_no_model_is_named(tmp_path, capsys):
    write("vae", tmp_path / "a")
    command.main(["from-pytorch", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"pickle")
    for name, words in (
        ("b", "is an import already"), ("empty", "config.json is missing"), ("model.bin", "--base"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            command.main(
                ["from-pytorch", "--model", str(tmp_path / name), "--out", str(tmp_path / "c")]
            )
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_bench_measures_a_small_model(capsys, tmp_path):
    conversion.run("tiny", str(tmp_path))
    out = capsys.readouterr().out
    assert "bit-equal" in out and "from-pytorch" in out
    assert list(tmp_path.iterdir()) == []


def test_tied_and_plain_presets_stream_alike():
    """What the header promises is what `spill` gives."""
    for name, kind in nano.KINDS.items():
        if name == "qwen_vae":
            continue
        shapes = kind.shapes(kind.config)
        what = kind.table, nano.random_tree(shapes), shapes, jnp.bfloat16
        promised = specs(*what)
        given = {name: (array.shape, array.dtype) for name, array in spill(*what)}
        assert given == {n: (spec.shape, spec.dtype) for n, spec in promised.items()}
        assert dataclasses.is_dataclass(kind.config)
