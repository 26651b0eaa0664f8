"""The table of layouts: a config's train step compiled for TPU slices that need not be here.

    python -m qk_jax.bench layouts --config configs/stage3.py:20b --slice v5p-128 v6e-64
        --layout fsdp=64 fsdp=16,tensor=4/mmdit=zero2 --per-chip-batch 1 2 --out DIR

Each row is a process (`row`). Its answer is a line of DIR/layouts.jsonl as soon as it is there, and
the same command again goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax

import qk_jax
from qk_jax import sharding
from qk_jax.bench import processes, report, row, shardings, topologies
from qk_jax.bench.row import Place, Row
from qk_jax.errors import InputError
from qk_jax.models import layers
from qk_jax.training import config as config_lib

TABLE = "layouts.jsonl"
MOST = 24  # layouts of a search per slice
# What a row depends on besides its definition.
SOURCES = (
    "models", "diffusion", "training", "sharding.py", "bench/row.py", "bench/cost.py",
    "bench/estimates.py", "bench/hlo.py", "bench/hlo_text.py", "bench/topologies.py",
)  # fmt: skip
# Fields of every row, in the order in which they are written; those of `Row` among them.
FIELDS = (
    "config", "slice", "layout", "remat", "per_chip_batch", "fits", "hbm_peak_gib",
    "hbm_limit_gib", "model_tflops_per_step", "compute_s", "attention_s", "exposed_comm_s",
    "step_time_s", "pictures_per_s", "mfu", "collectives", "compile_s", "error",
    "overrides", "here", "size", "pictures", "flags", "measure", "devices", "chips", "mesh",
    "rows", "accumulation", "dtype", "argument_gib", "temp_gib", "output_gib", "code_gib",
    "host_gib", "model_tflops", "comm_s", "pictures_per_s_per_chip", "ops", "unpriced",
    "measured_step_s", "measured_pictures_per_s", "measured_mfu", "loss", "grad_norm",
    "versions", "key",
)  # fmt: skip


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


def overrides(rest: Sequence[str]) -> dict[str, str]:
    """{field: text} from --config.FIELD=VALUE, or --config.FIELD VALUE.

    Raises:
      InputError: another argument, or one without a value.
    """
    found, words = {}, iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config."):
            raise InputError(f"argument {word!r} is unknown; see --help")
        value = value if equals else next(words, None)
        if value is None:
            raise InputError(f"{name} needs a value: {name}=VALUE")
        found[name.removeprefix("--config.")] = value
    return found


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
        if name != row.NO_REMAT:
            layers.remat_policy(name)
    places = find_places(args, [*config.compiler.tpu, *config.compiler.tpu_step, *flags])
    given = Row(
        args.config, dict(overrides), "", bool(args.measure), "", "", 0.0, size, pictures, flags,
        args.measure,
    )  # fmt: skip
    own = config.data.batch / config.optimizer.accumulation
    batches = {at: tuple(args.per_chip_batch or [own / at.devices]) for at in places}
    remats = args.remat or [config.model.remat or row.NO_REMAT]
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


def plan(
    args: argparse.Namespace, given: Row, batches: Mapping[Place, Sequence[float]]
) -> list[tuple[Place, str, float]]:
    """(place, layout in full, rows per device) of everything that is to be compiled.

    A layout or a batch that does not fit one place may fit another, and is left out of the first
    with a line that says so.

    Args:
      args, given: the command and its rows.
      batches: rows per device on each place.

    Raises:
      InputError: something that is given fits nowhere, or a search finds no mesh for a place.
    """
    found, refused, used = [], [], set()
    for at, sizes in batches.items():
        for layout in search(given, at) if args.search else args.layout or [""]:
            one = dataclasses.replace(given, layout=layout)
            for batch in sizes:
                try:
                    found.append((at, fitted(one, at, batch).text, batch))
                    used |= {at.name, layout, batch}
                except InputError as error:
                    refused.append(
                        (
                            {at.name, layout, batch},
                            f"{at.name} {layout or 'as the config lies'}: {error}",
                        )
                    )
    for names, reason in refused:
        if not names <= used:
            raise InputError(reason)
        print(f"left out: {reason}")
    return list(dict.fromkeys(found))


class Fitted(NamedTuple):
    """A layout on a place: itself in full (`row.describe`), and bytes of parameters, gradients and
    state on each device."""

    text: str
    nbytes: int


@functools.lru_cache(maxsize=2 * MOST)
def _parameters(config: str, devices: str) -> int:
    """Bytes of parameters, gradients and state on each device; both arguments are JSON."""
    mesh = sharding.abstract_mesh(json.loads(devices))
    return sum(r.held + r.gathered + r.gradient for r in shardings.rows(json.loads(config), mesh))


def fitted(given: Row, at: Place, batch: float | None = None) -> Fitted:
    """How the layout of a row fits.

    Raises:
      InputError: the devices, the parameters, or the rows of a micro-batch do not divide.
    """
    config = config_lib.load(given.config, given.overrides)
    row.lay_out(config, given.layout, at)
    sizes = {axis: size * config.slices.get(axis, 1) for axis, size in config.mesh.items()}
    if batch is not None:
        mesh, towers = sharding.abstract_mesh(sizes), sharding.tables(config.sharding)
        sharding.check_batch(row.micro_batch(at, batch), mesh, towers)
    nbytes = _parameters(config_lib.to_json(config), json.dumps(sizes))
    return Fitted(row.describe(config), nbytes)


def search(given: Row, at: Place) -> list[str]:
    """Meshes over fsdp, tensor and context whose state fits into HBM, the least split first.

    'tensor' must divide the heads of every tower that it splits, 'tensor' x 'context' those of the
    generator; 'data' joins slices.

    Raises:
      InputError: none is left.
    """
    devices = at.devices // at.slices
    found, left = [], []
    for tensor, context in sorted(meshes(given, at), key=lambda pair: (math.prod(pair), pair)):
        shape = {"fsdp": devices // tensor // context, "context": context, "tensor": tensor}
        text = row.mesh_text(shape)
        try:
            nbytes = fitted(dataclasses.replace(given, layout=text), at).nbytes
        except InputError as error:
            left.append(f"{text}: {error}")
            continue
        if at.hbm_bytes and nbytes > at.hbm_bytes:
            left.append(f"{text}: parameters, gradients and state are {nbytes / row.GIB:.1f} GiB")
        else:
            found.append(text)
    if not found:
        raise InputError(f"no mesh of {at.name} holds {given.config}: {left[0]}; take a larger one")
    for line in left:
        print(f"left out: {at.name} {line}")
    if len(found) > MOST:
        print(f"left out: {at.name} {' '.join(found[MOST:])}, more than {MOST}")
    print(f"search: {at.name} {' '.join(found[:MOST])}")
    return found[:MOST]


def meshes(given: Row, at: Place) -> list[tuple[int, int]]:
    """(tensor, context) sizes that divide the devices of a slice and the heads."""
    config = config_lib.load(given.config, given.overrides)
    model, towers = config.model, sharding.tables(config.sharding)
    heads = {
        "vision": [model.vlm.vision.num_heads],
        "text": [model.vlm.text.num_attention_heads, model.vlm.text.num_key_value_heads],
        "mmdit": [model.mmdit.num_attention_heads],
    }
    split = [
        count
        for tower, counts in heads.items()
        for count in counts
        if "tensor" in towers[tower].activations.heads
    ]
    devices = at.devices // at.slices
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    return [
        (tensor, context)
        for tensor, context in itertools.product(sizes, sizes)
        if devices % (tensor * context) == 0
        and all(count % tensor == 0 for count in split)
        and model.mmdit.num_attention_heads % (tensor * context) == 0
    ]


# ---- rows and their processes ----------------------------------------------------------------


class Job(NamedTuple):
    """A row, its place and what tells it from every other."""

    row: Row
    at: Place
    key: str


def versions() -> dict[str, str]:
    """Of jax, libtpu and our own code."""
    found = {}
    for package in ("jax", "jaxlib", "libtpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    root = pathlib.Path(qk_jax.__file__).parent
    names = [root / name for name in SOURCES]
    files = [x for name in names for x in (sorted(name.rglob("*.py")) or [name])]
    text = b"".join(file.read_bytes() for file in files)
    return found | {"qk_jax": hashlib.sha256(text).hexdigest()[:12]}


def key(one: Row, at: Place, of: Mapping[str, str]) -> str:
    """A digest of all that a row depends on: its definition, its config in full, versions."""
    resolved = config_lib.to_json(row.configured(one, at))
    parts = [dataclasses.asdict(one), resolved, dict(of)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def work_through(
    rows: Sequence[Row], places: Mapping[str, Place], out: pathlib.Path, args: argparse.Namespace
) -> None:
    """Runs the rows that the table does not have yet, and writes the report of all of it.

    Raises:
      SystemExit: 130 after Ctrl-C.
    """
    table, of = out / TABLE, versions()
    known = {found["key"]: found for found in read(table)}
    jobs = [Job(one, places[one.slice], key(one, places[one.slice], of)) for one in rows]
    todo = [job for job in jobs if job.key not in known or known[job.key]["error"]]
    print(f"{len(jobs)} rows, {len(jobs) - len(todo)} of them in {table} already", flush=True)
    print(report.header(), flush=True)
    for job in jobs:
        if job not in todo:
            print(report.line(known[job.key]), flush=True)
    try:
        for found in run(todo, args, of):
            append(table, found)
            print(report.line(found), flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        found = latest(read(table))
        if found:
            report.write(out, found)
    for warning in report.differing(found):
        print(warning, file=sys.stderr)
    print(f"{out / report.PAGE} and {out / report.PICTURE} are of {len(found)} rows")


def latest(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that were defined alike, the last: others are of another version."""
    names = [field.name for field in dataclasses.fields(Row)]
    found = {json.dumps([one[name] for name in names]): one for one in table}
    return list(found.values())


def read(table: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a table; a line that an interruption tore is taken out of the file."""
    if not table.exists():
        return []
    found, whole = [], []
    for line in table.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
            whole.append(f"{line}\n")
        except ValueError:
            print(f"{table}: a torn line is left out", file=sys.stderr)
    text = "".join(whole)
    if text != table.read_text(encoding="utf-8"):
        partial = table.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(table)
    return found


def append(table: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes one row to the end of a table, and waits until it is on the disk."""
    with open(table, "a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run(
    jobs: Sequence[Job], args: argparse.Namespace, of: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Rows as their processes end; those that still run when it is left are killed.

    Rows that are measured run one at a time.
    """
    at_once = 1 if args.measure else args.jobs
    waiting: deque[Job] = deque(jobs)
    running: list[tuple[Job, processes.Process]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                stem = pathlib.Path(args.out) / job.key
                request = {
                    "row": dataclasses.asdict(job.row),
                    "hlo": f"{stem}.hlo.txt" if args.hlo else None,
                }
                log = stem.with_suffix(".log")
                running.append((job, processes.Process(request, 60 * args.timeout, log)))
            for job, process in [pair for pair in running if pair[1].ended()]:
                running.remove((job, process))
                yield whole(job, process.answer(), of)
            time.sleep(0.1)
    finally:
        for _, process in running:
            process.kill()


def whole(job: Job, found: Mapping[str, Any], of: Mapping[str, str]) -> dict[str, Any]:
    """A row with all its fields; null is what is not known."""
    given = dataclasses.asdict(job.row) | {
        "key": job.key,
        "versions": dict(of),
        "devices": job.at.devices,
        "chips": job.at.chips,
        "hbm_limit_gib": job.at.hbm_bytes and job.at.hbm_bytes / row.GIB,
    }
    return dict.fromkeys(FIELDS) | given | found
