"""Sheets of pictures for people: a line per example, a labelled column per picture. PIL only.

A sheet that was saved can be taken apart again: its PNG says where each picture is.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.painting.request import Request

Cell = tuple[str, np.ndarray]  # (label, uint8 [h, w, 3])
Line = tuple[str, list[Cell]]  # (prompt, labelled pictures)
_PARTS = "qk_jax sheet"  # the text chunk of a PNG that says what is where
SIDE = 160  # longest side of a picture on the sheet, in pixels
GAP = 12
TEXT_WIDTH = 300
INK, GREY, PAPER, FRAME = (20, 20, 20), (110, 110, 110), (255, 255, 255), (200, 200, 200)


def draw(title: str, lines: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    """A sheet with (prompt, labelled pictures) on each line, of which `save` keeps the places."""
    heading, body, small = (ImageFont.load_default(size) for size in (22, 16, 13))
    columns = max(len(cells) for _, cells in lines)
    width = GAP + TEXT_WIDTH + columns * (SIDE + GAP) + GAP
    wrapped = textwrap.wrap(title, max(20, width // 12))
    top = GAP + 28 * len(wrapped) + GAP
    height = top + len(lines) * (SIDE + 2 * GAP + 18)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    parts: list[dict[str, Any]] = []
    for number, words in enumerate(wrapped):
        pen.text((GAP, GAP + 28 * number), words, INK, heading)
    for number, (prompt, cells) in enumerate(lines):
        y = top + number * (SIDE + 2 * GAP + 18)
        pen.line((GAP, y - GAP // 2, width - GAP, y - GAP // 2), FRAME)
        text = textwrap.wrap(prompt, TEXT_WIDTH // 9, max_lines=9, placeholder=" ...")
        pen.multiline_text((GAP, y + 18), "\n".join(text), INK, body, spacing=4)
        parts.append({"prompt": prompt, "cells": []})
        for column, (label, pixels) in enumerate(cells):
            x = GAP + TEXT_WIDTH + column * (SIDE + GAP)
            pen.text((x, y), label, GREY, small)
            picture = enlarged(pixels)
            sheet.paste(picture, (x, y + 18))
            size = pixels.shape[1::-1]
            box = (x, y + 18, picture.width, picture.height)
            parts[-1]["cells"].append({"label": label, "box": box, "size": size})
            right, bottom = x + picture.width, y + 18 + picture.height
            pen.rectangle((x - 1, y + 17, right, bottom), outline=FRAME)
    sheet.info[_PARTS] = json.dumps(parts)
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
    chunks = PngImagePlugin.PngInfo()
    if _PARTS in sheet.info:
        chunks.add_itxt(_PARTS, sheet.info[_PARTS], zip=True)
    sheet.save(data, format="PNG", pnginfo=chunks)
    files.write_bytes(path, data.getvalue())


def read(path: files.PathLike) -> tuple[Image.Image, list[Line]]:
    """A sheet that `save` wrote, and its lines; none of one that does not say where they are.

    A picture that the sheet shows enlarged has its own pixels again, one that it shows smaller has
    those of the sheet.

    Raises: InputError when it is no PNG that can be read, or says of itself what cannot be.
    """
    try:
        png = Image.open(io.BytesIO(files.Path(path).read_bytes()), formats=["PNG"])
        told, sheet = png.info.get(_PARTS, "[]"), png.convert("RGB")
        return sheet, [
            (str(part["prompt"]), [(str(x["label"]), _cut(sheet, x)) for x in part["cells"]])
            for part in json.loads(told)
        ]
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, OverflowError,
            RecursionError, Image.DecompressionBombError) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no sheet that can be read ({reason}); paint it anew") from None


def _cut(sheet: Image.Image, cell: dict[str, Any]) -> np.ndarray:
    """The picture of a cell, uint8 [h, w, 3]. Raises: ValueError, TypeError, KeyError."""
    x, y, width, height = map(int, cell["box"])
    if not (0 <= x < x + width <= sheet.width and 0 <= y < y + height <= sheet.height):
        raise ValueError(f"a picture at {cell['box']} is outside of it")
    picture = sheet.crop((x, y, x + width, y + height))
    own = tuple(map(int, cell["size"]))
    if len(own) == 2 and 0 < min(own) and own[0] <= width and own[1] <= height:
        picture = picture.resize(own, Image.Resampling.NEAREST)
    return np.asarray(picture)
