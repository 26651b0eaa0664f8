"""Painted pictures: the same record through the phases of a run, and of all runs, in one card."""

from __future__ import annotations

import html
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from qk_jax.base.errors import InputError
from qk_jax.data.example import TASKS
from qk_jax.evaluation.report import curves
from qk_jax.evaluation.report.runs import Run, Sheet
from qk_jax.painting import sheets
from qk_jax.pictures import inline

SHOWN = 6  # phases of a record; of more, the first, the last and some between
_WHOLE = 2  # of those, where sheets cannot be taken apart
_FIRST = 2  # records of a task that are shown before all are asked for
_STAGES = "through the stages"


class _Strip(NamedTuple):
    """A record of one run.

    Attributes:
      given: labelled condition pictures.
      painted: pictures by phase.
      truth: labelled, at most one.
    """

    given: list[sheets.Cell]
    painted: list[sheets.Cell]
    truth: list[sheets.Cell]


# (set of sheets, task, number of the record, its words)
_Key = tuple[str, str, int, str]
_T = TypeVar("_T")


class Gallery:
    """The pictures of some runs."""

    def __init__(self, runs: Sequence[Run]):
        """Reads the sheets; one that cannot be read becomes a note of its run."""
        self._runs = runs
        self._cards: dict[_Key, dict[int, _Strip]] = defaultdict(dict)
        self._whole: list[tuple[int, str, Sheet, Image.Image]] = []
        self._ids = itertools.count()
        for number, run in enumerate(runs):
            for name, found in ((_STAGES, run.sheets), *((s.name, s.sheets) for s in run.stages)):
                for task in dict.fromkeys(sheet.task for sheet in found):
                    self._read(number, name, [sheet for sheet in found if sheet.task == task])

    def _read(self, run: int, name: str, found: list[Sheet]) -> None:
        """Sheets of one run, set and task."""
        chosen = _spread(found, SHOWN)
        notes = self._runs[run].notes
        if len(chosen) < len(found):
            kept = ", ".join(sheet.phase for sheet in chosen)
            notes.append(f"{name}, {found[0].task}: {len(chosen)} of {len(found)} sheets are "
                         f"shown ({kept}).")  # fmt: skip
        whole = []
        for sheet in chosen:
            try:
                picture, lines = sheets.read(sheet.path)
            except InputError as error:
                notes.append(str(error))
                continue
            if not lines:
                whole.append((run, name, sheet, picture))
            for number, (prompt, cells) in enumerate(lines, start=1):
                strips = self._cards[name, sheet.task, number, prompt]
                _add(strips.setdefault(run, _Strip([], [], [])), sheet.phase, cells)
        self._whole += _spread(whole, _WHOLE)

    def draw(self) -> str:
        """The elements of all of them, '' where there are none."""
        if not (self._cards or self._whole):
            return ""
        keys = sorted(self._cards, key=_order)
        cards = "".join(self._card(key, self._cards[key]) for key in keys)
        form = _form(keys) if cards else ""
        whole = "".join(self._sheet(*one) for one in self._whole)
        if whole:
            whole = (
                "<h3>Whole sheets</h3><p class=grey>They do not say where their pictures are, as "
                "those of an earlier version: they cannot be taken apart.</p>"
                f'<div class="pictures whole">{whole}</div>'
            )
        return f'{form}<div class="records">\n{cards}</div>{whole}'

    def _card(self, key: _Key, strips: dict[int, _Strip]) -> str:
        name, task, number, prompt = key
        drawn = "".join(self._strip(run, strip, prompt) for run, strip in sorted(strips.items()))
        words, head = task.replace("_", " "), html.escape(prompt) or "(no text)"
        return (
            f'<article class="record" data-set="{html.escape(name)}" '
            f'data-task="{html.escape(task)}" data-number="{number}"><h3 dir="auto">{head}'
            f'</h3><p class="grey">{html.escape(words)} {number}, {html.escape(_told(name))}</p>'
            f"{drawn}</article>\n"
        )

    def _strip(self, run: int, strip: _Strip, prompt: str) -> str:
        several = len(self._runs) > 1
        name = self._runs[run].name if several else ""
        head = f'<p class="run"><i class="c{run}"></i>{html.escape(name)}</p>' if several else ""
        cells = [*strip.given, *strip.painted, *strip.truth]
        ids = [f"p{next(self._ids)}" for _ in cells]
        pictures = "".join(
            f'<figure id="{one}"><button type="button">'
            f"{inline.image(pixels, f'{label}: {prompt}' + f' ({name})' * several)}</button>"
            f"<figcaption>{html.escape(label)}</figcaption></figure>"
            for one, (label, pixels) in zip(ids, cells, strict=True)
        )
        labels = [label for label, _ in cells]
        slider = ""
        if "source" in labels and strip.painted:
            given = len(strip.given)
            after = list(zip(ids, labels, strict=True))[given:]
            last = given + len(strip.painted) - 1
            slider = _slider(ids[labels.index("source")], after, ids[last])
        return (
            f'<div class="strip" data-of-run="{run}">{head}<div class="row">{slider}'
            f'<div class="pictures">{pictures}</div></div></div>'
        )

    def _sheet(self, run: int, name: str, sheet: Sheet, picture: Image.Image) -> str:
        words = f"{sheet.task.replace('_', ' ')}, {_told(name)}, {sheet.phase}"
        if len(self._runs) > 1:
            words = f"{self._runs[run].name}: {words}"
        shown = inline.image(np.asarray(picture), words)
        return (
            f'<figure data-of-run="{run}"><button type="button">{shown}</button>'
            f"<figcaption>{html.escape(words)}</figcaption></figure>"
        )


def _add(strip: _Strip, phase: str, cells: Sequence[sheets.Cell]) -> None:
    """The pictures of a line of a sheet; what is not painted is the same on the others."""
    given = [cell for cell in cells if cell[0] not in ("painted", "truth")]
    strip.given[:] = strip.given or given
    strip.painted.extend((curves.title(phase), pixels) for label, pixels in cells
                         if label == "painted")  # fmt: skip
    strip.truth[:] = strip.truth or [cell for cell in cells if cell[0] == "truth"]


def _slider(before: str, after: Sequence[tuple[str, str]], chosen: str) -> str:
    """A slider between two pictures of the card, whose later one can be chosen."""
    options = "".join(
        f'<option value="{one}"{" selected" * (one == chosen)}>{html.escape(label)}</option>'
        for one, label in after
    )
    return (
        f'<figure class="slider" data-before="{before}"><div class="stack"><img alt=""><img alt="">'
        '<i class="rule"></i></div><input type="range" min="0" max="100" value="50" '
        'aria-label="How much of the source is shown"><figcaption><span>source</span>'
        f'<select aria-label="The picture beside the source">{options}</select></figcaption>'
        "</figure>"
    )


def _spread(items: Sequence[_T], most: int) -> list[_T]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def _order(key: _Key) -> tuple[int, str, int, str, int]:
    name, task, number, _ = key
    place = TASKS.index(task) if task in TASKS else len(TASKS)
    return (name != _STAGES, name, place, task, number)


def _told(name: str) -> str:
    return name if name == _STAGES else f"{curves.title(name)} while it was trained"


def _form(keys: Sequence[_Key]) -> str:
    names = dict.fromkeys(name for name, *_ in keys)
    tasks = dict.fromkeys(task for _, task, *_ in keys)
    first = next(iter(names))
    sets = "".join(
        f'<option value="{html.escape(name)}"{" selected" * (name == first)}>'
        f"{html.escape(_told(name))}</option>"
        for name in names
    )
    chosen = "".join(
        f'<option value="{html.escape(task)}">{html.escape(task.replace("_", " "))}</option>'
        for task in tasks
    )
    return (
        '<form class="pictures-of" role="search" aria-label="Filter pictures">'
        f'<label>Sheets <select name="set">{sets}<option value="">all</option></select></label>\n'
        f'<label>Task <select name="task"><option value="">all</option>{chosen}</select></label>\n'
        f'<label>Records <select name="most"><option value="{_FIRST}">the first {_FIRST} of each '
        'task</option><option value="">all</option></select></label>\n'
        '<label>Words <input name="words" type="search" autocomplete="off"></label>\n'
        '<button type="reset">Reset</button> <span role="status"></span></form>\n'
    )
