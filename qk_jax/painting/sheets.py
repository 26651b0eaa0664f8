"""Sheets of pictures for people: a line per example, a labelled column per picture. PIL only."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qk_jax.base import files
from qk_jax.painting.request import Request

Cell = tuple[str, np.ndarray]  # (label, uint8 [h, w, 3])
SIDE = 160  # longest side of a picture on the sheet, in pixels
GAP = 12
TEXT_WIDTH = 300
INK, GREY, PAPER, FRAME = (20, 20, 20), (110, 110, 110), (255, 255, 255), (200, 200, 200)


def draw(title: str, lines: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A sheet with (prompt, labelled pictures) on each line."""
    heading, body, small = (ImageFont.load_default(size) for size in (22, 16, 13))
    columns = max(len(cells) for _, cells in lines)
    width = GAP + TEXT_WIDTH + columns * (SIDE + GAP) + GAP
    wrapped = textwrap.wrap(title, max(20, width // 12))
    top = GAP + 28 * len(wrapped) + GAP
    height = top + len(lines) * (SIDE + 2 * GAP + 18)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, words in enumerate(wrapped):
        pen.text((GAP, GAP + 28 * number), words, INK, heading)
    for number, (prompt, cells) in enumerate(lines):
        y = top + number * (SIDE + 2 * GAP + 18)
        pen.line((GAP, y - GAP // 2, width - GAP, y - GAP // 2), FRAME)
        text = textwrap.wrap(prompt, TEXT_WIDTH // 9, max_lines=9, placeholder=" ...")
        pen.multiline_text((GAP, y + 18), "\n".join(text), INK, body, spacing=4)
        for column, (label, pixels) in enumerate(cells):
            x = GAP + TEXT_WIDTH + column * (SIDE + GAP)
            pen.text((x, y), label, GREY, small)
            picture = enlarged(pixels)
            sheet.paste(picture, (x, y + 18))
            right, bottom = x + picture.width, y + 18 + picture.height
            pen.rectangle((x - 1, y + 17, right, bottom), outline=FRAME)
    return sheet


def enlarged(pixels: np.ndarray) -> Image.Image:
    """A picture whose longest side is SIDE; single pixels stay visible when it grows."""
    picture = Image.fromarray(pixels)
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def of_requests(
    title: str,
    requests: Sequence[Request],
    painted: Sequence[np.ndarray],
    truths: Sequence[np.ndarray | None],
) -> Image.Image:
    """A sheet of painted pictures, what they were painted from, and the truth where it is known."""
    lines = []
    for request, picture, truth in zip(requests, painted, truths, strict=True):
        cells = [] if request.source is None else [("source", request.source)]
        cells += [(f"reference {n}", x) for n, x in enumerate(request.references, start=1)]
        cells.append(("painted", picture))
        if truth is not None:
            cells.append(("truth", truth))
        lines.append((request.prompt, cells))
    return draw(title, lines)


def save(sheet: Image.Image, path: files.PathLike) -> None:
    """Writes a PNG. Raises InputError when it cannot be written."""
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    files.write_bytes(path, data.getvalue())
