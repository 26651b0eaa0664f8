"""The file layouts.jsonl: a line per table row, its fields, and the work that fills it."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import qk_jax
from qk_jax.base import files
from qk_jax.bench import processes, report
from qk_jax.bench.cases import Case, Target, config_of
from qk_jax.bench.schedule.topologies import GIB
from qk_jax.experiment import config as config_lib

TABLE = "layouts.jsonl"
# What a table row depends on besides its case.
SOURCES = (
    "models", "diffusion", "sharding", "experiment", "training", "bench/schedule", "bench/row.py",
    "bench/cases.py", "bench/compile.py", "bench/measure.py", "bench/batches.py",
)  # fmt: skip
# Fields of every table row, in the order in which they are written; those of `Case` among them.
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
    """A case, its target, and a key that tells the table row from every other."""

    case: Case
    target: Target
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


def job(case: Case, target: Target, of: Mapping[str, str]) -> Job:
    """The job of a case; its key is a digest of case, config in full and versions `of`."""
    parts = [dataclasses.asdict(case), config_lib.to_json(config_of(case, target)), dict(of)]
    text = json.dumps(parts, sort_keys=True)
    return Job(case, target, hashlib.sha256(text.encode()).hexdigest()[:16])


def work_through(
    cases: Sequence[tuple[Case, Target]], out: files.Path, args: argparse.Namespace
) -> None:
    """Runs the cases that the table does not have yet, and writes the report of all of it.

    Raises:
      SystemExit: 130 after Ctrl-C.
    """
    table, of = out / TABLE, versions()
    known = {found["key"]: found for found in read(table)}
    jobs = [job(case, target, of) for case, target in cases]
    todo = [one for one in jobs if one.key not in known or known[one.key]["error"]]
    print(f"{len(jobs)} table rows, {len(jobs) - len(todo)} of them in {table} already")
    print(report.header(), flush=True)
    for one in jobs:
        if one not in todo:
            print(report.line(known[one.key]), flush=True)

    def done(found: dict[str, Any]) -> None:
        append(table, found)
        print(report.line(found), flush=True)

    try:
        asyncio.run(run(todo, args, of, done))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        rows = latest(read(table))
        if rows:
            report.write(out, rows)
    for warning in report.differing(rows):
        print(warning, file=sys.stderr)
    print(f"{out / report.PAGE} and {out / report.PICTURE} are of {len(rows)} table rows")


def latest(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each case: the others are of another version."""
    names = [field.name for field in dataclasses.fields(Case)]
    found = {json.dumps([row[name] for name in names]): row for row in table}
    return list(found.values())


def read(table: files.Path) -> list[dict[str, Any]]:
    """Rows of a table; a torn line, of an interruption, is removed from it."""
    if not table.exists():
        return []
    text = table.read_text()
    found, whole = [], ""
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
            whole += f"{line}\n"
        except ValueError:
            print(f"{table}: a torn line is left out", file=sys.stderr)
    if text != whole:
        files.write_text(table, whole)
    return found


def append(table: files.Path, row: Mapping[str, Any]) -> None:
    """Writes one row to the end of a table, and waits until it is on the disk."""
    with table.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


async def run(
    jobs: Sequence[Job],
    args: argparse.Namespace,
    of: Mapping[str, str],
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Gives `done` each table row as its process ends; jobs that measure run one at a time."""
    slots = asyncio.Semaphore(1 if args.measure else args.jobs)

    async def work(job: Job) -> None:
        stem = files.Path(args.out) / job.key
        request = {
            "case": dataclasses.asdict(job.case),
            "hlo": f"{stem}.hlo.txt" if args.hlo else None,
        }
        async with slots:
            log = stem.with_suffix(".log")
            found = await processes.ask(request, 60 * args.timeout, log)
            done(row(job, found, of))

    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(work(job))


def row(job: Job, found: dict[str, Any], of: Mapping[str, str]) -> dict[str, Any]:
    """A table row with all its fields; null is what is unknown."""
    target = job.target
    given = dataclasses.asdict(job.case) | {
        "key": job.key,
        "versions": dict(of),
        "devices": target.devices,
        "chips": target.chips,
        "hbm_limit_gib": target.hbm_bytes and target.hbm_bytes / GIB,
    }
    return dict[str, Any].fromkeys(FIELDS) | given | found
