"""Bars with standard errors: what works, by task and kind, and where the time goes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from qk_jax.evaluation.report import curves
from qk_jax.evaluation.report.runs import Run, as_number, as_object

_NO_COPY = 99  # dB: the condition picture is the truth, as in reconstruction
_Figures = dict[str, Any]


class Bar(NamedTuple):
    """A figure.

    Attributes:
      group: what it is of, such as a task.
      series: number of a series, which has a colour.
      value: the figure.
      error: its standard error; None where that is unknown.
    """

    group: str
    series: int
    value: float
    error: float | None = None


def chart(title: str, about: str, series: Sequence[str], bars: Sequence[Bar], unit: str) -> str:
    """A table whose last columns are the bars and their values; '' without any.

    Args:
      title: above it.
      about: a sentence below the title.
      series: names; colours are those of their numbers.
      bars: in any order.
      unit: of the values; '%' shows shares of 1 in hundredths.
    """
    if not bars:
        return ""
    ends = [end for bar in bars for end in (0.0, bar.value - (bar.error or 0.0),
                                            bar.value + (bar.error or 0.0))]  # fmt: skip
    low, high = min(ends), max(ends)
    span = high - low or 1.0
    several = len(series) > 1
    rows = []
    for group in dict.fromkeys(bar.group for bar in bars):
        if several:
            rows.append(f'<tr><th scope="rowgroup" colspan="3">{html.escape(group)}</th></tr>')
        members = [bar for bar in bars if bar.group == group]
        for bar in sorted(members, key=lambda bar: bar.series):
            name = html.escape(series[bar.series] if several else group)
            rows.append(
                f'<tr><th scope="row">{name}</th><td>{_drawn(bar, low, span)}</td>'
                f"<td>{_told(bar, unit)}</td></tr>"
            )
    return (
        f'<figure class="bars"><figcaption><h4>{html.escape(title)}</h4>'
        f'<span class="grey">{html.escape(about)}</span></figcaption>'
        f"<table><tbody>{''.join(rows)}</tbody></table></figure>\n"
    )


def _drawn(bar: Bar, low: float, span: float) -> str:
    def x(value: float) -> float:
        return 100 * (value - low) / span

    left, right = sorted((x(0.0), x(bar.value)))
    whisker = ""
    if bar.error:
        a, b = x(bar.value - bar.error), x(bar.value + bar.error)
        whisker = f'<path class="whisker" d="M{a:.2f} 5H{b:.2f}M{a:.2f} 2V8M{b:.2f} 2V8"/>'
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="c{bar.series % 8}" x="{left:.2f}" y="1" '
        f'width="{max(right - left, 0.2):.2f}" height="8"/>{whisker}'
        f'<path class="zero" d="M{x(0.0):.2f} 0V10"/></svg>'
    )


def _told(bar: Bar, unit: str) -> str:
    scale = 100 if unit == "%" else 1
    value, error = bar.value * scale, (bar.error or 0.0) * scale
    if error:  # two of its digits
        digits = 1 - math.floor(math.log10(error))
    else:
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    digits = min(max(digits, 0), 4)
    plus = "" if bar.error is None else f" ± {error:.{digits}f}"
    return html.escape(f"{value:.{digits}f}{plus} {unit}".strip())


# ---- what works --------------------------------------------------------------------------------


class _Measure(NamedTuple):
    """A figure of held-out examples: its title, what it says, its name in the file and its unit."""

    title: str
    about: str
    name: str
    unit: str


_MEASURES = (
    _Measure("PSNR over a copy", "Painted picture against the truth, less the condition picture "
             "itself against the truth: what only copies has 0.", "gain_over_copy", "dB"),
    _Measure("PSNR", "Painted picture against the truth.", "psnr", "dB"),
    _Measure("Right background", "How often the border of the painted picture has the colour that "
             "the words name.", "background", "%"),
    _Measure("Margin", "How much higher the loss is with another record's condition: what ignores "
             "its condition has 0.", "margin", ""),
)  # fmt: skip


def held_out(runs: Sequence[Run]) -> str:
    """Figures of held-out examples by task and kind; '' where no run has any.

    Of one run for every phase, of several for the last phase of each.
    """
    if len(runs) == 1:
        (run,) = runs
        columns = [(curves.title(phase), found) for phase, found in run.figures.items()]
    else:
        columns = []
        for run in runs:
            phase, found = next(reversed(run.figures.items()), ("", {}))
            columns.append((f"{run.name}, {curves.title(phase)}" if phase else run.name, found))
    names = [name for name, _ in columns]
    drawn = []
    for measure in _MEASURES:
        bars, kinds = [], []
        for number, (_, found) in enumerate(columns):
            for task, figures in as_object(found.get("tasks")).items():
                group = task.replace("_", " ")
                bars += _bars(group, number, as_object(figures), measure)
                for kind, of_kind in as_object(as_object(figures).get("kinds")).items():
                    kinds += _bars(f"{group}: {kind}", number, as_object(of_kind), measure)
        drawn.append(chart(measure.title, measure.about, names, bars, measure.unit))
        drawn.append(chart(f"{measure.title}, by kind", measure.about, names, kinds, measure.unit))
    drawn.append(_retrieval(columns, names))
    return "".join(drawn)


def _bars(group: str, series: int, figures: _Figures, measure: _Measure) -> list[Bar]:
    value = as_number(figures.get(measure.name))
    if value is None:
        return []
    error = "gain" if measure.name == "gain_over_copy" else measure.name
    if error == "gain" and (as_number(figures.get("psnr_copy")) or 0) >= _NO_COPY:
        return []
    spread = as_number(figures.get(f"{error}_standard_error"))
    return [Bar(group, series, value, spread if spread is not None and spread >= 0 else None)]


def _retrieval(columns: Sequence[tuple[str, _Figures]], names: Sequence[str]) -> str:
    bars, chance = [], ""
    for number, (_, found) in enumerate(columns):
        figures = as_object(found.get("retrieval"))
        among = as_number(figures.get("captions"))
        if among:
            chance = f" Among {among:g} captions; by chance {100 / among:.3g} %."
        for space in ("pixels", "vision"):
            value = as_number(as_object(figures.get(space)).get("top1"))
            if value is not None:
                bars.append(Bar(space, number, value))
    about = "How often the painted picture is nearest to that of its own caption, by colours "
    return chart("Retrieval, top-1", f"{about}(pixels) and by the vision tower.{chance}", names,
                 bars, "%")  # fmt: skip


# ---- time --------------------------------------------------------------------------------------


def time(runs: Sequence[Run]) -> str:
    """Shares of the time by phase of each stage, and the parts of a quickstart."""
    drawn = []
    names = [run.name for run in runs]
    for stage_name in curves.stage_names(runs):
        shares = []
        for number, run in enumerate(runs):
            for stage in run.stages:
                if stage.name == stage_name:
                    shares += _shares(number, stage.history.series)
        shares.sort(key=lambda bar: -bar.value)
        title = f"{curves.title(stage_name)}: share of the time since its last start"
        drawn.append(chart(title, "By phase (goodput).", names, shares, "%"))
    seconds: list[Bar] = []
    totals: list[Bar] = []
    for number, run in enumerate(runs):
        for name, value in as_object(run.report.get("seconds")).items():
            if (found := as_number(value)) is not None:
                (totals if name == "total" else seconds).append(Bar(name, number, found))
    if len(runs) > 1:
        seconds += totals
    whole = "".join(f", {bar.value:,.0f} in all" for bar in totals) if len(runs) == 1 else ""
    drawn.append(chart("Quickstart", f"Seconds of each part{whole}.", names, seconds, "s"))
    return "".join(drawn)


def _shares(series: int, known: dict[tuple[str, str], Any]) -> list[Bar]:
    """By the last line that has them."""
    found = []
    for (kind, name), values in known.items():
        if kind == "train" and name.startswith("goodput/"):
            value = values.last()
            if value is not None:
                found.append(Bar(name.removeprefix("goodput/"), series, value))
    return found
