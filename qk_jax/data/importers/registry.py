from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.data.example import TaskSettings
from qk_jax.data.importers import record_files, tfds
from qk_jax.data.records import RecordFile
from qk_jax.data.synthesis import tasks
from qk_jax.data.synthesis.corpus import Corpus


def make_sources(
    config: Mapping[str, Any], split: str, seed: int, names: Sequence[str]
) -> dict[str, Any]:
    """The sources of the tasks `names`, from config.data.

    `records` '' makes the tasks from the cut-outs of `corpus` ('' is the embedded one); a folder
    with train.array_record and validation.array_record gives ready examples; 'tfds:NAME' gives
    captioned pictures of a TensorFlow data set.

    Raises: InputError for files that are missing or damaged, or a task that they do not have.
    """
    data = config["data"]
    settings = TaskSettings(
        sizes=tuple(tuple(size) for size in data["sizes"]),
        reference_size=data["reference_size"],
        seed=seed,
    )
    place, bound = data.get("records", ""), data["max_pixels"]
    if place.startswith("tfds:"):
        if set(names) != {"text_to_image"}:
            raise InputError(f"{place} has text_to_image only; set other data.tasks to 0")
        image, text = data.get("tfds_image", "image"), data.get("tfds_text", "text")
        name = place.removeprefix("tfds:")
        return {names[0]: tfds.TfdsSource(name, split, settings, image, text, bound)}
    if place:
        file = RecordFile(f"{place}/{split}.array_record")
        return {name: record_files.RecordSource(file, name, settings, bound) for name in names}
    corpus = Corpus(split, data["corpus"] or None, bound)
    return {name: tasks.SOURCES[name](corpus, settings) for name in names}
