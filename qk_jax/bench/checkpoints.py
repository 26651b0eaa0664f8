"""Measures saving and restoring a state on the disk or bucket at hand.

    python -m qk_jax.bench checkpoints [--gigabytes 1] [--repeat 3] [--out DIR]

saves a state of random float32 leaves, sharded over the devices at hand as a run's would be, with
`checkpoints.store`, and restores it with its digests compared; then reads the same files as they
are. Before each reading the files are dropped from the system's cache, where they are on a disk.
Every figure is the median of the repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from qk_jax import sharding
from qk_jax.base import buckets, files
from qk_jax.base.types import Tree
from qk_jax.bench import measure
from qk_jax.checkpoints.digest import describe
from qk_jax.checkpoints.store import Meta, Store, Trees

LEAF_BYTES = 2**26
META = {"stage": "none", "size": "none", "config": {}}


class Seconds(NamedTuple):
    """Of one repetition.

    Attributes:
      digest: to compute the digests of all leaves, compiled before.
      blocked: until a save lets the run go on, digests included.
      save: until it is on disk.
      restore: with the digests compared.
      read: of the same files, one after the other.
    """

    digest: float
    blocked: float
    save: float
    restore: float
    read: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state (1)")
    parser.add_argument("--repeat", type=int, default=3, help="times everything is done (3)")
    parser.add_argument("--out", help="folder or bucket to measure (a temporary folder)")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Prints the table."""
    del overrides
    with contextlib.ExitStack() as stack:
        out = args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="qk-bench-"))
        tree = _state(max(1, round(args.gigabytes * files.GIGABYTE / LEAF_BYTES)))
        total = sum(x.nbytes for x in jax.tree.leaves(tree))
        jax.block_until_ready(describe(tree))
        runs = [_once(files.Path(out) / f"measured-{i}", tree) for i in range(args.repeat)]
    print(
        f"{total / 1e9:.2f} GB of float32 over {jax.device_count()} {jax.devices()[0].device_kind}"
    )
    for line in report(total, Seconds(*map(float, np.median(runs, axis=0)))):
        print(line)


def report(total: int, seconds: Seconds) -> Iterator[str]:
    """Lines about `total` bytes."""
    yield f"{'':<28} {'seconds':>8} {'GB/s':>6}  share"
    for name, value, share in (
        ("save, until on disk", seconds.save, ""),
        ("  of it, the run waits", seconds.blocked, _share(seconds.blocked, seconds.save)),
        ("  of that, digests", seconds.digest, _share(seconds.digest, seconds.save)),
        ("plain read of the files", seconds.read, ""),
        ("restore, digests compared", seconds.restore,
         f"{seconds.read / seconds.restore:.0%} of the plain speed"),
    ):  # fmt: skip
        yield f"{name:<28} {value:>8.2f} {total / value / 1e9:>6.2f}  {share}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%} of the save"


def _state(leaves: int) -> Tree:
    """Leaves of LEAF_BYTES of random float32, sharded over all devices."""
    mesh = sharding.build_mesh({"fsdp": jax.device_count()})
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    columns = 1024
    shape = (LEAF_BYTES // 4 // columns, columns)
    draw = jax.jit(measure.uniform, static_argnums=0, out_shardings=spec)
    return {f"leaf_{i:04d}": draw(shape, i) for i in range(leaves)}


def _once(folder: files.Path, tree: Tree) -> Seconds:
    begun = time.monotonic()
    jax.block_until_ready(describe(tree))
    digest = time.monotonic() - begun
    with contextlib.closing(Store(folder)) as store:
        begun = time.monotonic()
        store.save(1, {"params": tree}, META)
        blocked = time.monotonic() - begun
        store.wait()
        save = time.monotonic() - begun
    _forget(folder)
    begun = time.monotonic()
    for file in files.below(folder):
        file.read_bytes()
    read = time.monotonic() - begun
    _forget(folder)
    target = jax.tree.map(_abstract, tree)

    def wanted(found: Meta) -> Trees:
        del found
        return {"params": target}

    with contextlib.closing(Store(folder, write=False)) as store:
        begun = time.monotonic()
        jax.block_until_ready(store.restore(wanted).items)
        restore = time.monotonic() - begun
    files.remove_folder(folder)
    return Seconds(digest, blocked, save, restore, read)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _forget(folder: files.Path) -> None:
    """Writes what is left, and drops the files of a local folder from the system's cache."""
    if buckets.is_remote(folder) or not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for file in files.below(folder):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
