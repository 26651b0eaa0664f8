"""Folders of safetensors: what is read and written, and every kind of bad input by name."""

import json
import os
import pickle
import resource
import stat
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.weights import safetensors
from tests.weights import nano

INDEX = "diffusion_pytorch_model.safetensors.index.json"
KIND = nano.KINDS["mmdit"]


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The bytes of a sharded model folder."""
    folder = tmp_path_factory.mktemp("model")
    params = nano.random_tree(KIND.shapes)
    KIND.write(params, folder, max_shard_bytes=60_000)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(contents, tmp_path):
    for name, content in contents.items():
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
    refused(folder, "which is no file of its folder")


def test_an_index_may_not_promise_what_its_shard_lacks(folder):
    first = shard(folder).name
    edit_index(folder, lambda places: places.update({"ghost.weight": first}))
    refused(folder, "lacks ghost.weight, which the index has in it")


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
        safetensors.TensorFolder(folder / "pytorch_model.bin")


def test_an_empty_folder_and_no_folder(tmp_path):
    with pytest.raises(InputError, match="holds no .safetensors file"):
        safetensors.TensorFolder(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        safetensors.TensorFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json is missing"):
        KIND.read(tmp_path)


def write_raw(file, header, data=b"", size=None):
    """A .safetensors file with any header: text, or what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    file.write_bytes(size.to_bytes(8, "little") + text + data)


def entry(first=0, last=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry()}, None),
        ({"a": entry(), "b": entry(8, 8, (0,)), "__metadata__": {"k": "v"}}, None),
        ({"a": entry(0, 4, (2,))}, "a of 8 bytes .* has the offsets"),
        ({"a": entry(shape=(2, 2))}, "a of 16 bytes"),
        ({"a": entry(dtype="F64")}, "a of 16 bytes"),
        ({"a": entry(dtype="X7")}, "the type 'X7'"),
        ({"a": entry(dtype=["F32"])}, "the type"),
        ({"a": entry(dtype="I32")}, "unsupported type I32"),
        ({"a": entry(), "b": entry()}, "b begins at byte 0, expected 8"),
        ({"a": entry(0, 4, (1,)), "b": entry(3, 7, (1,))}, "b begins at byte 3, expected 4"),
        ({"a": entry(4, 8, (1,))}, "a begins at byte 4, expected 0"),
        ({"a": entry(0, 4, (1,))}, "tensors of 4 bytes"),
        ({"a": entry(0, 16, (4,))}, "tensors of 16 bytes"),
        ({"a": entry(8, 0)}, "has the offsets"),
        ({"a": entry(-8, 0)}, "expected sizes"),
        ({"a": entry(shape=(-2,))}, "expected sizes"),
        ({"a": entry(shape=(2.0,))}, "expected sizes"),
        ({"a": entry(shape=(True, 2))}, "expected sizes"),
        ({"a": entry() | {"data_offsets": [0, 4, 8]}}, "has the offsets"),
        ({"a": entry() | {"more": 1}}, "no entry of dtype"),
        ({"a": {"dtype": "F32"}}, "no entry of dtype"),
        ({"a": [1]}, "no entry of dtype"),
        ({"a": entry(), "__metadata__": [1]}, "metadata that is no text"),
        ({"a": entry(), "__metadata__": {"k": 1}}, "metadata that is no text"),
        ({"a": entry(), "b": entry(8, 8, (0, 2**70))}, None),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe{}", "decode"),
        (b"", "Expecting value"),
    ],
)
def test_a_header_must_account_for_every_byte(tmp_path, header, message):
    file = tmp_path / "model.safetensors"
    write_raw(file, header, b"\0" * 8)
    if message is None:
        assert not safetensors.TensorFolder(file).read("a").any()
        return
    with pytest.raises(InputError, match=message) as caught:
        safetensors.TensorFolder(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("size", [100, 2**63, 2**64 - 1])
def test_a_header_beyond_the_file_is_not_read(tmp_path, size):
    write_raw(tmp_path / "model.safetensors", {"a": entry()}, b"\0" * 8, size)
    with pytest.raises(InputError, match="is truncated or no safetensors file"):
        safetensors.TensorFolder(tmp_path)


def test_impossible_shapes_and_files_that_shrink_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    write_raw(file, {"a": entry(0, 0, (0, 2**70)), "b": entry()}, b"\0" * 8)
    source = safetensors.TensorFolder(file)
    with pytest.raises(InputError, match="model.safetensors"):
        source.read("a")
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="ends within a tensor"):
        source.read("b")
    file.unlink()
    with pytest.raises(InputError, match="No such file"):
        source.read("b")


def test_types_that_are_no_weights_are_refused_on_writing(tmp_path):
    tensors = {"good": np.ones(3, np.float32), "bad": np.ones(3, np.int32)}
    with pytest.raises(InputError, match="tensor bad is int32"):
        safetensors.write_tensors(tmp_path, "model", tensors)
    assert not list(tmp_path.iterdir())


FLOATS = [np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [0, 777_777, -1])
def test_values_that_are_not_finite_are_refused(tmp_path, dtype, bad, place):
    largest = ml_dtypes.finfo(dtype).max
    array = np.full(1_000_003, -largest, dtype)
    array[1] = ml_dtypes.finfo(dtype).smallest_subnormal
    safetensors.write_tensors(tmp_path, "model", {"a": array})
    np.testing.assert_array_equal(safetensors.TensorFolder(tmp_path).read("a"), array)
    array[place] = bad
    safetensors.write_tensors(tmp_path, "model", {"a": array})
    with pytest.raises(InputError, match="tensor a .* not finite"):
        safetensors.TensorFolder(tmp_path).read("a")


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (5, 6), (6, 4, 3), (4, 3, 2, 5)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_part_of_a_tensor(tmp_path, monkeypatch, shape, dtype):
    rng = np.random.default_rng(0)
    array = rng.standard_normal(shape).astype(dtype)
    first = np.zeros(3, dtype)
    safetensors.write_tensors(tmp_path, "model", {"first": first, "a": array})
    source = safetensors.TensorFolder(tmp_path)
    for block in (1, 100, 1 << 20):
        monkeypatch.setattr(safetensors, "BLOCK", max(64, block))
        for _ in range(30):
            ends = [sorted(rng.integers(-1, size + 2, 2)) for size in shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)[: rng.integers(len(shape) + 1)]
            np.testing.assert_array_equal(source.read("a", index), array[index])
    np.testing.assert_array_equal(source.read("a"), array)
    np.testing.assert_array_equal(source.read("a", (slice(None),) * len(shape)), array)


@pytest.mark.parametrize("index", [(slice(0, 4, 2),), (slice(None, None, -1),), (slice(None),) * 3])
def test_an_index_that_is_no_part_is_a_defect(tmp_path, index):
    safetensors.write_tensors(tmp_path, "model", {"a": np.ones((4, 4), np.float32)})
    with pytest.raises(ValueError, match="no unit steps"):
        safetensors.TensorFolder(tmp_path).read("a", index)


def peak_of(function):
    """Bytes that numpy and Python had at once while `function` ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_the_part_that_is_read_and_the_tensor_that_is_written(tmp_path):
    shape, names = (4096, 2048), [f"layers.{i}.weight" for i in range(4)]
    array = np.ones(shape[::-1], np.float32)
    tensors = dict.fromkeys(names, array.T)
    slack = 3 * safetensors.BLOCK

    def write():
        safetensors.write_tensors(tmp_path, "model", tensors, 80_000_000)

    assert peak_of(write) < slack < array.nbytes
    source = safetensors.TensorFolder(tmp_path)
    assert peak_of(lambda: source.read(names[0])) < array.nbytes + slack
    rows, columns = (slice(100, 200),), (slice(None), slice(100, 200))
    assert peak_of(lambda: source.read(names[0], rows)) < slack
    assert peak_of(lambda: source.read(names[0], columns)) < slack


def test_a_snapshot_of_links_is_read(contents, folder, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for number, name in enumerate(contents):
        blob = folder / f"blob{number}"
        (folder / name).rename(blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    config, params = KIND.read(snapshot)
    nano.assert_same(params, nano.random_tree(KIND.shapes))
    assert config == KIND.config
    (snapshot / INDEX).resolve().unlink()
    with pytest.raises(InputError, match="no index that says which"):
        KIND.read(snapshot)


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"{number}.{dtype}": rng.standard_normal((number, 3)).astype(dtype)
        for number in (1, 2, 3, 5)
        for dtype in FLOATS
    } | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float16)}
    safetensors.write_tensors(tmp_path, "model", tensors, 200)
    index = files.read_json(tmp_path / "model.safetensors.index.json")
    assert list(index["weight_map"]) == list(tensors)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    read = {}
    for file in sorted(set(index["weight_map"].values())):
        assert stat.S_IMODE((tmp_path / file).stat().st_mode) == 0o644
        shard = load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 200
        read |= shard
        with safe_open(tmp_path / file, "numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
        start = 8 + int.from_bytes((tmp_path / file).read_bytes()[:8], "little")
        assert start % 64 == 0
    source = safetensors.TensorFolder(tmp_path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.read(name), array)
        np.testing.assert_array_equal(read[name].double().numpy(), array.astype(np.float64))


@pytest.mark.parametrize("made", [np.ones(3, np.float32), np.ones(2, np.float16)])
def test_a_tensor_that_is_not_as_promised_is_a_defect(tmp_path, made):
    tensor = safetensors.Tensor((2,), np.dtype(np.float32), lambda: made)
    with pytest.raises(ValueError, match="tensor a became"):
        safetensors.write_tensors(tmp_path, "model", {"a": tensor})
    assert not list(tmp_path.iterdir())


def test_a_new_write_takes_away_what_the_old_one_left_and_nothing_else(tmp_path):
    tensors = dict.fromkeys("abc", np.ones(8, np.float32))
    others = ["model_ema.safetensors", "model.fp16.safetensors", "mode.safetensors", "model.txt"]
    for name in others:
        (tmp_path / name).write_text("")
    safetensors.write_tensors(tmp_path, "model", tensors, max_shard_bytes=32)
    assert len(list(tmp_path.iterdir())) == len(others) + 4
    safetensors.write_tensors(tmp_path, "model", tensors)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "model.safetensors"])
    safetensors.write_tensors(tmp_path, "model", tensors, max_shard_bytes=64)
    assert safetensors.TensorFolder(tmp_path).shapes == {"a": (8,), "b": (8,), "c": (8,)}


@pytest.mark.parametrize("number", [0, 2])
def test_a_full_disk_is_one_line_and_the_old_files_stay(tmp_path, number):
    old = {"old": np.zeros(3, np.float32)}
    safetensors.write_tensors(tmp_path, "model", old)
    name = f"model-0000{number + 1}-of-00003.safetensors"
    (tmp_path / f".{name}.{os.getpid()}.part").symlink_to("/dev/full")
    tensors = dict.fromkeys("abc", np.ones(8, np.float32))
    with pytest.raises(InputError, match="No space left on device.*free space"):
        safetensors.write_tensors(tmp_path, "model", tensors, max_shard_bytes=32)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert list(safetensors.TensorFolder(tmp_path).shapes) == ["old"]


def test_a_disk_that_fills_up_within_a_tensor(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    array = np.ones((1 << 10, 1 << 10), np.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (array.nbytes // 2, limits[1]))
        with pytest.raises(InputError, match="cannot be written .*File too large"):
            safetensors.write_tensors(tmp_path, "model", {"a": array})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_under_the_final_name(tmp_path):
    def fail():
        raise InputError("stop")

    array = np.ones(8, np.float32)
    tensors = {"a": array, "b": array, "c": safetensors.Tensor(array.shape, array.dtype, fail)}
    with pytest.raises(InputError, match="stop"):
        safetensors.write_tensors(tmp_path, "model", tensors, max_shard_bytes=32)
    assert not list(tmp_path.iterdir())


def test_a_full_or_closed_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    tensors = {"a": np.ones(2, np.float32)}
    with pytest.raises(InputError, match="cannot be written"):
        safetensors.write_tensors(tmp_path / "file" / "model", "model", tensors)
    with pytest.raises(InputError, match="cannot be written"):
        files.write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(InputError, match="cannot be written"):
        with files.fresh_folder(tmp_path / "file" / "out", "marker"):
            pass


def test_a_fresh_folder_replaces_only_its_own_kind(tmp_path):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with files.fresh_folder(out, "marker") as part:
            (part / "marker").write_text(content)
            (part / content).write_text("")
    assert sorted(os.listdir(out)) == ["marker", "second"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    with pytest.raises(RuntimeError):
        with files.fresh_folder(out, "marker") as part:
            raise RuntimeError
    assert (out / "marker").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is no earlier export"):
        with files.fresh_folder(tmp_path / "theirs", "marker"):
            pass
