"""Folders of safetensors: what is refused, and that random damage never ends in anything else."""

import json
import os
import pickle
import stat

import numpy as np
import pytest

from qk_jax.convert import safetensors_io, torch_import
from qk_jax.errors import InputError
from tests.convert import nano

INDEX = "diffusion_pytorch_model.safetensors.index.json"
KIND = nano.KINDS["mmdit"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a sharded model folder."""
    folder = tmp_path_factory.mktemp("model")
    params = nano.random_tree(KIND.shapes(KIND.config))
    KIND.write(params, KIND.config, folder, max_shard_bytes=60_000)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, message):
    with pytest.raises(InputError, match=message):
        KIND.read(folder)


def test_a_missing_shard_is_named(folder):
    name = shard(folder).name
    shard(folder).unlink()
    refused(folder, f"the shard .*{name} is missing")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(folder, size):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[:size])
    refused(folder, f"{shard(folder).name} is truncated or no safetensors file")


def test_a_header_that_claims_more_than_the_file_is_refused(folder):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(b"\xff" * 7 + b"\x00" + content[8:])
    refused(folder, "is truncated or no safetensors file")


@pytest.mark.parametrize(
    "place",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "a\\b", "a\0b"],
)
def test_an_index_stays_in_its_folder(folder, place):
    edit_index(folder, lambda places: places.update({"img_in.bias": place}))
    refused(folder, "which is not a file beside it")


def test_an_index_may_not_promise_what_its_shard_lacks(folder):
    first = shard(folder).name
    edit_index(folder, lambda places: places.update({"ghost.weight": first}))
    refused(folder, "lacks ghost.weight, which its index places there")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_index_is_named(folder, content):
    (folder / INDEX).write_bytes(content)
    refused(folder, INDEX)


def test_pickles_are_refused_with_the_reason(tmp_path, folder):
    for file in folder.glob("*safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "pytorch_model.bin is a pickle, which can run any code")
    with pytest.raises(InputError, match="is a pickle"):
        safetensors_io.TensorFolder(folder / "pytorch_model.bin")


def test_an_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(InputError, match="holds no .safetensors file"):
        safetensors_io.TensorFolder(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        safetensors_io.TensorFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json is missing"):
        KIND.read(tmp_path)


def test_types_and_values_that_are_no_weights_are_refused(tmp_path):
    good = np.ones(3, np.float32)
    for bad, message in (
        (np.ones(3, np.int32), "unsupported type I32"),
        (good * np.inf, "not finite"),
    ):
        safetensors_io.write_tensors(tmp_path, "model", [("good", good), ("bad", bad)])
        with pytest.raises(InputError, match=message):
            source = safetensors_io.TensorFolder(tmp_path)
            source.read("bad")


def damage(rng, folder):
    """One random corruption of one file."""
    victims = sorted(folder.iterdir())
    victim = victims[rng.integers(len(victims))]
    content = bytearray(victim.read_bytes())
    kind = rng.integers(5)
    # Flips beyond the header of a shard only change values, which nothing can know.
    header = 8 + int.from_bytes(content[:8], "little") if victim.suffix == ".safetensors" else None
    end = min(header or len(content), len(content))
    if kind == 0:
        victim.unlink()
        return
    if kind == 1:
        del content[rng.integers(len(content)) :]
    elif kind == 2:
        content[rng.integers(end)] ^= 1 << rng.integers(8)
    elif kind == 3:
        start = rng.integers(end)
        content[start : start + 9] = rng.bytes(9)
    else:
        start = rng.integers(end)
        del content[start : start + rng.integers(1, 30)]
    victim.write_bytes(content)


def test_random_damage_is_an_input_error_or_harmless(files, folder):
    truth = nano.random_tree(KIND.shapes(KIND.config))
    # Our config reader is tested with its model; here a good config must meet damaged weights.
    table, shapes = KIND.table, KIND.shapes(KIND.config)
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(120):
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").unlink()
        damage(rng, folder)
        try:
            params = torch_import.fill(table, safetensors_io.TensorFolder(folder), shapes)
            nano.assert_same(params, truth)
        except InputError as error:
            refusals += 1
            assert str(folder) in str(error)
    assert refusals > 80


def test_a_failed_write_leaves_nothing_under_the_final_name(tmp_path):
    def tensors():
        yield "a", np.ones(8, np.float32)
        yield "b", np.ones(8, np.float32)
        raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        safetensors_io.write_tensors(tmp_path, "model", tensors(), max_shard_bytes=32)
    assert not list(tmp_path.iterdir())


def test_a_full_or_closed_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    tensors = [("a", np.ones(2, np.float32))]
    with pytest.raises(InputError, match="cannot be written"):
        safetensors_io.write_tensors(tmp_path / "file" / "model", "model", tensors)
    with pytest.raises(InputError, match="cannot be written"):
        safetensors_io.write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(InputError, match="cannot be written"):
        with safetensors_io.fresh_folder(tmp_path / "file" / "out", "marker"):
            pass


def test_a_fresh_folder_replaces_only_its_own_kind(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with safetensors_io.fresh_folder(out, "marker") as part:
            (part / "marker").write_text(content)
            (part / content).write_text("")
    assert sorted(os.listdir(out)) == ["marker", "second"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    with pytest.raises(RuntimeError):
        with safetensors_io.fresh_folder(out, "marker") as part:
            raise RuntimeError
    assert (out / "marker").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is no earlier export"):
        with safetensors_io.fresh_folder(tmp_path / "theirs", "marker"):
            pass
