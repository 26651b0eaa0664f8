"""Orders of a command line or a file of prompts, and the PNGs that are written for them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.painting.painter import Painter
from qk_jax.painting.request import Request, Settings
from qk_jax.pictures import sizes

LINE_KEYS = ("prompt", "source", "references", "seed", "out")


@dataclasses.dataclass(frozen=True)
class Order:
    """One prompt as asked for, before any picture is read.

    Attributes:
      where: what precedes an error: '' or 'line 3 of many.jsonl: '.
      request: prompt and seed.
      source: path of the picture to edit, or None.
      references: paths of pictures of subjects.
      out: the file to write.

    Raises:
      InputError: `out` is no PNG.
    """

    where: str
    request: Request
    source: files.Path | None
    references: tuple[files.Path, ...]
    out: files.Path

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".png":
            raise InputError(f"{self.out} is no .png; pictures are written as PNG")


class Job(NamedTuple):
    """One picture to paint: its order, its request and its file."""

    order: Order
    request: Request
    path: files.Path


@contextlib.contextmanager
def _prefixed(where: str) -> Iterator[None]:
    """Input errors of the block begin with `where`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def orders(args: argparse.Namespace) -> list[Order]:
    """What the arguments ask for; nothing is read but the file of prompts.

    Raises:
      InputError: arguments that do not go together, or a bad line, with its number.
    """
    if args.num < 1 or (args.batch is not None and args.batch < 1):
        raise InputError("--num and --batch must be at least 1")
    if args.prompts:
        for name in ("prompt", "source", "reference", "out"):
            if getattr(args, name):
                raise InputError(f"--{name} does not go with --prompts; put it into the file")
        if not args.out_dir:
            raise InputError("--prompts needs a folder for its pictures: give --out-dir DIR")
        return read_orders(files.Path(args.prompts), files.Path(args.out_dir), args.seed)
    request = Request(args.prompt, seed=args.seed)
    if args.out_dir:
        raise InputError("--out-dir goes with --prompts; name the picture with --out FILE.png")
    source = files.Path(args.source) if args.source else None
    references = tuple(map(files.Path, args.reference))
    out = files.Path(args.out) if args.out else free_name(args.prompt)
    return [Order("", request, source, references, out)]


def free_name(prompt: str, folder: files.PathLike = ".") -> files.Path:
    """A PNG named after a prompt that is not there yet: a-red-kite.png, a-red-kite-2.png, ..."""
    stem = "-".join(re.findall(r"\w+", prompt.lower()))[:60].rstrip("-") or "picture"
    paths = (
        files.Path(folder) / f"{stem}{number}.png"
        for number in itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    )
    # With --num the names are made of it.
    return next(x for x in paths if not (x.exists() or x.with_stem(f"{x.stem}-0").exists()))


def read_orders(path: files.Path, out_dir: files.Path, seed: int) -> list[Order]:
    """The orders of a file of JSON lines; empty lines are skipped.

    Raises:
      InputError: the file cannot be read or is empty, or a line is wrong; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}; give a file of JSON lines") from None
    return orders_of(lines, path, out_dir, seed)


def orders_of(
    lines: Iterable[str], path: files.Path, out_dir: files.Path, seed: int
) -> list[Order]:
    """The orders of JSON lines that stand in `path`; arguments and errors as `read_orders`."""
    found: list[Order] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}: "
        with _prefixed(where):
            value = {"seed": seed, "out": f"{number:05d}.png"} | _object(line)
            found.append(_order_of(where, value, path.parent, out_dir))
    if not found:
        raise InputError(f"{path} holds no prompt; write one JSON object a line")
    return found


def _object(line: str) -> dict[str, Any]:
    """The JSON object of a line, with known keys only; null is as good as a missing key."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f'no JSON ({error}); write {{"prompt": "..."}}') from None
    if not isinstance(value, dict):
        raise InputError(f'{line[:40]!r} is no JSON object; write {{"prompt": "..."}}')
    for key in value:
        if key not in LINE_KEYS:
            near = difflib.get_close_matches(key, LINE_KEYS, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown key {key!r}; did you mean {near!r}?")
    return {key: given for key, given in value.items() if given is not None}


def _order_of(where: str, value: dict[str, Any], folder: files.Path, out_dir: files.Path) -> Order:
    """The order of one line's object, whose paths are relative to `folder`."""
    paths = value.get("references", [])
    is_list = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    for key, kind, good in (
        ("source", "a path", isinstance(value.get("source", ""), str)),
        ("references", "a list of paths", is_list),
        ("seed", "a number", type(value["seed"]) is int),
        ("out", "a file name", isinstance(value["out"], str)),
    ):
        if not good:
            raise InputError(f"{key} is {value[key]!r:.40}, not {kind}")
    name = pathlib.PurePath(value["out"])
    if name.is_absolute() or ".." in name.parts or not name.name:
        raise InputError(f"out is {str(name)!r}; give a name inside --out-dir")
    return Order(
        where=where,
        request=Request(value.get("prompt", ""), seed=value["seed"]),
        source=folder / value["source"] if "source" in value else None,
        references=tuple(folder / path for path in paths),
        out=out_dir / name,
    )


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of --size, None where it is not given. Raises InputError for no size."""
    return None if text is None else sizes.parse_size(text, "--size")


def make_folders(paths: Sequence[files.Path], *, overwrite: bool) -> None:
    """Makes the folders of all outputs and proves that they can be written.

    Raises:
      InputError: one cannot, two outputs have the same name, or one exists that is not to be
        replaced.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(f"two pictures would be called {twice}; give each its own 'out'")
    for folder in sorted({path.parent for path in paths}):
        files.writable_folder(folder, "the folder")
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists; give another name, or --overwrite to replace it")


def jobs_of(painter: Painter, order: Order, size: tuple[int, int] | None, count: int) -> list[Job]:
    """The `count` pictures of an order.

    Raises:
      InputError: a picture cannot be read, or the model cannot follow; names line and thing.
    """
    with _prefixed(order.where):
        source = None if order.source is None else painter.read(order.source)
        references = [painter.read(path) for path in order.references]
        prompt, seed = order.request.prompt, order.request.seed
        request = painter.fit(prompt, source, references, size, seed)
    if count == 1:
        return [Job(order, request, order.out)]
    requests = (dataclasses.replace(request, number=number) for number in range(count))
    stem = order.out.stem
    return [Job(order, x, order.out.with_stem(f"{stem}-{x.number}")) for x in requests]


def write_png(path: files.Path, pixels: np.ndarray, texts: dict[str, str]) -> None:
    """Writes a PNG with text chunks. Raises InputError when it cannot be written."""
    files.write_bytes(path, png_of(pixels, texts))


def png_of(pixels: np.ndarray, texts: dict[str, str]) -> bytes:
    """A PNG of uint8 [H, W, 3] with text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG", pnginfo=info)
    return data.getvalue()


def texts_of(painter: Painter, job: Job, settings: Settings) -> dict[str, str]:
    """The text chunks of one picture."""
    order = job.order
    source = str(order.source) if order.source else None
    return texts(painter.name, job.request, settings, source, list(map(str, order.references)))


def texts(
    model: str,
    request: Request,
    settings: Settings,
    source: str | None,
    references: Sequence[str],
    **more: Any,
) -> dict[str, str]:
    """The text chunks of one picture, by what its model and its condition pictures are called."""
    shown = dataclasses.asdict(settings) | {
        "size": sizes.format_size(request.size),
        "number": request.number,
        "source": source,
        "references": list(references),
        "model": model,
    }
    told = {"prompt": request.prompt, "seed": str(request.seed)}
    return told | {"settings": json.dumps(shown | more)}
