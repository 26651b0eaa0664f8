"""Run folders read for a report: what is there, and a note of what is not.

A run that has just begun, was killed, or was made elsewhere is a run all the same: what is missing
or damaged in it becomes a note on the page, and only a folder that is none is an error.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError, some
from qk_jax.checkpoints import run_folder, steps
from qk_jax.evaluation.report import history
from qk_jax.evaluation.report.history import History
from qk_jax.experiment.stages import STAGES

METRICS, SAMPLES, FIGURES, EVALUATION = "metrics.jsonl", "samples", "report.json", "evaluation"
UNTRAINED = "untrained"
PHASES = (UNTRAINED, *STAGES)  # in the order of the training
MOST = 8  # runs that are told apart by their colours


class Sheet(NamedTuple):
    """A file of painted pictures.

    Attributes:
      path: the PNG.
      task: what is painted.
      phase: 'step 400' of a stage, or the name of a phase.
    """

    path: files.Path
    task: str
    phase: str


class Stage(NamedTuple):
    """A stage of a run.

    Attributes:
      name: such as 'stage3'.
      config: as JSON; empty where it cannot be read.
      history: of its metrics.
      sheets: that its evaluator painted, the oldest first.
      revision: of the program that wrote its newest checkpoint, '' where there is none.
    """

    name: str
    config: dict[str, Any]
    history: History
    sheets: list[Sheet]
    revision: str


class Run(NamedTuple):
    """A run.

    Attributes:
      name: short, and its own among those of the report.
      folder: as it was given.
      stages: that were begun, in order.
      sheets: of phases of the whole run, in order.
      figures: {phase: figures of `evaluation.evaluate`}, in order.
      report: report.json; empty where there is none.
      notes: what is missing or damaged.
    """

    name: str
    folder: str
    stages: list[Stage]
    sheets: list[Sheet]
    figures: dict[str, dict[str, Any]]
    report: dict[str, Any]
    notes: list[str]


def read(folders: Sequence[str]) -> list[Run]:
    """The runs of some folders.

    Args:
      folders: work directories, with a folder for each stage, or folders of stages.

    Raises:
      InputError: one holds no run, or there are too many.
    """
    buckets.check(folders)
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs are given; give at most {MOST}")
    names = _names(folders)
    return [_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ; equal paths get numbers."""
    paths = [files.absolute(folder).parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = [str(pathlib.PurePosixPath(*parts[-length:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]


def _run(given: str, name: str) -> Run:
    folder, notes = files.Path(given), list[str]()
    found = [folder] if _is_stage(folder) else _stage_folders(folder)
    report = _json(folder / FIGURES, notes) if (folder / FIGURES).is_file() else {}
    figures = _figures(folder, report, notes)
    if not (found or report or figures):
        raise InputError(
            f"{given} holds no run; give a work directory with stage1/, or the folder of a stage"
        )
    stages = [_stage(path, path != folder, notes) for path in found]
    sheets = [] if _is_stage(folder) else _phase_sheets(folder)
    if not stages:
        notes.append("No stage was begun: there are no curves and no settings.")
    if not sheets and not any(stage.sheets for stage in stages):
        notes.append(
            "No sheets of pictures. The trainer paints them every config.evals.sheets.every "
            "steps, the quickstart after each stage."
        )
    if not figures:
        notes.append(
            "No figures of held-out examples (report.json, evaluation/): the quickstart "
            "measures them."
        )
    return Run(name, given, stages, sheets, figures, report, notes)


def _is_stage(folder: files.Path) -> bool:
    return any((folder / name).is_file() for name in (run_folder.CONFIG, METRICS))


def _stage_folders(folder: files.Path) -> list[files.Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _is_stage(path)]
    return sorted(found, key=lambda path: _order(path.name))


def _order(phase: str) -> tuple[int, str]:
    """Sorts phases as they are trained, others after them."""
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _json(path: files.Path, notes: list[str]) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except InputError as error:
        notes.append(str(error))
        return {}


def _stage(folder: files.Path, is_below: bool, notes: list[str]) -> Stage:
    """A stage; one in a work directory has the name of its folder, which no other there has."""
    is_known = (folder / run_folder.CONFIG).is_file()
    config = _json(folder / run_folder.CONFIG, notes) if is_known else {}
    name = folder.name if is_below else str(config.get("stage") or folder.name)
    if not is_known:
        notes.append(f"{name}: no config.json, so its settings are not known.")
    path = folder / METRICS
    past = history.read(path.read_bytes() if path.is_file() else b"")
    if past.damaged:
        lines = some(map(str, past.damaged))
        notes.append(f"{name}: what is damaged in {METRICS} is left out: line {lines}.")
    if past.step is None:
        notes.append(f"{name}: no metrics yet; the first come after config.log.every steps.")
    known = steps.found(folder / run_folder.CHECKPOINTS)
    revision = ""
    if known:
        try:
            revision = str(known[-1].meta().get("revision", ""))
        except steps.Damage as damage:
            notes.append(f"{name}, checkpoint of step {known[-1].number}: {damage}.")
    return Stage(name, config, past, _step_sheets(folder / SAMPLES), revision)


def _step_sheets(folder: files.Path) -> list[Sheet]:
    """Those of an evaluator, TASK_STEP.png."""
    found = []
    for path in folder.glob("*.png") if folder.is_dir() else ():
        if match := re.fullmatch(r"(.+)_(\d{1,15})", path.stem):
            found.append((int(match[2]), Sheet(path, match[1], f"step {int(match[2])}")))
    return [sheet for _, sheet in sorted(found, key=lambda pair: (pair[0], pair[1].task))]


def _phase_sheets(folder: files.Path) -> list[Sheet]:
    """Those of the quickstart, TASK_PHASE.png."""
    found = []
    for path in (folder / SAMPLES).glob("*.png") if (folder / SAMPLES).is_dir() else ():
        task, _, phase = path.stem.rpartition("_")
        if task and phase in PHASES:
            found.append(Sheet(path, task, phase))
    return sorted(found, key=lambda sheet: (_order(sheet.phase), sheet.task))


def _figures(
    folder: files.Path, report: dict[str, Any], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """By phase; of a run that is not done, those that were measured so far."""
    phases: dict[str, dict[str, Any]] = {}
    for task, by_phase in as_object(report.get("tasks")).items():
        for phase, found in as_object(by_phase).items():
            phases.setdefault(phase, {"tasks": {}})["tasks"][task] = found
    for phase, found in as_object(report.get("retrieval")).items():
        phases.setdefault(phase, {})["retrieval"] = found
    if not phases and (folder / EVALUATION).is_dir():
        for path in (folder / EVALUATION).glob("*.json"):
            phases[path.stem] = _json(path, notes)
    return dict(sorted(phases.items(), key=lambda pair: _order(pair[0])))


def as_object(value: Any) -> dict[str, Any]:
    """A part of a file that may hold anything: itself where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_number(value: Any) -> float | None:
    """A part of such a file where it is a number of usual size."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None
