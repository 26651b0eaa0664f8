"""Every format: a set made to the published form becomes records with the same bytes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from configs import stage3
from qk_jax.base.errors import InputError
from qk_jax.data import records
from qk_jax.data.importers import formats, importing, pieces, registry
from qk_jax.data.importers.drafts import encoded
from qk_jax.data.importers.job import Job
from qk_jax.pictures.decoding import decode_picture
from tests.data.importers import published, tfds_sets


def imported(made: published.Made, out, **more):
    job = Job(task=made.task, out=str(out), **{"shard_records": 3, **made.job, **more})
    return importing.run(job, pieces.Engine())


def examples(out, split="train"):
    """(instruction, target, ((role, picture), ...)) of all records, in order."""
    found = records.RecordSet(out, split)
    for number in range(len(found)):
        header, blobs = found[number]
        names = [f"picture_{n + 1}" for n in range(len(header["roles"]))]
        assert list(blobs) == ["target", *names]
        pairs = zip(header["roles"], (blobs[name] for name in names), strict=True)
        yield header["instruction"], blobs["target"], tuple(pairs)


@pytest.mark.parametrize("name", published.SETS)
def test_a_published_set_is_read(name, tmp_path):
    made = published.SETS[name](tmp_path / "in")
    manifest = imported(made, tmp_path / "out")
    assert list(examples(tmp_path / "out")) == made.examples
    assert manifest["records"] == {"train": len(made.examples)}
    assert manifest["rejected"] == ({"filtered": 1} if name == "uno" else {})
    found = records.RecordSet(tmp_path / "out", "train").indices()
    index = np.concatenate([piece for _, piece in found])
    assert set(zip(index["width"], index["height"], strict=True)) == {(40, 24)}
    assert index["pictures"].tolist() == [len(pictures) for *_, pictures in made.examples]
    assert set(index["source"]) == {made.job["format"].encode()}
    assert len(np.unique(index["digest"], axis=0)) == len(made.examples)


def test_every_format_has_a_set():
    tested = {make.__name__ for make in published.SETS.values()} | set(published.SETS)
    known = tested | {"subjects200k", "tfds"} | {"folder", "list"}
    assert set(formats.FORMATS) <= known


def test_training_reads_what_was_imported(tmp_path):
    made = published.folder_of_metadata(tmp_path / "in")
    imported(made, tmp_path / "out")
    config = stage3.get_config("tiny")
    config.data.records = str(tmp_path / "out")
    source = registry.make_sources(config, "train", 0, ["editing"])["editing"]
    assert len(source) == 6
    for number, (text, target, pictures) in enumerate(made.examples):
        example = source[number]
        assert example.instruction == text and len(example.pictures) == len(pictures)
        colour = decode_picture(target, "RGB", 0, "x")[12, 20]
        np.testing.assert_allclose(example.target[20, 40], colour, atol=3)


def test_both_halves_of_a_composite_are_kept(tmp_path):
    """Subjects200K: the margin is cut off, and its quality filter is kept."""
    rows = []
    for n, (score, valid) in enumerate([(5, True), (4, True), (5, False), (None, True), (0, True)]):
        image = Image.new("RGB", (132, 66), "white")
        image.paste((10 * n, 0, 0), (1, 1, 65, 65))
        image.paste((0, 0, 10 * n + 9), (66, 1, 130, 65))
        scores = {"compositeStructure": 5, "objectConsistency": score, "imageQuality": 5}
        scores = scores if score != 0 else None
        words = {"description_0": f"left {n}", "description_1": f"right {n}", "item": "a cup"}
        rows.append(
            {"image": published.struct(encoded(image, "PNG")), "collection": "c1",
             "quality_assessment": scores, "description": {**words, "description_valid": valid}}
        )  # fmt: skip
    published.table(tmp_path / "in" / "train-00000-of-00032.parquet", rows)
    made = published.Made(
        "customization", {"format": "subjects200k", "inputs": (str(tmp_path / "in"),)}, []
    )
    manifest = imported(made, tmp_path / "out")
    assert manifest["rejected"] == {"filtered": 2, "no number": 2}
    left, right = examples(tmp_path / "out")
    assert (left[0], right[0]) == ("left 0", "right 0")
    halves = [decode_picture(data, "RGB", 0, "x") for data in (left[1], right[1])]
    assert (halves[0] == (0, 0, 0)).all() and (halves[1] == (0, 0, 9)).all()
    assert halves[0].shape == (64, 64, 3)
    assert left[2] == (("reference", right[1]),) and right[2] == (("reference", left[1]),)


class Things(tfds_sets.Captioned):
    """A small TensorFlow data set."""

    def _generate_examples(self):
        for n in range(5):
            image = io.BytesIO(encoded(Image.new("RGB", (40, 24), (9 * n,) * 3), "PNG"))
            yield n, {"image": image, "text": f"thing {n}"}


def test_a_tensorflow_data_set_is_read_from_its_folder(tmp_path):
    builder = Things(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    given = {"format": "tfds", "inputs": (str(builder.data_path),)}
    imported(published.Made("text_to_image", given, []), tmp_path / "out")
    found = {text: data for text, data, _ in examples(tmp_path / "out")}
    assert sorted(found) == [f"thing {n}" for n in range(5)]
    assert decode_picture(found["thing 3"], "RGB", 0, "x").tolist() == [[[27] * 3] * 40] * 24
    with pytest.raises(InputError, match="no split 'test'"):
        imported(published.Made("text_to_image", given, []), tmp_path / "more", split="test")


def test_the_manifest_says_what_is_there(tmp_path):
    made = published.omniedit(tmp_path / "in")
    manifest = imported(made, tmp_path / "out", name="omni")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["licence"], manifest["sources"]) == ("MIT", {"omni": 5})
    (path,) = (tmp_path / "in" / "data").iterdir()
    assert list(manifest["inputs"]) == [str(path)]
    assert sum(shard["records"] for shard in manifest["shards"].values()) == 5
    on_disk = {p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".array_record"}
    assert on_disk == set(manifest["shards"])
    assert records.RecordSet(tmp_path / "out", "train")[0].header["key"] == "task_1"
    assert not (tmp_path / "out" / ".import").exists()
