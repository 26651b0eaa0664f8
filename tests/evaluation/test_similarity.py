"""The figures of the report: what they say of pictures whose likeness is known."""

import numpy as np
import pytest

from qk_jax.evaluation import similarity


def noise(seed, count=6, side=32):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def square(x, y, side=64, colour=(200, 30, 30)):
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[y : y + 16, x : x + 16] = colour
    return picture


def test_psnr_of_a_known_error():
    black = np.zeros((2, 8, 8, 3), np.uint8)
    grey = black + np.uint8(51)
    np.testing.assert_allclose(similarity.psnr(black, grey), 20 * np.log10(5), rtol=1e-9)
    assert similarity.psnr(black, black).tolist() == [99, 99]


def test_ranks_find_the_right_picture_and_ties_count_against_it():
    truth = similarity.coarse(noise(0))
    near = truth + 0.01 * np.random.default_rng(1).standard_normal(truth.shape)
    assert similarity.ranks(near, truth).tolist() == [0] * 6
    swapped = near[[1, 0, 2, 3, 4, 5]]
    assert (similarity.ranks(swapped, truth) > 0).tolist() == [True, True] + [False] * 4
    same = np.ones_like(truth)
    assert similarity.ranks(same, truth).min() == 5, "a constant picture finds nothing"


def test_coarse_is_the_mean_of_boxes():
    picture = np.zeros((1, 16, 24, 3), np.uint8)
    picture[0, :2, :3] = 255
    out = similarity.coarse(picture).reshape(8, 8, 3)
    assert (out[0, 0] == 1).all() and out.sum() == 3


def test_layout_change_sees_place_and_not_colour():
    start = square(8, 24)[None]
    recoloured, moved = square(8, 24, colour=(20, 20, 150))[None], square(40, 24)[None]
    assert similarity.layout_change(start, start)[0] == pytest.approx(0, abs=1e-9)
    assert similarity.layout_change(start, recoloured)[0] < 0.05
    assert similarity.layout_change(start, moved)[0] > 0.8


def test_displacement_is_the_shift_in_diagonals():
    start, moved = square(8, 24)[None], square(38, 24)[None]
    diagonal = np.hypot(64, 64)
    assert similarity.displacement(start, start)[0] == 0
    assert similarity.displacement(start, moved)[0] == pytest.approx(30 / diagonal, abs=1e-6)


def test_edges_of_one_colour_are_nothing():
    flat = np.full((1, 16, 16, 3), 90, np.uint8)
    assert not similarity.edges(flat).any()
    assert similarity.layout_change(flat, flat)[0] == 1


def test_mean_and_error():
    mean, error = similarity.mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5 and error == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert similarity.mean_and_error(np.array([3.0])) == (3.0, 0.0)
