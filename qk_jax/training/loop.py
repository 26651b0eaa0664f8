"""The trainer: a stage from its start, or from where it stopped, to its last step."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from qk_jax.base import buckets, distributed, files, notices, runtime
from qk_jax.base.errors import INTERRUPTED, InputError, some
from qk_jax.checkpoints import run_folder
from qk_jax.checkpoints.store import Meta, Store, Trees
from qk_jax.data import pipeline
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import train_state
from qk_jax.experiment.plan import Plan
from qk_jax.training import ahead, cached, evals, flops, metrics, profiling, programs, spikes, start
from qk_jax.training.cached import CachedPadding
from qk_jax.training.padding import Padding
from qk_jax.training.phases import Limits, Phases
from qk_jax.training.saving import Saver

log = logging.getLogger(__name__)
PREEMPTED = 42  # exit status after SIGTERM
# Phases that the progress bar names: the others last no longer than a step.
SHOWN = {
    "compile": "compiling", "save": "saving", "validation": "validating", "painting": "painting",
    "restore": "restoring",
}  # fmt: skip


def train(config: ConfigDict, workdir: files.PathLike, *, imported_s: float | None = None) -> None:
    """Runs the config's stage to its last step, from its start or from where it stopped.

    Args:
      config: of `config.load`.
      workdir: the stage's folder is made inside.
      imported_s: age of the process when its imports were done, for the log.

    Raises:
      InputError: anything wrong with config, folders, checkpoints or data, or a loss of NaN.
      Failure: `checkpoint.max_failures` saves in a row have failed.
      SystemExit: 42 after SIGTERM, 130 after Ctrl-C; the state is saved.
    """
    imported_s = runtime.age() if imported_s is None else imported_s
    distributed.agree("run", facts(config))
    buckets.check([os.fspath(workdir), *(value for _, value in config_lib.fields(config))])
    start.check(config, workdir)
    folder = run_folder.create(workdir, config.stage)
    if config.compilation_cache:
        runtime.keep_programs(files.absolute(workdir) / "compilation_cache")
    stacks = None if buckets.is_remote(folder) else folder / "stacks.txt"  # stderr has them too
    phases = Phases(Limits(**config.watchdog), stacks, hung)
    with contextlib.closing(phases), phases.doing("start"):
        start.inherit(config, workdir)
        plan = Plan.build(config)
        evals.check(plan)
        profiling.check(config.profile.steps)
        spikes.check(config)
        ahead.check(config)
        store = Store(
            folder / run_folder.CHECKPOINTS,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            keep_last=(config.checkpoint.every, spikes.KEPT) if config.spike.zscore else None,
        )
        with contextlib.closing(store), jax.set_mesh(plan.mesh):
            for line in plan.describe():
                log.info("%s", line)
            pad = cached.padding_of(config)
            with phases.doing("index"):
                evals.check_data(config)
                data = pipeline.Pipeline(config, "train", prompts=plan.prompts, finish=pad)
            distributed.agree("data", {"the digest of the data's plan": data.digest()})
            with phases.doing("restore" if store.steps() else "start"):
                begun = start.restore_or_start(plan, folder, store)
            cached.check(plan, pad, begun.frozen)
            files.write_text(folder / run_folder.CONFIG, config_lib.to_json(config))
            if int(begun.state.step) >= config.steps:
                log.info("%s is done: %d of %d steps", folder, begun.state.step, config.steps)
                return
            trainer = Trainer(plan, folder, store, data, pad, begun, phases)
            with contextlib.closing(trainer):
                trainer.run(imported_s)


def hung(line: str) -> NoReturn:
    """Ends the process, and all others, because a phase does not end; in the watchdog's thread."""
    workers = [
        f"data worker {worker.pid} is {runtime.process_state(worker.pid)}"
        for worker in multiprocessing.active_children()
    ]
    distributed.stop(1, "; ".join([line, *workers, "the stacks of all threads are above"]))


def facts(config: ConfigDict) -> dict[str, str]:
    """What must be the same on all hosts: every field of the config, program and libraries."""
    fields = {f"config.{name}": str(value) for name, value in config_lib.fields(config)}
    return fields | {"the revision of qk_jax": runtime.revision(), **runtime.versions()}


class Trainer:
    """One process's training loop and what belongs to it."""

    def __init__(
        self,
        plan: Plan,
        folder: files.Path,
        store: Store,
        data: pipeline.Pipeline,
        pad: Padding | CachedPadding,
        begun: start.Start,
        phases: Phases,
    ):
        """Compiles nothing yet; `begun` is consumed."""
        self.plan, self.folder, self.store = plan, folder, store
        self.saver = Saver(store, plan.config)
        self.state, self.frozen, self.fingerprint = begun.state, begun.frozen, begun.fingerprint
        self.train_step = programs.Programs(plan)
        run_folder.keep_tokenizer(folder, plan.prompts)
        self.data, self.pad = data, pad
        self.window, self.clock = metrics.Window(begun.window), metrics.Clock()
        self.phases = phases
        self.profiler = profiling.Profiler(folder / "profile", plan.config.profile.steps)
        self.peak = flops.peak(jax.devices()[0])
        self.signal = 0
        self.skipped = 0  # updates in a row
        self.spikes = spikes.Detector(plan.config, begun.spikes)
        self.rollback: spikes.Rollback | None = None  # that is about to be done
        self.writers = metrics.Writers(folder, int(begun.state.step), plan.config)
        self.writers.text(int(begun.state.step), "config", config_lib.table(plan.config))
        self.evaluators = evals.build(plan, folder, self.writers)

    def run(self, imported_s: float) -> None:
        """Compiles all programs, and steps from the state's own to config.steps."""
        config, first = self.plan.config, int(self.state.step)
        with self.bar(first) as bar:
            with self.phases.doing("compile"):
                self.train_step.compile(map(self.pad.abstract, self.data.abstract()))
            if first == 0:
                self.evaluate(0)
            bar.unpause()  # its rate is that of the steps
            self.steps(first, bar, imported_s)
        log.info("%s: %d steps done; time: %s", self.folder, config.steps, self.phases.report())

    @contextlib.contextmanager
    def bar(self, first: int) -> Iterator[tqdm.tqdm]:
        """The progress bar, which names the phases that take long while they last."""
        config = self.plan.config
        bar = tqdm.tqdm(
            total=config.steps, initial=first, desc=config.stage, unit="step", smoothing=0.1,
            disable=jax.process_index() != 0, mininterval=0.5 if sys.stderr.isatty() else 20,
        )  # fmt: skip
        shown = ""

        def show(phase: str) -> None:
            nonlocal shown
            if (words := SHOWN.get(phase, "")) != shown:
                shown = words
                bar.set_description(f"{config.stage}, {words}" if words else config.stage)

        with bar:
            self.phases.entered = show
            try:
                yield bar
            finally:
                self.phases.entered = lambda phase: None

    def steps(self, first: int, bar: tqdm.tqdm, imported_s: float) -> None:
        """Takes the steps after `first`, and saves the last."""
        config = self.plan.config
        pending: Pending | None = None
        with self.signals(), notices.passed_on(), self.profiler.signals():
            batches = self.data.batches(first)
            step = first
            while step < config.steps:
                step += 1
                pending = self.take(step, batches, pending, bar)
                if step == first + 1:
                    with self.phases.doing("step", f"step {step}"):
                        jax.block_until_ready(pending[1])
                    log.info("the first step ended %s", self.phases.since_start(imported_s))
                self.saver.check()
                leave, saves = self.asked_to_leave(), self.saver.is_due(step)
                if not self.rollback and (leave or saves or self.evaluates(step)):
                    with self.phases.doing("step", f"step {step}"):
                        self.record(*pending, bar, counts=False)
                    pending = None
                if self.rollback:  # from this step, or the one before it
                    bar.n = step = self.rollback.step
                    pending, saves, batches = None, True, self.go_back(self.rollback)
                if pending is None:
                    self.between(step, saves, leave)
                    self.clock.pause()
            with self.phases.doing("save", f"step {config.steps}"):
                self.saver.save_whole(config.steps, *self.checkpoint())

    def take(
        self, step: int, batches: Iterator[Any], pending: Pending | None, bar: tqdm.tqdm
    ) -> Pending:
        """Takes a step, and records the one before it."""
        self.clock.begin()
        self.profiler.begin(step)
        with self.phases.doing("data", f"step {step}"):
            batch = evals.global_batch(self.plan, next(batches))
        self.clock.data_ready()
        new = self.train_step.is_new(batch)
        with self.phases.doing("compile" if new else "step", f"step {step}"):
            self.state, values, work = self.train_step(self.state, self.frozen, batch)
            self.profiler.end(step, values)
            if pending:  # one step behind, so that the devices never wait for the log
                self.record(*pending, bar, counts=not new)
        return step, values, batch["task"].shape[0], work

    def evaluates(self, step: int) -> bool:
        """Whether an evaluator is due after `step`."""
        return any(evaluator.is_due(step) for evaluator in self.evaluators)

    def between(self, step: int, saves: bool, leave: int) -> None:
        """Saves and evaluates after `step`; leaves when asked to."""
        if leave:
            self.leave(step, leave)
        if saves:
            with self.phases.doing("save", f"step {step}"):
                self.saver.save(step, *self.checkpoint())
        self.evaluate(step)

    def leave(self, step: int, status: int) -> NoReturn:
        """Saves and ends with `status`."""
        log.info("asked to stop: saving step %d", step)
        if status == PREEMPTED and self.saver.is_too_slow():
            log.warning(
                "the last save took %.0f s: this one is not likely to be complete when the host "
                "ends; if it is not, the run goes on from step %s",
                self.saver.took_s, max(self.store.steps(), default="none"),
            )  # fmt: skip
        begun = time.monotonic()
        with self.phases.doing("save", f"step {step}"):
            self.saver.save_whole(step, *self.checkpoint())
        log.info("step %d was saved in %.1f s; run the same command to go on", step,
                 time.monotonic() - begun)  # fmt: skip
        raise SystemExit(status)

    def evaluate(self, step: int) -> None:
        """Runs the evaluators that are due after `step`."""
        for evaluator in self.evaluators:
            if evaluator.is_due(step):
                with self.phases.doing(evaluator.phase, f"step {step}"):
                    evaluator.maybe_run(step, self.state, self.frozen)

    def record(
        self, step: int, values: Any, examples: int, work: int, bar: tqdm.tqdm, *, counts: bool
    ) -> None:
        """Fetches the metrics of a step (waiting for it) and logs them when due.

        Raises:
          InputError: the run has diverged; names the step.
        """
        config = self.plan.config
        values = jax.device_get(values)
        self.clock.end(examples, work, counts)
        applied, finite = values.pop("applied"), values.pop("finite")
        if not math.isfinite(values["param_norm"]):
            self.diverged(step, "the weights are not finite after")
        if applied:
            self.skipped = 0
            self.window.add(values)
            self.judge(step, values)
        else:
            self.skip(step, values, finite)
        bar.update()
        if step % config.log.every == 0 or step == config.steps:
            line = self.window.take() | self.clock.take(self.peak, jax.device_count())
            line |= self.phases.shares() | metrics.memory() | self.bad_counts()
            waits = distributed.latest("data_wait", line.get("data_wait", 0.0))
            if self.writers.active and (slow := metrics.straggler(waits)):
                log.warning("%s", slow)
            self.writers.write(step, "train", line)
            speed = line.get("pictures_per_second")
            bar.set_postfix_str(
                f"loss {line.get('loss', math.nan):.4f}"
                + (f", {speed:.1f} pictures/s" if speed else "")
            )

    def bad_counts(self) -> dict[str, float]:
        """Bad records so far: of all processes, and of this one by source and kind; {} for none."""
        counts = self.data.bad_counts()
        own = float(sum(counts.values()))
        total = sum(distributed.latest("bad", own).values()) or own
        return {"bad": total, **counts} if total else {}

    def skip(self, step: int, values: Any, finite: np.ndarray) -> None:
        """Names an update that was not applied, and the examples [B] whose loss is not finite.

        Raises:
          InputError: it is one of too many in a row.
        """
        self.skipped += 1
        self.window.skip()
        records = self.data.records(step - 1)
        culprits = [name for name, good in zip(records, finite, strict=True) if not good]
        log.warning(
            "step %d is skipped: its loss is %s, the norm of its gradient %s; records: %s",
            step, values["loss"], values["grad_norm"], some(culprits or records, 8),
        )  # fmt: skip
        if self.skipped >= self.plan.config.optimizer.max_skipped:
            self.diverged(step, f"{self.skipped} updates in a row are not finite, the last is")

    def judge(self, step: int, values: Any) -> None:
        """Notes a spike in the losses of a step, and the step to go back to where there is one;
        drops the steps between.

        Raises:
          InputError: it is one of too many.
        """
        if not (spike := self.spikes.judge(step, values)):
            return
        self.saver.check(wait=True)
        saved = json.loads(distributed.told(f"saved/{step}", json.dumps(self.store.steps())))
        records = some(self.data.records(step - 1), 8)
        if (good := self.spikes.last_good(spike, saved)) is None:
            log.warning("%s; no checkpoint to go back to, records: %s", spike, records)
            return
        self.spikes.count(spike, good)
        log.warning(
            "%s; going back to the state of step %d, the data of steps %d to %d is skipped; "
            "records of step %d: %s", spike, good, good + 1, step, step, records,
        )  # fmt: skip
        self.store.drop(s for s in saved if s > good)
        self.rollback = spikes.Rollback(good, step)

    def go_back(self, back: spikes.Rollback) -> Iterator[Any]:
        """Takes the state of a checkpoint as that of a later step; the batches that follow."""
        self.rollback = None
        del self.state  # there is room for one
        with self.phases.doing("restore", f"step {back.good}"):
            state, _ = start.read_state(self.plan, self.store, back.good)
            self.state = train_state.counted_on(state, back.step)
        self.data.close()
        self.writers.write(back.step, "rollback", {"to": back.good})
        return self.data.batches(back.step)

    def diverged(self, step: int, what: str) -> NoReturn:
        """Raises InputError, which names the last checkpoint and the mend."""
        self.saver.settle()
        known = [s for s in self.store.steps() if s < step]
        raise InputError(
            f"{what} step {step} of {self.plan.config.stage}; the last checkpoint is of step "
            f"{known[-1] if known else 'none'}: run again with a lower optimizer.lr or with "
            "optimizer.clip=1.0"
        )

    def checkpoint(self) -> tuple[Trees, Meta]:
        """What is saved of the state: arrays and metadata."""
        items = {"params": self.state.params, "optimizer": self.state.opt_state}
        if self.state.ema:
            items["ema"] = self.state.ema
        meta = {"frozen": self.fingerprint, "window": self.window.state(), **self.spikes.meta()}
        return items, run_folder.metadata(self.plan) | meta

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within the block, SIGTERM and Ctrl-C only leave a note.

        With several processes SIGTERM stays JAX's, which tells all of them, and Ctrl-C becomes one.
        """
        status: dict[int, int] = {signal.SIGINT: INTERRUPTED}
        if not distributed.several():
            status[signal.SIGTERM] = PREEMPTED

        def note(number: int, frame: Any) -> None:
            self.signal = status[number]
            if distributed.several():
                os.kill(os.getpid(), signal.SIGTERM)

        old = {number: signal.signal(number, note) for number in status}
        try:
            with runtime.patient():
                yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def asked_to_leave(self) -> int:
        """The exit status to leave with now, or 0; the same on every host. Called once a step."""
        if distributed.several():
            return PREEMPTED if distributed.preempted() else 0
        return self.signal

    def close(self) -> None:
        """Waits for the last checkpoint and closes all files but the store."""
        self.profiler.close()
        self.saver.settle()
        self.data.close()
        for evaluator in self.evaluators:
            evaluator.close()
        self.writers.close()


Pending = tuple[int, Any, int, int]  # (step, metrics on the devices, examples, FLOPs)
