"""Our MMDiT against diffusers' in PyTorch: time and memory of a training and a sampling step.

Both sides read the same folder of weights, compute the same function (checked before anything is
timed) and are equally optimised: ours is jitted; PyTorch runs eagerly on a CPU, as its users do
there, and under torch.compile on a GPU; AdamW is fused on both.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from qk_jax.base.errors import InputError
from qk_jax.bench.peer_work import BATCH, MODEL, WHATS, WORK, Work, batch
from qk_jax.models import mmdit
from qk_jax.weights.write import export_mmdit, mmdit_shapes

SIZES = {
    "tiny": dict(blocks=2, heads=2, head_dim=32, context=24, side=4, text=8, batch=2),
    "small": dict(blocks=6, heads=4, head_dim=64, context=256, side=16, text=64, batch=8),
    # Qwen-Image's width at 512^2; full AdamW training of six blocks holds 33 GB in float32
    "slice": dict(blocks=6, heads=24, head_dim=128, context=3584, side=32, text=640, batch=4),
    "20b": dict(blocks=60, heads=24, head_dim=128, context=3584, side=32, text=640, batch=4),
}
SIDES = {"ours": "qk_jax.bench.peer_ours", "theirs": "qk_jax.bench.peer_theirs"}
WARM_UP = 2  # steps that compile, and on which values are compared
# Largest difference, of the largest velocity and of the first losses: sums in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
      work: what was computed.
      difference: of the two velocities before any step, relative to the largest.
      values: of the first steps of each side (losses, or mean squares of the latents).
      seconds: {side: median seconds of a step in each pair}.
      peak_bytes: {side: most memory in use}: of the device, on a CPU resident in the process.
    """

    work: Work
    difference: float
    values: dict[str, list[float]]
    seconds: dict[str, list[float]]
    peak_bytes: dict[str, int]

    @property
    def ratios(self) -> list[float]:
        """Ours / theirs of every pair; below 1 ours is faster."""
        pairs = zip(self.seconds["ours"], self.seconds["theirs"], strict=True)
        return [ours / theirs for ours, theirs in pairs]

    def line(self) -> str:
        """One line for the terminal."""
        ours, theirs = (np.median(self.seconds[side]) for side in SIDES)
        mib = {side: round(peak / 2**20) for side, peak in self.peak_bytes.items()}
        ratios = self.ratios
        return (
            f"{self.work.what}: ours {ours:.4f} s, PyTorch {theirs:.4f} s, ratio "
            f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f} over {len(ratios)} "
            f"pairs); peak {mib['ours']} and {mib['theirs']} MiB; outputs differ by "
            f"{self.difference:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return dataclasses.asdict(self) | {"ratio": float(np.median(self.ratios))}


def works(size: str, whats: Sequence[str], **given: Any) -> list[Work]:
    """The work of each comparison; `given` replaces fields of the size where it is not None.

    Raises:
      InputError: a number that is not positive.
    """
    fields = SIZES[size] | {name: value for name, value in given.items() if value is not None}
    for name, value in fields.items():
        if type(value) is int and value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    return [Work(what=what, **fields) for what in whats]


def compare(work: Work, pairs: int, steps: int) -> Report:
    """Measures both sides in turns: ours, theirs, ours, theirs, ...

    On a CPU both processes live through all turns, and the one that waits takes no time. A GPU
    holds one at a time, so there each turn is a process of its own, which finds on the disk what
    the first one compiled.

    Args:
      work: what to compute.
      pairs: turns of each side.
      steps: timed in each turn; the median counts.

    Raises:
      InputError: PyTorch or the device is missing, a side failed, or the two differ by more than
        rounding explains.
    """
    for package in ("torch", "diffusers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; pip install 'qk_jax[torch]'")
    running, first, difference = {}, {}, 0.0
    answers = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="qk-peer-") as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        write(folder, work)
        for pair in range(pairs):
            for name in SIDES:
                if name not in running:
                    running[name] = stack.enter_context(Side(name, folder, work))
                    first[name] = running[name].ask(WARM_UP)["values"]
                answers[name].append(running[name].ask(steps))
                if work.device != "cpu":
                    running.pop(name).close()
            if not pair:
                difference = agreement(folder, work, first)
    return Report(
        work,
        difference,
        first,
        {side: [float(np.median(a["seconds"])) for a in found] for side, found in answers.items()},
        {side: max(a["peak_bytes"] for a in found) for side, found in answers.items()},
    )


def write(folder: pathlib.Path, work: Work) -> None:
    """Writes what both sides read: random weights of one block, the batch and the work."""
    config = mmdit.MMDiTConfig(
        num_layers=1,
        num_attention_heads=work.heads,
        attention_head_dim=work.head_dim,
        joint_attention_dim=work.context,
        axes_dims_rope=axes(work.head_dim),
    )
    rng = np.random.default_rng(1)

    def random(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            return noise * np.float32(shape[-2] ** -0.5)
        return np.float32(path.endswith("scale")) + np.float32(0.02) * noise

    shapes = mmdit_shapes(config)
    flat = {path: random(path, shape) for path, shape in shapes.items()}
    model = folder / MODEL
    model.mkdir()
    export_mmdit(unflatten_dict(flat, sep="/"), config, model, work.weights)
    np.savez(folder / BATCH, **batch(work, config.in_channels))
    (folder / WORK).write_text(json.dumps(dataclasses.asdict(work)))


def axes(head_dim: int) -> tuple[int, int, int]:
    """Rotary channels of (frame, row, column), an eighth for the frame as in Qwen-Image."""
    frame = head_dim // 8
    return frame, (head_dim - frame) // 2, (head_dim - frame) // 2


def environment(folder: pathlib.Path, work: Work) -> dict[str, str]:
    """Variables of a side's process: its device, its threads, the whole GPU's memory."""
    if work.device == "cpu":
        threads = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(work.threads))
        return os.environ | threads | {"JAX_PLATFORMS": "cpu"}
    return os.environ | {
        "JAX_PLATFORMS": "",  # a JAX without CUDA is to say so, which it does not when told 'cuda'
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


class Side(contextlib.AbstractContextManager):
    """The process of one side, ready for steps.

    Raises:
      InputError: it finds no device of the kind, or fails with a message of its own.
    """

    def __init__(self, name: str, folder: pathlib.Path, work: Work):
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", SIDES[name], str(folder), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(folder, work),
        )
        self._read()

    def ask(self, steps: int) -> dict[str, Any]:
        """Runs steps: {'seconds': [...], 'values': [...], 'peak_bytes': ...}."""
        print(steps, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise InputError(
                f"the side {self._name!r} failed, its message stands above; "
                "when memory is short give a smaller --batch or fewer --blocks"
            )
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            raise InputError(f"{answer['error']}; give --device cpu or run it where there is one")
        return answer

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._process.communicate()

    def __exit__(self, *exception: object) -> None:
        self.close()


def agreement(folder: pathlib.Path, work: Work, first: dict[str, list[float]]) -> float:
    """The largest difference of the velocities before any step, relative to the largest.

    Args:
      folder: where both sides wrote their velocity.
      work: what was computed.
      first: the values of the first steps of each side.

    Raises:
      InputError: velocities or values differ by more than rounding explains.
    """
    limit = TOLERANCE[work.dtype]
    ours, theirs = (np.load(folder / f"{side}.npy") for side in SIDES)
    found = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not found <= limit:
        raise InputError(
            f"the velocities differ by {found:.2g} of the largest; {limit} is rounding"
        )
    if not np.allclose(first["ours"], first["theirs"], rtol=limit, atol=0):
        raise InputError(
            f"the first steps give {first['ours']} here, {first['theirs']} in PyTorch: "
            "no comparison of times means anything before they agree"
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb `peer`."""
    parser.add_argument("--size", choices=SIZES, default="small", help="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu")
    parser.add_argument("--what", choices=WHATS, nargs="+", default=WHATS, help="both")
    for name in ("batch", "blocks", "threads"):
        parser.add_argument(f"--{name}", type=int, help="instead of the size's")
    parser.add_argument("--pairs", type=int, default=6, help="turns of each side (6)")
    parser.add_argument("--steps", type=int, default=5, help="timed in each turn (5)")
    parser.add_argument(
        "--full", action="store_true", help="no padded text: PyTorch's attention gets no mask"
    )
    parser.add_argument("--out", default="peer.json", help="JSON file to write (peer.json)")


def command(args: argparse.Namespace) -> None:
    """The verb `peer`: a line for each comparison, and all of them in a JSON file.

    Raises:
      InputError: see `works` and `compare`; or --pairs or --steps is not positive.
    """
    if args.pairs < 1 or args.steps < 1:
        raise InputError("--pairs and --steps must be at least 1")
    given = {name: getattr(args, name) for name in ("device", "batch", "blocks", "threads")}
    reports = []
    jax.config.update("jax_platforms", "cpu")  # the device is for the sides' processes
    for work in works(args.size, args.what, padded=not args.full, **given):
        reports.append(compare(work, args.pairs, args.steps))
        print(reports[-1].line(), flush=True)
        text = json.dumps([report.to_json() for report in reports], indent=2)
        pathlib.Path(args.out).write_text(text + "\n")
