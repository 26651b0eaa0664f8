"""metrics.jsonl read back: each line of a chart once, whatever the run went through."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from qk_jax.base import files

_MOST_STEPS = 2**53  # beyond which JavaScript has no integers
POINTS = 600  # of a line; of more, the lowest and the highest of each stretch are kept


class Series(NamedTuple):
    """Values of one name by step.

    Attributes:
      steps: rising.
      values: as many; None where a value was not finite.
    """

    steps: list[int]
    values: list[float | None]

    def last(self) -> float | None:
        """The last finite value."""
        return next((value for value in reversed(self.values) if value is not None), None)

    def thinned(self, points: int = POINTS) -> Series:
        """At most about so many points, among them every extreme value."""
        if len(self.steps) <= points:
            return self
        known = np.array([np.nan if value is None else value for value in self.values])
        kept = {0, len(known) - 1}
        for part in np.array_split(np.arange(len(known)), points // 2):
            finite = part[np.isfinite(known[part])]
            if len(finite):
                kept |= {int(finite[known[finite].argmin()]), int(finite[known[finite].argmax()])}
            if len(finite) < len(part):  # a gap stays one
                kept.add(int(part[np.isnan(known[part])][0]))
        chosen = sorted(kept)
        return Series([self.steps[i] for i in chosen], [self.values[i] for i in chosen])


class History(NamedTuple):
    """What the metrics of a stage say.

    Attributes:
      series: by (kind, name), such as ('train', 'loss').
      rollbacks: (step, the step whose state was taken) of each.
      damaged: numbers of the lines that cannot be read, counted from 1.
    """

    series: dict[tuple[str, str], Series]
    rollbacks: list[tuple[int, int]]
    damaged: list[int]

    def last(self, kind: str, name: str) -> float | None:
        """The last finite value, where there is one."""
        found = self.series.get((kind, name))
        return found.last() if found else None

    @property
    def step(self) -> int | None:
        """The last step of which there is a line of training."""
        steps = [x.steps[-1] for (kind, _), x in self.series.items() if kind == "train"]
        return max(steps, default=None)


def read(text: bytes) -> History:
    """The history of a metrics.jsonl.

    A step that a run did again, after it was resumed from an earlier one, counts as it was done
    last. A line that cannot be read, such as the torn last one of a killed run, is left out.
    """
    rows: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    damaged = []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = files.json_object(line)
            step, kind = row.pop("step"), row.pop("kind")
        except (ValueError, KeyError, RecursionError):
            damaged.append(number)
            continue
        if type(step) is not int or not 0 <= step < _MOST_STEPS or not isinstance(kind, str):
            damaged.append(number)
            continue
        lines = rows[kind]
        while lines and lines[-1][0] >= step:
            lines.pop()
        lines.append((step, row))
    series: dict[tuple[str, str], Series] = {}
    for kind, lines in rows.items():
        for step, row in lines:
            for name, value in row.items():
                # Numbers near the ends of their range are no metrics, and break a scale.
                if value is None or type(value) in (int, float) and abs(value) < 1e300:
                    steps, values = series.setdefault((kind, name), Series([], []))
                    steps.append(step)
                    values.append(value)
    rollbacks = [(step, row["to"]) for step, row in rows["rollback"] if type(row.get("to")) is int]
    return History(series, rollbacks, damaged)
