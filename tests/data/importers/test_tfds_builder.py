"""The builder of TensorFlow data sets: what it makes of records is read back as they were."""

import io
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from tensorflow_datasets.scripts.cli import build, cli_utils

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import Writer, pipeline, records, tfds_builder
from qk_jax.data.importers import importing, pieces, tfds, tfds_records
from qk_jax.data.importers.job import Job
from tests.data import stage3
from tests.data.importers.published import picture, tar

TASKS = {"editing": 1.0, "text_to_image": 1.0}


def written(folder):
    """Records of two tasks in two splits, with pictures of several sizes and forms."""
    for split, count in (("train", 12), ("validation", 8)):
        with Writer(folder / f"{split}.array_record") as writer:
            for n in range(count):
                size = (40, 24) if n % 2 else (24, 40)
                given = [picture(30 + n + k, "WEBP") for k in range(n % 3)]
                before = picture(10 + n, size=size)
                target = picture(n, "PNG", size)
                writer.add("editing", f"do {n} ü", target, source=before, references=given, more=n)
                writer.add("text_to_image", f"see {n}", target, name="captions")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(a folder of records, the folder of the data set that is made of it)."""
    folder = tmp_path_factory.mktemp("built")
    given = written(folder / "in")
    return given, pathlib.Path(tfds_builder.prepare(given, folder / "out").data_path)


def data_set(folder, split="train"):
    found = tfds.opened(str(folder), split)
    return tfds_records.TfdsSet("tfds:x", found.folder, split, found.data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_records_are_read_back(built, split):
    given, folder = built
    found, expected = data_set(folder, split), records.RecordSet(given, split)
    assert [found[n] for n in range(len(found))] == [expected[n] for n in range(len(expected))]
    assert pickle.loads(pickle.dumps(found))[3] == expected[3]
    for (_, mine), (_, theirs) in zip(found.indices(), expected.indices(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_batches_are_those_of_the_records(built, builder):
    given, folder = built
    pipes = [
        pipeline.Pipeline(stage3.config(TASKS, 4, 4, records=path), "train", 1, 2, builder)
        for path in (f"tfds:{folder}", str(given))
    ]
    assert pipes[0].digest() == pipes[1].digest()
    for step in range(6):
        stage3.assert_same(*(pipe.batch(step) for pipe in pipes))
    assert not pipes[0].bad_counts()


def test_the_order_of_roles_is_kept():
    header = {"instruction": "x", "roles": ["reference", "source", "reference"], "key": "k"}
    blobs = {"target": b"t", "picture_1": b"1", "picture_2": b"2", "picture_3": b"3"}
    example = tfds_records.example_of(records.Record(header, blobs), "editing", "x")
    assert (example["source_image"], example["references"]) == ([b"2"], [b"1", b"3"])
    texts = {key: value.encode() for key, value in example.items() if isinstance(value, str)}
    found = {**example, **texts, "roles": [role.encode() for role in example["roles"]]}
    assert tfds_records.record_of(found) == records.Record(header, blobs)
    with pytest.raises(BadRecord, match="x has the blobs image and the roles None"):
        tfds_records.example_of(records.Record({"caption": "x"}, {"image": b"1"}), "", "x")


def test_the_code_of_tfds_build_makes_it_of_tars(tmp_path):
    """All of `tfds build` but the import of its other verbs, which need TensorFlow and more; an
    import reads what it made."""
    members = []
    for n in range(4):
        members += [(f"{n}.jpg", picture(n)), (f"{n}.txt", f"n {n}".encode())]
    tar(tmp_path / "in" / "a.tar", members)
    job = Job(str(tmp_path / "index"), "webdataset", (str(tmp_path / "in"),), "text_to_image")
    importing.run(Job(**{**job.__dict__, "in_place": True}), pieces.Engine())
    line = f"tfds qk_records --imports qk_jax.data.tfds_builder --data_dir {tmp_path / 'out'}"
    line += f" --manual_dir {tmp_path / 'index'}"
    cli_utils.make_flags_parser(build.Args, "")(line.split()).execute()
    folder = tmp_path / "out" / "qk_records" / "1.0.0"
    again = Job(str(tmp_path / "again"), "tfds", (str(folder),), "text_to_image")
    importing.run(again, pieces.Engine())
    for found in (data_set(folder), records.RecordSet(tmp_path / "again", "train")):
        got = [(found[n].header["instruction"], found[n].blobs["target"]) for n in range(4)]
        assert got == [(f"n {n}", picture(n)) for n in range(4)]


def test_edits_are_imported_with_their_roles(built, tmp_path):
    given, folder = built
    job = Job(str(tmp_path), "tfds", (str(folder),), "editing", split="validation")
    manifest = importing.run(job, pieces.Engine())
    assert manifest["records"] == {"train": 8} and manifest["rejected"] == {"roles": 8}
    found, expected = records.RecordSet(tmp_path, "train"), records.RecordSet(given, "validation")
    for number in range(8):
        theirs = expected[2 * number]
        assert found[number].blobs == theirs.blobs
        assert found[number].header["roles"] == theirs.header["roles"]


def test_what_is_missing_or_damaged_is_named(built, tmp_path):
    with pytest.raises(InputError, match="has no records; give a folder that `import`"):
        tfds_builder.prepare(tmp_path, tmp_path / "a")
    shutil.copytree(built[1], folder := tmp_path / "1.0.0")
    side = folder / "train.index.npy"
    whole = side.read_bytes()
    side.write_bytes(whole[:-3])
    with pytest.raises(InputError, match="train.index.npy cannot be read .* build it again"):
        data_set(folder)
    rows = np.load(io.BytesIO(whole))
    side.write_bytes(records.index_bytes(rows[:-1]))
    with pytest.raises(InputError, match="has 23 examples and the split 24, or"):
        data_set(folder)
    side.write_bytes(records.index_bytes(rows[::-1].copy()))
    with pytest.raises(BadRecord, match="is damaged, or its data set was built in another order"):
        data_set(folder)[3]
    side.write_bytes(whole)
    path = next(folder.glob("*train.array_record*"))
    body, drawn = path.read_bytes(), np.random.default_rng(0)
    expected, bad = [data_set(folder)[n] for n in range(24)], 0
    for place in drawn.integers(0, len(body) // 2, 20):
        path.write_bytes(body[:place] + bytes([body[place] ^ 4]) + body[place + 1 :])
        found = data_set(folder)
        for number in range(24):
            try:
                assert found[number] == expected[number]
            except BadRecord as error:
                assert error.kind == "unreadable"
                bad += 1
    assert bad


def test_a_damaged_record_stops_a_build(tmp_path):
    folder = written(tmp_path / "in")
    path = folder / "train.array_record"
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 2])
    with pytest.raises(InputError, match="train.array_record .*copy it again"):
        tfds_builder.prepare(folder, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("dataset_info.json"))
