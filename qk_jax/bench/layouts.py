"""The table of layouts: a config's train step compiled for TPU slices that need not be here.

    python -m qk_jax.bench layouts --config configs/stage3.py:20b --slice v5p-128 v6e-64
        --layout fsdp=64 fsdp=16,tensor=4/mmdit=zero2 --per-chip-batch 1 2 --out DIR

Each row is a process (`row`). Its answer is a line of DIR/layouts.jsonl as soon as it is there, and
the same command again goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qk_jax.base.errors import InputError
from qk_jax.bench import processes, slices
from qk_jax.bench.schedule import topologies
from qk_jax.bench.search import plan
from qk_jax.bench.slices import Place, Row
from qk_jax.bench.table import work_through
from qk_jax.experiment import config as config_lib
from qk_jax.models import layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb `layouts`, besides --config."""
    add = parser.add_argument
    many = {"nargs": "+", "action": "extend"}
    add("--slice", **many, metavar="NAME", help="v5p-128, '2x v5e-256'")
    add(
        "--layout", **many, metavar="MESH[/ROWS]",
        help="fsdp=16,tensor=4/mmdit=zero2,text=tensor; '' is the config's own",
    )  # fmt: skip
    add("--search", action="store_true", help="every sensible mesh instead of --layout")
    add("--remat", **many, metavar="NAME", help="config.model.remat, or none (the config's)")
    add(
        "--per-chip-batch", **many, type=float, metavar="ROWS",
        help="rows of a micro-batch per device (the config's)",
    )  # fmt: skip
    add("--size", metavar="HxW", help="a target size of the config (the first)")
    add("--pictures", type=int, help="condition pictures (2 where the generator sees them, else 1)")
    add("--flags", **many, default=[], metavar="NAME=VALUE", help="TPU options of the train step")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="rows compiled at once")
    add("--timeout", type=float, default=60, metavar="MINUTES", help="for one row (60)")
    add(
        "--measure", type=int, nargs="?", const=5, default=0, metavar="STEPS",
        help="time so many steps (5) on the devices at hand",
    )  # fmt: skip
    add("--hlo", action="store_true", help="keep the compiled programs in DIR too")
    add("--out", required=True, metavar="DIR", help="for layouts.jsonl, layouts.md, layouts.png")


def command(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """The verb `layouts`: compiles what is missing of the table and writes the report.

    Raises:
      InputError: something given is unknown or does not fit, or libtpu or matplotlib is missing.
      SystemExit: 130 after Ctrl-C; the report is of the rows until then.
    """
    check(args)
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the rows' processes
    config = config_lib.load(args.config, overrides)
    size, pictures = shape(args, config)
    out = folder(args.out)
    flags = tuple(args.flags)
    for name in args.remat or ():
        if name != slices.NO_REMAT:
            layers.remat_policy(name)
    places = find_places(args, [*config.compiler.tpu, *config.compiler.tpu_step, *flags])
    given = Row(
        args.config, dict(overrides), "", bool(args.measure), "", "", 0.0, size, pictures, flags,
        args.measure,
    )  # fmt: skip
    own = config.data.batch / config.optimizer.accumulation
    batches = {at: tuple(args.per_chip_batch or [own / at.devices]) for at in places}
    remats = args.remat or [config.model.remat or slices.NO_REMAT]
    rows = [
        dataclasses.replace(given, slice=at.name, layout=layout, remat=remat, per_chip_batch=batch)
        for at, layout, batch in plan(args, given, batches)
        for remat in remats
    ]
    work_through(rows, {at.name: at for at in places}, out, args)


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


def shape(args: argparse.Namespace, config: Any) -> tuple[tuple[int, int], int]:
    """((H, W), condition pictures) of the rows.

    Raises:
      InputError: no target size of the config, or a negative number of pictures.
    """
    sizes = {f"{h}x{w}": (int(h), int(w)) for h, w in config.data.sizes}
    name = args.size or next(iter(sizes))
    if name not in sizes:
        raise InputError(f"--size {name} is not of the config's: {', '.join(sizes)}")
    pictures = args.pictures
    if pictures is None:
        pictures = 2 if config.model.condition_latents else 1
    if pictures < 0:
        raise InputError("--pictures must be at least 0")
    return sizes[name], pictures


def folder(name: str) -> pathlib.Path:
    """Makes the folder of the table.

    Raises:
      InputError: it cannot be made.
    """
    out = pathlib.Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {name} cannot be made: {error.strerror}") from None
    return out


def find_places(args: argparse.Namespace, flags: Sequence[str]) -> list[Place]:
    """The slices that are asked for, or the devices at hand where rows are measured.

    Raises:
      InputError: an unknown slice or compiler option, no libtpu, or other devices at hand.
    """
    slices = list(dict.fromkeys(topologies.parse(name) for name in args.slice or ()))
    names = [] if args.measure else [str(where) for where in slices]
    here = processes.ask(
        {"probe": {"slices": names, "here": bool(args.measure), "flags": list(flags)}}
    )
    if not args.measure:
        return [Place.of(where) for where in slices]
    at = Place(**here)
    if slices and [str(where) for where in slices] != [at.name]:
        raise InputError(
            f"--measure runs on the devices at hand, {at.name}, which are not {args.slice}; "
            "leave --slice or --measure out"
        )
    return [at]
