"""Ctrl-C: heard at once whatever the process does, and one line at the end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qk_jax.base import errors, runtime

# Busy where Python calls no handler: inside of one call of a library, as a compiled program is.
BUSY = """
import contextlib, hashlib, signal, sys
from qk_jax.base import distributed, runtime
with runtime.answered(distributed.interrupted), contextlib.ExitStack() as stack:
    if sys.argv[2] == "patient":
        stack.enter_context(runtime.patient())
        signal.signal(signal.SIGINT, lambda *_: print("handled", flush=True))
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))
    print("done", flush=True)
"""


@pytest.fixture
def busy():
    """A process that is busy for minutes, or as long as it is given."""
    running = []

    def start(turns, how="patient"):
        command = [sys.executable, "-c", BUSY, str(turns), how]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True))
        assert running[-1].stdout.readline() == "busy\n"
        time.sleep(1)  # it is inside of the call
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_it_is_answered_before_python_can_and_a_second_one_ends(busy):
    process = busy(2_000_000_000)
    process.send_signal(signal.SIGINT)
    assert [process.stderr.readline(), process.stderr.readline()] == ["\n", f"{runtime.STOPPING}\n"]
    process.send_signal(signal.SIGINT)  # the same key, passed on twice
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(runtime._TWICE_S + 0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == errors.INTERRUPTED
    assert process.stdout.read() == ""  # no handler was called in all that time
    assert process.stderr.read() == f"\n{errors.STOPPED}\n"


def test_where_there_is_nothing_to_save_the_first_one_ends(busy):
    process = busy(2_000_000_000, "at once")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == errors.INTERRUPTED
    assert process.stderr.read() == f"\n{errors.STOPPED}\n"


def test_what_the_handler_does_comes_after(busy):
    process = busy(10_000_000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert out == "handled\ndone\n" and err.count(runtime.STOPPING) == 1
    assert process.returncode == 0


def test_nothing_is_left_behind():
    before, handler = signal.set_wakeup_fd(-1), signal.getsignal(signal.SIGINT)
    files = set(os.listdir("/proc/self/fd"))
    with runtime.answered(pytest.fail):
        assert signal.getsignal(signal.SIGINT) is not handler
    assert signal.set_wakeup_fd(before) == -1 and signal.getsignal(signal.SIGINT) is handler
    assert set(os.listdir("/proc/self/fd")) == files


def test_a_command_that_is_stopped_says_so_in_one_line(capsys):
    @errors.exits
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == errors.INTERRUPTED
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
