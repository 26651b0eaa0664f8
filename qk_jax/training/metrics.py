"""What a run says of itself: windows of losses, an honest clock, and the files they go to."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.base.files import GIGABYTE
from qk_jax.data.example import TASKS

log = logging.getLogger(__name__)
_SLOW_WAIT = 0.1  # part of its time that a process may wait for data and be no straggler


class Window:
    """Collects the metrics of several steps and gives their means, per task and per t-bin."""

    _sums: dict[str, np.ndarray]
    _last: dict[str, float]

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Empty, or going on from what `state` returned, so that a resumed run's lines are those of
        one that never stopped."""
        self._clear()
        if state:
            self._sums = {name: np.asarray(x, np.float64) for name, x in state["sums"].items()}
            self._last = dict(state["last"])
            self.steps, self.skipped = state["steps"], state["skipped"]

    def state(self) -> dict[str, Any]:
        """What it has collected, as JSON."""
        sums = {name: x.tolist() for name, x in self._sums.items()}
        return {"sums": sums, "last": self._last, "steps": self.steps, "skipped": self.skipped}

    def _clear(self) -> None:
        self._sums, self._last = {}, {}
        self.steps = self.skipped = 0

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Metrics of one step or validation batch, on the host (`step.summaries`)."""
        self.steps += 1
        for name, value in metrics.items():
            if name == "lr":
                self._last[name] = float(value)
            else:
                old = self._sums.get(name, 0.0)
                self._sums[name] = old + np.asarray(value, np.float64)

    def skip(self) -> None:
        """Counts a step whose update was not applied; it is in none of the means."""
        self.skipped += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; a task or bin that did not occur is left out."""
        sums, steps = self._sums, max(self.steps, 1)
        out = dict(self._last) | ({"skipped": self.skipped} if self.skipped else {})
        for name, value in sums.items():
            if value.ndim == 0:
                out[name] = float(value) / steps
        out |= _ratios("loss", TASKS, sums.get("task_sum"), sums.get("task_count"))
        if "t_sum" in sums:
            bins = len(sums["t_sum"])
            names = [f"t{i / bins:.2f}-{(i + 1) / bins:.2f}" for i in range(bins)]
            out |= _ratios("loss", names, sums["t_sum"], sums["t_count"])
        self._clear()
        return out


def _ratios(prefix: str, names: Any, total: Any, count: Any) -> dict[str, float]:
    """{prefix/name: total / count} where there is something to divide by."""
    if total is None:
        return {}
    triples = zip(names, total, count, strict=True)
    return {f"{prefix}/{name}": float(t / n) for name, t, n in triples if n > 0}


class Clock:
    """Steady speed: iterations that compiled, or came after a pause, do not count.

    An iteration dispatches one step and waits for the one before, whose examples and FLOPs it gets.
    """

    def __init__(self) -> None:
        self._start = self._ready = time.perf_counter()
        self._skip = True
        self._seconds = self._examples = self._flops = self._wait = 0.0

    def pause(self) -> None:
        """The next iteration does not count (compilation, validation, painting, saving)."""
        self._skip = True

    def begin(self) -> None:
        """Call before the iteration asks for its batch."""
        self._start = time.perf_counter()

    def data_ready(self) -> None:
        """Call when the iteration has its batch."""
        self._ready = time.perf_counter()

    def end(self, examples: int, flops: int, counts: bool) -> None:
        """Call when the step before is done; `counts` is False when this iteration compiled."""
        now = time.perf_counter()
        if counts and not self._skip:
            self._seconds += now - self._start
            self._wait += self._ready - self._start
            self._examples += examples
            self._flops += flops
        self._skip = not counts

    def take(self, peak: float | None, devices: int) -> dict[str, float]:
        """Speed since the last call: pictures/s, model TFLOP/s per device, MFU where known."""
        out = {}
        if self._seconds > 0:
            rate = self._flops / self._seconds / devices
            out = {
                "pictures_per_second": self._examples / self._seconds,
                "model_tflops_per_second_per_device": rate / 1e12,
                "data_wait": self._wait / self._seconds,
            }
            if peak:
                out["mfu"] = rate / peak
        self._seconds = self._examples = self._flops = self._wait = 0.0
        return out


def memory() -> dict[str, float]:
    """The most memory that a device of this process has used so far, in GB, where it is known."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    most = max(found.get("peak_bytes_in_use", 0) for found in stats)
    return {"memory_gb": most / GIGABYTE} if most else {}


def straggler(waits: Mapping[str, float]) -> str:
    """The process that the others wait for, in words, by the part of its time that each waits for
    data; '' where there is none."""
    if not waits:
        return ""
    name, wait = max(waits.items(), key=lambda pair: pair[1])
    if wait < max(_SLOW_WAIT, 2 * float(np.median(list(waits.values())))):
        return ""
    return f"{name} waits for data {100 * wait:.0f} % of the time, and all others for it"


class Writers:
    """metrics.jsonl always, TensorBoard where tensorboardX is installed, Weights & Biases when
    asked for; process 0 only."""

    def __init__(self, folder: files.Path, first_step: int, config: ConfigDict):
        """Opens the files; what an abandoned run wrote after `first_step` is dropped.

        Raises:
          InputError: wandb.project is set but wandb is not installed.
        """
        self.active = jax.process_index() == 0
        self._wandb = self._board = None
        if not self.active:
            return
        # A bucket's files cannot be appended to: they grow here and are uploaded at log points.
        self._mirror = buckets.Mirror(folder)
        here, path = self._mirror.here, folder / "metrics.jsonl"
        self._path = path
        _drop_after(path, first_step)
        if here != folder and path.is_file():
            path.copy(here / path.name)
        self._file = (here / path.name).open("a")
        try:
            import tensorboardX  # imports torch where there is one

            # Its thread ends when the disk is full; a queue with a bound would then block.
            self._board = tensorboardX.SummaryWriter(
                str(here), purge_step=first_step + 1, max_queue=0
            )
        except ImportError:
            log.warning("tensorboardX is not installed: nothing is written for TensorBoard")
        if config.wandb.project:
            try:
                import wandb
            except ImportError:
                raise InputError(
                    "wandb.project is set but wandb is not installed; install it or unset it"
                ) from None
            self._wandb = wandb.init(
                project=config.wandb.project,
                name=config.wandb.name or folder.name,
                id=_run_id(folder / "wandb_id"),
                dir=str(here),
                config=config.to_dict(),
                resume="allow",
            )

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line, and one point per value under '<kind>/<name>'."""
        if not self.active:
            return
        # JSON knows no NaN or infinity
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self._told():  # what could not be flushed is written with the next line
            self._file.write(json.dumps({"step": step, "kind": kind, **clean}) + "\n")
            self._file.flush()
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": v for name, v in values.items()}, step=step)
        self._mirror.changed()

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture uint8 [H, W, 3] for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def text(self, step: int, name: str, markdown: str) -> None:
        """A text for TensorBoard."""
        if self._board is not None:
            self._board.add_text(name, markdown, step)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.active:
            with self._told():
                self._file.close()
            if self._board is not None:
                with self._told():
                    self._board.close()
            if self._wandb is not None:
                self._wandb.finish()
            self._mirror.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Metrics that cannot be written, on a full disk, are a line of the log."""
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror or error)


def _run_id(path: files.Path) -> str:
    """Of the run at Weights & Biases, which goes on when the stage does; drawn once."""
    if not path.is_file():
        files.write_text(path, secrets.token_hex(4))
    return path.read_text()


def _drop_after(path: files.Path, step: int) -> None:
    """Keeps the whole lines of a metrics file up to `step`."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the torn last line of a killed run
    files.write_text(path, "".join(f"{line}\n" for line in kept))
