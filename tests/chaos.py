"""Trains three stages over several processes while disasters befall them, and compares the bits.

    python tests/chaos.py [--disasters 60] [--seed 0] [--steps 12] [--out DIR]

The stages of tests/training/nano.py run twice with two processes of two devices each, which read
made pictures with one data worker each: once undisturbed, and once with a disaster in every start
until there were enough. Each must end with a status that the launchers know, within LIMIT_S; in the
end every leaf of every stage's last checkpoint, weights, moments and averages, must be the same to
the bit. Exits with 1 where one is not.

The machine's clock is not stepped and no disk is filled that others use: "full disk" needs the
right to mount a tmpfs, and is left out, and said so, where it is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).parent.parent
NANO = "tests/training/nano.py"
STAGES = ("stage1", "stage2", "stage3")
PROCESSES, DEVICES = 2, 2
LIMIT_S = 600  # of one start: it hangs
FINE, STOPPED, AGAIN = 0, 1, 42  # statuses
KILLED, ABORTED = -signal.SIGKILL, -signal.SIGABRT  # the latter where the coordinator is gone
DISK_MB = 64


class Start:
    """One start of a stage: all its processes."""

    def __init__(self, stage: str, workdir: pathlib.Path, steps: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        fields = {
            "steps": steps, "checkpoint.every": 2, "data.workers": 1, "checkpoint.keep": 3,
            "watchdog.floor_s": 30, "watchdog.first_s": 300, "data.sizes": "64x64",
        }  # fmt: skip
        self.stage, self.workdir = stage, workdir
        self.logs = [workdir.parent / f"{workdir.name}-{i}.log" for i in range(PROCESSES)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "PYTHONPATH": str(ROOT),
        }
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "qk_jax.train", "--config", f"{NANO}:{stage}",
                    "--workdir", str(workdir), "--coordinator", address,
                    "--processes", str(PROCESSES), "--process", str(i),
                    *(f"--config.{name}={value}" for name, value in fields.items()),
                ],
                cwd=ROOT, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT,
            )
            for i, log in enumerate(self.logs)
        ]  # fmt: skip

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / self.stage / "checkpoints"

    def step(self) -> int:
        """The last step in the metrics, 0 before there is one."""
        path, last = self.workdir / self.stage / "metrics.jsonl", 0
        for line in path.read_text().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):  # torn
                last = json.loads(line)["step"]
        return last

    def wait_for(self, step: int) -> bool:
        """Whether `step` is reached before a process ends."""
        while all(process.poll() is None for process in self.processes):
            if self.step() >= step:
                return True
            time.sleep(0.05)
        return False

    def signal(self, number: int, *which: int) -> None:
        for index in which:
            self.processes[index].send_signal(number)

    def statuses(self) -> list[int]:
        """Of all processes, once they have ended.

        Raises:
          TimeoutError: one hangs.
        """
        end = time.monotonic() + LIMIT_S
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > end:
                self.signal(signal.SIGKILL, *range(PROCESSES))
                raise TimeoutError(f"a process of {self.stage} has not ended")
            time.sleep(0.1)
        return [process.returncode for process in self.processes]


Disaster = Callable[[Start, random.Random], set[int]]  # gives the statuses that may follow
DISASTERS: dict[str, Disaster] = {}


def disaster(function: Disaster) -> Disaster:
    DISASTERS[function.__name__.replace("_", " ")] = function
    return function


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
    start.signal(signal.SIGKILL, *range(PROCESSES))
    return {KILLED}


@disaster
def SIGSTOP_of_a_data_worker(start: Start, rng: random.Random) -> set[int]:
    main = start.processes[rng.randrange(PROCESSES)].pid
    children = pathlib.Path(f"/proc/{main}/task/{main}/children").read_text().split()
    workers = [pid for pid in map(int, children) if "spawn_main" in command_of(pid)]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    return {STOPPED} if workers else {FINE}


@disaster
def a_flipped_bit_in_the_newest_checkpoint(start: Start, rng: random.Random) -> set[int]:
    allowed = SIGKILL_of_all(start, rng)
    start.statuses()
    if file := a_file_of_the_newest(start, rng):
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    return allowed


@disaster
def a_truncated_file_in_the_newest_checkpoint(start: Start, rng: random.Random) -> set[int]:
    allowed = SIGKILL_of_all(start, rng)
    start.statuses()
    if file := a_file_of_the_newest(start, rng):
        os.truncate(file, rng.randrange(file.stat().st_size))
    return allowed


@disaster
def a_torn_line_in_the_metrics(start: Start, rng: random.Random) -> set[int]:
    allowed = SIGKILL_of_all(start, rng)
    start.statuses()
    with (start.workdir / start.stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    return allowed


@disaster
def a_damaged_compiled_program(start: Start, rng: random.Random) -> set[int]:
    allowed = SIGTERM_to_all(start, rng)
    start.statuses()
    files = sorted((start.workdir / "compilation_cache").glob("*-cache"))
    if files:
        file = rng.choice(files)
        os.truncate(file, file.stat().st_size // 2)
    return allowed


@disaster
def full_disk(start: Start, rng: random.Random) -> set[int]:
    filler = start.workdir / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    start.wait_for(start.step() + 4)
    allowed = SIGKILL_of_all(start, rng)
    start.statuses()
    filler.unlink()
    return allowed | {1, 2}


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def a_file_of_the_newest(start: Start, rng: random.Random) -> pathlib.Path | None:
    """A file with bytes of the newest step, where another step is older than it."""
    steps = sorted(int(x.name) for x in start.checkpoints.glob("*") if x.name.isdecimal())
    if len(steps) < 2:
        return None
    folder = start.checkpoints / str(steps[-1])
    return rng.choice(sorted(x for x in folder.rglob("*") if x.is_file() and x.stat().st_size))


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


def trained(workdir: pathlib.Path, steps: int, disasters: int, rng: random.Random) -> dict:
    """The digests of every stage, trained while so many disasters happen.

    Raises:
      SystemExit: a start ended as none may; its logs are printed.
    """
    with small_disk(workdir) as mounted:
        kinds = [name for name in DISASTERS if mounted or name != "full disk"]
        if disasters and not mounted:
            print("left out, for want of the right to mount: full disk", flush=True)
        for number, stage in enumerate(STAGES):
            left = disasters * (number + 1) // len(STAGES) - disasters * number // len(STAGES)
            while not one_start(stage, workdir, steps, kinds if left > 0 else [], rng):
                left -= 1
        return {stage: digests(workdir / stage) for stage in STAGES}


def one_start(
    stage: str, workdir: pathlib.Path, steps: int, kinds: list[str], rng: random.Random
) -> bool:
    """Whether the stage reached its last step; else a disaster, if any of `kinds`, ended it."""
    start, begun = Start(stage, workdir, steps), time.monotonic()
    allowed, name = {FINE}, "nothing"
    if kinds and start.wait_for(start.step() + rng.randrange(1, 4)):
        name = rng.choice(kinds)
        time.sleep(rng.random())
        # all may have ended well just before
        allowed |= DISASTERS[name](start, rng)
    found = start.statuses()
    seconds = time.monotonic() - begun
    print(f"{stage} to step {start.step()}: {name}, {found}, {seconds:.0f} s", flush=True)
    if not set(found) <= allowed:
        for log in start.logs:
            print(f"---- {log}\n{log.read_text()[-4000:]}")
        raise SystemExit(f"error: expected statuses {sorted(allowed)}")
    return set(found) == {FINE}


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Of every leaf of the last checkpoint of a stage."""
    steps = [int(x.name) for x in (folder / "checkpoints").glob("*") if x.name.isdecimal()]
    meta = json.loads((folder / "checkpoints" / str(max(steps)) / "meta/metadata").read_text())
    return {
        f"{meta['step']}/{item}/{name}": leaf["digest"]
        for item, leaves in meta["leaves"].items()
        for name, leaf in leaves.items()
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--disasters", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="of each stage")
    parser.add_argument("--out", type=pathlib.Path, help="default: a folder that is removed")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        out = args.out or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rng = random.Random(args.seed)
        wanted = trained(out / "undisturbed", args.steps, 0, rng)
        found = trained(out / "disturbed", args.steps, args.disasters, rng)
    differ = [
        f"{stage}/{name}"
        for stage, leaves in wanted.items()
        for name in leaves.keys() | found[stage].keys()
        if leaves.get(name) != found[stage].get(name)
    ]
    total = sum(map(len, wanted.values()))
    print(f"{args.disasters} disasters: {total - len(differ)} of {total} leaves are the same bits")
    if differ:
        raise SystemExit(f"error: {', '.join(sorted(differ)[:5])} differ")


if __name__ == "__main__":
    main(sys.argv[1:])
