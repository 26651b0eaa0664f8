"""Where examples come from: `config.data.records` chooses a format, and READERS reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qk_jax.data.example import Source, TaskSettings
from qk_jax.data.importers import record_files, tfds
from qk_jax.data.synthesis import tasks

# (config.data, split, settings, names of tasks) -> their sources; raises InputError
Reader = Callable[[Mapping[str, Any], str, TaskSettings, Sequence[str]], dict[str, Source]]
# By what precedes the first ':' of config.data.records; any other text is a folder of record files.
READERS: dict[str, Reader] = {"tfds": tfds.sources}


def make_sources(
    config: Mapping[str, Any], split: str, seed: int, names: Sequence[str]
) -> dict[str, Source]:
    """The sources of the tasks `names`, from config.data.

    `records` '' makes the tasks from cut-outs, a folder has ready examples, and FORMAT:NAME is read
    by one of READERS.

    Raises: InputError for files that are missing or damaged, or a task that they do not have.
    """
    data = config["data"]
    settings = TaskSettings.from_config(data, seed)
    if not data["records"]:
        read: Reader = tasks.sources
    else:
        read = READERS.get(data["records"].partition(":")[0], record_files.sources)
    return read(data, split, settings, names)
