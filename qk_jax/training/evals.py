"""Evaluation during training: entries of `config.evals`, each run when it is due.

An entry {name: {'type': ..., 'every': steps, ...}} names a class of EVALUATORS, which reads the
rest of its section. A new evaluator is a class here and a line in that table.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qk_jax import painting
from qk_jax.base import files, trees
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.base.types import PaddedBatch, Tree
from qk_jax.data import pipeline
from qk_jax.data.example import TASKS, Example, Source
from qk_jax.data.importers import registry
from qk_jax.experiment.plan import Plan
from qk_jax.experiment.train_state import TrainState
from qk_jax.painting import sheets
from qk_jax.training import metrics
from qk_jax.training import step as step_lib
from qk_jax.training.padding import Padding

log = logging.getLogger(__name__)


class Evaluator(abc.ABC):
    """One entry of config.evals.

    Attributes:
      phase: what the time that it takes is booked on (`phases`).
    """

    phase = "validation"

    def __init__(
        self, plan: Plan, section: ConfigDict, folder: files.Path, writers: metrics.Writers
    ):
        """Prepares everything that does not depend on the parameters.

        Args:
          plan: of the run.
          section: the entry.
          folder: of the stage.
          writers: for figures and pictures.

        Raises:
          InputError: a setting or the validation data cannot be used.
        """
        self.plan, self.section, self.folder, self.writers = plan, section, folder, writers

    def is_due(self, step: int) -> bool:
        """Whether it runs after `step`: before the first, every `every` steps and at the end."""
        every = self.section.every
        return bool(every) and (step % every == 0 or step == self.plan.config.steps)

    def maybe_run(self, step: int, state: TrainState, frozen: Tree) -> None:
        """Runs it when it is due, on the moving average of the weights where there is one."""
        if not self.is_due(step):
            return
        params = state.params
        if state.ema:
            params = jax.device_put(state.ema, trees.shardings(self.plan.params))
        self.run(step, params, frozen)

    @abc.abstractmethod
    def run(self, step: int, params: Tree, frozen: Tree) -> None:
        """Evaluates the model as it is after `step` updates.

        Args:
          step: finished updates.
          params: the trained leaves, their moving average where there is one.
          frozen: the frozen leaves.
        """

    def close(self) -> None:  # noqa: B027, most hold nothing
        """Frees what it holds."""


class ValidationLoss(Evaluator):
    """Loss on the fixed validation batches, per task and per t-bin.

    Pictures are encoded by the train step's own programs where both batches are as large.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        config = copy.deepcopy(self.plan.config)
        config.data.max_groups = config.validation.max_groups
        config.optimizer.accumulation = 1  # a validation batch is no larger than a micro-batch
        self.data = pipeline.Pipeline(
            config, "validation", prompts=self.plan.prompts, finish=Padding.from_config(config)
        )
        self.eval_step = step_lib.make_eval_step(self.plan)
        self.encode = step_lib.Encoder(dataclasses.replace(self.plan, config=config))

    def run(self, step: int, params: Tree, frozen: Tree) -> None:
        window = metrics.Window()
        for index, batch in enumerate(self.data.fixed()):
            number = jax.device_put(np.int32(index), self.plan.replicated)
            examples = global_batch(self.plan, batch)
            values = self.eval_step(params, frozen, self.encode(frozen, examples), number)
            window.add(jax.device_get(values))
        if window.steps:
            self.writers.write(step, "validation", window.take())

    def close(self) -> None:
        self.data.close()


class Sheets(Evaluator):
    """Paints the same few validation records of every task of the run, beside their truth.

    Those of a task have one shape, and all tasks the commonest size of a target where they have
    it: a shape is compiled once, which takes longer than painting. Sheets go to
    <stage folder>/samples/ and to TensorBoard.
    """

    phase = "painting"

    def __init__(self, *args: Any):
        super().__init__(*args)
        config, section = self.plan.config, self.section
        self.settings = painting.Settings(section.steps, section.guidance, section.image_guidance)
        sources = validation_sources(config)
        sizes = np.concatenate([source.size_of for source in sources.values()])
        size = int(np.bincount(sizes).argmax())
        found = {name: alike(source, size, section.records) for name, source in sources.items()}
        self.examples = {name: examples for name, examples in found.items() if examples}

    def run(self, step: int, params: Tree, frozen: Tree) -> None:
        slots = self.plan.fitting_batch(self.section.records)
        painter = painting.of_params(self.plan, trees.join(params, frozen), batch=slots)
        for name, examples in self.examples.items():
            requests = [
                painting.request_of(example, self.section.seed, number)
                for number, example in enumerate(examples)
            ]
            painted = painter.paint(requests, self.settings)
            if not self.writers.active:
                continue
            title = f"{name}, {self.plan.stage.name}, step {step}"
            sheet = sheets.of_requests(title, requests, painted, [e.target for e in examples])
            sheets.save(sheet, self.folder / "samples" / f"{name}_{step:07d}.png")
            self.writers.picture(step, f"samples/{name}", np.asarray(sheet.convert("RGB")))


def alike(source: Source, size: int, count: int) -> list[Example]:
    """The first `count` examples of the commonest shape, bad records left out.

    Args:
      source: of one task.
      size: index of the target size that is taken where there are examples of it.
      count: at most so many.
    """
    shapes = np.column_stack([source.size_of, source.pictures_of, source.references_of])
    numbers = np.flatnonzero(source.size_of == size)
    if not len(numbers):
        numbers = np.arange(len(source))
    _, kind, often = np.unique(shapes[numbers], axis=0, return_inverse=True, return_counts=True)
    return list(_readable(source, numbers[kind == often.argmax()], count))


def _readable(source: Source, numbers: Iterable[int], count: int) -> Iterator[Example]:
    """The first `count` of the examples that can be read."""
    for number in numbers:
        if count == 0:
            return
        try:
            yield source[int(number)]
            count -= 1
        except BadRecord as bad:
            log.warning("%s: left a bad record out of the sheets: %s", source.task, bad)


EVALUATORS: dict[str, type[Evaluator]] = {"loss": ValidationLoss, "sheets": Sheets}


def check(plan: Plan) -> None:
    """Raises InputError for evaluators that cannot run, before anything is loaded.

    An entry is of an unknown type, or the validation batch does not divide over the mesh.
    """
    for name, section in plan.config.evals.items():
        if section.type not in EVALUATORS:
            raise InputError(
                f"config.evals.{name}.type is {section.type!r}; give one of {', '.join(EVALUATORS)}"
            )
        if section.every and EVALUATORS[section.type] is ValidationLoss:
            plan.check_batch(plan.config.validation.batch)


def check_data(config: ConfigDict) -> None:
    """Raises InputError where there is no validation split for the evaluators that are on."""
    if any(section.every for section in config.evals.values()):
        validation_sources(config)


def validation_sources(config: ConfigDict) -> dict[str, Source]:
    """The validation split of every task of the run."""
    names = [name for name in TASKS if config.data.tasks[name] > 0]
    return registry.make_sources(config, "validation", config.validation.seed, names)


def build(plan: Plan, folder: files.Path, writers: metrics.Writers) -> list[Evaluator]:
    """The evaluators of config.evals that are on. Raises InputError as their constructors."""
    return [
        EVALUATORS[section.type](plan, section, folder, writers)
        for section in plan.config.evals.values()
        if section.every
    ]


def global_batch(plan: Plan, batch: PaddedBatch) -> PaddedBatch:
    """This host's slots -> global arrays sharded over (data, fsdp)."""
    where = plan.batch_sharding
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, x), batch)
