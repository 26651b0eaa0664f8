"""Traces are of the steps that were asked for."""

import os
import signal

import jax.numpy as jnp
import pytest

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.training import profiling


@pytest.fixture
def traced(monkeypatch):
    """Steps at which traces began and ended, instead of traces."""
    found = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda _: found.append("begin"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: found.append("end"))
    return found


def run(profiler, traced, steps, at=lambda step: None):
    """What is traced over steps 1 to `steps`; `at` is called before each."""
    for step in range(1, steps + 1):
        at(step)
        profiler.begin(step)
        traced.append(step)
        profiler.end(step, ())
    return traced


def test_steps_of_the_config(tmp_path, traced):
    profiler = profiling.Profiler(files.Path(tmp_path), (2, 3))
    assert run(profiler, traced, 4) == [1, "begin", 2, 3, "end", 4]


def test_a_signal_asks_for_the_next_three(tmp_path, traced):
    profiler = profiling.Profiler(files.Path(tmp_path), ())
    kill = lambda step: step == 2 and os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
    with profiler.signals():
        assert run(profiler, traced, 6, kill) == [1, "begin", 2, 3, 4, "end", 5, 6]


def test_a_run_that_ends_within_a_trace_writes_it(tmp_path):
    profiler = profiling.Profiler(files.Path(tmp_path), (1, 9))
    profiler.begin(1)
    profiler.end(1, jnp.ones(3) * 2)
    profiler.close()
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("steps", [(3,), (0, 2), (5, 4)])
def test_other_steps_are_refused(steps):
    with pytest.raises(InputError, match="profile.steps is .*such as 10,12"):
        profiling.check(steps)


def test_a_trace_of_a_run_in_a_bucket_is_on_the_disk(traced, monkeypatch, caplog):
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", traced.append)
    profiler = profiling.Profiler(files.Path("gs://bucket/run/stage1/profile"), (1, 1))
    run(profiler, traced, 1)
    assert traced[0].endswith("/qk_jax/profile") and "gs:" not in traced[0]
