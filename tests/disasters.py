"""Starts of a stage over several processes, and the disasters that befall them.

A disaster is a function of a start. It gives the exit statuses that may follow, none where the
start goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from qk_jax.base.distributed import HEARTBEAT_S
from tests.base import storage

ROOT = pathlib.Path(__file__).parent.parent
NANO = "tests/training/nano.py"
PROCESSES, DEVICES_IN_ALL = 2, 4
LIMIT_S = 600  # of one start: it hangs
SILENCE_S = 20  # of a bucket
WATCHDOG_S = 60  # longer than a bucket's silence
FINE, STOPPED, AGAIN = 0, 1, 42  # statuses
# Of a killed process, and of one whose coordinator is gone, or that has no handler yet.
KILLED, ABORTED, TERMINATED = -signal.SIGKILL, -signal.SIGABRT, -signal.SIGTERM
DISK_MB = 64
NEEDS_MOUNT = "full disk"  # the right to mount a tmpfs


class Place:
    """Where a run is: its work directory, and the same files as this program sees them.

    Attributes:
      workdir: as the command line names it.
      here: a local folder.
      server: of the bucket that `workdir` is in, if any.
      records: folder of record files.
      clock: what is added to the time of all processes, for libfaketime; None without it.
    """

    def __init__(
        self,
        workdir: str,
        here: pathlib.Path,
        records: pathlib.Path,
        clock: pathlib.Path | None,
        server: storage.Server | None = None,
    ):
        self.workdir, self.here, self.records = workdir, here, records
        self.clock, self.server = clock, server
        self.has_small_disk = False

    @property
    def environment(self) -> dict[str, str]:
        """Of the processes of a start."""
        variables = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        }
        if self.clock is not None:
            self.clock.write_text("+0s\n")
            variables |= {
                "LD_PRELOAD": str(faketime()),
                "FAKETIME_TIMESTAMP_FILE": str(self.clock),
                "FAKETIME_CACHE_DURATION": "1",  # seconds after which it is read again
                "DONT_FAKE_MONOTONIC": "1",  # which a step of a real clock leaves alone
            }
        return os.environ | variables


def faketime() -> pathlib.Path | None:
    """The library that steps the clock of the processes that load it, of PyPI's libfaketime."""
    found = importlib.util.find_spec("libfaketime")
    if found is None:
        return None
    library = pathlib.Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    return library if library.is_file() else None


class Start:
    """One start of a stage: all its processes."""

    def __init__(
        self,
        stage: str,
        place: Place,
        logs: pathlib.Path,
        fields: dict[str, object],
        processes: int = PROCESSES,
    ):
        fields = {
            "checkpoint.every": 2, "data.workers": 1, "checkpoint.keep": 3, "data.sizes": "64x64",
            "watchdog.floor_s": WATCHDOG_S, "watchdog.first_s": 300, "data.max_bad_share": 0.0,
            "data.records": place.records, "distributed.timeout_s": 60, **fields,
        }  # fmt: skip
        self.place, self.folder = place, place.here / stage
        self.logs = [logs / f"{stage}-{i}.log" for i in range(processes)]
        command = [
            sys.executable, "-m", "qk_jax.train", "--config", f"{NANO}:{stage}",
            "--workdir", place.workdir,
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]  # fmt: skip
        environment = place.environment | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_IN_ALL // processes}"
        }
        if processes > 1:
            command += ["--coordinator", free_address(), "--processes", str(processes)]
        self.processes = [
            subprocess.Popen(
                command + (["--process", str(i)] if processes > 1 else []),
                cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(self.logs)
        ]  # fmt: skip

    def step(self) -> int:
        """The last step in the metrics, 0 before there is one."""
        path, last = self.folder / "metrics.jsonl", 0
        for line in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # torn
                last = json.loads(line)["step"]
        return last

    def wait(self, reached: Callable[[], bool]) -> bool:
        """Whether `reached` holds before a process ends, within LIMIT_S."""
        end = time.monotonic() + LIMIT_S
        while all(process.poll() is None for process in self.processes):
            if reached():
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return False

    def signal(self, number: int, *which: int) -> None:
        for index in which:
            self.processes[index].send_signal(number)

    def kill(self) -> None:
        """Ends all processes at once, and waits for it."""
        self.signal(signal.SIGKILL, *range(len(self.processes)))
        for process in self.processes:
            process.wait()

    def statuses(self) -> list[int]:
        """Of all processes, once they have ended.

        Raises:
          TimeoutError: one hangs.
        """
        end = time.monotonic() + LIMIT_S
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a process of {self.folder} has not ended")
            time.sleep(0.1)
        return [process.returncode for process in self.processes]


Disaster = Callable[[Start, random.Random], set[int]]
DISASTERS: dict[str, Disaster] = {}


def disaster(function: Disaster) -> Disaster:
    DISASTERS[function.__name__.replace("_", " ")] = function
    return function


def possible(place: Place) -> list[str]:
    """Names of the disasters that can befall a run at `place`."""
    lacking = {
        NEEDS_MOUNT: not place.has_small_disk,
        "a step of the clock": place.clock is None,
        "a silent bucket": place.server is None,
        "a bucket that refuses connections": place.server is None,
    }
    return [name for name in DISASTERS if not lacking.get(name)]


@disaster
def SIGTERM_to_one(start: Start, rng: random.Random) -> set[int]:
    start.signal(signal.SIGTERM, rng.randrange(PROCESSES))
    return {AGAIN}


@disaster
def SIGTERM_to_all(start: Start, rng: random.Random) -> set[int]:
    start.signal(signal.SIGTERM, *range(PROCESSES))
    return {AGAIN}


@disaster
def SIGKILL_of_one(start: Start, rng: random.Random) -> set[int]:
    start.signal(signal.SIGKILL, PROCESSES - 1)
    return {AGAIN, KILLED}


@disaster
def SIGKILL_of_the_coordinator(start: Start, rng: random.Random) -> set[int]:
    start.signal(signal.SIGKILL, 0)
    return {AGAIN, KILLED, ABORTED}


@disaster
def SIGKILL_of_all(start: Start, rng: random.Random) -> set[int]:
    start.kill()
    return {KILLED}


@disaster
def SIGSTOP_of_a_data_worker(start: Start, rng: random.Random) -> set[int]:
    main = start.processes[rng.randrange(PROCESSES)].pid
    children = pathlib.Path(f"/proc/{main}/task/{main}/children").read_text().split()
    workers = [pid for pid in map(int, children) if "spawn_main" in command_of(pid)]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    return {STOPPED} if workers else set()


@disaster
def a_flipped_bit_in_the_newest_checkpoint(start: Start, rng: random.Random) -> set[int]:
    start.kill()
    if file := a_file_of_the_newest(start, rng):
        flip(file, rng)
    return {KILLED}


@disaster
def a_truncated_file_in_the_newest_checkpoint(start: Start, rng: random.Random) -> set[int]:
    start.kill()
    if file := a_file_of_the_newest(start, rng):
        os.truncate(file, rng.randrange(file.stat().st_size))
    return {KILLED}


@disaster
def a_damaged_record_file(start: Start, rng: random.Random) -> set[int]:
    """Is never replaced by other records here (data.max_bad_share is 0): it stops the run, or
    nothing of it was read."""
    file = rng.choice(sorted(start.place.records.iterdir()))
    whole, step = file.read_bytes(), start.step()
    try:
        if rng.random() < 0.5:
            flip(file, rng)
        else:
            os.truncate(file, rng.randrange(len(whole)))
        start.wait(lambda: start.step() >= step + 6)
        start.kill()
    finally:
        file.write_bytes(whole)
    return {STOPPED, KILLED}


@disaster
def a_torn_line_in_the_metrics(start: Start, rng: random.Random) -> set[int]:
    start.kill()
    with (start.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    return {KILLED}


@disaster
def a_damaged_compiled_program(start: Start, rng: random.Random) -> set[int]:
    start.signal(signal.SIGTERM, *range(PROCESSES))
    start.statuses()
    files = sorted((start.place.here / "compilation_cache").glob("*-cache"))
    if files:
        file = rng.choice(files)
        os.truncate(file, file.stat().st_size // 2)
    return {AGAIN}


@disaster
def full_disk(start: Start, rng: random.Random) -> set[int]:
    """Until a save has failed, of which three in a row may. The metrics stop, too."""
    with filled(start.place.here) as fill:

        def failed() -> bool:
            fill()  # what a step that is no longer kept has left
            return "was not saved" in start.logs[0].read_text(errors="replace")

        start.wait(failed)
    return set()


@disaster
def a_step_of_the_clock(start: Start, rng: random.Random) -> set[int]:
    """JAX's coordination service measures silence by it, and may take all processes for lost."""
    assert start.place.clock is not None
    start.place.clock.write_text(rng.choice(["-1d\n", "-1h\n", "-1m\n", "+1h\n", "+1d\n"]))
    end = time.monotonic() + 2 * HEARTBEAT_S
    goes_on = start.wait(lambda: time.monotonic() > end)
    return set() if goes_on else {AGAIN, ABORTED}


@disaster
def a_silent_bucket(start: Start, rng: random.Random) -> set[int]:
    assert start.place.server is not None
    with start.place.server.silent():
        time.sleep(SILENCE_S)
    return set()


@disaster
def a_bucket_that_refuses_connections(start: Start, rng: random.Random) -> set[int]:
    assert start.place.server is not None
    start.place.server.stop()
    time.sleep(SILENCE_S)
    start.place.server.start()
    return set()


# Before the first step too; the others need a run that has begun.
EARLY = ("SIGKILL of one", "SIGKILL of the coordinator", "SIGKILL of all", "SIGTERM to all")


def free_address() -> str:
    """HOST:PORT that no program listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def flip(file: pathlib.Path, rng: random.Random) -> None:
    """Flips one bit, in place."""
    position = rng.randrange(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << rng.randrange(8)]))


def a_file_of_the_newest(start: Start, rng: random.Random) -> pathlib.Path | None:
    """A file with bytes of the newest step, where another step is older than it."""
    checkpoints = start.folder / "checkpoints"
    steps = sorted(int(x.name) for x in checkpoints.glob("*") if x.name.isdecimal())
    if len(steps) < 2:
        return None
    folder = checkpoints / str(steps[-1])
    files = sorted(x for x in folder.rglob("*") if x.is_file() and x.stat().st_size)
    return rng.choice(files) if files else None


@contextlib.contextmanager
def filled(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Within the block no byte is left on the disk of `folder` whenever what it gives is called."""
    filler = folder / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    fill()
    try:
        yield fill
    finally:
        filler.unlink()


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[bool]:
    """A tmpfs over `folder`; gives whether it could be mounted."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    mounted = not subprocess.run(["mount", *options], capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
