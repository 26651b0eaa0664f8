"""Sheets of pictures: what is saved can be taken apart again."""

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from qk_jax.base.errors import InputError
from qk_jax.painting import sheets


def noise(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def test_pictures_come_back_pixel_for_pixel(tmp_path):
    shapes = [(64, 64), (48, 80), (80, 48), (1, 160), (127, 31), (160, 159)]
    lines = [(f"words {h} 海", [("source", noise(h, w)), ("painted", noise(w, h))])
             for h, w in shapes]  # fmt: skip
    sheets.save(sheets.draw("a title", lines), tmp_path / "sheet.png")
    picture, found = sheets.read(tmp_path / "sheet.png")
    assert picture.size == Image.open(tmp_path / "sheet.png").size
    assert [words for words, _ in found] == [words for words, _ in lines]
    for (_, ours), (_, theirs) in zip(found, lines, strict=True):
        for (label, pixels), (name, truth) in zip(ours, theirs, strict=True):
            assert label == name
            np.testing.assert_array_equal(pixels, truth)


def test_a_larger_picture_comes_back_as_the_sheet_shows_it(tmp_path):
    sheets.save(sheets.draw("", [("", [("painted", noise(300, 400))])]), tmp_path / "sheet.png")
    [(_, [(_, pixels)])] = sheets.read(tmp_path / "sheet.png")[1]
    assert pixels.shape == (120, 160, 3)


def test_a_picture_that_is_no_sheet_has_no_lines(tmp_path):
    Image.fromarray(noise(9, 9)).save(tmp_path / "sheet.png")
    assert sheets.read(tmp_path / "sheet.png")[1] == []


@pytest.mark.parametrize(
    "told",
    [
        "no json", "3", "[3]", "[{}]", '[{"prompt": "", "cells": [{"label": ""}]}]',
        json.dumps([{"prompt": "", "cells": [{"label": "", "box": [5, 5, 9, 9], "size": [1, 1]}]}]),
        '[{"prompt": "", "cells": [{"label": "", "box": [0, 0, Infinity, 9], "size": [1, 1]}]}]',
    ],
)  # fmt: skip
def test_a_sheet_that_says_what_cannot_be_is_an_error(told, tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("qk_jax sheet", told)
    Image.fromarray(noise(9, 9)).save(tmp_path / "sheet.png", pnginfo=chunks)
    with pytest.raises(InputError, match="sheet.png is no sheet that can be read"):
        sheets.read(tmp_path / "sheet.png")


def test_a_torn_file_is_an_error(tmp_path):
    sheets.save(sheets.draw("", [("", [("painted", noise(64, 64))])]), tmp_path / "sheet.png")
    whole = (tmp_path / "sheet.png").read_bytes()
    for end in (0, 4, 40, len(whole) // 2):
        (tmp_path / "sheet.png").write_bytes(whole[:end])
        with pytest.raises(InputError, match="paint it anew"):
            sheets.read(tmp_path / "sheet.png")
