"""Measures import and export of a large model: memory, speed against `cp`, equality.

    python -m qk_jax.convert bench [--shape 3b]

writes a folder of random bfloat16 weights in the shape of Qwen2.5-VL, copies it with `cp`, imports
it, exports it again, each in a process of its own whose peak resident memory is the operating
system's figure, and compares every byte. The times are of one run, one after the other, each
until everything written is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.base.files import GIGABYTE, write_json
from qk_jax.models import qwen_vl
from qk_jax.weights import tables
from qk_jax.weights.read import vlm_shapes
from qk_jax.weights.safetensors import TensorFolder, write_tensors

SHARD = 4 * GIGABYTE  # as the public 3B is split
# What a process prints about itself when its work is done.
_WATCHED = """
import json, resource, sys
from qk_jax.convert.__main__ import main
main(sys.argv[1:])
scale = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
print(json.dumps({"peak_bytes": peak}))
"""


def _weights(specs: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of random finite numbers of both signs, the same in every run."""
    for number, (name, spec) in enumerate(specs.items()):
        bits = np.random.default_rng(number).integers(0, 2**16, spec.shape, np.uint16)
        bits &= np.uint16(0xBFFF)  # an exponent below 128: finite
        yield name, bits.view(jnp.bfloat16)


def write_model(folder: files.Path, shape: str) -> int:
    """A Qwen2.5-VL folder of random bfloat16 weights; its size in bytes."""
    config = qwen_vl.PRESETS[shape]
    table = tables.vlm(config.tie_word_embeddings)
    specs = {
        name: jax.ShapeDtypeStruct(
            row.transform.torch_shape(ours if layer is None else ours[1:]), jnp.bfloat16
        )
        for path, ours in vlm_shapes(config).items()
        for name, layer, row in table.names(path, ours)
    }
    write_tensors(folder, "model", _weights(specs), SHARD, specs)
    write_json(folder / "config.json", config.to_hf() | {"dtype": "bfloat16"})
    return sum(file.stat().st_size for file in folder.iterdir())


def _timed(command: list[str]) -> tuple[float, str]:
    """Seconds until a command has ended and the disk has what it wrote, and its output.

    Without waiting for the disk, what one command left in the system's cache slows the next.
    """
    os.sync()
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    os.sync()
    if done.returncode:
        raise InputError(f"`{command[0]}` failed; its message stands above")
    return time.monotonic() - start, done.stdout


def differing(a: files.Path, b: files.Path) -> list[str]:
    """Names of tensors that are not equal bit by bit in two folders, or are in one of them only."""
    first, second = TensorFolder(a), TensorFolder(b)
    both = first.shapes.keys() & second.shapes.keys()
    bad = list(first.shapes.keys() ^ second.shapes.keys())
    return bad + [n for n in both if first.read(n).tobytes() != second.read(n).tobytes()]


def run(shape: str, directory: str | None, say: Callable[[str], None] = print) -> None:
    """Prints the figures.

    Args:
      shape: a preset of `qwen_vl`.
      directory: where four times the model's size is written and removed again; default a
        temporary folder.
      say: gets each line.

    Raises:
      SystemExit: 1 when the round trip is not bit-equal.
    """
    root = files.Path(tempfile.mkdtemp(prefix="qk-convert-bench-", dir=directory))
    try:
        total = write_model(root / "model", shape)
        say(f"Qwen2.5-VL-{shape} of random bfloat16 weights: {total / 1e9:.2f} GB")
        copied, _ = _timed(["cp", "-r", str(root / "model"), str(root / "copy")])
        shutil.rmtree(root / "copy")
        say(f"{'':<14} {'seconds':>8} {'GB/s':>6} {'of cp':>6} {'peak GB':>8}")
        say(f"{'cp -r':<14} {copied:>8.1f} {total / copied / 1e9:>6.2f} {1:>6.2f}")
        there, back = str(root / "imported"), str(root / "exported")
        for verb, *words in (
            ("from-pytorch", "--model", str(root / "model"), "--out", there),
            ("to-pytorch", "--checkpoint", there, "--out", back),
        ):
            seconds, output = _timed([sys.executable, "-c", _WATCHED, verb, *words])
            peak = json.loads(output.splitlines()[-1])["peak_bytes"] / 1e9
            speed = total / seconds / 1e9
            say(f"{verb:<14} {seconds:>8.1f} {speed:>6.2f} {copied / seconds:>6.2f} {peak:>8.2f}")
        bad = differing(root / "model", files.Path(back))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    say("every tensor is bit-equal after the round trip" if not bad else f"differ: {bad[:4]}")
    if bad:
        raise SystemExit(1)
