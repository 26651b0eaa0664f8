"""The verb `peer`: our MMDiT against diffusers' in PyTorch, time and memory of a step.

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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qk_jax.base import files, trees
from qk_jax.base.errors import InputError
from qk_jax.bench.peer_work import MODEL, WORK, Work
from qk_jax.models import mmdit
from qk_jax.weights.read import shapes
from qk_jax.weights.write import export_model

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
INSTEAD = ("batch", "blocks", "threads")  # options that replace a field of the size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb `peer`."""
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="small")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu")
    whats = ("train", "sample")
    add("--what", choices=whats, nargs="+", default=whats, help="both")
    for name in INSTEAD:
        add(f"--{name}", type=int, help="instead of the size's")
    add("--pairs", type=int, default=6, help="turns of each side (6)")
    add("--steps", type=int, default=5, help="timed in each turn (5)")
    add("--full", action="store_true", help="no padded text: PyTorch's attention gets no mask")
    add("--out", default="peer.json", help="JSON file to write (peer.json)")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Prints a line for each comparison, and writes all of them to a JSON file.

    Raises:
      InputError: see `compare`; or a number is not positive.
    """
    del overrides  # there is no config
    given = {name: getattr(args, name) for name in (*INSTEAD, "pairs", "steps")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise InputError(f"--{name} {value} must be at least 1")
    fields = SIZES[args.size] | {name: given[name] for name in INSTEAD if name in given}
    jax.config.update("jax_platforms", "cpu")  # the device is for the sides' processes
    reports = []
    for what in args.what:
        work = Work(what, args.device, padded=not args.full, **fields)
        reports.append(compare(work, args.pairs, args.steps))
        print(line(reports[-1]), flush=True)
        files.write_json(args.out, reports)


def line(report: Mapping[str, Any]) -> str:
    """A comparison as one line for the terminal."""
    seconds, mib = report["seconds"], {s: n / 2**20 for s, n in report["peak_bytes"].items()}
    ratios = np.divide(seconds["ours"], seconds["theirs"])
    return (
        f"{report['work']['what']}: ours {np.median(seconds['ours']):.4f} s, PyTorch "
        f"{np.median(seconds['theirs']):.4f} s, ratio {report['ratio']:.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f} over {len(ratios)} pairs); peak {mib['ours']:.0f} and "
        f"{mib['theirs']:.0f} MiB; outputs differ by {report['difference']:.1e}"
    )


def compare(work: Work, pairs: int, steps: int) -> dict[str, Any]:
    """Measures both sides in turns: ours, theirs, ours, theirs, ...

    On a CPU both processes live through all turns, and the one that waits takes no time. A GPU
    holds one at a time, so there each turn is a process of its own, which finds on the disk what
    the first one compiled.

    Args:
      work: what to compute.
      pairs: turns of each side.
      steps: timed in each turn; the median counts.

    Returns:
      work: what was computed.
      difference: of the two velocities before any step, relative to the largest.
      values: of the first steps of each side (losses, or mean squares of the latents).
      seconds: {side: median seconds of a step in each pair}.
      peak_bytes: {side: most memory in use}: of the device, on a CPU resident in the process.
      ratio: median of ours / theirs over the pairs; below 1 ours is faster.

    Raises:
      InputError: PyTorch or the device is missing, a side failed, or the two differ by more than
        rounding explains.
    """
    for package in ("torch", "diffusers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; pip install 'qk_jax[torch]'")
    running: dict[str, Side] = {}
    first: dict[str, list[float]] = {}
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    difference = 0.0
    with tempfile.TemporaryDirectory(prefix="qk-peer-") as root, contextlib.ExitStack() as stack:
        folder = pathlib.Path(root)
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
    seconds = {
        side: [float(np.median(answer["seconds"])) for answer in found]
        for side, found in answers.items()
    }
    return {
        "work": dataclasses.asdict(work),
        "difference": difference,
        "values": first,
        "seconds": seconds,
        "peak_bytes": {s: max(one["peak_bytes"] for one in found) for s, found in answers.items()},
        "ratio": float(np.median(np.divide(seconds["ours"], seconds["theirs"]))),
    }


def write(folder: pathlib.Path, work: Work) -> None:
    """Writes what both sides read: random weights of one block, and the work."""
    frame = work.head_dim // 8  # an eighth for the frame, as in Qwen-Image
    config = mmdit.MMDiTConfig(
        num_layers=1,
        num_attention_heads=work.heads,
        attention_head_dim=work.head_dim,
        joint_attention_dim=work.context,
        axes_dims_rope=(frame, (work.head_dim - frame) // 2, (work.head_dim - frame) // 2),
    )
    rng = np.random.default_rng(1)

    def random(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if path.endswith("kernel"):
            return noise * np.float32(shape[-2] ** -0.5)
        return np.float32(path.endswith("scale")) + np.float32(0.02) * noise

    params = {path: random(path, shape) for path, shape in shapes(config).items()}
    (folder / MODEL).mkdir()
    export_model(trees.unflatten(params), config, folder / MODEL, work.weights)
    (folder / WORK).write_text(json.dumps(dataclasses.asdict(work)))


def environment(folder: pathlib.Path, work: Work) -> dict[str, str]:
    """Variables of a side's process: its device, its threads, the whole GPU's memory."""
    if work.device == "cpu":
        threads = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(work.threads))
        return os.environ | threads | {"JAX_PLATFORMS": "cpu"}
    return os.environ | {
        "JAX_PLATFORMS": "",  # told 'cuda', a JAX without CUDA does not say that it has none
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


class Side(contextlib.AbstractContextManager["Side"]):
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
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._read()

    def ask(self, steps: int) -> dict[str, Any]:
        """Runs steps: {'seconds': [...], 'values': [...], 'peak_bytes': ...}."""
        print(steps, file=self._stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line:
            self.close()
            raise InputError(
                f"the side {self._name!r} failed, see its message above; "
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


def agreement(folder: pathlib.Path, work: Work, first: Mapping[str, Sequence[float]]) -> float:
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
