"""Where examples come from: `config.data.records`, or each entry of `config.data.sources`, names a
format, and READERS reads it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.data.example import Joined, Part, Source, TaskSettings
from qk_jax.data.importers import record_files, tars, tfds
from qk_jax.data.settings import Listed
from qk_jax.data.settings import sources as listed_sources
from qk_jax.data.synthesis import tasks

# (config.data, split, settings, names of tasks) -> their sources; raises InputError
Reader = Callable[[Mapping[str, Any], str, TaskSettings, Sequence[str]], dict[str, Source]]
# By what precedes the first ':' of config.data.records; any other text is a folder of record files.
READERS: dict[str, Reader] = {"tar": tars.sources, "tfds": tfds.sources}


def make_sources(
    config: Mapping[str, Any], split: str, seed: int, names: Sequence[str]
) -> dict[str, Source]:
    """The sources of the tasks `names`, from config.data, a `Joined` where `sources` lists several.

    `records` '' makes the tasks from cut-outs, a folder has ready examples, and FORMAT:NAME is read
    by one of READERS; so does the path of an entry of `sources`.

    Raises: InputError for files that are missing or damaged, or a task that they do not have.
    """
    data = config["data"]
    settings = TaskSettings.from_config(data, seed)
    if listed := listed_sources(data):
        return _joined(listed, data, split, settings, names)
    return _reader(data["records"])(data, split, settings, names)


def _reader(path: str) -> Reader:
    return READERS.get(path.partition(":")[0], record_files.sources) if path else tasks.sources


def _joined(
    listed: Sequence[Listed],
    data: Mapping[str, Any],
    split: str,
    settings: TaskSettings,
    names: Sequence[str],
) -> dict[str, Source]:
    """The sources of all entries, by task. Raises: InputError."""
    parts: dict[str, list[Part]] = {name: [] for name in names}
    for entry in listed:
        own = [name for name in names if name in entry.tasks]
        where = entry.split if split == "train" else entry.validation
        if not own or not where:
            continue
        read, given = _reader(entry.path), {**data, "records": entry.path}
        if read in (record_files.sources, tars.sources):
            read = functools.partial(read, captions=entry.captions, roles=entry.roles)
        for name, source in read(given, where, settings, own).items():
            parts[name].append(Part(entry.name, entry.weight, source))
    for name, found in parts.items():
        if not found:
            raise InputError(
                f"no entry of config.data.sources has a split for the {split} of {name}; name one "
                "in 'validation'"
            )
    return {name: Joined(found) for name, found in parts.items()}
