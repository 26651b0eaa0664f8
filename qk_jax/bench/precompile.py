"""The verb `precompile`: all programs of a stage, compiled for devices that need not be here.

    python -m qk_jax.bench precompile --config stage2:20b@v5p-128 --slice v5p-128 --out DIR

A run takes them from DIR by config.programs.folder (`training.ahead`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping

import jax

from qk_jax import sharding
from qk_jax.base import buckets, files, runtime
from qk_jax.bench.schedule import topologies
from qk_jax.data import pipeline, settings
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import ahead, cached
from qk_jax.training.programs import Programs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb `precompile`, besides --config."""
    parser.add_argument(
        "--slice", metavar="NAME", help="v5p-128, '2x v5e-256' (the devices of this machine)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="for the programs; or a bucket")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Compiles what `--out` lacks, and writes programs and manifest there.

    Raises:
      InputError: the slice is unknown, libtpu is missing, the config does not fit it, or the folder
        cannot be written.
    """
    runtime.start_logging()
    buckets.check([args.out, *overrides.values()])
    devices = None
    if args.slice:
        jax.config.update("jax_platforms", "cpu")  # accelerators at hand are left alone
        devices = topologies.devices(topologies.parse(args.slice))
    out = files.writable_folder(args.out, "--out")
    config = config_lib.load(args.config, dict(overrides))
    config.programs.folder = ""  # of a run; this one compiles
    plan = Plan.build(config, sharding.build_mesh(config.mesh, devices, config.slices))
    with tempfile.TemporaryDirectory(prefix="qk-programs-") as cache, jax.set_mesh(plan.mesh):
        runtime.keep_programs(cache, instead=True)
        pad = cached.padding_of(config)
        batches = (
            pad.abstract(pipeline.abstract(config, plan.prompts, shape, plan.batch_sizes))
            for shape in settings.shapes(config)
        )
        old = ahead.kept(out, plan)
        made = Programs(plan).compile(batches, digests=True, skip=old.programs)
        path = ahead.keep(out, plan, {one.digest: one.name for one in made}, old)
    print(f"{len(old.programs) + len(made)} programs, {len(made)} of them new: {path}")
    print(f"a run takes them by --config.programs.folder={args.out}")
