"""Sizes as they are written: width x height."""

import pytest

from configs import highres, stage3
from qk_jax.base.errors import InputError
from qk_jax.data import settings
from qk_jax.models import mmdit, vae
from qk_jax.painting import orders
from qk_jax.pictures import sizes


def test_a_size_is_read_and_written_width_first():
    assert sizes.parse_size("80x48", "it") == (48, 80) and sizes.format_size((48, 80)) == "80x48"
    assert sizes.parse_size("80X48", "it") == (48, 80)
    for kind in ("tiny", "qwen_image"):
        patch = mmdit.PRESETS["tiny"].patch_size
        assert vae.PRESETS[kind].downscale * patch == sizes.PACKED
    for config in (stage3.get_config("20b"), highres.get_config("tiny")):
        for text in config.data.sizes:
            assert sizes.format_size(sizes.parse_size(text, "it")) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("abc", "is 'abc'; give width x height in pixels, such as 80x48"),
        ("64", "is '64'; give width x height"),
        ("64x", "is '64x'"),
        ("-64x64", "is '-64x64'"),
        ((64, 64), r"is \(64, 64\); give width x height"),
        ("60x60", "60x60 is no multiple of 16; 64x64 is near"),
        ("0x64", "0x64 is no multiple of 16; 16x64 is near"),
        ("64x40", "64x40 is no multiple of 16; 64x32 is near"),
    ],
)
def test_what_is_no_size_is_named_where_it_was_given(text, words):
    with pytest.raises(InputError, match=f"config.data.sizes {words}"):
        sizes.parse_sizes(["64x64", text], "config.data.sizes")
    config = stage3.get_config("tiny")
    config.data.sizes = ("64x64", text)
    with pytest.raises(InputError, match=f"config.data.sizes {words}"):
        settings.check(config)
    if isinstance(text, str):
        with pytest.raises(InputError, match=f"--size {words}"):
            orders.parse_size(text)


def test_no_size_at_all_is_an_error():
    with pytest.raises(InputError, match="config.data.sizes is empty; give sizes such as"):
        sizes.parse_sizes((), "config.data.sizes")
