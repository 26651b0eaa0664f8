"""Phases of a run: where the time goes, and a phase that never ends."""

import threading
import time

import pytest

from qk_jax.base import files
from qk_jax.training.phases import Limits, Phases

NEVER = Limits(0.0, 0.0, 0.0)


def test_nested_phases_share_the_time():
    phases = Phases(NEVER, None, pytest.fail)
    with phases.doing("start"):
        time.sleep(0.1)
        with phases.doing("compile"):
            time.sleep(0.2)
        time.sleep(0.1)
    time.sleep(0.2)  # of no phase
    assert phases.seconds["start"] == pytest.approx(0.2, abs=0.08)
    assert phases.seconds["compile"] == pytest.approx(0.2, abs=0.08)
    shares = phases.shares()
    assert set(shares) == {"goodput/start", "goodput/compile"}
    assert 0.4 < sum(shares.values()) < 0.85
    assert phases.report().count("%") == 2


def test_who_asks_is_told_which_phase_goes_on():
    phases, told = Phases(NEVER, None, pytest.fail), []
    phases.entered = told.append
    with phases.doing("start"), phases.doing("compile"):
        pass
    with pytest.raises(OSError), phases.doing("save"):
        raise OSError
    assert told == ["start", "compile", "start", "", "save", ""]


def watched(tmp_path, limits):
    """(phases, the line of a hang, its stacks)."""
    found, heard = [], threading.Event()

    def hung(line):
        found.append(line)
        heard.set()

    stacks = files.Path(tmp_path / "stacks.txt")
    return Phases(limits, stacks, hung), found, heard, stacks


def test_a_phase_that_does_not_end_is_named_with_all_stacks(tmp_path, capfd):
    phases, found, heard, stacks = watched(tmp_path, Limits(0.3, 2.0, 60.0))
    with phases.doing("step", "step 6"):  # the first may take longer
        time.sleep(0.6)
    with phases.doing("step", "step 7"):  # so may a few times the median
        time.sleep(0.9)
    assert not found
    with phases.doing("step", "step 8"):
        assert heard.wait(10)
    assert found[0].startswith("step (step 8) has not ended after ")
    for text in (stacks.read_text(), capfd.readouterr().err):
        assert "test_a_phase_that_does_not_end" in text
    phases.close()


def test_an_inner_phase_is_not_the_outer_ones_hang(tmp_path):
    phases, found, _, _ = watched(tmp_path, Limits(0.5, 1.0, 0.5))
    with phases.doing("start"):
        for _ in range(3):
            time.sleep(0.3)
            with phases.doing("restore"):
                time.sleep(0.3)
    assert not found
    phases.close()


def test_nothing_is_watched_without_a_floor(tmp_path):
    phases, found, _, _ = watched(tmp_path, Limits(0.0, 1.0, 0.1))
    with phases.doing("step"):
        time.sleep(0.8)
    assert not found
