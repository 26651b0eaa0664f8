"""What an import costs: records per second of one core, and peak memory, on made-up pictures."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from qk_jax.data.bench import fresh
from qk_jax.data.importers import importing, pieces
from qk_jax.data.importers.drafts import encoded
from qk_jax.data.importers.job import Job
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.fitting import Size

_GROUP = 100  # rows of a row group, as Hugging Face writes pictures


def pictures(count: int, size: Size = (512, 512)) -> list[bytes]:
    """JPEGs of a (height, width), quality 90, about as large as photographs are."""
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 255, (count, 24, 24, 3), np.uint8)
    found = []
    for grid in coarse:
        image = Image.fromarray(grid).resize(size[::-1], Image.Resampling.BICUBIC)
        grain = draw.normal(0, 5, (*size, 1))
        pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        found.append(encoded(Image.fromarray(pixels), "JPEG", 90))
    return found


def _folder(path: pathlib.Path, data: list[bytes]) -> None:
    rows = []
    for number, picture in enumerate(data):
        (path / f"{number}.jpg").write_bytes(picture)
        rows.append(json.dumps({"file_name": f"{number}.jpg", "text": f"picture {number}"}))
    (path / "metadata.jsonl").write_text("\n".join(rows))


def _webdataset(path: pathlib.Path, data: list[bytes]) -> None:
    with tarfile.open(path / "0.tar", "w") as out:
        for number, picture in enumerate(data):
            for name, body in (("jpg", picture), ("txt", f"picture {number}".encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(body)
                out.addfile(info, io.BytesIO(body))


def _parquet(path: pathlib.Path, data: list[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "a picture", "image": {"bytes": picture, "path": None}} for picture in data]
    pq.write_table(pa.Table.from_pylist(rows), path / "0.parquet", row_group_size=_GROUP)


MAKERS: dict[str, Callable[[pathlib.Path, list[bytes]], None]] = {
    "folder": _folder,
    "webdataset": _webdataset,
    "parquet": _parquet,
}


def _measure(job: Job) -> tuple[float, float]:
    """Seconds, and those of the processor."""
    begun, cpu = time.perf_counter(), time.process_time()
    importing.run(job, pieces.Engine())
    return time.perf_counter() - begun, time.process_time() - cpu


def run(count: int) -> str:
    """A table: each main format with `count` records and with four times as many."""
    data = pictures(64)
    begun = time.process_time()
    for number, picture in enumerate(data):
        decode_picture(picture, "RGB", 0, str(number))
    alone = len(data) / (time.process_time() - begun)
    size = sum(map(len, data)) / len(data) / 1000
    lines = [f"decoding alone: {alone:.0f} pictures per CPU second, {size:.0f} kB each"]
    lines.append("| format | records | records/s | per CPU second | peak memory, MiB |")
    lines.append("| --- | --- | --- | --- | --- |")
    for name, make in MAKERS.items():
        for number in (count, 4 * count):
            with tempfile.TemporaryDirectory() as folder:
                source = pathlib.Path(folder) / "in"
                source.mkdir()
                make(source, [data[n % len(data)] for n in range(number)])
                job = Job(f"{folder}/out", name, (str(source),), "text_to_image")
                (wall, cpu), peak = fresh.run(_measure, job)
            lines.append(
                f"| {name} | {number} | {number / wall:.0f} | {number / cpu:.0f} "
                f"| {peak / 2**20:.0f} |"
            )
    return "\n".join(lines)
