"""Runs the trainer on one host: counts fruitless starts, hands signals on, keeps the exit status.

    python supervise.py --checkpoints W/stage1/checkpoints --starts W/launch/starts-stage1.json \\
        --restarts 3 -- -m qk_jax.train --config ...

It lies beside the wheel on a TPU VM and is process 1 of the container on GKE. There it must take
SIGTERM and hand it on: the kernel drops what process 1 has no handler for, and the trainer has none
while it imports. Who starts the trainer again decides by the exit status, which is the trainer's,
128 + signal for a killed one, and 3 after `--restarts` restarts without a new checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from qk_jax.base import files

FRUITLESS = 3


class Child:
    """A process to which SIGTERM and SIGINT are handed on, also those that came before it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.early = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hand_on)

    def hand_on(self, number: int, _: object) -> None:
        if self.process is None:
            self.early = number
        else:
            self.process.send_signal(number)

    def run(self, command: Sequence[str]) -> int:
        """Its exit status."""
        self.process = subprocess.Popen(command)
        if self.early:
            self.process.send_signal(self.early)
        while True:  # as process 1 it also buries what orphaned workers leave
            found, status = os.waitpid(-1, 0)
            if found == self.process.pid:
                code = self.process.returncode = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def is_first() -> bool:
    """Whether this is the first host of the first slice, which counts for all.

    `host.sh` numbers those of TPU VMs, GKE its own.
    """
    given = [os.environ.get(name) for name in ("QK_SLICE", "MEGASCALE_SLICE_ID")]
    given += [os.environ.get(name) for name in ("QK_HOST", "TPU_WORKER_ID")]
    return all(number in (None, "", "0") for number in given)


def count(checkpoints: files.Path, starts: files.Path) -> tuple[int, int]:
    """(newest step, starts from it with this one); writes them down."""
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    step, number = max((int(name) for name in names if name.isdigit()), default=0), 1
    try:
        before = json.loads(starts.read_text()) if starts.exists() else {}
        if before.get("step") == step:
            number += int(before["starts"])
    except (ValueError, KeyError, AttributeError, TypeError):
        pass  # cut off while it was written: count anew
    starts.parent.mkdir(parents=True, exist_ok=True)
    starts.write_text(json.dumps({"step": step, "starts": number}))
    return step, number


def main(argv: Sequence[str]) -> int:
    """The command; see the module's docstring."""
    child = Child()
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--checkpoints", required=True, type=files.Path)
    options.add_argument("--starts", required=True, type=files.Path)
    options.add_argument("--restarts", required=True, type=int)
    options.add_argument("words", nargs="+", help="arguments of Python")
    args = options.parse_args(argv)
    if is_first():
        step, number = count(args.checkpoints, args.starts)
        if number > args.restarts + 1:
            what = f"error: {number - 1} starts from step {step} brought no new checkpoint"
            print(f"{what}; the log of the last one says why", file=sys.stderr)
            return FRUITLESS
        print(f"start {number} from step {step}", flush=True)
    return child.run([sys.executable, *args.words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
