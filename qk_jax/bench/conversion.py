"""Measures reading and writing a large model: memory, speed against `cp`, equality.

    python -m qk_jax.convert bench [--shape 3b]

writes a folder of random bfloat16 weights in the shape of Qwen2.5-VL, copies it with `cp`, converts
it with from-pytorch and compares every byte, and imports it into memory, as training does. Each
runs in a process of its own, whose peak resident memory is the operating system's figure. The
times are of one run, one after the other, each until everything written is on the disk.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.base.files import GIGABYTE, write_json
from qk_jax.models import qwen_vl
from qk_jax.weights import hub_configs, read, tables
from qk_jax.weights.safetensors import Tensor, TensorFolder, write_tensors

SHARD = 4 * GIGABYTE  # as the public 3B is split
# What a process does, and prints about itself when its work is done.
_WATCHED = """
import json, resource, sys
{work}
scale = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(json.dumps({{"peak_bytes": peak}}))
"""
_WORK = {
    "from-pytorch": """from qk_jax.convert import main
main(["from-pytorch", "--model", sys.argv[1], "--out", sys.argv[2]])""",
    "import": """from qk_jax.weights.read import import_model
import_model("vlm", sys.argv[1])""",
}


def _random(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Finite bfloat16 numbers of both signs, the same in every run."""
    bits = np.random.default_rng(number).integers(0, 2**16, shape, np.uint16)
    bits &= np.uint16(0xBFFF)  # an exponent below 128: finite
    return bits.view(jnp.bfloat16)


def write_model(folder: files.Path, shape: str) -> int:
    """A Qwen2.5-VL folder of random bfloat16 weights; the bytes of its tensors."""
    config = qwen_vl.PRESETS[shape]
    table = tables.of(config)
    tensors: dict[str, Tensor] = {}
    for path, ours in read.shapes(config).items():
        for name, layer, row in table.names(path, ours):
            one = row.transform.torch_shape(ours if layer is None else ours[1:])
            make = functools.partial(_random, len(tensors), one)
            tensors[name] = Tensor(one, jnp.dtype(jnp.bfloat16), make)
    write_tensors(folder, "model", tensors, SHARD)
    write_json(folder / "config.json", hub_configs.to_hf(config) | {"dtype": "bfloat16"})
    return sum(int(np.prod(tensor.shape)) * 2 for tensor in tensors.values())


def _timed(command: list[str]) -> tuple[float, str]:
    """Seconds until a command has ended and the disk has what it wrote, and its output.

    Without waiting for the disk, what one command left in the system's cache slows the next.
    """
    os.sync()
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    os.sync()
    if done.returncode:
        raise InputError(f"`{command[0]}` failed; its message is above")
    return time.monotonic() - start, done.stdout


def differing(a: files.PathLike, b: files.PathLike) -> list[str]:
    """Names of tensors that are not equal bit by bit in two folders, or are in one of them only."""
    first, second = TensorFolder(a), TensorFolder(b)
    both = first.shapes.keys() & second.shapes.keys()
    bad = list(first.shapes.keys() ^ second.shapes.keys())
    return bad + [n for n in both if first.read(n).tobytes() != second.read(n).tobytes()]


def run(shape: str, directory: str | None, say: Callable[[str], None] = print) -> None:
    """Prints the figures.

    Args:
      shape: a preset of `qwen_vl`.
      directory: where three times the model's size is written and removed again; default a
        temporary folder.
      say: gets each line.

    Raises:
      SystemExit: 1 when a tensor is not bit-equal after from-pytorch.
    """
    root = files.Path(tempfile.mkdtemp(prefix="qk-convert-bench-", dir=directory))
    model, out = str(root / "model"), str(root / "converted")
    try:
        total = write_model(root / "model", shape)
        say(f"Qwen2.5-VL-{shape} of random bfloat16 weights: {total / 1e9:.2f} GB")
        copied, _ = _timed(["cp", "-r", model, str(root / "copy")])
        files.remove_folder(root / "copy")
        say(f"{'':<14} {'seconds':>8} {'GB/s':>6} {'of cp':>6} {'peak GB':>8}")
        say(f"{'cp -r':<14} {copied:>8.1f} {total / copied / 1e9:>6.2f} {1:>6.2f}")
        for name, work in _WORK.items():
            program = _WATCHED.format(work=work)
            seconds, output = _timed([sys.executable, "-c", program, model, out])
            peak = json.loads(output.splitlines()[-1])["peak_bytes"] / 1e9
            speed = total / seconds / 1e9
            say(f"{name:<14} {seconds:>8.1f} {speed:>6.2f} {copied / seconds:>6.2f} {peak:>8.2f}")
        bad = differing(model, out)
    finally:
        files.remove_folder(root)
    say("every tensor is bit-equal after from-pytorch" if not bad else f"differ: {bad[:4]}")
    if bad:
        raise SystemExit(1)
