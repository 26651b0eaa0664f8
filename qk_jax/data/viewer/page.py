"""The page: one HTML file, in the frame of `base.webpage`. Texts of records are not trusted."""

from __future__ import annotations

import html
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from qk_jax.base import files, webpage
from qk_jax.data.viewer import charts
from qk_jax.data.viewer.shown import Shown, Sizes, Text
from qk_jax.pictures import inline
from qk_jax.pictures.sizes import format_size

_NOTES = 4  # bad records of an example that are told one by one


class Heading(NamedTuple):
    """What the page says above the examples.

    Attributes:
      title: what is shown, such as the config or the folder.
      about: which examples of it, in a sentence.
      facts: {name: value} to list, such as those of a manifest.
    """

    title: str
    about: str
    facts: Mapping[str, str]


def write(path: files.PathLike, heading: Heading, shown: Iterable[Shown], sizes: Sizes) -> None:
    """Writes the page of some examples, one after another; nothing is left behind by an error.

    Args:
      path: the HTML file.
      heading: what is above them.
      shown: the examples.
      sizes: of the whole split, for the histograms.

    Raises:
      InputError: the file cannot be written, or as `shown` raises.
    """
    known = _Known()
    with tempfile.TemporaryFile() as cards:  # before which stands what is known after them
        for number, one in enumerate(shown, start=1):
            cards.write(webpage.encode(_card(number, one)))
            known.add(one)
        cards.seek(0)
        with files.beside(path) as part, part.open("wb") as page:
            _assemble(page, heading, known, sizes, cards)


class _Known:
    """What the head of the page says of its examples."""

    def __init__(self) -> None:
        self.tasks, self.sources, self.kinds = Counter[str](), Counter[str](), Counter[str]()
        self.bad = 0
        self.characters: list[int] = []
        self.tokens: list[int] = []

    def add(self, one: Shown) -> None:
        self.tasks[one.task] += 1
        self.sources[one.source] += 1
        self.kinds.update(bad.kind for bad in one.bad)
        self.bad += bool(one.bad)
        if one.example is not None and one.text is not None:
            self.characters.append(len(one.example.instruction))
            if not one.no_text:
                self.tokens.append(one.text.tokens)


def _assemble(
    page: IO[Any], heading: Heading, known: _Known, sizes: Sizes, cards: IO[bytes]
) -> None:
    before, after = webpage.frame(
        f"{heading.title} - training examples", ["viewer.css"], ["viewer.js"]
    )
    head = _head(heading, known, sizes)
    page.write(webpage.encode(f"{before}{head}{_form(known)}<main>\n"))
    shutil.copyfileobj(cards, page)
    page.write(webpage.encode(
        "</main>\n<footer class=\"grey\"><p>Keys: <kbd>j</kbd> and <kbd>k</kbd> go to the next and "
        "the previous example, <kbd>/</kbd> to the words, <kbd>Enter</kbd> on a picture "
        f"enlarges it.</p></footer>\n{after}"
    ))  # fmt: skip


def _head(heading: Heading, known: _Known, sizes: Sizes) -> str:
    lines = [f"<p>{html.escape(heading.about)}</p>"]
    if known.bad:
        kinds = ", ".join(f"{count} {kind}" for kind, count in known.kinds.most_common())
        one = known.bad == 1
        lines.append(
            f'<p class="note">{known.bad} {"example has" if one else "examples have"} '
            f"bad records: {html.escape(kinds)}.</p>"
        )
    if heading.facts:
        rows = webpage.table(list(heading.facts.items()))
        lines.append(f"<details><summary>About the set</summary>{rows}</details>")
    whole = "files" if sizes.original else "buckets"
    side = np.minimum(sizes.width, sizes.height)
    drawn = [
        charts.histogram(f"Shorter side, all {side.size:,} targets ({whole})", "pixels", side),
        charts.ratios(f"Aspect ratio, all {side.size:,} targets", sizes.width, sizes.height),
        charts.histogram("Text length, examples below", "characters", known.characters),
        charts.histogram("Text tokens, examples below", "tokens", known.tokens),
    ]
    return (
        f"<header>\n<h1>{html.escape(heading.title)}</h1>\n{''.join(lines)}\n"
        f'<div class="charts">\n{"".join(drawn)}</div>\n</header>\n'
    )


def _form(known: _Known) -> str:
    sources, tasks = _options(known.sources), _options(known.tasks)
    return (
        '<form role="search" aria-label="Filter"><div>\n'
        f'<label>Source <select name="source"><option value="">all</option>{sources}</select>'
        f'</label>\n<label>Task <select name="task"><option value="">all</option>{tasks}</select>'
        '</label>\n<label>Words <input name="words" type="search" autocomplete="off"></label>\n'
        '<label><input name="bad" type="checkbox"> bad records only</label>\n'
        '<button type="reset">Reset</button>\n'
        '<span id="told" role="status"></span>\n</div></form>\n'
    )


def _options(counts: Counter[str]) -> str:
    return "".join(
        f'<option value="{html.escape(name)}">{html.escape(name)} ({count})</option>'
        for name, count in sorted(counts.items())
    )


def _card(number: int, one: Shown) -> str:
    """One example as an article."""
    notes = "".join(
        f'<p class="note">{"Replaces a bad record" if one.example else "Bad record"} '
        f"({html.escape(bad.kind)}): {html.escape(bad.message)}</p>"
        for bad in one.bad[:_NOTES]
    )
    if len(one.bad) > _NOTES:
        notes += f'<p class="note">and {len(one.bad) - _NOTES} more</p>'
    source, task = html.escape(one.source), html.escape(one.task)
    marks = (' class="bad"' if one.example is None else "") + " data-bad" * bool(one.bad)
    facts = [("task", task), ("source", source)]
    pictures = text = ""
    if one.example is not None and one.text is not None:
        example = one.example
        pictures = (
            f'<div class="pictures">{"".join(_picture(number, *x) for x in one.pictures())}</div>'
        )
        text = _text(one)
        shapes = [f"{role} {format_size(x.shape[:2])}" for role, x in one.conditions()]
        bucket = " + ".join([format_size(example.target.shape[:2]), *shapes])
        facts += [
            ("bucket", bucket),
            ("record", str(example.record)),
            ("tokens", _tokens(one.text)),
        ]
    listed = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts)
    return (
        f'<article tabindex="-1" id="e{number}" data-source="{source}" data-task="{task}"{marks} '
        f'aria-labelledby="h{number}">\n<div class="head"><h2 id="h{number}">Example {number}</h2>'
        f'<span class="grey">{html.escape(one.place)}</span></div>\n'
        f"{notes}{pictures}{text}<dl>{listed}</dl>\n</article>\n"
    )


def _tokens(text: Text) -> str:
    cut = f", {text.tokens - text.most} of them cut" if text.tokens > text.most else ""
    return f"{text.tokens} of text{cut} (at most {text.most}), {text.sequence} in all"


def _picture(number: int, role: str, pixels: np.ndarray, dropped: bool) -> str:
    """A picture as it is trained, pixel for pixel."""
    height, width = pixels.shape[:2]
    state = ", dropped" if dropped else ""
    shown = inline.image(pixels, f"Example {number}: {role}, {width}x{height}{state}")
    return (
        f'<figure{" class=dropped" * dropped}><button type="button">{shown}</button>'
        f"<figcaption>{role}{state}</figcaption></figure>"
    )


def _text(one: Shown) -> str:
    assert one.example is not None and one.text is not None
    if one.no_text:
        words = html.escape(one.example.instruction)
        return f'<p class="text"><span class="tag">text dropped</span> <del>{words}</del></p>'
    cut = f"<del>{html.escape(one.text.cut)}</del>" if one.text.cut else ""
    return f'<p class="text" dir="auto">{html.escape(one.text.read)}{cut}</p>'
