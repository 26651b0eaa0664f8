"""Aspect-ratio buckets."""

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import buckets

# width x height for 1:1, 1:2, 2:3, 3:4, 3:5, 4:5, 9:16
TABLE = {
    (256, 16): "256x256 176x352 208x304 224x288 192x320 192x336",
    (512, 16): "512x512 352x704 416x624 432x576 384x640 448x560 384x672",
    (512, 32): "512x512 352x704 416x608 448x576 384x640 384x672",
    (1024, 16): "1024x1024 720x1440 832x1248 880x1184 784x1312 912x1136 768x1360",
    (1024, 32): "1024x1024 704x1408 832x1248 864x1152 768x1280 896x1120 768x1344",
    (448, 28): "448x448 308x616 364x532 392x504 336x560 336x588",
    (448, 32): "448x448 320x608 352x544 384x512 320x544 384x480 320x576",
}


@pytest.mark.parametrize("side, multiple", TABLE)
def test_the_paper_s_ratios_give_the_known_table(side, multiple):
    known = [tuple(map(int, size.split("x"))) for size in TABLE[side, multiple].split()]
    portraits = buckets.table(side, multiple, mirror=False)
    assert [(width, height) for height, width in portraits] == known
    whole = buckets.table(side, multiple)
    assert len(whole) == 2 * len(known) - 1 >= 11
    assert max(height * width for height, width in whole) == side**2  # what a step is padded to
    assert {(width, height) for height, width in whole} == set(whole)


def test_sizes_that_coincide_are_given_once():
    assert len(buckets.table(256, 16)) == 11  # 3:4 and 4:5 are one size at this multiple
    assert buckets.table(64, 16, ratios=((3, 5),)) == ((80, 48), (48, 80))


def test_a_multiple_above_the_side_is_an_error():
    with pytest.raises(InputError, match="side 64"):
        buckets.table(64, 80)


def test_nearest_is_by_ratio_and_symmetric():
    sizes = buckets.table(512, 16)
    rng = np.random.default_rng(0)
    height, width = rng.integers(20, 2000, (2, 500))
    found = buckets.nearest(height, width, sizes)
    mirrored = buckets.nearest(width, height, sizes)
    logs = np.log([w / h for h, w in sizes])
    gaps = np.abs(np.log(width / height)[:, None] - logs)
    assert np.allclose(gaps[np.arange(500), found], gaps.min(1))
    assert [sizes[i][::-1] for i in found] == [sizes[i] for i in mirrored]
    exact = [buckets.nearest(np.array(h), np.array(w), sizes) for h, w in sizes]
    assert exact == list(range(len(sizes)))
