"""Tables: final figures of all runs side by side, settings and what differs, versions, memory."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from qk_jax.base import webpage
from qk_jax.evaluation.report import curves
from qk_jax.evaluation.report.runs import Run, Stage, as_number, as_object
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import glossary

# (what it is called, kind and name in the metrics, unit, whether a lower one is better)
_FINAL = (
    ("loss", "train", "loss", "", False),
    ("validation loss", "validation", "loss", "", True),
    ("gradient norm", "train", "grad_norm", "", False),
    ("pictures per second", "train", "pictures_per_second", "", False),
    ("model TFLOP/s per device", "train", "model_tflops_per_second_per_device", "", False),
    ("MFU", "train", "mfu", "%", False),
    ("time spent waiting for data", "train", "data_wait", "%", False),
    ("memory of a device", "train", "memory_gb", "GB", False),
    ("bad records", "train", "bad", "", False),
)


def summary(runs: Sequence[Run]) -> str:
    """The last figures of every stage: a column for each run, or for each stage of a single one."""
    names = curves.stage_names(runs)
    if not names:
        return ""
    if len(runs) == 1:
        (run,) = runs
        heads, body = [curves.title(stage.name) for stage in run.stages], _rows("", run.stages)
    else:
        heads = [run.name for run in runs]
        body = "".join(_rows(curves.title(name), [_of(run, name) for run in runs])
                       for name in names)  # fmt: skip
    columns = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    corner = '<th scope="col">stage</th>' if len(runs) > 1 else ""
    return (
        '<div class="wide" tabindex="0">'
        f'<table class="ruled"><thead><tr>{corner}<th scope="col">last value'
        f"</th>{columns}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _rows(group: str, stages: Sequence[Stage | None]) -> str:
    """A table row for each figure that one of them has; the best of a group is bold."""
    rows = [("steps", [_steps(stage) for stage in stages])]
    for title, kind, figure, unit, lower in _FINAL:
        values = [stage.history.last(kind, figure) if stage else None for stage in stages]
        known = [value for value in values if value is not None]
        if not known:
            continue
        told = [_value(value, unit) for value in values]
        if group and lower and len(known) > 1:
            best = values.index(min(known))
            told[best] = f"<b>{told[best]}</b>"
        rows.append((title, told))
    head = f'<th scope="rowgroup" rowspan="{len(rows)}">{html.escape(group)}</th>' if group else ""
    return "".join(
        f'<tr>{head * (number == 0)}<th scope="row">{title}</th>'
        f"{''.join(f'<td>{text}</td>' for text in told)}</tr>"
        for number, (title, told) in enumerate(rows)
    )


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.3g} %" if unit == "%" else f"{value:.4g} {unit}".strip()


def _of(run: Run, name: str) -> Stage | None:
    return next((stage for stage in run.stages if stage.name == name), None)


def _steps(stage: Stage | None) -> str:
    if stage is None:
        return "-"
    done, whole = stage.history.step or 0, as_number(stage.config.get("steps"))
    return f"{done:,} of {whole:,}" if whole else f"{done:,}"


def machines(runs: Sequence[Run]) -> str:
    """Versions, machine and memory, as far as they are known."""
    tables = []
    for run in runs:
        facts = [
            (f"revision of {stage.name}", stage.revision) for stage in run.stages if stage.revision
        ]
        machine = as_object(run.report.get("machine"))
        facts += [(name, _text(value)) for name, value in machine.items()]
        memory = as_object(run.report.get("peak_memory_mib"))
        words = {"driver": "peak memory, measuring", "child": "peak memory, training"}
        facts += [(words.get(who, who), f"{_text(mib)} MiB") for who, mib in memory.items()]
        if facts:
            title = f"<h4>{html.escape(run.name)}</h4>" if len(runs) > 1 else ""
            tables.append(f"<div>{title}{webpage.table(facts)}</div>")
    return f'<div class="machines">{"".join(tables)}</div>' if tables else ""


def settings(runs: Sequence[Run]) -> str:
    """Every config field of every stage; those that differ between runs are marked."""
    columns = [
        (number, run.name, stage)
        for name in curves.stage_names(runs)
        for number, run in enumerate(runs)
        for stage in run.stages
        if stage.name == name and stage.config
    ]
    if not columns:
        return ""
    values = [dict(config_lib.fields(stage.config)) for _, _, stage in columns]
    several = len(runs) > 1
    rows, differing = [], 0
    for field in dict.fromkeys(name for found in values for name in found):
        texts = [_text(found[field]) if field in found else None for found in values]
        differs = _differs(columns, texts) if several else len(set(texts)) > 1
        differing += differs
        cells = "".join(
            '<td class="none">absent</td>' if text is None else f"<td>{html.escape(text)}</td>"
            for text in texts
        )
        rows.append(
            f'<tr{" data-differs" * differs}><th scope="row"><code>{html.escape(field)}</code>'
            f"<small>{html.escape(glossary.meaning(field))}</small></th>{cells}</tr>"
        )
    between = "runs" if several else "stages"
    heads = "".join(
        f'<th scope="col">{html.escape(f"{name}, " * several + curves.title(stage.name))}</th>'
        for _, name, stage in columns
    )
    checked = " checked" * bool(differing)
    return (
        '<form class="settings-of" role="search" aria-label="Filter settings">'
        '<label>Words <input name="words" type="search" autocomplete="off"></label>\n'
        f'<label><input name="differing" type="checkbox"{checked}> only what differs between '
        f'{between} ({differing})</label>\n<button type="reset">Reset</button> '
        '<span role="status"></span></form>\n'
        '<div class="wide" tabindex="0"><table class="ruled" id="settings"><thead><tr>'
        f'<th scope="col">field</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _differs(columns: Sequence[tuple[int, str, Stage]], texts: Sequence[str | None]) -> bool:
    """Whether two runs have different values at the same stage."""
    found: dict[str, set[str | None]] = {}
    for (_, _, stage), text in zip(columns, texts, strict=True):
        found.setdefault(stage.name, set()).add(text)
    return any(len(values) > 1 for values in found.values())


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value, ensure_ascii=False)
