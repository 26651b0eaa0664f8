"""The verb `layouts`: a config's train step compiled for TPU slices that need not be here.

    python -m qk_jax.bench layouts --config stage3:20b --slice v5p-128 v6e-64
        --layout fsdp=64 fsdp=16,tensor=4/mmdit=zero2 --per-chip-batch 1 2 --out DIR

Each table row is a process (`row`). Its answer is a line of DIR/layouts.jsonl as soon as it is
there, and the same command again goes on with the table rows that are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.bench import batches, processes, search, table
from qk_jax.bench.cases import NO_REMAT, Case, Target
from qk_jax.bench.schedule import topologies
from qk_jax.experiment import config as config_lib
from qk_jax.models import layers
from qk_jax.pictures.sizes import format_size, parse_size, parse_sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb `layouts`, besides --config."""
    add = parser.add_argument
    many: dict[str, Any] = {"nargs": "+", "action": "extend"}
    add("--slice", **many, metavar="NAME", help="v5p-128, '2x v5e-256'")
    add(
        "--layout", **many, metavar="MESH[/ROWS]",
        help="fsdp=16,tensor=4/mmdit=zero2,text=tensor; '' is the config's own",
    )  # fmt: skip
    add("--search", action="store_true", help="every sensible mesh instead of --layout")
    add("--remat", **many, metavar="NAME", help="config.model.remat, or none (the config's)")
    add(
        "--per-chip-batch", **many, type=float, metavar="N",
        help="examples of a micro-batch per device (the config's)",
    )  # fmt: skip
    add("--size", metavar="WxH", help="a target size of the config, width x height (the first)")
    add("--pictures", type=int, help="condition pictures (2 where the generator sees them, else 1)")
    add("--largest", action="store_true", help="the trained shape with the most tokens instead")
    add("--flags", **many, default=[], metavar="NAME=VALUE", help="TPU options of the train step")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="table rows at once")
    add("--timeout", type=float, default=60, metavar="MINUTES", help="for one table row (60)")
    add(
        "--measure", type=int, nargs="?", const=5, default=0, metavar="STEPS",
        help="time so many steps (5) on the devices at hand",
    )  # fmt: skip
    add("--hlo", action="store_true", help="keep the compiled programs in DIR too")
    add("--out", required=True, metavar="DIR", help="for layouts.jsonl, layouts.md, layouts.png")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Compiles what is missing of the table and writes the report.

    Raises:
      InputError: something given is unknown or does not fit, or libtpu or matplotlib is missing.
      SystemExit: 130 after Ctrl-C; the report has the table rows until then.
    """
    check(args)
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the processes
    config = config_lib.load(args.config, overrides)
    size, pictures = shape(args, config)
    out = files.writable_folder(args.out, "--out")
    for name in args.remat or ():
        if name != NO_REMAT:
            layers.remat_policy(name)
    flags = tuple(args.flags)
    given = Case(
        args.config, dict(overrides), "", bool(args.measure), "", "", 0.0, size, pictures, flags,
        args.measure,
    )  # fmt: skip
    targets = find_targets(args, [*config.compiler.tpu, *config.compiler.tpu_step, *flags])
    table.work_through(search.cases(args, given, targets), out, args)


def check(args: argparse.Namespace) -> None:
    """Raises InputError for numbers out of range and packages that are missing."""
    if args.jobs < 1 or args.timeout <= 0 or args.measure < 0:
        raise InputError("--jobs and --timeout must be positive, --measure at least 1")
    if any(batch <= 0 for batch in args.per_chip_batch or ()):
        raise InputError("--per-chip-batch must be positive")
    if not args.slice and not args.measure:
        raise InputError("--slice is missing: give a TPU slice such as v5p-128, or --measure")
    if args.search and args.layout:
        raise InputError("--search finds the layouts itself; leave --layout out")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("layouts.png needs matplotlib; pip install 'qk_jax[bench]'")


def shape(args: argparse.Namespace, config: ConfigDict) -> tuple[str, int]:
    """(target size, condition pictures) of the examples.

    Raises:
      InputError: no target size of the config, a negative number of pictures, or --largest beside
        one of the two.
    """
    if args.largest and (args.size or args.pictures is not None):
        raise InputError("--largest finds the shape itself; leave --size and --pictures out")
    if args.largest:
        size, pictures = batches.largest(config)
        return format_size(size), pictures
    known = parse_sizes(config.data.sizes, "config.data.sizes")
    size = parse_size(args.size, "--size") if args.size else known[0]
    if size not in known:
        raise InputError(
            f"--size {args.size} is not of the config's: {', '.join(map(format_size, known))}"
        )
    pictures = args.pictures
    if pictures is None:
        pictures = 2 if config.model.condition_latents else 1
    if pictures < 0:
        raise InputError("--pictures must be at least 0")
    return format_size(size), pictures


def find_targets(args: argparse.Namespace, flags: Sequence[str]) -> list[Target]:
    """The slices that are asked for, or the devices at hand if they are to be measured.

    Raises:
      InputError: an unknown slice or compiler option, no libtpu, or other devices at hand.
    """
    slices = list(dict.fromkeys(topologies.parse(name) for name in args.slice or ()))
    names, here = list(map(str, slices)), bool(args.measure)
    wanted = {"slices": [] if here else names, "here": here, "flags": list(flags)}
    found = asyncio.run(processes.ask({"probe": wanted}, seconds=600))
    if "error" in found:
        raise InputError(found["error"])
    if not here:
        return list(map(Target.of, slices))
    target = Target(**found)
    if names and names != [target.name]:
        raise InputError(
            f"--measure runs on the devices at hand, {target.name}, which are not {args.slice}; "
            "leave --slice or --measure out"
        )
    return [target]
