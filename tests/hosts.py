"""Trains every stage in four processes and in one, and compares the losses.

    python tests/hosts.py [--steps 50] [--out DIR]

The stages of tests/training/nano.py run over four devices, once of one process and once of four,
with no data workers and with two in each process, from the same record files. The loss of every
step must agree to 1e-6 of itself; so must those of the steps that follow when each goes on from the
checkpoint of the other. Exits with 1 where they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import shutil
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from qk_jax.experiment import stages
from tests import chaos
from tests.disasters import FINE, Place, Start

HOSTS = (1, 4)  # processes
WORKERS = (0, 2)
MORE = 4  # steps from the other's checkpoint
TOLERANCE = 1e-6


class Case:
    """One stage with so many processes and workers, in a work directory of its own."""

    def __init__(
        self, out: pathlib.Path, stage: str, processes: int, workers: int, suffix: str = ""
    ):
        self.out, self.stage, self.processes, self.workers = out, stage, processes, workers
        here = out / f"{stage}-{processes}-{workers}{suffix}"
        self.place = Place(str(here), here, out / "records", None)

    def train(self, steps: int) -> None:
        """To step `steps`. Raises: SystemExit, when it fails; its logs are printed."""
        fields: dict[str, object] = {
            "steps": steps, "data.workers": self.workers, "checkpoint.every": 0,
        }  # fmt: skip
        if previous := stages.get(self.stage).previous:
            fields["init.checkpoint"] = self.out / f"{previous}-{HOSTS[0]}-{WORKERS[0]}" / previous
        self.place.here.mkdir(parents=True, exist_ok=True)
        start = Start(self.stage, self.place, self.place.here, fields, self.processes)
        if set(start.statuses()) != {FINE}:
            for log in start.logs:
                print(f"---- {log}\n{log.read_text()[-4000:]}")
            raise SystemExit(f"error: {self.place.here} ended with {start.statuses()}")

    def losses(self) -> list[float]:
        """Of every step."""
        text = (self.place.here / self.stage / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    def begins_as(self, other: Case, *what: str) -> None:
        """Copies folders of the other's work directory."""
        for name in what:
            source, target = other.place.here / name, self.place.here / name
            shutil.copytree(source, target, dirs_exist_ok=True)


def difference(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def compare(out: pathlib.Path, stage: str, steps: int) -> float:
    """Trains a stage in every way; returns the largest difference from the first."""
    worst, wanted, known = 0.0, [], {}
    for workers in WORKERS:
        for processes in HOSTS:
            case = Case(out, stage, processes, workers)
            if processes in known:
                case.begins_as(known[processes], "compilation_cache")
            known.setdefault(processes, case)
            case.train(steps)
            losses = case.losses()
            wanted = wanted or losses
            worst = max(worst, difference(losses, wanted))
            off = difference(losses, wanted)
            print(f"{stage}, {processes} processes, {workers} workers: {len(losses)} steps, the "
                  f"last loss {losses[-1]:.6f}, off by {off:.1e}", flush=True)  # fmt: skip
    after = {}
    for mine, other in (HOSTS, HOSTS[::-1]):
        case = Case(out, stage, mine, WORKERS[0], "-exchanged")
        case.begins_as(known[mine], "compilation_cache")
        case.begins_as(known[other], stage)
        case.train(steps + MORE)
        after[mine] = case.losses()[steps:]
    exchanged = difference(*after.values())
    print(f"{stage}, {MORE} steps from each other's checkpoint: off by {exchanged:.1e}", flush=True)
    return max(worst, exchanged)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=pathlib.Path, help="default: a folder that is removed")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        out = args.out or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chaos.write_records(out / "records")
        worst = max(compare(out, stage, args.steps) for stage in chaos.STAGES)
    print(f"the largest relative difference is {worst:.1e}, {TOLERANCE:.0e} is allowed")
    if worst > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
