"""Measures saving and restoring a state on the disk or bucket at hand.

    python -m qk_jax.bench checkpoints [--gigabytes 1] [--repeat 3] [--out DIR]
    python -m qk_jax.bench checkpoints --config stage2:20b@v5p-128 --slice v5p-128

saves a state of random float32 leaves, sharded over the devices at hand as a run's would be, with
`checkpoints.store`, and restores it with its digests compared; then reads the same files as they
are. Before each reading the files are dropped from the system's cache, where they are on a disk.
Every figure is the median of the repetitions.

With a slice, which need not be here, the compiler estimates instead how long the digests of the
state of a run take there: an accelerator computes them in its own memory, a CPU beside the writing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from qk_jax import sharding
from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.bench import measure
from qk_jax.bench.schedule import topologies, walk
from qk_jax.checkpoints.digest import describe, device_digests
from qk_jax.checkpoints.store import Meta, Store, Trees
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan

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
    parser.add_argument("--slice", metavar="NAME", help="v5p-128: estimate the digests there")
    parser.add_argument("--config", help="NAME:SIZE, or FILE.py:SIZE; of the run, with --slice")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Prints the table, or the estimate.

    Raises:
      InputError: one of --slice and --config is missing, or they do not fit.
    """
    if args.slice or args.config:
        if not (args.slice and args.config):
            raise InputError("--slice and --config go together; give both, or none")
        print(estimated(args.config, overrides, args.slice))
        return
    if args.repeat < 1 or args.gigabytes <= 0:
        raise InputError("--repeat and --gigabytes must be above 0")
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


def estimated(config_name: str, overrides: Mapping[str, str], name: str) -> str:
    """How long the digests of a run's state take on a slice, in words."""
    config, where = config_lib.load(config_name, dict(overrides)), topologies.parse(name)
    devices = topologies.devices(where)
    mesh = sharding.build_mesh(config.mesh, devices, config.slices)
    plan = Plan.build(config, mesh, check=False)
    state = jax.tree.leaves([plan.state.params, plan.state.opt_state, plan.state.ema])
    with jax.set_mesh(plan.mesh):
        program = device_digests.trace(state).lower().compile()
    found = walk.estimate(program.as_text(), plan.mesh, where)
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in state) / 1e9
    return (
        f"digests of the {total:,.1f} GB of {config_name} on {name}: {found.step_time_s:.4f} s, "
        f"{total / len(devices) / found.step_time_s:,.0f} GB/s on each device (estimated)"
    )


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
