"""Sizes as people write them: width x height in pixels, such as '80x48'.

Command lines, configs and files have this one order; in Python a size is (height, width), or has
its sides by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from qk_jax.base.errors import InputError
from qk_jax.pictures.fitting import Size

_Entry = TypeVar("_Entry")
PACKED = 16  # pixels along a side of one packed token of the generator: 8x VAE, 2x2 packing


def parse_size(text: object, name: str) -> Size:
    """(height, width) of 'WIDTHxHEIGHT'; `name` is what an error calls it.

    Raises:
      InputError: it is not of that form, or a side is no multiple of 16.
    """
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text) if isinstance(text, str) else None
    if not match:
        raise InputError(f"{name} is {text!r}; give width x height in pixels, such as 80x48")
    size = int(match[2]), int(match[1])
    check_size(size, name)
    return size


def parse_sizes(texts: Sequence[object], name: str) -> tuple[Size, ...]:
    """(height, width) of each of several sizes.

    Raises:
      InputError: see `parse_size`; or there is none.
    """
    if not texts:
        raise InputError(f"{name} is empty; give sizes such as 64x64,80x48")
    return tuple(parse_size(text, name) for text in texts)


def for_number(entries: Sequence[_Entry], number: int) -> _Entry:
    """Of entries for 1, 2, ... things the one for `number` of them; the last is for more."""
    return entries[min(number, len(entries)) - 1]


def check_size(size: Size, name: str) -> None:
    """Raises InputError when a side of (height, width) is no multiple of 16, with one near."""
    if any(side % PACKED or side < PACKED for side in size):
        near = tuple(max(1, round(side / PACKED)) * PACKED for side in size)
        raise InputError(
            f"{name} {format_size(size)} is no multiple of {PACKED}; {format_size(near)} is near"
        )


def format_size(size: Sequence[int]) -> str:
    """'80x48', width x height, of (height, width)."""
    height, width = size
    return f"{width}x{height}"
