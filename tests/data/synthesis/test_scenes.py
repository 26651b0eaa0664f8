"""Drawing."""

from random import Random

import numpy as np

from qk_jax.data.synthesis import scenes


def test_paste_keeps_aspect_and_blends_alpha():
    rgba = np.zeros((10, 20, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 128
    canvas = scenes.flat((40, 40), "white")
    out = scenes.paint(canvas, [scenes.Item(rgba, (0.25, 0.25, 0.75, 0.75))])
    changed = np.argwhere((out != 255).any(-1))
    assert changed.min(0).tolist() == [15, 10] and changed.max(0).tolist() == [24, 29]
    np.testing.assert_allclose(out[20, 20], [227, 127, 127], atol=1)
    assert (canvas == 255).all()


def test_paste_over_the_edge_is_cut():
    rgba = np.full((8, 8, 4), 255, np.uint8)
    rgba[..., :3] = 0
    out = scenes.paint(scenes.flat((16, 16), "white"), [scenes.Item(rgba, (-0.25, 0.0, 0.25, 0.5))])
    assert (out[:8, :4] == 0).all() and (out[8:] == 255).all()


def test_no_colour_bleeds_from_transparent_pixels():
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., 1] = 255  # green, but transparent
    rgba[:32] = (255, 0, 0, 255)
    out = scenes.paint(scenes.flat((21, 21), "white"), [scenes.Item(rgba, (0, 0, 1, 1))])
    assert (out[..., 1] == out[..., 2]).all()


def test_changes_keep_the_size_and_do_what_they_say():
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    for name, change in scenes.CHANGES.items():
        out = change(picture)
        assert out.dtype == np.uint8
        assert out.shape == ((80, 48, 3) if name in scenes.TURNS else picture.shape), name
        assert not np.array_equal(out.ravel(), picture.ravel())
    twice = ("mirror", "upside down", "negative", "red and blue")
    for name in twice:
        np.testing.assert_array_equal(scenes.CHANGES[name](scenes.CHANGES[name](picture)), picture)
    change = scenes.CHANGES
    np.testing.assert_array_equal(change["mirror"](picture)[:, 0], picture[:, -1])
    np.testing.assert_array_equal(change["upside down"](picture)[0], picture[-1])
    np.testing.assert_array_equal(change["turn left"](picture)[0], picture[:, -1])
    np.testing.assert_array_equal(change["turn right"](picture)[:, -1], picture[0])
    assert change["darker"](picture).mean() < picture.mean() < change["brighter"](picture).mean()
    grey = scenes.CHANGES["greyscale"](picture)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 1] == grey[..., 2]).all()


def test_tinting_shows_in_line_drawings():
    lines = np.full((4, 4, 4), 255, np.uint8)
    lines[1, :, :3] = 0
    out = scenes.tinted(lines, "red")
    assert out[1, 0, 0] > 60 and out[1, 0, 1] < 30 and (out[0, 0, :3] == 255).all()
    assert (out[..., 3] == 255).all()


def test_a_contrasting_colour_is_far_when_there_is_one():
    shown = np.array([scenes.COLOURS["red"], scenes.COLOURS["white"]], np.float32)
    drawn = {scenes.contrasting(Random(i), shown, list(scenes.COLOURS)) for i in range(60)}
    assert "red" not in drawn and "white" not in drawn and len(drawn) > 4
    assert scenes.contrasting(Random(0), shown, ["red", "orange"]) == "orange"


def test_patterns_have_two_colours():
    for pattern in scenes.PATTERNS:
        canvas = scenes.patterned((48, 80), pattern, "red", "white")
        colours = {tuple(c) for c in canvas.reshape(-1, 3).astype(int).tolist()}
        assert colours == {scenes.COLOURS["red"], scenes.COLOURS["white"]}
    fade = scenes.gradient((64, 64), "red", "blue")
    np.testing.assert_allclose(fade[0, 0], scenes.COLOURS["red"])
    np.testing.assert_allclose(fade[-1, -1], scenes.COLOURS["blue"])
