"""The page of a report: one HTML file, in the frame of `base.webpage`.

Folders of runs are not trusted: every text in them is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from qk_jax.base import files, webpage
from qk_jax.base.errors import some
from qk_jax.evaluation.report import bars, curves, facts, runs
from qk_jax.evaluation.report.gallery import Gallery
from qk_jax.evaluation.report.runs import Run


def write(folders: Sequence[str], path: files.PathLike) -> str:
    """Writes the page of some runs, and says in a line what it shows.

    Args:
      folders: work directories, with a folder for each stage, or folders of stages.
      path: the HTML file.

    Raises:
      InputError: a folder holds no run, there are too many, or the file cannot be written.
    """
    found = runs.read(folders)
    text = webpage.encode(page(found))
    files.write_bytes(path, text)
    told = ", ".join(f"{run.name} ({', '.join(s.name for s in run.stages) or 'no stage'})"
                     for run in found)  # fmt: skip
    return f"{path}: {told}; {len(text) / 1e6:.1f} MB"


def page(found: Sequence[Run]) -> str:
    """The page of some runs. A sheet that cannot be read becomes a note of its run."""
    title = " and ".join(run.name for run in found) if len(found) < 4 else f"{len(found)} runs"
    drawn, charts = curves.draw(found)
    pictures = Gallery(found).draw()  # before the notes, which it adds to
    sections = [
        ("overview", "Overview", _notes(found) + facts.summary(found), ""),
        ("curves", "Curves", drawn and f"{_LOGS}{drawn}", "No stage was begun."),
        ("pictures", "Pictures", pictures, "No sheets of painted pictures."),
        ("works", "What works", _grid(bars.held_out(found)), "No figures of held-out examples."),
        ("time", "Time and memory", _grid(bars.time(found)) + facts.machines(found),
         "Nothing is known of time and memory."),
        ("set", "Settings", facts.settings(found), "No config.json can be read."),
    ]  # fmt: skip
    links = "".join(f'<a href="#{name}">{head}</a>' for name, head, _, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{head}</h2>\n{part or f"<p class=none>{empty}</p>"}</section>\n'
        for name, head, part, empty in sections
    )
    before, after = webpage.frame(f"{title} - report", ["report.css"], ["report.js"])
    return (
        f"{before}<header><h1>{html.escape(title)}</h1></header>\n"
        f'<nav aria-label="Page"><div>{links}{_legend(found)}</div></nav>\n<main>\n{body}</main>\n'
        '<footer class="grey"><p>Keys: on a chart <kbd>&larr;</kbd> <kbd>&rarr;</kbd> go from step '
        "to step, <kbd>Home</kbd> and <kbd>End</kbd> to its ends; on a slider they move it; "
        "<kbd>Enter</kbd> on a picture enlarges it.</p></footer>\n"
        f"{webpage.data('runs', [run.name for run in found])}"
        f"{webpage.data('charts', charts)}{after}"
    )


_LOGS = (
    '<p><button type="button" id="logs" aria-pressed="false">all charts on a log scale</button>'
    "</p>\n"
)


def _grid(drawn: str) -> str:
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _notes(found: Sequence[Run]) -> str:
    """What is missing or damaged, and in which runs."""
    names: dict[str, list[str]] = {}
    for run in found:
        for note in run.notes:
            names.setdefault(note, []).append(run.name)
    lines = [
        f"<li>{html.escape(f'{some(of)}: ' * (len(found) > 1) + note)}</li>"
        for note, of in names.items()
    ]
    return f'<ul class="note">{"".join(lines)}</ul>\n' if lines else ""


def _legend(found: Sequence[Run]) -> str:
    """Buttons that hide a run everywhere, where there are several."""
    if len(found) == 1:
        return ""
    buttons = "".join(
        f'<button type="button" data-run="{number}" aria-pressed="true" '
        f'title="{html.escape(run.folder)}"><svg viewBox="0 0 22 8" width="22" height="8" '
        f'aria-hidden="true"><path class="line c{number}" d="M0 3H22"/>'
        f'<path class="line plain d{number}" d="M0 7H22"/></svg>{html.escape(run.name)}</button>'
        for number, run in enumerate(found)
    )
    return f'<span id="legend" role="group" aria-label="Runs">{buttons}</span>'
