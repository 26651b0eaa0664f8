"""What `config.data` says of a run beyond single fields, read and checked in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from qk_jax.base.errors import InputError
from qk_jax.data.example import MAX_REFERENCES, TASKS, TaskSettings, reference_sizes
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.sizes import for_number, parse_sizes


class Dropout(NamedTuple):
    """Probabilities that an example loses its text alone, its pictures alone, or both."""

    text: float
    pictures: float
    both: float


NO_DROPOUT = Dropout(0.0, 0.0, 0.0)


def dropouts(data: Mapping[str, Any]) -> dict[str, Dropout]:
    """The dropout of each task: its own of config.data.task_dropout, or config.data.dropout.

    Checkpoints from before tasks had their own have no `task_dropout`.

    Raises:
      InputError: they are no three probabilities whose sum is at most 1; names the field.
    """
    common = [data["dropout"][name] for name in Dropout._fields]
    own = data.get("task_dropout", {})
    return {
        task: _probabilities(f"task_dropout.{task}", own[task])
        if own.get(task)
        else _probabilities("dropout", common)
        for task in TASKS
    }


def _probabilities(name: str, values: Sequence[float]) -> Dropout:
    known = all(isinstance(x, int | float) and x >= 0 for x in values)
    if not known or len(values) != len(Dropout._fields) or round(sum(values), 9) > 1:
        raise InputError(
            f"config.data.{name} is {tuple(values)}; give (text, pictures, both), three "
            "probabilities whose sum is at most 1"
        )
    return Dropout(*values)


class Phase(NamedTuple):
    """A part of a run with sizes, or weights of the tasks, of its own.

    Attributes:
      first: its first step, counted from 0.
      data: config.data as it is from there on.
    """

    first: int
    data: dict[str, Any]


def phases(config: Mapping[str, Any]) -> list[Phase]:
    """The phases of config.data.curriculum; the last has the sizes of config.data itself.

    Checkpoints from before there were curricula have none.

    Raises:
      InputError: an entry is none, steps do not rise, the last phase would never come, a size is
        none, or a task has no weight in the last phase.
    """
    data = config["data"]
    found, first = [], 0
    for entry in data.get("curriculum", ()):
        until, own = _checked(entry, first)
        if "sizes" in own:
            parse_sizes(own["sizes"], "config.data.curriculum")
        chosen = [task for task, weight in own.get("tasks", {}).items() if weight]
        if late := sorted(task for task in chosen if not data["tasks"][task]):
            raise InputError(
                f"config.data.curriculum has the task {late[0]} before step {until}, which "
                "validation and painting would not know; give it a small weight in "
                f"config.data.tasks.{late[0]}, too"
            )
        found.append(Phase(first, {**data, **own}))
        first = until
    if first and first >= config["steps"]:
        raise InputError(
            f"config.data.curriculum ends at step {first} of {config['steps']}: config.data.sizes, "
            "which validation and painting have, would never be trained; end it sooner"
        )
    return [*found, Phase(first, {**data})]


def _checked(entry: Any, first: int) -> tuple[int, dict[str, Any]]:
    """The step before which an entry of the curriculum holds, and its fields of config.data."""
    if isinstance(entry, tuple | list) and len(entry) in (2, 3):
        until, *tables = entry
        are_tables = all(isinstance(table, tuple | list) for table in tables)
        if type(until) is int and until > first and are_tables:
            fields = ("sizes", "reference_sizes_by_number")
            return until, dict(zip(fields, map(tuple, tables), strict=False))
        if type(until) is int and until > first and _are_shares(*tables):
            return until, {"tasks": dict.fromkeys(TASKS, 0.0) | dict(tables[0])}
    raise InputError(
        f"config.data.curriculum has {entry!r}; give (step, sizes), (step, sizes, sides of "
        "references by their number) or (step, weights of the tasks) by rising steps, such as "
        "((1000, ('32x32', '48x32')), (2000, {'editing': 1})): these before that step, those of "
        "config.data after"
    )


def _are_shares(tasks: Any, *others: Any) -> bool:
    """Whether these are weights of tasks alone."""
    return (
        not others and isinstance(tasks, Mapping) and 0 < len(tasks)
        and set(tasks) <= set(TASKS) and _are_weights(list(tasks.values()))
    )  # fmt: skip


class Listed(NamedTuple):
    """An entry of config.data.sources.

    Attributes:
      path: as config.data.records; '' makes examples from config.data.corpus.
      tasks: that are read from it.
      name: what metrics and errors call it.
      weight: beside the other sources of the same task.
      captions: {field of the record's header: weight}, one of which is shown each time.
      roles: {role in the record: role that is trained}.
      split: that is trained on.
      validation: that is validated on; '' for none.
    """

    path: str
    tasks: tuple[str, ...]
    name: str
    weight: float = 1.0
    captions: Mapping[str, float] = MappingProxyType({"instruction": 1.0})
    roles: Mapping[str, str] = MappingProxyType({})
    split: str = "train"
    validation: str = "validation"


def sources(data: Mapping[str, Any]) -> list[Listed]:
    """The entries of config.data.sources; [] where config.data.records alone says what is read.

    Checkpoints from before there were several sources have none.

    Raises:
      InputError: an entry is none, two have one name, config.data.records is given too, or a task
        that has a weight has no source.
    """
    found: list[Listed] = []
    for entry in data.get("sources", ()):
        found.append(_listed(entry))
        if found[-1].name in {other.name for other in found[:-1]}:
            raise InputError(
                f"config.data.sources has two entries named {found[-1].name!r}; give one of them "
                "another 'name'"
            )
    if not found:
        return []
    if data["records"]:
        raise InputError(
            f"config.data.records is {data['records']!r} beside config.data.sources; make it an "
            "entry of them, or leave one of the two out"
        )
    wanted = {task for task, weight in data["tasks"].items() if weight > 0}
    if absent := sorted(wanted - {task for source in found for task in source.tasks}):
        raise InputError(
            f"no entry of config.data.sources is of the task {absent[0]}; add one or set "
            f"config.data.tasks.{absent[0]} to 0"
        )
    return found


def _listed(entry: Any) -> Listed:
    """An entry with its defaults. Raises: InputError."""
    if not isinstance(entry, Mapping) or not {"path", "tasks"} <= set(entry) <= {*Listed._fields}:
        raise InputError(
            f"config.data.sources has {entry!r:.200}; give entries such as {{'path': 'DATA', "
            f"'tasks': ('editing',), 'weight': 2}}, with the fields {', '.join(Listed._fields)}"
        )
    path, tasks = str(entry["path"]), entry["tasks"]
    tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    name = path.rstrip("/").rpartition("/")[2].rpartition(":")[2] or "made"
    found = Listed(**{"name": name, **entry, "path": path, "tasks": tasks})
    are_texts = all(isinstance(x, str) for x in (found.name, found.split, found.validation))
    faults = {
        "tasks": not tasks or not set(tasks) <= set(TASKS),
        "weight": not _are_weights([found.weight]),
        "captions": not isinstance(found.captions, Mapping)
        or not found.captions
        or not _are_weights(list(found.captions.values())),
        "roles": not isinstance(found.roles, Mapping)
        or not {*found.roles, *found.roles.values()} <= {"source", "reference"},
        "name": not are_texts or not found.name or not found.split,
    }
    if fault := next((field for field, wrong in faults.items() if wrong), ""):
        raise InputError(
            f"config.data.sources, {found.name}: {fault} is {getattr(found, fault)!r}; "
            f"{_WANTED[fault]}"
        )
    are_records = path and not path.startswith("tfds:")
    if not are_records and (found.roles or set(found.captions) != {"instruction"}):
        raise InputError(
            f"config.data.sources, {found.name}: captions and roles are of record files, which "
            f"{path or 'made examples'!r} are not; leave them out"
        )
    return found


_WANTED = {
    "tasks": f"give some of {', '.join(TASKS)}",
    "weight": "give a number above 0",
    "captions": "give fields of the records with weights above 0, such as {'instruction': 1}",
    "roles": "give roles by roles in the records, such as {'source': 'reference'}",
    "name": "name, split and validation are texts, the first two not empty",
}


def _are_weights(values: Sequence[Any]) -> bool:
    return all(type(x) in (int, float) and 0 < x < math.inf for x in values)


def check(config: Mapping[str, Any]) -> None:
    """Raises InputError for sections of config.data that no run can use; reads no data."""
    sources(config["data"])
    for phase in phases(config):
        TaskSettings.from_config(phase.data, 0)
    dropouts(config["data"])


def shapes(config: Mapping[str, Any]) -> list[tuple[Size, ...]]:
    """(H, W) of the target and of the condition pictures of every batch that a config may train.

    What its data do not have is among them. Of references of several sizes in one example each has
    the same here.

    Raises:
      InputError: see `phases`.
    """
    found: dict[tuple[Size, ...], None] = {}
    for phase in phases(config):
        tasks = {task for task, weight in phase.data["tasks"].items() if weight}
        references = reference_sizes(phase.data)
        for target in parse_sizes(phase.data["sizes"], "config.data.sizes"):
            if "text_to_image" in tasks:
                found[(target,)] = None
            if tasks - MAX_REFERENCES.keys() - {"text_to_image"}:
                found[target, target] = None  # the source, which has the target's size
            most = max((MAX_REFERENCES[task] for task in tasks & MAX_REFERENCES.keys()), default=0)
            for number in range(1, most + 1):
                for size in for_number(references, number):
                    found[target, *[size] * number] = None
    return list(found)
