from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import qk_jax
from qk_jax.base import files
from qk_jax.bench import processes, report, slices
from qk_jax.bench.slices import Place, Row
from qk_jax.experiment import config as config_lib

TABLE = "layouts.jsonl"
# What a row depends on besides its definition.
SOURCES = (
    "models", "diffusion", "sharding", "experiment", "training", "bench/schedule", "bench/row.py",
    "bench/slices.py", "bench/compile.py", "bench/measure.py", "bench/cost.py",
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
    sources = [x for name in names for x in (sorted(name.rglob("*.py")) or [name])]
    text = b"".join(source.read_bytes() for source in sources)
    return found | {"qk_jax": hashlib.sha256(text).hexdigest()[:12]}


def key(one: Row, at: Place, of: Mapping[str, str]) -> str:
    """A digest of all that a row depends on: its definition, its config in full, versions."""
    resolved = config_lib.to_json(slices.configured(one, at))
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
        files.write_text(table, text)
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
        "hbm_limit_gib": job.at.hbm_bytes and job.at.hbm_bytes / slices.GIB,
    }
    return dict.fromkeys(FIELDS) | given | found
