"""The embedded corpus."""

import re

import numpy as np
import pytest

from qk_jax.base.errors import BadRecord
from qk_jax.data import records
from qk_jax.data.synthesis import corpus


@pytest.fixture(scope="module")
def sides():
    return {split: corpus.Corpus(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def headers(sides):
    return {split: [c.file[i].header for i in range(len(c))] for split, c in sides.items()}


def test_no_subject_or_caption_is_on_both_sides(headers):
    train, validation = headers["train"], headers["validation"]
    assert len(train) > 2000 and len(validation) > 150
    for field in ("subject", "caption", "key"):
        assert not {h[field] for h in train} & {h[field] for h in validation}


def test_captions_are_short_phrases_and_licences_are_stated(headers):
    for header in headers["train"] + headers["validation"]:
        assert re.fullmatch(r"[a-z0-9][a-z0-9' ,!*#-]*", header["caption"]), header["caption"]
        assert header["license"] in ("OFL-1.1", "public domain")
        assert header["source"]


def test_pictures_are_visible_cutouts_of_the_stated_size(sides):
    c = sides["validation"]
    for number in range(len(c)):
        cutout = c[number]
        height, width = cutout.rgba.shape[:2]
        assert (c.file.index["height"][number], c.file.index["width"][number]) == (height, width)
        assert max(height, width) <= 64 and cutout.rgba.dtype == np.uint8
        assert (cutout.rgba[..., 3] > 8).mean() > 0.02
    assert c[3] is c[3]


def test_it_is_small():
    files = list(corpus.EMBEDDED.iterdir())
    assert sum(file.stat().length for file in files) <= 12_000_000
    assert {file.name for file in files} >= {"LICENSE.OFL-1.1.txt", "LICENSE.public-domain.txt"}


def test_bad_records_have_a_kind(tmp_path, sides):
    good = sides["validation"].file[0]
    rows = [
        ({"caption": "a"}, {"image": b"no picture"}),
        ({"caption": 7}, good.blobs),
        ({"caption": "a"}, {}),
        ({"caption": "a"}, good.blobs),
    ]
    path = tmp_path / "train.array_record"
    records.write_records(path, (records.Entry(*row, width=64, height=64) for row in rows))
    bad = corpus.Corpus("train", tmp_path, max_pixels=100)
    kinds = ["undecodable", "no text", "undecodable", "too large"]
    for number, kind in enumerate(kinds):
        with pytest.raises(BadRecord, match=f"record {number} of") as error:
            bad[number]
        assert error.value.kind == kind
