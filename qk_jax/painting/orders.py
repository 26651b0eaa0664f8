"""What a command line or a file of prompts asks for, and the PNGs that answer it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from qk_jax import painting
from qk_jax.base import files
from qk_jax.base.errors import InputError

LINE_KEYS = ("prompt", "source", "references", "seed", "out")


@dataclasses.dataclass(frozen=True)
class Order:
    """One prompt as asked for, before any picture is read.

    Attributes:
      where: what an error calls it: '' or 'line 3 of many.jsonl: '.
      prompt, source, references, seed: as given; pictures are paths.
      out: the file to write.
    """

    where: str
    prompt: str
    source: files.Path | None
    references: tuple[files.Path, ...]
    seed: int
    out: files.Path


def orders(args: argparse.Namespace) -> list[Order]:
    """What the arguments ask for; nothing is read but the file of prompts.

    Raises:
      InputError: arguments that do not go together, or a bad line, with its number.
    """
    if args.num < 1 or args.batch < 1:
        raise InputError("--num and --batch must be at least 1")
    if args.prompts:
        for name in ("prompt", "source", "reference", "out"):
            if getattr(args, name):
                raise InputError(f"--{name} does not go with --prompts; put it into the file")
        if not args.out_dir:
            raise InputError("--prompts needs a folder for its pictures: give --out-dir DIR")
        return read_orders(files.Path(args.prompts), files.Path(args.out_dir), args.seed)
    if args.prompt is None or not args.prompt.strip():
        raise InputError("there is no prompt; say what to paint: --prompt 'a red kite'")
    if args.out_dir or not args.out:
        raise InputError("--prompt needs the name of its picture: give --out FILE.png")
    source = files.Path(args.source) if args.source else None
    references = tuple(map(files.Path, args.reference))
    order = Order("", args.prompt, source, references, args.seed, files.Path(args.out))
    check_order(order)
    return [order]


def read_orders(path: files.Path, out_dir: files.Path, seed: int) -> list[Order]:
    """The orders of a file of JSON lines; empty lines are passed over.

    Raises:
      InputError: the file cannot be read or is empty, or a line is wrong; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}; give a file of JSON lines") from None
    found: list[Order] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}: "
        order = _order_of(where, _object(where, line), number, path.parent, out_dir, seed)
        found.append(order)
    if not found:
        raise InputError(f"{path} holds no prompt; write one JSON object a line")
    return found


def _object(where: str, line: str) -> dict[str, Any]:
    """The JSON object of a line, with known keys only."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f'{where}no JSON ({error}); write {{"prompt": "..."}}') from None
    if not isinstance(value, dict):
        raise InputError(f'{where}{line[:40]!r} is no JSON object; write {{"prompt": "..."}}')
    for key in value:
        if key not in LINE_KEYS:
            near = difflib.get_close_matches(key, LINE_KEYS, n=1, cutoff=0.0)[0]
            raise InputError(f"{where}unknown key {key!r}; did you mean {near!r}?")
    return value


def _order_of(
    where: str,
    value: dict[str, Any],
    number: int,
    folder: files.Path,
    out_dir: files.Path,
    seed: int,
) -> Order:
    """The order of one line's object; null is as good as a missing key."""
    value = {key: given for key, given in value.items() if given is not None}
    paths = value.get("references", [])
    is_list = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    wrong = [
        f"{key} is {value[key]!r:.40}, not {kind}"
        for key, kind, good in (
            ("source", "a path", isinstance(value.get("source", ""), str)),
            ("references", "a list of paths", is_list),
            ("seed", "a number", type(value.get("seed", 0)) is int),
            ("out", "a file name", isinstance(value.get("out", ""), str)),
        )
        if not good
    ]
    if wrong:
        raise InputError(f"{where}{wrong[0]}")
    name = pathlib.PurePath(value.get("out", f"{number:05d}.png"))
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise InputError(f"{where}out is {str(name)!r}; give a name inside --out-dir")
    order = Order(
        where=where,
        prompt=value.get("prompt"),
        source=folder / value["source"] if "source" in value else None,
        references=tuple(folder / path for path in paths),
        seed=value.get("seed", seed),
        out=out_dir / name,
    )
    check_order(order)
    return order


def check_order(order: Order) -> None:
    """Raises InputError for what is wrong whatever the model."""
    if not isinstance(order.prompt, str) or not order.prompt.strip():
        raise InputError(f"{order.where}there is no prompt; give a string")
    if not 0 <= order.seed < painting.SEEDS:
        raise InputError(f"{order.where}seed is {order.seed}; give 0 to {painting.SEEDS - 1}")
    if order.out.suffix.lower() != ".png":
        raise InputError(f"{order.where}{order.out} is no .png; pictures are written as PNG")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of 'WIDTHxHEIGHT'.

    Raises:
      InputError: it is not of that form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if not match:
        raise InputError(f"--size is {text!r}; give width x height in pixels, such as 64x64")
    return int(match[2]), int(match[1])


def make_folders(paths: Sequence[files.Path]) -> None:
    """Makes the folders of all outputs and proves that they can be written.

    Raises:
      InputError: one cannot, or two outputs have the same name.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(f"two pictures would be called {twice}; give each its own 'out'")
    for folder in sorted({path.parent for path in paths}):
        files.writable_folder(folder, "the folder")
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")


def jobs_of(
    painter: painting.Painter, order: Order, size: tuple[int, int] | None, count: int
) -> list[tuple[Order, painting.Request, files.Path]]:
    """(order, request, file) of each of the `count` pictures of an order.

    Raises:
      InputError: a picture cannot be read, or the model cannot follow; names line and thing.
    """
    try:
        source = None if order.source is None else painter.read(order.source)
        references = [painter.read(path) for path in order.references]
        request = painter.fit(order.prompt, source, references, size, order.seed)
        painter.check(request)
    except InputError as error:
        raise InputError(f"{order.where}{error}") from None
    if count == 1:
        return [(order, request, order.out)]
    return [
        (
            order,
            dataclasses.replace(request, number=number),
            order.out.with_stem(f"{order.out.stem}-{number}"),
        )
        for number in range(count)
    ]


def write_png(path: files.Path, pixels: np.ndarray, texts: dict[str, str]) -> None:
    """Writes a PNG with text chunks. Raises InputError when it cannot be written."""
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    with files.beside(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", pnginfo=info)


def texts_of(
    painter: painting.Painter,
    order: Order,
    request: painting.Request,
    settings: painting.Settings,
) -> dict[str, str]:
    """The text chunks of one picture."""
    height, width = request.size
    shown = dataclasses.asdict(settings) | {
        "size": f"{width}x{height}",
        "number": request.number,
        "source": str(order.source) if order.source else None,
        "references": [str(path) for path in order.references],
        "model": painter.name,
    }
    return {"prompt": request.prompt, "seed": str(request.seed), "settings": json.dumps(shown)}
