"""How many pictures a second reach the trainer, beside decoding alone and PyTorch's DataLoader."""

from __future__ import annotations

import concurrent.futures
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from PIL import Image

from qk_jax.base import runtime
from qk_jax.base.errors import InputError
from qk_jax.data import Writer
from qk_jax.data.bench.imports import pictures
from qk_jax.data.bench.made_up import TOKENIZER, Load, fields
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.fitting import cover

_SIZE, _SIDE = (600, 640), 512  # (height, width) of the files; side of what is trained
_FILES, _BATCH, _ROUNDS = 64, 32, 3


class TorchSet:
    """What a PyTorch user would write: Pillow, the shorter side scaled by the same filter, the
    middle cropped."""

    def __init__(self, files: list[str], count: int):
        from transformers import AutoTokenizer

        self.files, self.count = files, count
        self.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        import numpy as np
        import torch

        image = Image.open(self.files[number % len(self.files)]).convert("RGB")
        scale = _SIDE / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        left, top = ((side - _SIDE) // 2 for side in image.size)
        image = image.crop((left, top, left + _SIDE, top + _SIDE))
        text = self.tokenizer(
            caption(number), padding="max_length", truncation=True, max_length=128,
            return_tensors="pt",
        )  # fmt: skip
        return {"target": torch.from_numpy(np.array(image)), "input_ids": text["input_ids"][0]}


def caption(number: int) -> str:
    """Of a made-up picture."""
    return f"picture {number} of a set that was made up to be measured"


def _timed(batches: Iterable[Any], count: int, size: Callable[[Any], int]) -> float:
    """Pictures per second of `count` pictures, after the first batch."""
    iterator = iter(batches)
    next(iterator)
    begun, read = time.perf_counter(), 0
    while read < count:
        read += size(next(iterator))
    return read / (time.perf_counter() - begun)


def _alone(data: list[bytes], count: int, threads: int) -> float:
    """Of decoding and fitting alone."""

    def one(number: int) -> None:
        cover(decode_picture(data[number % len(data)], "RGB", 0, "made"), (_SIDE, _SIDE))

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(one, range(count)))
        return count / (time.perf_counter() - begun)


def _ours(load: Load, folder: str, count: int, workers: int, threads: int) -> float:
    """Of our batches."""
    from qk_jax.data.pipeline import Pipeline

    own = {"data.workers": str(workers), "data.threads": str(threads), "data.sizes": "512x512"}
    config = load(fields(folder, {"text_to_image": 1.0}, _BATCH) | own)
    pipeline = Pipeline(config, "train", 0, 1)
    try:
        return _timed(pipeline.batches(), count, lambda batch: len(batch["record"]))
    finally:
        pipeline.close()


def _theirs(files: list[str], count: int, workers: int) -> float:
    """Of PyTorch's."""
    import torch.utils.data

    made = TorchSet(files, count + _BATCH)
    loader: Any = torch.utils.data.DataLoader(made, batch_size=_BATCH, num_workers=workers)  # type: ignore[arg-type]
    return _timed(loader, count, lambda batch: len(batch["target"]))


def run(count: int, load: Load) -> str:
    """A table: pictures per second of each, medians of three rounds that alternate.

    Raises: InputError without PyTorch.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError("bench load needs PyTorch: pip install 'qk_jax[torch]'") from None
    runtime.skip_absent_tpu()
    data = pictures(_FILES, _SIZE)
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        files = [str(here / f"{number}.jpg") for number in range(len(data))]
        for file, picture in zip(files, data, strict=True):
            pathlib.Path(file).write_bytes(picture)
        for split in ("train", "validation"):
            with Writer(here / f"{split}.array_record") as writer:
                for number in range(max(count, _BATCH)):
                    writer.add("text_to_image", caption(number), data[number % len(data)])
        ways: dict[str, Callable[[], float]] = {
            "decoding and fitting alone, 2 threads": lambda: _alone(data, count, 2),
            "qk_jax, 2 threads": lambda: _ours(load, folder, count, 0, 2),
            "qk_jax, 2 workers": lambda: _ours(load, folder, count, 2, 2),
            "PyTorch DataLoader, 2 workers": lambda: _theirs(files, count, 2),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_ROUNDS):
            for name, way in ways.items():
                found[name].append(way())
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    alone = next(iter(medians.values()))
    lines = ["| way | pictures/s, median | lowest and highest | of decoding alone |"]
    lines.append("| --- | --- | --- | --- |")
    for name, rates in found.items():
        lines.append(
            f"| {name} | {medians[name]:.0f} | {min(rates):.0f} - {max(rates):.0f} "
            f"| {medians[name] / alone:.0%} |"
        )
    return "\n".join(lines)
