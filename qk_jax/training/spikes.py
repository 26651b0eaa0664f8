"""Loss spikes: how a step's loss is told from the usual ones, and where a run goes back to.

The state of a checkpoint before the spike takes the place of the state after it and counts as of
the spike's step: the updates between are undone, their data is skipped, and the step number alone
still decides data, noise and rate. Everything is decided by the losses so far and by the
checkpoints of `checkpoint.every`, all of which a stopped run has again when it goes on, so that it
decides the same. The name in the checkpoints' metadata is `spikes`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from qk_jax.base.errors import InputError
from qk_jax.data.example import TASKS

NORMAL = 1.4826  # median absolute deviations in a standard deviation of normal values
LEAST = 0.01  # of the median: no standard deviation is taken for less
TINY = 1e-30  # losses of zero deviate by it
KEPT = 2  # newest checkpoints of `checkpoint.every` that must stay, see `Detector.last_good`
MIN_WINDOW = 8  # losses of which a median and a deviation mean something


def check(config: ConfigDict) -> None:
    """Raises InputError when the section `spike` is on and cannot work."""
    section = config.spike
    if section.zscore and not config.checkpoint.every:
        raise InputError(
            "spike.zscore goes back to the checkpoints of checkpoint.every, which is 0; set it"
        )
    if section.window < MIN_WINDOW:
        raise InputError(f"spike.window is {section.window}; give at least {MIN_WINDOW} steps")


class Spike(NamedTuple):
    """A loss that stands out.

    Attributes:
      step: its step.
      task: whose mean loss in the batch of that step it is.
      loss: that mean.
      usual: the median of the task's last losses.
      zscore: robust standard deviations between the two.
    """

    step: int
    task: str
    loss: float
    usual: float
    zscore: float

    def __str__(self) -> str:
        return (
            f"the loss of {self.task} at step {self.step} is {self.loss:.4g}, usual is "
            f"{self.usual:.4g} (z-score {self.zscore:.1f})"
        )


class Rollback(NamedTuple):
    """The state of step `good` that counts as that of `step`, the step of a spike."""

    good: int
    step: int


class Detector:
    """The last losses of each task.

    Attributes:
      rollbacks: of the run so far.
    """

    def __init__(self, config: ConfigDict, state: Mapping[str, Any] | None = None):
        """Knows nothing yet, or goes on from what `meta` returned as 'spikes'."""
        self._section, self._every = config.spike, config.checkpoint.every
        known = state or {"losses": {}, "rollbacks": []}
        self._losses = {
            task: deque(known["losses"].get(task, ()), self._section.window) for task in TASKS
        }
        self.rollbacks = [Rollback(*pair) for pair in known["rollbacks"]]

    def meta(self) -> dict[str, Any]:
        """Its entry in the metadata of a checkpoint; none when spikes are not looked for."""
        if not self._section.zscore:
            return {}
        losses = {task: list(values) for task, values in self._losses.items() if values}
        return {"spikes": {"losses": losses, "rollbacks": self.rollbacks}}

    def judge(self, step: int, values: Mapping[str, np.ndarray]) -> Spike | None:
        """The spike in the metrics of a step (`step.summaries`), if there is one.

        A task is judged once it has as many losses as the window holds. Those of a step that has
        no spike join them.
        """
        if not self._section.zscore:
            return None
        counts = values["task_count"]
        means = {
            task: float(values["task_sum"][i] / counts[i])
            for i, task in enumerate(TASKS)
            if counts[i] > 0
        }
        for task, loss in means.items():
            if found := self._compared(step, task, loss):
                return found
        for task, loss in means.items():
            self._losses[task].append(loss)
        return None

    def _compared(self, step: int, task: str, loss: float) -> Spike | None:
        known = np.asarray(self._losses[task], np.float64)
        if len(known) < self._section.window:
            return None
        usual = float(np.median(known))
        deviation = NORMAL * float(np.median(np.abs(known - usual)))
        zscore = (loss - usual) / max(deviation, LEAST * abs(usual), TINY)
        return Spike(step, task, loss, usual, zscore) if zscore > self._section.zscore else None

    def last_good(self, spike: Spike, saved: Sequence[int]) -> int | None:
        """The newest step of `saved` to go back to, None where there is none.

        It must be of `checkpoint.every`, since a run that is stopped elsewhere saves other steps
        besides; and a step between it and the spike must have had a usual loss, which proves its
        weights.
        """
        good = [s for s in saved if s % self._every == 0 and s <= spike.step - 2]
        return max(good, default=None)

    def count(self, spike: Spike, good: int) -> None:
        """Counts a rollback from `spike` to the step `good`.

        Raises:
          InputError: it is one more than spike.max_rollbacks.
        """
        most = self._section.max_rollbacks
        if len(self.rollbacks) >= most:
            raise InputError(
                f"{spike}, after {most} rollbacks (spike.max_rollbacks): run again with a lower "
                "optimizer.lr, or with more spike.max_rollbacks where each had a cause in the data"
            )
        self.rollbacks.append(Rollback(good, spike.step))
