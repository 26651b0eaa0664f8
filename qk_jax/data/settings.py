"""What `config.data` says of a run beyond single fields, read and checked in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qk_jax.base.errors import InputError
from qk_jax.data.example import TASKS, TaskSettings


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


def check(config: Mapping[str, Any]) -> None:
    """Raises InputError for sections of config.data that no run can use; reads no data."""
    TaskSettings.from_config(config["data"], 0)
    dropouts(config["data"])
