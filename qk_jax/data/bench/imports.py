"""What an import costs: records per second of one core, and peak memory, on made-up pictures."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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


def _list(path: pathlib.Path, data: list[bytes]) -> None:
    (path / "pictures").mkdir()
    rows = []
    for number, picture in enumerate(data):
        (path / "pictures" / f"{number}.jpg").write_bytes(picture)
        rows.append({"image": f"{number}.jpg", "text": f"picture {number}"})
    (path / "list.json").write_text(json.dumps(rows))


def _controlled(path: pathlib.Path, data: list[bytes]) -> None:
    """Two pictures for each record."""
    for name in ("target", "control"):
        (path / name).mkdir()
        for number, picture in enumerate(data):
            (path / name / f"{number}.jpg").write_bytes(picture)
            (path / name / f"{number}.txt").write_text(f"make it picture {number}")


@functools.cache  # a name can be registered once
def _builder() -> Any:
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # or it looks for checksums beside this file
        pictures: list[bytes] = []

        def _info(self) -> Any:
            features = {"image": tfds.features.Image(), "text": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for number, picture in enumerate(self.pictures):
                yield number, {"image": io.BytesIO(picture), "text": f"picture {number}"}

    tfds.disable_progress_bar()
    return Made


def _tfds(path: pathlib.Path, data: list[bytes]) -> None:
    _builder().pictures = data
    _builder()(data_dir=path, file_format="array_record").download_and_prepare()


class Way(NamedTuple):
    """How records of a reader are made, and imported.

    Attributes:
      name: in the table.
      make: writes them into a folder.
      job: of the folder that was made and of the one to write.
    """

    name: str
    make: Callable[[pathlib.Path, list[bytes]], None]
    job: Callable[[str, str], Job]


def _plain(form: str, out: str, made: str) -> Job:
    return Job(out, form, (made,), "text_to_image")


# One for each reader: the other formats are these with other names of columns.
WAYS = (
    Way("folder", _folder, functools.partial(_plain, "folder")),
    Way("list", _list, lambda out, made: Job(
        out, "list", (f"{made}/list.json",), "text_to_image", images=(f"{made}/pictures",))),
    Way("parquet", _parquet, functools.partial(_plain, "parquet")),
    Way("webdataset", _webdataset, functools.partial(_plain, "webdataset")),
    Way("webdataset, in place", _webdataset, lambda out, made: Job(
        out, "webdataset", (made,), "text_to_image", in_place=True)),
    Way("tfds", _tfds, lambda out, made: Job(
        out, "tfds", (f"{made}/made/1.0.0",), "text_to_image")),
    Way("musubi, with control pictures", _controlled, lambda out, made: Job(
        out, "musubi", (f"{made}/target",), "editing", control=(f"{made}/control",))),
)  # fmt: skip


def _measure(job: Job) -> tuple[float, float]:
    """Seconds, and those of the processor."""
    begun, cpu = time.perf_counter(), time.process_time()
    importing.run(job, pieces.Engine())
    return time.perf_counter() - begun, time.process_time() - cpu


def run(count: int) -> str:
    """A table: each reader of formats with `count` records and with four times as many."""
    data = pictures(64)
    begun = time.process_time()
    for number, picture in enumerate(data):
        decode_picture(picture, "RGB", 0, str(number))
    alone = len(data) / (time.process_time() - begun)
    size = sum(map(len, data)) / len(data) / 1000
    lines = [f"decoding alone: {alone:.0f} pictures per CPU second, {size:.0f} kB each"]
    lines.append("| format | records | records/s | per CPU second | peak memory, MiB |")
    lines.append("| --- | --- | --- | --- | --- |")
    for way in WAYS:
        for number in (count, 4 * count):
            with tempfile.TemporaryDirectory() as folder:
                source = pathlib.Path(folder) / "in"
                source.mkdir()
                way.make(source, [data[n % len(data)] for n in range(number)])
                job = way.job(f"{folder}/out", str(source))
                (wall, cpu), peak = fresh.run(_measure, job)
            lines.append(
                f"| {way.name} | {number} | {number / wall:.0f} | {number / cpu:.0f} "
                f"| {peak / 2**20:.0f} |"
            )
    return "\n".join(lines)
