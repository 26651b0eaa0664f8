"""Curves by step: what the page's script draws, as data, and the elements that it draws into."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from qk_jax.evaluation.report.runs import Run, Stage
from qk_jax.experiment.stages import STAGES

_BIN = re.compile(r"loss/t\d+\.\d+-\d+\.\d+")
_TRAIN, _VALIDATION = "train", "validation"


class _Chart(NamedTuple):
    """Which series are drawn together.

    Attributes:
      title: above it.
      takes: whether it has the series (kind, name).
      called: what its legend calls that series.
      by_run: colours tell runs apart, where there are several, and dashes the series; else the
        other way round.
    """

    title: str
    takes: Callable[[str, str], bool]
    called: Callable[[str, str], str]
    by_run: bool


def _parts(kind: str, title: str, bins: bool) -> _Chart:
    """The parts of the loss: its tasks, or its bins of t."""
    return _Chart(
        title,
        lambda k, name: k == kind and name.startswith("loss/") and bool(_BIN.match(name)) == bins,
        lambda _, name: name.removeprefix("loss/").replace("_", " "),
        by_run=False,
    )


def _named(title: str, kind: str, group: str) -> _Chart:
    """The series of a kind with this name, and those below it, such as bad/SOURCE/KIND."""
    return _Chart(
        title,
        lambda k, name: k == kind and name.split("/")[0] == group,
        lambda _, name: name,
        by_run=True,
    )


_CHARTS = (
    _Chart("Loss", lambda _, name: name == "loss", lambda kind, _: kind, by_run=True),
    _parts(_TRAIN, "Loss by task", bins=False),
    _parts(_TRAIN, "Loss by part of t", bins=True),
    _parts(_VALIDATION, "Validation loss by task", bins=False),
    _parts(_VALIDATION, "Validation loss by part of t", bins=True),
    _named("Learning rate", _TRAIN, "lr"),
    _named("Gradient norm", _TRAIN, "grad_norm"),
)


def draw(runs: Sequence[Run]) -> tuple[str, list[dict[str, Any]]]:
    """The elements of all charts, and what the script draws into them."""
    charts: list[dict[str, Any]] = []
    sections = []
    for name in stage_names(runs):
        stages = [(number, s) for number, run in enumerate(runs) for s in run.stages
                  if s.name == name]  # fmt: skip
        first = len(charts)
        known = {key for _, stage in stages for key in stage.history.series}
        shown = [_chart(chart, stages, known) for chart in _CHARTS]
        charts += [chart for chart in shown if chart["lines"]]
        drawn = "".join(_element(n, charts[n]) for n in range(first, len(charts)))
        middle = len(charts)
        charts += _others(stages, known)
        more = "".join(_element(n, charts[n]) for n in range(middle, len(charts)))
        if more:
            more = f'<div class="charts">{more}</div>'
            more = f"<details><summary>More curves</summary>{more}</details>"
        body = f'<div class="charts">{drawn}</div>{more}'
        if not known:
            body = '<p class="none">No metrics yet.</p>'
        sections.append(f"<h3>{html.escape(title(name))}</h3>\n{body}\n")
    return "".join(sections), charts


def stage_names(runs: Sequence[Run]) -> list[str]:
    """Of all runs, in the order of the training."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    order = list(STAGES)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def title(stage: str) -> str:
    """'Stage 3' of 'stage3'; other names as they are."""
    return re.sub(r"^stage(\d)$", r"Stage \1", stage)


def _others(
    stages: Sequence[tuple[int, Stage]], known: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """A chart for each of the other figures of training, and for each other kind of line."""
    others = sorted(
        (kind, name.split("/")[0])
        for kind, name in known
        if kind != "rollback"
        and not name.startswith("goodput/")  # shares of the time, told where time is
        and not any(chart.takes(kind, name) for chart in _CHARTS)
    )
    for kind, group in dict.fromkeys(others):
        title = group.replace("_", " ")
        yield _chart(_named(title if kind == _TRAIN else f"{kind}: {title}", kind, group),
                     stages, known)  # fmt: skip


def _chart(
    chart: _Chart, stages: Sequence[tuple[int, Stage]], known: set[tuple[str, str]]
) -> dict[str, Any]:
    """As the script reads it."""
    taken = sorted(key for key in known if chart.takes(*key))
    lines = []
    for run, stage in stages:
        for part, key in enumerate(taken):
            if key in stage.history.series:
                steps, values = stage.history.series[key].thinned()
                values = [value if value is None else float(f"{value:.6g}") for value in values]
                lines.append({"run": run, "part": part, "x": steps, "y": values})
    marks = [
        {"run": run, "step": step, "to": to}
        for run, stage in stages
        for step, to in stage.history.rollbacks
    ]
    parts = [chart.called(*key) for key in taken]
    return {
        "title": chart.title, "parts": parts, "byRun": chart.by_run, "lines": lines, "marks": marks,
    }  # fmt: skip


def _element(number: int, chart: dict[str, Any]) -> str:
    name = html.escape(chart["title"])
    return (
        f'<figure class="chart" data-chart="{number}"><figcaption><h4>{name}</h4>'
        '<span class="grey step"></span>'
        f'<button type="button" class="log" aria-pressed="false" aria-label="{name}: '
        'logarithmic scale">log</button></figcaption>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{name}"></div>'
        '<ul class="legend"></ul></figure>\n'
    )
