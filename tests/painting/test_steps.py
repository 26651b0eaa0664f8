"""Painting step by step: the same pictures, with what happens in between."""

import dataclasses

import numpy as np
import painters
import pytest

from qk_jax import painting


@pytest.fixture(scope="module")
def painter():
    return painters.painter()


@pytest.fixture(scope="module")
def requests(painter):
    """Three of one shape, for two slots, and one of another."""
    edit = painter.fit("make it blue", painters.picture(1), (), (32, 32), seed=7)
    edits = [dataclasses.replace(edit, number=number) for number in range(3)]
    return [*edits, painter.fit("a kite", size=(32, 48))]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_pictures_are_those_of_stream(painter, requests, solver, steps):
    """Two programs may round differently: at most by 1/255."""
    settings = painting.Settings(steps=steps, solver=solver, guidance=3.0)
    expected = painter.paint(requests, settings)
    painted = {}
    for progress in painter.steps(requests, settings):
        assert (progress.pictures is None) == (progress.step < progress.steps)
        if progress.pictures is not None:
            painted |= zip(progress.indices, progress.pictures, strict=True)
    for index, picture in enumerate(expected):
        difference = painted[index].astype(int) - picture
        assert np.abs(difference).max() <= 1, index


def test_every_step_is_told_and_previews_come_nearer(painter, requests):
    settings = painting.Settings(steps=6, zero_init_steps=1)
    told = list(painter.steps(requests, settings, preview=2))
    steps = [(x.indices, x.step) for x in told]
    chunks = [(0, 1), (2,), (3,)]
    assert steps == [(chunk, step) for chunk in chunks for step in range(2, 7)]
    first = told[:5]
    assert [x.pictures is not None for x in first] == [True, False, True, False, True]
    shown = [x.pictures.astype(int) for x in first if x.pictures is not None]
    assert shown[0].shape == (2, 32, 32, 3)
    far = [np.abs(x - shown[-1]).mean() for x in shown]
    assert far[0] > far[1] > far[2] == 0


def test_who_stops_asking_stops_the_painting(painter, requests, monkeypatch):
    computed, phases = [], []
    original = painter.programs.step
    monkeypatch.setattr(
        painter.programs, "step", lambda *a, **k: (computed.append(1), original(*a, **k))[1]
    )
    settings = painting.Settings(steps=50)
    for progress in painter.steps(requests, settings, phase=phases.append):
        if progress.step == 3:
            break
    assert len(computed) == 3 and phases[0] == "compiling" and phases[1:] == ["painting"] * 3
