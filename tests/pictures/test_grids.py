"""Sizes at which the VLM sees pictures, and where their tokens stand."""

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qk_jax.base.errors import InputError
from qk_jax.pictures.grids import grid_of, mrope_positions, picture_tokens, vision_size


@pytest.mark.parametrize("size", [(64, 64), (480, 640), (3000, 2000), (30, 1000), (17, 90)])
def test_the_processor_of_transformers_keeps_our_sizes(size):
    shown = vision_size(*size, 384 * 384)
    assert smart_resize(*shown) == shown
    assert picture_tokens((grid_of(*shown),)) == shown[0] * shown[1] // 28**2


def test_the_nearest_multiples_of_28_are_taken():
    assert vision_size(48, 80, 112 * 112) == (84, 140)
    assert vision_size(64, 64, 384 * 384) == (392, 392)
    assert grid_of(84, 140) == (6, 10)


def test_sizes_that_the_vlm_cannot_see_are_refused():
    with pytest.raises(InputError, match="500x1 pixels"):
        vision_size(1, 500, 384 * 384)
    with pytest.raises(InputError, match="28x30 pixels"):
        grid_of(30, 28)


def test_positions_of_a_picture_between_words():
    ids, mask = np.array([[0, 7, 90, 90, 8, 9]]), np.array([[0, 1, 1, 1, 1, 1]])
    wanted = [[0, 0, 1, 1, 3, 4], [0, 0, 1, 1, 3, 4], [0, 0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(mrope_positions(ids, mask, ((2, 4),), 90)[0], wanted)


def test_positions_refuse_pictures_of_another_size():
    ids = np.array([[90, 90], [90, 90]])
    with pytest.raises(InputError, match="slot 0 has 2 picture tokens, its pictures give 4"):
        mrope_positions(ids, np.ones((2, 2)), ((4, 4),), 90)
