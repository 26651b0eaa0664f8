"""One law of decoding: in training, cut-outs, painting, Python and the exported pipeline."""

import ast
import inspect
import io

import numpy as np
import pytest
from PIL import Image

from qk_jax.api.trained import TrainedModel
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import records
from qk_jax.data.example import TaskSettings
from qk_jax.data.importers import record_files
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.export import kontext
from qk_jax.pictures import decoding
from qk_jax.pictures.fitting import contain
from tests.painting import painters
from tests.pictures import encoded

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")
CASES, SIZE = encoded.CASES, (encoded.HEIGHT, encoded.WIDTH)


def near(got, case):
    assert got.shape == case.shown.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - case.shown).max() <= case.within


def decode(data, mode="RGB", most=0):
    return decoding.decode_picture(data, mode, most, "it")


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_what_it_shows(name):
    near(decode(CASES[name].data), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_exported_pipeline_has_the_same_law(name):
    image = Image.open(io.BytesIO(CASES[name].data))
    theirs = np.asarray(kontext.Kontext.picture(image))
    np.testing.assert_array_equal(theirs, decode(CASES[name].data))


def law(module):
    """{name: syntax tree without comments} of the law in a module."""
    names = ("standard", "to_srgb", "over_white", "TURNS", "KEYS")
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        name = targets[0].id if targets else getattr(node, "name", "")
        if name in names:
            found[name] = ast.dump(node)
    assert found.keys() == set(names)
    return found


def test_both_files_have_the_same_words():
    assert law(decoding) == law(kontext)


def test_training_shows_what_painting_shows(tmp_path):
    """Targets, sources and references of a record file."""
    entries = [
        records.Entry(
            {"instruction": name, "roles": ["source", "reference"]},
            {"target": case.data, "picture_1": case.data, "picture_2": case.data},
            width=80, height=48, pictures=2, task="editing",
        )
        for name, case in CASES.items()
    ]  # fmt: skip
    records.write_records(tmp_path / "train.array_record", entries)
    file = records.RecordSet(tmp_path, "train")
    source = record_files.RecordSource(file, "editing", TaskSettings(), 0)
    painter = painters.painter()
    for number, (name, case) in enumerate(CASES.items()):
        example = source[number]
        assert example.instruction == name
        near(example.target, case)
        np.testing.assert_array_equal(example.pictures[0], example.target)
        np.testing.assert_array_equal(example.pictures[1], contain(example.target, (64, 64)))
        (tmp_path / "given").write_bytes(case.data)
        np.testing.assert_array_equal(painter.read(tmp_path / "given"), example.target)


def test_python_takes_pictures_by_the_same_law():
    model = TrainedModel(painters.painter())
    for case in CASES.values():
        given = model._picture("source", Image.open(io.BytesIO(case.data)))
        np.testing.assert_array_equal(given, decode(case.data))
    rgba = np.dstack([encoded.blocks(3), encoded.ALPHA])
    shown = encoded.over_white(rgba[..., :3], encoded.ALPHA)
    assert np.abs(model._picture("source", rgba).astype(int) - shown).max() <= 1
    with pytest.raises(InputError, match="source: a picture cannot be decoded"):
        model._picture("source", Image.open(io.BytesIO(encoded.BAD["floats"])))


def test_an_image_is_left_as_it_was():
    image = Image.open(io.BytesIO(CASES["profile and orientation"].data))
    again = [decoding.picture_of(image, "RGB", 0, "it") for _ in range(2)]
    np.testing.assert_array_equal(*again)
    once = decoding.standard(image)
    np.testing.assert_array_equal(decoding.standard(once), once)  # is not turned once more
    assert image.size != once.size


def test_cut_outs_keep_their_alpha(tmp_path):
    colour, alpha = encoded.blocks(3), encoded.ALPHA
    rgba = np.dstack([colour[..., ::-1], alpha])
    data = encoded.turned(rgba, 6, "PNG", icc_profile=encoded.swapping())
    entry = records.Entry({"caption": "a thing"}, {"image": data}, width=80, height=48)
    records.write_records(tmp_path / "train.array_record", [entry])
    cutout = Corpus("train", tmp_path)[0]
    np.testing.assert_array_equal(cutout.rgba[..., 3], alpha)
    assert np.abs(cutout.rgba[..., :3].astype(int) - colour).max() <= 2
    for name in ("alphas of a palette", "key of 16 bits", "grey with alpha"):
        found = decode(CASES[name].data, "RGBA")
        assert found.shape == (*SIZE, 4) and found[..., 3].min() == 0
        near(encoded.over_white(found[..., :3], found[..., 3]), CASES[name]._replace(within=1))
    assert (decode(CASES["16 bits"].data, "RGBA")[..., 3] == 255).all()


def test_values_of_srgb_stay_as_they_are():
    assert decoding.to_srgb(encoded.SRGB) == ("", None)
    assert decoding.to_srgb(encoded.swapping())[0] == "RGB"


@pytest.mark.parametrize("name", encoded.BAD)
def test_what_cannot_be_shown_is_named(name):
    with pytest.raises(BadRecord, match="it: a picture cannot be decoded") as caught:
        decode(encoded.BAD[name])
    assert caught.value.kind == "undecodable"


def test_the_bound_is_checked_before_decoding(monkeypatch):
    data = CASES["alpha"].data
    assert decode(data, most=48 * 80).shape == (48, 80, 3)
    monkeypatch.setattr(decoding, "standard", lambda image: pytest.fail("decoded"))
    with pytest.raises(BadRecord, match="80x48 exceeds the bound of 3,839 pixels") as caught:
        decode(data, most=48 * 80 - 1)
    assert caught.value.kind == "too large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadRecord) as caught:
        decode(data)
    assert caught.value.kind == "too large"


def test_files_that_run_other_programs_are_no_pictures():
    """Pillow hands EPS to Ghostscript, which executes what is in it."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "EPS")
    with pytest.raises(BadRecord, match="cannot identify image file"):
        decode(buffer.getvalue())
