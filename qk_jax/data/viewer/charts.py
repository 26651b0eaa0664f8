"""Histograms as inline SVG, without scripts and with words for those who do not see them."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

WIDTH, HEIGHT, FOOT, BARS = 320, 120, 18, 16  # pixels, and how many bars at most
_STEPS = (1, 2, 5)
# Of aspect ratios: half a step of the paper's between two edges; 1 is in the middle of a bar.
_RATIO_EDGES = np.exp2((np.arange(18) - 8.5) / 4)


def histogram(title: str, unit: str, values: Sequence[float] | np.ndarray) -> str:
    """A figure of how often values from 0 on occur, in bars of a round width.

    The last bar has all that is more than twice what 95 of 100 do not exceed, so that one long text
    does not make one bar of all others.
    """
    values = np.asarray(values)
    if not values.size:
        return ""
    most = 2 * float(np.quantile(values, 0.95, method="lower"))
    near = np.minimum(values, max(most, 1.0))
    low, high = float(near.min()), float(near.max())
    width = _round_up((high - low + 1) / BARS)
    edges = np.arange(math.floor(low / width), math.floor(high / width) + 2) * width
    counts, _ = np.histogram(near, edges)
    bars = [f"{a} to {b - 1}" if width > 1 else f"{a}" for a, b in itertools.pairwise(edges)]
    if high < values.max():
        bars[-1] = f"{edges[-2]} or more"
    return _figure(title, unit, values, counts, bars, lambda x: f"{x:,.0f}")


def ratios(title: str, width: np.ndarray, height: np.ndarray) -> str:
    """A figure of how often aspect ratios occur, on a scale where 1:2 is as far from 1 as 2:1."""
    if not width.size:
        return ""
    values = width / height
    edges = _RATIO_EDGES
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    bars = [f"{a:.2f} to {b:.2f}" for a, b in itertools.pairwise(edges)]
    bars[0], bars[-1] = f"below {edges[1]:.2f}", f"above {edges[-2]:.2f}"
    return _figure(title, "width / height", values, counts, bars, lambda x: f"{x:.2f}")


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** max(0, math.floor(math.log10(width)))
    return next(step * power for step in (*_STEPS, 10) if step * power >= width)


def _figure(
    title: str,
    unit: str,
    values: np.ndarray,
    counts: np.ndarray,
    bars: Sequence[str],
    told: Callable[[float], str],
) -> str:
    """Bars with their count as a tip, ends of the scale below, and a sentence for all of it."""
    low, middle, high = values.min(), np.median(values), values.max()
    words = f"{told(low)} to {told(high)} {unit}, median {told(middle)}"
    step, tall = WIDTH / len(counts), HEIGHT - FOOT
    drawn = []
    for number, (count, name) in enumerate(zip(counts.tolist(), bars, strict=True)):
        if count:
            height = max(2.0, tall * count / counts.max())
            drawn.append(
                f'<rect x="{number * step + 1:.1f}" y="{tall - height:.1f}" '
                f'width="{max(step - 2, 1):.1f}" height="{height:.1f}">'
                f"<title>{html.escape(name)} {html.escape(unit)}: {count:,}</title></rect>"
            )
    title, words = html.escape(title), html.escape(words)
    ends = html.escape(bars[0]), html.escape(bars[-1])
    return (
        f'<figure class="chart"><figcaption><b>{title}</b> {words}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}: {values.size:,} values, {words}">'
        f"{''.join(drawn)}"
        f'<line x1="0" x2="{WIDTH}" y1="{tall}" y2="{tall}"/>'
        f'<text x="0" y="{HEIGHT - 4}">{ends[0]}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" class="end">{ends[1]}</text></svg></figure>\n'
    )
