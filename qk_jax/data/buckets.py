"""Aspect-ratio buckets: which picture sizes exist, and which one a picture goes to.

Sizes are (height, width) in pixels. Each size is one program of the autoencoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from qk_jax.base.errors import InputError
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.sizes import format_size

_AT_ONCE = 1 << 20  # pictures whose numbers are in memory at once
# The paper's seven aspect ratios (section 4), short side to long side; mirrors are added.
RATIOS = ((1, 1), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5), (9, 16))


def table(
    side: int, multiple: int, ratios: Sequence[tuple[int, int]] = RATIOS, mirror: bool = True
) -> tuple[Size, ...]:
    """Sizes (H, W) with about side x side pixels for every ratio and its mirror, without repeats.

    Of all sizes whose sides are multiples of `multiple` and that have no more pixels, the one with
    the least 2 |log ratio error| + |log area error|: shape counts twice what area counts. No more,
    because a step is padded to the tokens of the largest: those of the square, at 512 and 1,024
    a power of two, with which attention's sequence is whole blocks.

    Raises: InputError when the multiple is larger than the side.
    """
    if not 0 < multiple <= side:
        raise InputError(f"buckets of side {side} cannot have sides in multiples of {multiple}")
    out: list[Size] = []
    for a, b in ratios:
        short, long = _nearest_sides(side, multiple, min(a, b) / max(a, b))
        portrait, landscape = (long, short), (short, long)
        both = [portrait, landscape] if a <= b else [landscape, portrait]
        out += both if mirror else both[:1]
    return tuple(dict.fromkeys(out))


def names(side: int, multiple: int) -> tuple[str, ...]:
    """The sizes of `table` as configs write them: '512x512', width x height."""
    return tuple(map(format_size, table(side, multiple)))


def _nearest_sides(side: int, multiple: int, ratio: float) -> Size:
    """(short, long) in multiples, for a ratio short/long of at most 1."""
    steps = range(multiple, 4 * side + 1, multiple)
    ideal = side * math.sqrt(ratio)
    shorts = [short for short in steps if abs(short - ideal) < 2 * multiple]
    longs = [long for long in steps if abs(long - ideal / ratio) < 2 * multiple]
    pairs = [
        (short, long)
        for short in shorts
        for long in longs
        if short <= long and short * long <= side**2
    ]

    def error(pair: Size) -> tuple[float, int]:
        shape = abs(math.log(pair[0] / pair[1] / ratio))
        area = abs(math.log(pair[0] * pair[1] / side**2))
        return round(2 * shape + area, 9), pair[0]  # rounded, so that ties break alike everywhere

    return min(pairs, key=error)


def nearest(height: ArrayLike, width: ArrayLike, sizes: Sequence[Size]) -> np.ndarray:
    """Index [...] of the size nearest in log aspect ratio to each height and width [...].

    Symmetric in portrait and landscape: of several equally near sizes the squarest, then the first
    is taken, so a mirrored picture goes to the mirrored size.
    """
    logs = np.log([size[1] / size[0] for size in sizes])
    order = np.argsort(np.abs(logs), kind="stable")
    steps, ranks = np.unique(logs[order], return_index=True)
    height, width = np.broadcast_arrays(height, width)
    found = np.empty(height.shape, np.min_scalar_type(len(sizes)))
    flat, heights, widths = (x.reshape(-1) for x in (found, height, width))
    for begin in range(0, flat.size, _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        flat[part] = order[_nearest_rank(np.log(widths[part] / heights[part]), steps, ranks)]
    return found


def _nearest_rank(asked: np.ndarray, steps: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Of the two `steps` (rising) around each number, the rank of the nearer, the lower of two."""
    above = np.searchsorted(steps, asked).clip(max=len(steps) - 1)
    below = np.maximum(above - 1, 0)
    down, up = (np.round(np.abs(asked - steps[near]), 9) for near in (below, above))
    is_below = (down < up) | ((down == up) & (ranks[below] < ranks[above]))
    return np.where(is_below, ranks[below], ranks[above])
