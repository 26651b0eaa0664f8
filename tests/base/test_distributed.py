"""Several processes: what the command line says of them, and how they end; without any program."""

import argparse
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import pytest

from qk_jax.base import distributed
from qk_jax.base.distributed import Given
from qk_jax.base.errors import InputError

SCRIPT = pathlib.Path(__file__).parent / "several.py"


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(what, processes=3):
    """(status, stderr, seconds after the first of them ended) of each process."""
    address = str(port())
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), address, str(processes), str(i), what],
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    ends = {}
    limit = time.monotonic() + 100
    while len(ends) < processes and time.monotonic() < limit:
        for i, process in enumerate(running):
            if process.poll() is not None:
                ends.setdefault(i, time.monotonic())
        time.sleep(0.05)
    for process in running:
        process.kill()
    first = min(ends.values())
    outputs = [process.communicate()[1] for process in running]
    return [(running[i].returncode, text, ends[i] - first) for i, text in enumerate(outputs)]


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(("what", "status"), [("end", 0), ("leave", 0), ("status", 42)])
def test_all_end_together_with_one_status(what, status):
    for code, text, _ in ended(what):
        assert code == status, text
        assert "Check failure" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("what", "where", "status", "cause"),
    [
        ("input", 2, 2, "record 7 is no picture"),
        ("bug", 2, 1, "RuntimeError: a bug"),
        ("first", 0, 2, "the disk is full"),
        ("thread", 2, 1, "step 3 has not ended"),
    ],
)
def test_an_error_of_one_ends_all_with_its_cause(what, where, status, cause):
    for number, (code, text, seconds) in enumerate(ended(what)):
        assert seconds < 15
        if number == where:
            assert code == status and cause in text
        else:
            host = socket.gethostname()
            assert code == 1, text
            assert last_line(text) == f"error: process {where} ({host}) stopped: {cause}"


@pytest.mark.parametrize("what", ["kill", "collective"])
def test_a_killed_process_ends_all_in_time_with_its_host_named(what):
    """Also where the others get an error out of a collective with it."""
    *others, (code, _, _) = ended(what)
    assert code == -9
    for code, text, seconds in others:
        assert code == distributed.LOST and seconds < 30, text
        assert f"error: process 2 ({socket.gethostname()}) is gone; start again" in last_line(text)


def test_sigterm_before_the_first_step_is_not_lost():
    for code, text, _ in ended("preempted", 2):
        assert code == 42, text


def test_processes_that_differ_say_where():
    for code, text, _ in ended("agree", 2):
        assert code == 2, text
        assert re.search(r"clip is '2' on process 0 \(.*\) and '3' on process 1 \(.*\)", text)


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    code = (
        "from qk_jax.base import distributed\n"
        f"distributed.start(distributed.Given('127.0.0.1:{port()}', 2, 1), timeout_s=3)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(
        r"InputError: the coordinator 127.0.0.1:\d+ cannot be reached within 3 s", found.stderr
    )
    assert "a firewall rule" in found.stderr


def options(**values):
    return argparse.Namespace(**{"coordinator": None, "processes": None, "process": None} | values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator, --processes and --process go together"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator is 'a'; give"),
        ({"coordinator": "a:x", "processes": 2, "process": 0}, "give HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process is 2 of 2"),
        ({"coordinator": "a:1", "processes": 2, "process": -1}, "--process is -1 of 2"),
    ],
)
def test_options_that_do_not_fit(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Given.of(options(**given))


def test_the_environment_says_what_the_options_do_not(monkeypatch):
    assert Given.of(options()) == Given()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert Given.of(options()) == Given("a:1", 4, 3)
    assert Given.of(options(process=1)) == Given("a:1", 4, 1)
    monkeypatch.setenv("JAX_PROCESS_ID", "x")
    with pytest.raises(InputError, match="JAX_PROCESS_ID is 'x', expected a number"):
        Given.of(options())


def test_variables_of_other_slices_are_refused(monkeypatch):
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    with pytest.raises(InputError, match="MEGASCALE_NUM_SLICES is set"):
        distributed.start(Given())


@pytest.mark.parametrize(
    ("error", "may_be"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"), True),
        (ValueError("Gloo is a word of ours"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo AllGather failed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (None, False),
    ],
)
def test_which_errors_another_process_may_have_caused(error, may_be):
    assert distributed._may_be_of_others(error) is may_be


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"port {where.partition(':')[2]} cannot be listened"):
            distributed._check_free(where)


def test_the_first_difference_is_named():
    said = {0: {"a": "1", "b": "2"}, 1: {"a": "1", "b": "2"}, 2: {"a": "1", "c": "2"}}
    line = distributed._difference(said, ["x", "y", "z"])
    assert line.startswith("b is '2' on process 0 (x) and 'absent' on process 2 (z)")
    assert not distributed._difference({0: {"a": "1"}, 1: {"a": "1"}}, ["x", "y"])
