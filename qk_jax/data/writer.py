"""Writes examples from Python as a record file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.data import records
from qk_jax.data.example import TASKS
from qk_jax.data.importers.drafts import Draft, Limits, encoded, entry_of
from qk_jax.pictures.decoding import standard

_CHANNELS = (1, 3, 4)


class Writer:
    """A record file that examples are added to; `config.data.records` names its folder.

        with Writer("DATA/train.array_record") as writer:
            writer.add("editing", "make the hat green", target=after, source="before.png")

    A picture is a path, the bytes of a file, an image of PIL, or an array: uint8, or floats from 0
    to 1, [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels. Files and bytes are kept as they
    are; images and arrays are written as PNG, images upright and in sRGB.

    The file and its side index appear under their names only when the block ends well.

    Raises: InputError when the file cannot be written.
    """

    def __init__(self, path: files.PathLike):
        self.path, self.count = files.Path(path), 0
        self._stack = contextlib.ExitStack()
        self._write: Callable[[records.Entry], None] | None = None

    def __enter__(self) -> Writer:
        self._write = self._stack.enter_context(records.writing(self.path))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._write = None
        self._stack.__exit__(*raised)

    def add(
        self,
        task: str,
        instruction: str,
        target: Any,
        *,
        source: Any = None,
        references: Sequence[Any] = (),
        mask: Any = None,
        name: str = "",
        **header: Any,
    ) -> None:
        """Adds an example.

        Args:
          task: one of TASKS.
          instruction: what the user writes.
          target: the true picture.
          source: the picture to edit, where there is one, or several in a list.
          references: pictures of subjects that are to appear, in order.
          mask: a picture of the target's size, white where its subject is, for `synthesize`.
          name: of the set that it is from, for figures by source; at most 24 ASCII characters.
          **header: further JSON values of the record.

        Raises:
          InputError: one of them is wrong; names the example by its number, and the picture.
        """
        example = f"example {self.count}"
        if self._write is None:
            raise InputError(
                f"{example}: use Writer in a `with` block: with Writer(path) as writer"
            )
        if task not in TASKS:
            raise InputError(f"{example} has the task {task!r}, not of {TASKS}")
        if not isinstance(references, list | tuple):
            raise InputError(f"{example}: references are a {_kind(references)}, expected a list")
        if not (isinstance(name, str) and name.isascii() and len(name) <= records.NAME_LIMIT):
            raise InputError(
                f"{example}: the name {name!r} is no text of at most 24 ASCII characters"
            )
        if own := {"roles", "blobs"} & header.keys():
            raise InputError(f"{example}: {own.pop()!r} is the record's own; name the field else")
        sources = [] if source is None else list(source) if isinstance(source, list) else [source]
        given = [("source", one) for one in sources] + [("reference", one) for one in references]
        pictures = tuple(
            (role, bytes_of(one, f"{example}, {role} {number}"))
            for number, (role, one) in enumerate(given, start=1)
        )
        draft = Draft(
            example, instruction, bytes_of(target, f"{example}, target"), pictures, name,
            more=header, mask=b"" if mask is None else bytes_of(mask, f"{example}, mask"),
        )  # fmt: skip
        if bool(given) == (task == "text_to_image"):  # how many and of which role is the plan's
            raise InputError(
                f"{example} has {len(given)} condition pictures; {task} takes "
                f"{'none' if given else 'at least one'}"
            )
        self._write(entry_of(draft, task, tuple(role for role, _ in given), Limits(), example))
        self.count += 1


def bytes_of(picture: Any, name: str) -> bytes:
    """A picture as the bytes of a file; `name` is what an error calls it. Raises: InputError."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    if isinstance(picture, str | os.PathLike):
        try:
            return files.Path(picture).read_bytes()
        except OSError as error:
            raise InputError(f"{name}: {picture} cannot be read ({error.strerror})") from None
    if isinstance(picture, Image.Image):
        try:
            return encoded(standard(picture), "PNG")
        except Exception as error:  # of many classes
            raise InputError(f"{name}: the image cannot be used ({error})") from None
    if isinstance(picture, np.ndarray):
        return encoded(Image.fromarray(_pixels(picture, name)), "PNG")
    raise InputError(
        f"{name} is a {_kind(picture)}; give a path, bytes, an image of PIL or an array of numpy"
    )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3 or 4]. Raises: InputError."""
    array = _channels_last(array, name)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} is an array of {array.dtype}; give uint8, or floats from 0 to 1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # also where they are no numbers
        raise InputError(f"{name} has floats from {low:g} to {high:g}; scale them to 0 to 1")
    return np.ascontiguousarray(np.rint(array.astype(np.float32) * 255).astype(np.uint8))


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """[H, W] or [H, W, 3 or 4] of an array in one of the forms of `Writer`."""
    shape = array.shape
    last, first = (
        len(shape) == 3 and shape[-1] in _CHANNELS,
        len(shape) == 3 and shape[0] in _CHANNELS,
    )
    if not array.size or (len(shape) != 2 and not (last or first)):
        raise InputError(
            f"{name} is an array of shape {shape}; give [H, W], [H, W, C] or [C, H, W]"
        )
    if last and first:
        raise InputError(
            f"{name} is an array of shape {shape}, [H, W, C] or [C, H, W] alike; give an image"
        )
    if first:
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
