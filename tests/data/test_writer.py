"""`Writer`: every form of a picture, roles by name, and errors that name the example."""

import io

import numpy as np
import pytest
from PIL import Image

from qk_jax.base.errors import InputError
from qk_jax.data import Writer, records
from qk_jax.pictures.decoding import decode_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG")
    return buffer.getvalue()


def written(tmp_path, target, **more):
    """The one record that is written."""
    path = tmp_path / "train.array_record"
    with Writer(path) as writer:
        writer.add("text_to_image", "a thing", target, **more)
    return records.RecordFile(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PIXELS, PIXELS),
        (PIXELS.transpose(2, 0, 1), PIXELS),
        (PIXELS[..., 0], np.repeat(PIXELS[..., :1], 3, axis=-1)),
        (PIXELS[..., :1], np.repeat(PIXELS[..., :1], 3, axis=-1)),
        (PIXELS.astype(np.float32) / 255, PIXELS),
        (PIXELS.astype(np.float64).transpose(2, 0, 1) / 255, PIXELS),
        (PIXELS.astype(np.float16) / 255, PIXELS),
        (np.full((8, 8, 3), 0.5), np.full((8, 8, 3), 128)),
        (Image.fromarray(PIXELS), PIXELS),
        (Image.fromarray(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, axis=-1)),
    ],
)
def test_arrays_and_images_are_kept_exactly(tmp_path, given, expected):
    data = written(tmp_path, given)[0].blobs["target"]
    assert data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode_picture(data, "RGB", 0, "x"), expected)


def test_alpha_is_kept(tmp_path):
    given = np.dstack([PIXELS, np.full((24, 40), 7, np.uint8)])
    data = written(tmp_path, given)[0].blobs["target"]
    np.testing.assert_array_equal(decode_picture(data, "RGBA", 0, "x"), given)


def test_an_image_is_written_upright(tmp_path):
    image = Image.fromarray(PIXELS)
    image.getexif()[0x0112] = 6
    file = written(tmp_path, image)
    assert (file.index["width"][0], file.index["height"][0]) == (24, 40)


def test_files_and_bytes_keep_their_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    for given in (jpeg(), bytearray(jpeg()), tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
        assert written(tmp_path, given)[0].blobs["target"] == jpeg()


def test_roles_sources_and_fields(tmp_path):
    small = PIXELS[:10, :16]
    path = tmp_path / "train.array_record"
    with Writer(path) as writer:
        writer.add("editing", "x", PIXELS, source=jpeg(), references=[small], name="pets", score=4)
        assert writer.count == 1
    file = records.RecordFile(path)
    header, blobs = file[0]
    assert header == {"instruction": "x", "roles": ["source", "reference"], "score": 4}
    assert list(blobs) == ["target", "picture_1", "picture_2"] and blobs["picture_1"] == jpeg()
    (row,) = file.index
    assert (row["source"], row["pictures"], row["task"]) == (b"pets", 2, b"editing")
    assert row["references"].tolist() == [[16, 10], [0, 0], [0, 0]]
    assert bytes(row["digest"]) == records.digest_of(blobs.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "singing"}, "example 1 has the task 'singing'"),
        ({"instruction": " "}, "example 1: the caption is ' '"),
        ({"instruction": "\ud800"}, "example 1: the text is not UTF-8"),
        ({"target": None}, "example 1, target is a builtins.NoneType; give a path"),
        ({"target": "gone.jpg"}, "example 1, target: gone.jpg cannot be read"),
        ({"target": b"no picture"}, "example 1, target: a picture cannot be decoded"),
        ({"target": b""}, "example 1, target: the picture has no bytes"),
        ({"target": PIXELS.astype(np.int64)}, "example 1, target is an array of int64"),
        ({"target": PIXELS / 1.0}, "target has floats from 0 to 255; scale"),
        ({"target": PIXELS / 127.5 - 1}, "target has floats from -1 to 1; scale"),
        ({"target": np.full((8, 8, 3), np.nan)}, "target has floats from nan to nan"),
        ({"target": PIXELS[..., :2]}, r"shape \(24, 40, 2\); give"),
        ({"target": PIXELS[:0]}, r"shape \(0, 40, 3\); give"),
        ({"target": PIXELS[:3, :, :3]}, r"shape \(3, 40, 3\), \[H, W, C\] or \[C, H, W\] alike"),
        ({"source": 5}, "example 1, source 1 is a builtins.int"),
        ({"references": jpeg()}, "references are a builtins.bytes, expected a list"),
        ({"source": jpeg(), "references": [5]}, "example 1, reference 2 is a builtins.int"),
        ({"name": "a" * 25}, "is no text of at most 24 ASCII characters"),
        ({"name": 3}, "the name 3 is no text"),
        ({"source": None}, "example 1 has 0 condition pictures; editing takes at least one"),
        ({"task": "text_to_image"}, "1 condition pictures; text_to_image takes none"),
        ({"roles": ["reference"]}, "example 1: 'roles' is the record's own"),
        ({"when": {1}}, "example 1: Object of type set is not JSON"),
        ({"score": float("nan")}, "example 1: Out of range float"),
    ],
)
def test_an_error_names_the_example_and_leaves_nothing(tmp_path, change, words):
    with pytest.raises(InputError, match=words), Writer(tmp_path / "a.array_record") as writer:
        writer.add("text_to_image", "good", PIXELS)
        edit = {"task": "editing", "instruction": "x", "target": PIXELS, "source": jpeg()}
        writer.add(**{**edit, **change})
    assert not list(tmp_path.iterdir())


def test_a_writer_outside_of_a_block_is_an_error(tmp_path):
    with pytest.raises(InputError, match="use Writer in a `with` block"):
        Writer(tmp_path / "a.array_record").add("text_to_image", "x", PIXELS)
