"""What is looked at: the choice of examples, and what is said of them and of their set."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.data.example import TASKS
from qk_jax.data.importers.tars import TarSet
from qk_jax.data.pipeline import Pipeline
from qk_jax.data.records import RecordSet
from qk_jax.data.settings import sources
from qk_jax.data.viewer.shown import Reader, Shown

_MADE = "made"  # the source of examples that are made from cut-outs
_TARS = "tar:"  # before a folder of indexes of tars (`importers.tars`)
_UNDROPPED = "Dropout is drawn by the training step, so nothing is dropped here."


class Choice(NamedTuple):
    """Which examples to show.

    Attributes:
      split: 'train' or 'validation'.
      limit: at most so many.
      seed: of a choice by chance.
      step: show the batch of this training step, counted from 0.
      records: show the records with these numbers, counted from 0.
    """

    split: str = "train"
    limit: int = 48
    seed: int = 0
    step: int | None = None
    records: tuple[int, ...] | None = None


def is_folder(what: str) -> bool:
    """Whether `what` names a folder, here or in a bucket, or tar:FOLDER, and no config."""
    return what.startswith(_TARS) or "://" in what or files.Path(what).is_dir()


def folder_fields(folder: str, split: str) -> dict[str, str]:
    """{field: text} of a config by which the whole of a folder is read, of records or tar:FOLDER.

    Raises: InputError when it has no records of the split, or none of a known task.
    """
    in_tars = folder.startswith(_TARS)
    read = TarSet(folder.removeprefix(_TARS), split) if in_tars else RecordSet(folder, split)
    found = read.tasks()
    if not found & set(TASKS):
        raise InputError(
            f"{folder} has no {split} record of a task, only {', '.join(sorted(found)) or 'none'}; "
            "give a folder that `import` or Writer wrote"
        )
    return {
        "data.records": folder,
        "data.batch": "1",  # so that there are enough records of every shape
        "validation.batch": "1",
        **{f"data.tasks.{task}": str(float(task in found)) for task in TASKS},
    }


def choose(pipeline: Pipeline, choice: Choice, is_run: bool) -> tuple[Reader, str, Iterator[Shown]]:
    """A reader, a sentence that says which examples are chosen, and the examples.

    Args:
      pipeline: of the split of the choice.
      choice: which examples.
      is_run: the config is that of a run, so that its steps can be looked at.

    Raises:
      InputError: there is no such step or record.
    """
    config, split = pipeline.config, choice.split
    reader = Reader(pipeline, config["data"]["records"] or _MADE)
    total = sum(len(part.source) for part in reader.sources())
    if choice.records is not None:
        about = f"Chosen records of the {split} split, which has {total:,}. {_UNDROPPED}"
        return reader, about, reader.records(choice.records)
    trained = is_run and split == "train"
    if choice.step is not None:
        _check_step(choice.step, config["steps"], trained)
        slots = len(pipeline.plan[choice.step])
        first = f"the first {choice.limit}" if choice.limit < slots else "all"
        about = f"The batch of step {choice.step}: {first} of its {slots} slots, as trained."
        return reader, about, reader.step(choice.step, choice.limit)
    if trained:
        about = (
            f"{choice.limit} slots of the run's {config['steps']:,} steps, drawn by chance "
            f"(seed {choice.seed}), as trained."
        )
        return reader, about, reader.run(config["steps"], choice.limit, choice.seed)
    about = (
        f"{min(choice.limit, total):,} of the {total:,} examples of the {split} split, drawn by "
        f"chance (seed {choice.seed}). {'' if is_run else _UNDROPPED}"
    )
    return reader, about, reader.sample(choice.limit, choice.seed)


class Tally:
    """Passes examples on, counts them, and keeps small pictures of them for a sheet.

    Attributes:
      examples, bad: how many came by, and how many of them have bad records.
      lines: (words, labelled pictures) of each.
    """

    def __init__(self, shown: Iterator[Shown], small: int):
        """Pictures have at most `small` pixels along a side; 0 keeps none."""
        self._shown, self._small = shown, small
        self.examples = self.bad = 0
        self.lines: list[tuple[str, list[tuple[str, np.ndarray]]]] = []

    def __iter__(self) -> Iterator[Shown]:
        for one in self._shown:
            self.examples += 1
            self.bad += bool(one.bad)
            if self._small:
                self.lines.append((_words(one), [self._cell(*x) for x in one.pictures()]))
            yield one

    def exhaust(self) -> None:
        """Reads all of them."""
        for _ in self:
            pass

    def _cell(self, label: str, pixels: np.ndarray, dropped: bool) -> tuple[str, np.ndarray]:
        picture = Image.fromarray(pixels)
        picture.thumbnail((self._small, self._small))
        return label + ", dropped" * dropped, np.asarray(picture)


def _words(one: Shown) -> str:
    """What a sheet says of an example."""
    if one.text is None:
        return f"[{one.place}] bad record: {one.bad[-1].message}"
    return f"[{one.place}] {'(text dropped)' if one.no_text else one.text.read}"


def _check_step(step: int, steps: int, trained: bool) -> None:
    if not trained:
        raise InputError(
            "--step is of the training of a config; give one, such as stage3:7b with "
            "--config.data.records=DIR, and leave --split out"
        )
    if not 0 <= step < steps:
        raise InputError(f"--step {step} is not of the run, which has steps 0 to {steps - 1}")


def run_facts(config: Mapping[str, Any]) -> dict[str, str]:
    """{name: value} of what a run reads."""
    data = config["data"]
    weights = {name: weight for name, weight in data["tasks"].items() if weight}
    drop = ", ".join(f"{name} {share:g}" for name, share in data["dropout"].items())
    return {
        "records": _told_sources(data),
        "tasks": ", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
        "batch": str(data["batch"]),
        "sizes": ", ".join(data["sizes"]),
        "dropout": drop,
    }


def _told_sources(data: Mapping[str, Any]) -> str:
    made = f"made from cut-outs ({data['corpus'] or 'embedded'})"
    listed = [f"{one.name} ({one.path or made}, weight {one.weight:g})" for one in sources(data)]
    return ", ".join(listed) or str(data["records"]) or made


def folder_facts(folder: str) -> dict[str, str]:
    """{name: value} of the manifest of an import; nothing where a folder has none.

    Raises: InputError when there is one that is damaged.
    """
    path = files.Path(folder.removeprefix(_TARS)) / "manifest.json"
    if not path.is_file():
        return {}
    manifest = files.read_json(path)
    return {
        name: _told(manifest[name])
        for name in (
            "format", "task", "name", "licence", "tool", "records", "sources", "rejected",
        )
        if name in manifest
    }  # fmt: skip


def _told(value: Any) -> str:
    """A value of a manifest in words; a manifest is a file like others, so it may be anything."""
    if isinstance(value, dict):
        pairs = (f"{name} {count:,}" if type(count) is int else f"{name} {count}"
                 for name, count in value.items())  # fmt: skip
        return ", ".join(pairs) or "none"
    return value if isinstance(value, str) else json.dumps(value)
