"""The whole project in one command: trains three stages, measures, paints, exports, reports.

Run by launch/quickstart.sh. Finished parts are kept: the same command resumes a stopped run. The
last lines of the output say what is in the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import report  # beside this file
from report import PHASES

from qk_jax import evaluation, painting
from qk_jax.base import cli, files, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.evaluation.report import page
from qk_jax.experiment import config as config_lib
from qk_jax.painting import sheets
from qk_jax.training import start

ROOT = pathlib.Path(__file__).resolve().parent.parent
IS_MAC = sys.platform == "darwin"  # counts memory in bytes, where Linux counts KiB
STAGES = ("stage1", "stage2", "stage3")
MODES = {
    "quick": ("tiny", evaluation.Extent()),
    "smoke": ("smoke", evaluation.SMOKE),
    "long": ("tiny_long", evaluation.LONG),
}


class Quickstart:
    """A run of the command, in one folder."""

    def __init__(self, out: files.PathLike, mode: str):
        self.out, self.mode = files.Path(out), mode
        self.size, self.extent = MODES[mode]
        self.specs = {stage: f"{ROOT}/configs/{stage}.py:{self.size}" for stage in STAGES}
        configs = [config_lib.to_json(config_lib.load(spec)) for spec in self.specs.values()]
        text = json.dumps([configs, repr(self.extent)])
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.state: dict[str, Any] = {"mode": mode, "digest": self.digest, "parts": {}}

    def open(self, fresh: bool) -> None:
        """Makes the folder, or reads the state of a run that was begun in it.

        Raises:
          InputError: the folder cannot be written, or holds something else.
        """
        marker = self.out / "state.json"
        if fresh and marker.is_file():
            self.out.rmtree()
        files.writable_folder(self.out, "the folder")
        if marker.is_file():
            try:
                found = files.read_json(marker)
            except InputError:
                raise InputError(f"{marker} is damaged; begin anew with --fresh") from None
            if found.get("digest") != self.digest:
                raise InputError(
                    f"{self.out} holds a run of mode {found.get('mode')!r} with other settings "
                    f"than this one of mode {self.mode!r}; give another --out, or --fresh"
                )
            self.state = found
        elif any(self.out.iterdir()):
            raise InputError(f"{self.out} is not empty and holds no quickstart; give another --out")
        self.write("state.json", self.state)

    def write(self, name: str, value: Any) -> None:
        files.write_json(self.out / name, value)

    def part(self, name: str, title: str, work: Callable[[], None]) -> None:
        """Does `work` unless it was done before, and records its time and memory."""
        if name in self.state["parts"]:
            return
        print(f"[{len(self.state['parts']) + 1}] {title}", flush=True)
        start, before = time.monotonic(), processor_seconds()
        work()
        self.state["parts"][name] = {
            "seconds": round(time.monotonic() - start, 1),
            "processor_seconds": round(processor_seconds() - before, 1),
        }
        memory = self.state.setdefault("peak_memory_mib", {})
        for who, which in (("driver", resource.RUSAGE_SELF), ("child", resource.RUSAGE_CHILDREN)):
            peak = resource.getrusage(which).ru_maxrss / (1024**2 if IS_MAC else 1024)
            memory[who] = max(memory.get(who, 0), round(peak))
        self.write("state.json", self.state)

    # ---- the parts -----------------------------------------------------------------------------

    def run(self) -> None:
        """Every part that is not done, in order."""
        before = len(self.state["parts"])
        self.part("untrained", "measuring the untrained model", lambda: self.measure("untrained"))
        for stage in STAGES:
            train = functools.partial(self.train, stage)
            self.part(f"train {stage}", f"training {stage}", train)
            self.part(stage, f"measuring {stage}", functools.partial(self.measure, stage))
        self.part("export", "exporting stage3 to PyTorch", self.export)
        missing = [name for name in ("torch", "diffusers") if not importlib.util.find_spec(name)]
        if not missing:
            self.part("compare", "painting the same noise with PyTorch", self.compare)
        if before == len(self.state["parts"]):
            print("all parts are already done; --fresh begins anew")
        self.report(missing)

    def train(self, stage: str) -> None:
        """One stage, by the command that a user would type."""
        self.command("-m", "qk_jax.train", "--config", self.specs[stage], "--workdir", self.out)

    def export(self) -> None:
        """The stage-3 model as a folder for diffusers."""
        self.command(
            "-m", "qk_jax.convert", "to-pytorch",
            "--checkpoint", self.out / "stage3", "--out", self.out / "pytorch",
        )  # fmt: skip

    def compare(self) -> None:
        """The same weights, states and pictures from the same noise, in JAX and in PyTorch."""
        from qk_jax.export import verify  # imports transformers, slowly

        painter = painting.load(self.out / "stage3", batch=1)
        pipe = verify.load_pipeline(self.out / "pytorch")
        rows = []
        tensors = verify.tensors(painter, self.out / "pytorch")
        for line in itertools.chain(tensors, verify.outputs(painter, pipe)):
            print(f"    {line.name}: {line.difference:.3g} (at most {line.tolerance:g})")
            rows.append(line._asdict() | {"is_good": line.is_good})
        self.write("comparison.json", rows)

    def command(self, *words: Any) -> None:
        """Runs Python in a process of its own; exits with its status when it fails.

        After Ctrl-C it waits for the process, which saves; `subprocess.run` would kill it.
        """
        with subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)  # a terminal has done so already
                process.wait()
                raise
        if status:
            print(f"stopped (status {status}); the same command resumes", file=sys.stderr)
            raise SystemExit(status if status > 0 else 128 - status)

    def measure(self, phase: str) -> None:
        """Figures and sheets of one phase."""
        if phase == "untrained":
            loaded = start.untrained(config_lib.load(self.specs["stage1"]))
            painter = painting.of_loaded(loaded, batch=self.extent.batch)
        else:
            painter = painting.load(self.out / phase, batch=self.extent.batch)
        config = config_lib.load(self.specs["stage3"])
        held_out = evaluation.held_out_cases(config, self.extent.records)
        captions = evaluation.captions(config, self.extent.captions)
        figures, painted = evaluation.evaluate(
            painter, self.extent, held_out, captions, lambda line: print(f"    {line}", flush=True)
        )
        for task, pictures in painted.items():
            shown = held_out[task][: self.extent.sheet]
            sheet = sheets.of_requests(
                f"{task.replace('_', ' ')}, {phase}: held-out subjects",
                [example.request for example in shown],
                pictures[: self.extent.sheet],
                [example.truth for example in shown],
            )
            sheets.save(sheet, self.out / "samples" / f"{task}_{phase}.png")
        self.write(f"evaluation/{phase}.json", figures)

    def report(self, missing: Sequence[str]) -> None:
        """Writes report.json, report.md and report.html, and prints what is in the folder.

        Raises:
          SystemExit: 1 when PyTorch does not paint what JAX paints.
        """
        found = {
            phase: files.read_json(self.out / "evaluation" / f"{phase}.json") for phase in PHASES
        }
        comparison = self.out / "comparison.json"
        compared = json.loads(comparison.read_text()) if comparison.is_file() else None
        words, pictures = self.extent.words, self.extent.pictures
        plan = dataclasses.asdict(self.extent) | {
            "painting": f"{words.steps} {words.solver} steps, guidance {words.guidance:g} from "
            f"words alone and {pictures.guidance:g} from pictures"
        }
        whole = report.collect(self.state, plan, found, compared)
        self.write("report.json", whole)
        files.write_text(self.out / "report.md", report.markdown(whole))
        page.write([str(self.out)], self.out / "report.html")
        print(report.ending(self.out, whole))
        if missing:
            print(
                f"  Not compared with PyTorch: {' and '.join(missing)} not installed. "
                "`bash launch/test.sh` installs it; then run this command again."
            )
        bad = [row["name"] for row in compared or () if not row["is_good"]]
        if bad:
            print(f"error: PyTorch differs too much in: {', '.join(bad)}", file=sys.stderr)
            raise SystemExit(1)


def processor_seconds() -> float:
    """Processor time of this process and its finished children, in seconds over all cores."""
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="launch/quickstart.sh", description=__doc__)
    add = out.add_argument
    add("--out", help="folder for everything (default runs/quickstart, with --long runs/long)")
    add("--fresh", action="store_true", help="delete what an earlier run left in the folder")
    how = out.add_mutually_exclusive_group()
    how.add_argument("--smoke", action="store_true", help="everything, shortened: 4 minutes")
    how.add_argument("--long", action="store_true", help="more than an hour: more steps")
    return out


@exits
def main(argv: Sequence[str]) -> None:
    """The command."""
    args = parser().parse_args(argv)
    runtime.quiet()
    runtime.skip_absent_tpu()
    mode = "smoke" if args.smoke else "long" if args.long else "quick"
    default = ROOT / "runs" / {"quick": "quickstart"}.get(mode, mode)
    quickstart = Quickstart(files.Path(args.out or default).resolve(), mode)
    quickstart.open(args.fresh)
    try:
        quickstart.run()
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
