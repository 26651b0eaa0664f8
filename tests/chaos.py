"""Trains three stages over several processes while disasters befall them, and compares the bits.

    python tests/chaos.py [--disasters 60] [--steps N] [--seed 0] [--out DIR]

The stages of tests/training/nano.py run twice with two processes of two devices each, which read
record files with one data worker each; stage 3 has its work directory in a bucket. Once nothing
happens to them, and once the disasters of tests/disasters.py, one start after another, do. Each
start must end with a status that its disaster allows. In the end every leaf of every stage's last
checkpoint, weights, moments and averages, must be the same to the bit. Exits with 1 where one is
not.

What the machine lacks for a disaster is said; where the variable CI is set, and it can be installed
by pip, its lack is an error.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from qk_jax.data.example import TASKS
from qk_jax.data.synthesis import tasks
from qk_jax.data.writer import Writer
from qk_jax.experiment import stages
from qk_jax.pictures.roles import SOURCE
from tests import disasters
from tests.base import storage
from tests.disasters import DISASTERS, FINE, Place, Start

STAGES = ("stage1", "stage2", "stage3")
IN_BUCKET = "stage3"
IGNORED = 10  # steps after which a SIGTERM is taken for ignored
RECORDS = 96  # of each task


def write_records(folder: pathlib.Path) -> None:
    """One record file with every task."""
    with Writer(folder / "train.array_record") as writer:
        for name in TASKS:
            for example in tasks.examples("train", name, RECORDS):
                shown = list(zip(example.pictures, example.roles, strict=True))
                writer.add(
                    name, example.instruction, example.target,
                    source=[picture for picture, role in shown if role == SOURCE],
                    references=[picture for picture, role in shown if role != SOURCE],
                )  # fmt: skip


class Run:
    """The three stages, with or without disasters.

    Attributes:
      happened: how often each disaster did.
      ended_s: by disaster, the longest time from it to the end of the last process.
    """

    def __init__(self, out: pathlib.Path, name: str, server: storage.Server | None, steps: int):
        self.out, self.steps = out / name, steps
        clock = self.out / "clock" if disasters.faketime() else None
        self.records = self.out / "records"
        write_records(self.records)
        local = self.out / "run"
        self.local = Place(str(local), local, self.records, clock)
        self.bucket = self.local
        if server is not None:
            here = server.root / storage.BUCKET.removeprefix("gs://") / name
            workdir = f"{storage.BUCKET}/{name}"
            self.bucket = Place(workdir, here, self.records, clock, server)
        self.happened: collections.Counter[str] = collections.Counter()
        self.ended_s: dict[str, float] = {}

    def place(self, stage: str) -> Place:
        return self.bucket if stage == IN_BUCKET else self.local

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """The work directory on a disk that may be filled, where it can be had."""
        with disasters.small_disk(self.local.here) as mounted:
            self.local.has_small_disk = mounted
            yield

    def train(self, count: int, rng: random.Random) -> None:
        """All stages, while `count` disasters happen, as many to each."""
        kinds = {stage: disasters.possible(self.place(stage)) for stage in STAGES}
        if count and (missing := DISASTERS.keys() - {x for each in kinds.values() for x in each}):
            print(f"left out, for want of what they need: {', '.join(sorted(missing))}", flush=True)
            if os.environ.get("CI") and missing - {disasters.NEEDS_MOUNT}:
                raise SystemExit("error: in CI all but a full disk must be tried; pip install "
                                 "'qk_jax[test]'")  # fmt: skip
        for number, stage in enumerate(STAGES):
            # what an earlier stage ended too soon for, too
            left = count * (number + 1) // len(STAGES) - self.happened.total()
            ended = False
            while not ended:
                ended, happened = self.start(stage, left, kinds[stage], rng)
                left -= happened

    def start(
        self, stage: str, left: int, kinds: list[str], rng: random.Random
    ) -> tuple[bool, int]:
        """One start of a stage, with at most `left` disasters.

        Returns:
          Whether it reached its last step, and how many disasters happened.

        Raises:
          SystemExit: it ended as it may not; its logs are printed.
        """
        fields: dict[str, object] = {"steps": self.steps}
        previous = stages.get(stage).previous
        if previous and self.place(stage) is not self.place(previous):
            fields["init.checkpoint"] = self.place(previous).here / previous
        start, begun = Start(stage, self.place(stage), self.out, fields), time.monotonic()
        allowed, names = {FINE}, []
        while len(names) < left and len(allowed) == 1:
            early = not names and rng.random() < 0.2
            if early:
                moment = begun + rng.uniform(0, 20)
                reached = start.wait(lambda moment=moment: time.monotonic() > moment)
            else:
                pace = (self.steps - start.step()) // (left - len(names))  # so that all happen
                goal = start.step() + min(rng.randrange(1, 4), max(pace, 1))
                reached = start.wait(lambda goal=goal: start.step() >= goal)
            if not reached:
                break
            names.append(self.next(kinds, rng, early))
            befell, at = time.monotonic(), start.step()
            # all may have ended well just before
            allowed |= DISASTERS[names[-1]](start, rng)
            if early:
                # JAX aborts where a peer is lost while all register.
                allowed |= {disasters.TERMINATED, disasters.STOPPED, disasters.ABORTED}
        found = start.statuses()
        if len(allowed) > 1:  # the last disaster has ended it
            seconds = time.monotonic() - befell
            self.ended_s[names[-1]] = max(self.ended_s.get(names[-1], 0), seconds)
        print(f"{stage} to step {start.step()} of {self.steps}: {', '.join(names) or 'nothing'}, "
              f"{found}, {time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
        ignored = names and "SIGTERM" in names[-1] and start.step() > at + IGNORED
        if ignored or not set(found) <= allowed:
            for log in start.logs:
                print(f"---- {log}\n{log.read_text()[-4000:]}")
            raise SystemExit(f"error: expected statuses {sorted(allowed)}")
        return set(found) == {FINE}, len(names)

    def next(self, kinds: list[str], rng: random.Random, early: bool) -> str:
        """A disaster that has happened least often so far."""
        kinds = [name for name in kinds if name in disasters.EARLY] if early else kinds
        least = min(self.happened[name] for name in kinds)
        name = rng.choice([name for name in kinds if self.happened[name] == least])
        self.happened[name] += 1
        return name

    def digests(self) -> dict[str, str]:
        """Of every leaf of the last checkpoint of every stage."""
        return {
            f"{stage}/{name}": digest
            for stage in STAGES
            for name, digest in _digests(self.place(stage).here / stage / "checkpoints").items()
        }

    def takes_programs_of(self, other: Run) -> None:
        """Copies what `other` has compiled, so that a start takes less time."""
        for mine, theirs in ((self.local, other.local), (self.bucket, other.bucket)):
            shutil.copytree(
                theirs.here / "compilation_cache",
                mine.here / "compilation_cache",
                dirs_exist_ok=True,
            )


def _digests(checkpoints: pathlib.Path) -> dict[str, str]:
    steps = [int(x.name) for x in checkpoints.glob("*") if x.name.isdecimal()]
    meta = json.loads((checkpoints / str(max(steps)) / "meta/metadata").read_text())
    return {
        f"{meta['step']}/{item}/{name}": leaf["digest"]
        for item, leaves in meta["leaves"].items()
        for name, leaf in leaves.items()
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--disasters", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of each stage (8, and 2 for each disaster)")
    parser.add_argument("--out", type=pathlib.Path, help="where an undisturbed run is not done "
                        "again (default: a folder that is removed)")  # fmt: skip
    args = parser.parse_args(argv)
    # Each stage must last longer than its disasters take steps.
    steps = args.steps or 8 + 2 * args.disasters // len(STAGES)
    with contextlib.ExitStack() as stack:
        out = args.out or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = None
        if why := storage.missing():
            print(f"no stage is in a bucket: {why}", flush=True)
        else:
            (out / "objects").mkdir(parents=True, exist_ok=True)
            server = stack.enter_context(storage.served(out / "objects"))
        quiet, loud = (Run(out, name, server, steps) for name in ("undisturbed", "disturbed"))
        quiet.train(0, random.Random(args.seed))
        with loud.disk():
            loud.takes_programs_of(quiet)
            loud.train(args.disasters, random.Random(args.seed))
            wanted, found = quiet.digests(), loud.digests()
    differ = sorted(x for x in wanted.keys() | found.keys() if wanted.get(x) != found.get(x))
    for name, count in sorted(loud.happened.items()):
        ended = f", ended within {loud.ended_s[name]:.1f} s" if name in loud.ended_s else ""
        print(f"{count:3d} x {name}{ended}")
    print(f"{loud.happened.total()} disasters: {len(wanted) - len(differ)} of {len(wanted)} leaves "
          "are the same bits")  # fmt: skip
    if differ:
        raise SystemExit(f"error: {', '.join(differ[:5])} differ")
    if loud.happened.total() < args.disasters:
        raise SystemExit(f"error: the stages ended before {args.disasters} disasters; give --steps")


if __name__ == "__main__":
    main(sys.argv[1:])
