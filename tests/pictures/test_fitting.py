"""Pictures that are covered and contained."""

import numpy as np
import pytest
from PIL import Image

from configs import highres, stage3
from qk_jax.data import buckets
from qk_jax.pictures.fitting import contain, cover, cover_box
from qk_jax.pictures.sizes import parse_sizes

# The sizes of targets of all configs.
TABLES = [
    parse_sizes(get(size).data.sizes, "sizes")
    for get in (stage3.get_config, highres.get_config)
    for size in ("tiny", "20b")
]
# Sizes of which a part of a pixel was once asked for beyond an edge.
CRASHED = ((50, 49), (61, 37), (788, 816))


def test_cover_crops_evenly_and_contain_pads_with_white():
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 200
    assert cover(picture, (8, 8)).min() == 200
    padded = contain(picture, (24, 24))
    assert padded.shape == (24, 24, 3)
    np.testing.assert_array_equal(padded[8:16], picture)
    assert (padded[:8] == 255).all() and (padded[16:] == 255).all()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{len(table)} of {table[0][0]}")
def test_every_box_lies_in_its_picture(table):
    """100,000 sizes of pictures, each for the size that it goes to and for another."""
    rng = np.random.default_rng(0)
    height, width = np.concatenate([CRASHED, rng.integers(1, 5000, (100_000, 2))]).T
    for chosen in (buckets.nearest(height, width, table), rng.integers(0, len(table), len(height))):
        size = np.array(table)[chosen].T
        box = np.stack(cover_box(height, width, size))
        left, top, right, bottom = box.astype(np.float32)  # as Pillow reads them
        assert (left >= 0).all() and (top >= 0).all()
        assert (right <= width).all() and (bottom <= height).all()
        left, top, right, bottom = box
        np.testing.assert_allclose((right - left) / (bottom - top), size[1] / size[0], rtol=1e-9)
        np.testing.assert_allclose(left + right, width, atol=1e-6)
        np.testing.assert_allclose(top + bottom, height, atol=1e-6)
        assert (np.isclose(right - left, width) | np.isclose(bottom - top, height)).all()


def test_pictures_of_ordinary_sizes_are_covered_as_before_where_that_worked():
    rng, failed = np.random.default_rng(1), 0
    shapes = [*CRASHED, *rng.integers(20, 120, (300, 2)).tolist()]
    for height, width in shapes:
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        size = TABLES[0][int(buckets.nearest(height, width, TABLES[0]))]
        got = cover(picture, size)
        assert got.shape == (*size, 3)
        scale = max(size[0] / height, size[1] / width)
        rows, columns = size[0] / scale, size[1] / scale
        left, top = (width - columns) / 2, (height - rows) / 2
        box = (left, top, left + columns, top + rows)
        try:
            image = Image.fromarray(picture)
            before = image.resize(size[::-1], Image.Resampling.LANCZOS, box=box)
        except ValueError:
            failed += 1
        else:
            np.testing.assert_array_equal(got, before)
    assert 3 <= failed < 40


def test_a_picture_is_contained_whole_at_any_size():
    rng = np.random.default_rng(2)
    for _ in range(200):
        height, width, *size = rng.integers(1, 90, 4).tolist()
        shown = contain(np.zeros((height, width, 3), np.uint8), tuple(size))
        assert shown.shape == (*size, 3)
        rows, columns = ((shown < 255).any(axis=(2, axis)).sum() for axis in (1, 0))
        assert rows == size[0] or columns == size[1]
        scale = min(size[0] / height, size[1] / width)
        assert abs(rows - height * scale) < 1 and abs(columns - width * scale) < 1
