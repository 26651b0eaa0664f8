"""Pictures that are decoded, covered, contained and flattened."""

import io

import numpy as np
import pytest
from PIL import Image

from qk_jax.base.errors import BadRecord
from qk_jax.pictures.fitting import contain, cover, decode_picture, on_white


def test_cover_crops_evenly_and_contain_pads_with_white():
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 200
    assert cover(picture, (8, 8)).min() == 200
    padded = contain(picture, 24)
    assert padded.shape == (24, 24, 3)
    np.testing.assert_array_equal(padded[8:16], picture)
    assert (padded[:8] == 255).all() and (padded[16:] == 255).all()


def test_what_is_transparent_becomes_white():
    image = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8))
    np.testing.assert_array_equal(on_white(image), [[[10, 20, 30], [255, 255, 255]]])


def test_broken_and_too_large_pictures_are_bad_records():
    data = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(data, "PNG")
    assert decode_picture(data.getvalue(), "L", 600, "a").shape == (20, 30)
    for sent, most, kind in ((data.getvalue(), 599, "too large"), (b"PNG", 0, "undecodable")):
        with pytest.raises(BadRecord) as caught:
            decode_picture(sent, "RGB", most, "a")
        assert caught.value.kind == kind
