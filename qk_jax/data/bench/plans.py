"""What the plan of a large set costs: start, memory, and the look-up of a step, on made-up rows."""

from __future__ import annotations

import pathlib
import pickle
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from qk_jax.data import records
from qk_jax.data.bench import fresh
from qk_jax.data.bench.made_up import Load, fields

_SHARD = 1 << 16  # rows
_SIDES = (256, 2049)  # of the pictures, in pixels
# Share of the rows, and how many condition pictures they have.
_TASKS = {"text_to_image": (0.7, 0), "editing": (0.2, 1), "customization": (0.1, 3)}
_BATCHES = (32, 512)
_LATE = 1_000_000  # the step of a resume
_LOOKED_UP = 50  # steps


def _write(folder: pathlib.Path, rows: int) -> None:
    """Side indexes of so many records, beside files in which there are none."""
    count = -(-rows // _SHARD)
    draw = np.random.default_rng(0)
    for split, shards in (("train", count), ("validation", 1)):
        for shard in range(shards):
            index = np.zeros(min(_SHARD, rows - shard * _SHARD), records.INDEX_DTYPE)
            for side in ("width", "height"):
                index[side] = draw.integers(*_SIDES, len(index))
            places = draw.choice(len(_TASKS), len(index), p=[share for share, _ in _TASKS.values()])
            index["task"] = np.array([name.encode() for name in _TASKS])[places]
            index["pictures"] = np.array([number for _, number in _TASKS.values()])[places]
            known = np.arange(3) < index["pictures"][:, None]
            index["references"] = draw.integers(*_SIDES, (len(index), 3, 2)) * known[..., None]
            index["source"] = f"set {shard * 8 // count}".encode()
            path = folder / records.shard_name(split, shard, shards)
            path.touch()
            records.index_path(path).write_bytes(records.index_bytes(index))


def _measure(load: Load, folder: str, batch: int) -> dict[str, Any]:
    """Seconds of the start, of the look-up of a step and of a late one; bytes of what a worker
    gets."""
    from qk_jax.data.pipeline import Pipeline

    weights = {name: share for name, (share, _) in _TASKS.items()}
    config = load(fields(folder, weights, batch))
    begun = time.perf_counter()
    pipeline = Pipeline(config, "train", 0, 1)
    start, found = time.perf_counter() - begun, {}
    for first in (0, _LATE):
        times = []
        for step in range(first, first + _LOOKED_UP):
            begun = time.perf_counter()
            pipeline.plan[step]
            times.append(time.perf_counter() - begun)
        found[first] = statistics.median(times)
    return {"start": start, "look_up": found, "bytes": len(pickle.dumps(pipeline.loader))}


def run(rows: int, load: Load) -> str:
    """A table: the plan of a config over `rows` records in shards, for two batches."""
    lines = [
        f"{rows:,} rows of side index",
        "| batch | start, s | peak memory, GB | to a worker, GB | look-up, ms | at step "
        f"{_LATE:,}, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        _write(pathlib.Path(folder), rows)
        for batch in _BATCHES:
            found, peak = fresh.run(_measure, load, folder, batch)
            early, late = (1000 * found["look_up"][step] for step in (0, _LATE))
            lines.append(
                f"| {batch} | {found['start']:.1f} | {peak / 1e9:.2f} | {found['bytes'] / 1e9:.2f} "
                f"| {early:.2f} | {late:.2f} |"
            )
    return "\n".join(lines)
