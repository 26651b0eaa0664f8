"""Folders of safetensors: any part of any tensor is read, and shards are written as they come.

The layout is that of `save_pretrained` in transformers and diffusers: one `BASE.safetensors`, or
`BASE-00001-of-0000N.safetensors` with `BASE.safetensors.index.json`. Nothing is unpickled, and
nothing is mapped into memory: a mapped file counts as resident for as long as it is open, and one
that is cut short under its reader kills the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qk_jax.base import files
from qk_jax.base.errors import InputError, some
from qk_jax.base.files import GIGABYTE, PathLike, json_object, read_json, write_json

BASES = ("model", "diffusion_pytorch_model", "pytorch_lora_weights", "adapter_model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# The bits of a float's exponent, by its size: all of them set mean infinity or no number.
EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
MAX_HEADER = 100_000_000  # bytes, the limit of the format
BLOCK = 4 << 20  # bytes: read, checked or transposed at a time


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies: a file, the name of its type in the header, and its first byte."""

    file: files.Path
    kind: str
    offset: int


class TensorFolder:
    """The tensors of a model folder (or of one .safetensors file), read one at a time.

    Attributes:
      path: where they lie.
      shapes: {name: shape}, from the headers alone.
      dtypes: {name: numpy dtype}; bfloat16 is ml_dtypes'.
      metadata: {key: text} of the headers' `__metadata__`.

    Raises:
      InputError: no weights, only pickles, a missing or truncated shard, a header that does not
        fit its file, an index that points outside the folder or at a tensor that is not there.
    """

    def __init__(self, path: PathLike):
        self.path = files.Path(path)
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.metadata: dict[str, str] = {}
        for file, wanted in _shards(self.path).items():
            self._scan(file, wanted)

    def _scan(self, file: files.Path, wanted: set[str] | None) -> None:
        """Notes the tensors of one file; `wanted` are those its index places there."""
        if not os.path.isfile(file):
            raise InputError(f"the shard {file} is missing; download the whole folder again")
        with _clear(file):
            entries, metadata = _header(file)
        absent = sorted((wanted or set()) - entries.keys())
        if absent:
            raise InputError(
                f"{file} lacks {some(absent)}, which its index places there; download it again"
            )
        self.metadata.update(metadata)
        for name in sorted(entries if wanted is None else wanted):
            kind, shape, offset = entries[name]
            if kind not in DTYPES:
                raise InputError(
                    f"tensor {name} of {file} has the unsupported type {kind}; "
                    f"convert it to one of {', '.join(DTYPES)}"
                )
            self._places[name] = _Place(file, kind, offset)
            self.shapes[name] = shape
            self.dtypes[name] = DTYPES[kind]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor `name`, or a part of it; nothing else of the file stays in memory.

        Args:
          name: one of `shapes`.
          index: slices of step 1 along the leading axes, as `Sharding.devices_indices_map` of jax
            has them. Of the first axis only these rows are read; a part of a row is picked from
            the whole one, since reading on is cheaper than seeking at every row.

        Raises:
          InputError: it cannot be read, or holds a value that is not finite.
          ValueError: the index has another step or too many slices.
        """
        place = self._places[name]
        part = _bounds(self.shapes[name], index or ())
        with _clear(place.file):
            bits = _read(place, self.shapes[name], part)
        if not _is_finite(bits, EXPONENTS[place.kind]):
            raise InputError(
                f"tensor {name} of {place.file} holds values that are not finite numbers; "
                "download it again"
            )
        return bits.view(self.dtypes[name])


# The types of the format and their bytes; a type that is not DTYPES' still has to fit its file.
_SIZES = {
    **{kind: dtype.itemsize for kind, dtype in DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64", "C64"), 8),
}
_Entry = tuple[str, tuple[int, ...], int]


def _header(file: files.Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """({name: (type, shape, first byte)}, metadata) of a .safetensors file.

    Raises:
      ValueError: the tensors do not fill the file exactly, without holes and overlaps.
      OSError, RecursionError: as for any file of JSON.
    """
    with open(file, "rb") as handle:
        end = os.fstat(handle.fileno()).st_size
        size = int.from_bytes(handle.read(8), "little")
        start = 8 + size
        if end < 8 or start > end or size > MAX_HEADER:
            raise ValueError(f"a header of {size} bytes in a file of {end}")
        entries = json_object(handle.read(size))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata that is no text")
    found: dict[str, _Entry] = {}
    spans = []
    for name, entry in entries.items():
        kind, shape, (first, last) = _checked(name, entry)
        found[name] = kind, shape, start + first
        spans.append((first, last, name))
    reached = 0
    for first, last, name in sorted(spans):
        if first != reached:
            raise ValueError(f"{name} begins at byte {first}, not {reached}, where data are due")
        reached = last
    if start + reached != end:
        raise ValueError(f"tensors of {reached} bytes after a header of {start} in {end} bytes")
    return found, metadata


def _checked(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """(type, shape, offsets) of one entry of a header, or ValueError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no entry of dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name} has {numbers!r} where sizes are due")
    if not isinstance(kind, str) or kind not in _SIZES:
        raise ValueError(f"{name} has the type {kind!r}")
    size = math.prod(shape) * _SIZES[kind]
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{name} of {size} bytes ({kind} {shape}) lies at {offsets}")
    return kind, tuple(shape), (offsets[0], offsets[1])


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """[(start, stop)] along each axis of `shape`."""
    if len(index) > len(shape) or any(one.step not in (None, 1) for one in index):
        raise ValueError(f"the index {index} has no unit steps, or does not fit {shape}")
    slices = [*index, *[slice(None)] * (len(shape) - len(index))]
    starts_stops = [one.indices(size)[:2] for one, size in zip(slices, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in starts_stops]


def _read(place: _Place, shape: tuple[int, ...], part: list[tuple[int, int]]) -> np.ndarray:
    """The part of a tensor of `shape`, as unsigned integers of its bits."""
    unsigned = np.dtype(f"u{_SIZES[place.kind]}")
    out = np.empty([stop - start for start, stop in part], unsigned)
    row = math.prod(shape[1:]) * unsigned.itemsize
    with open(place.file, "rb", buffering=0) as handle:
        handle.seek(place.offset + (part[0][0] * row if part else 0))
        if out.shape[1:] == shape[1:]:
            _fill(handle, out)
        elif out.size:
            columns = tuple(slice(*bounds) for bounds in part[1:])
            rows = np.empty((max(1, BLOCK // row), *shape[1:]), unsigned)
            for first in range(0, len(out), len(rows)):
                some_rows = rows[: len(out) - first]
                _fill(handle, some_rows)
                out[first : first + len(rows)] = some_rows[:, *columns]
    return out


def _fill(handle: BinaryIO, array: np.ndarray) -> None:
    """Reads a whole contiguous array from where `handle` stands."""
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = handle.readinto(rest)
        if not count:
            raise ValueError("it ends within a tensor")
        rest = rest[count:]


def _is_finite(bits: np.ndarray, exponent: int) -> bool:
    """Whether no float with these bits has all bits of its exponent set.

    It is many times faster than ml_dtypes' isfinite, in blocks that stay in the cache.
    """
    flat = bits.reshape(-1)
    mask = flat.dtype.type(exponent)
    step = BLOCK // 8 // flat.itemsize
    scratch = np.empty(min(step, flat.size), flat.dtype)
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        masked = np.bitwise_and(block, mask, out=scratch[: block.size])
        if masked.max() == mask:
            return False
    return True


@contextlib.contextmanager
def _clear(file: files.Path) -> Iterator[None]:
    """Turns the reader's errors about `file` into one line."""
    try:
        yield
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{file} is truncated or no safetensors file ({error}); download it again"
        ) from None


def _shards(path: files.Path) -> dict[files.Path, set[str] | None]:
    """{file: tensors that the index places there, or None for all}."""
    if os.path.isfile(path):
        _refuse_pickles([path])
        return {path: None}
    if not os.path.isdir(path):
        raise InputError(f"{path} does not exist; give a model folder")
    indices = [path / f"{base}.safetensors.index.json" for base in BASES]
    for index in indices:
        if os.path.isfile(index):
            return _indexed(index)
    for base in BASES:
        if os.path.isfile(path / f"{base}.safetensors"):
            return {path / f"{base}.safetensors": None}
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise InputError(
            f"{path} holds {some(file.name for file in found)} and no index that says which to "
            "read; give the file itself"
        )
    _refuse_pickles(path.iterdir())
    raise InputError(f"{path} holds no .safetensors file; give a complete model folder")


def _refuse_pickles(files: Iterable[files.Path]) -> None:
    """Says why a pickle is not read."""
    for file in sorted(files):
        if file.suffix in PICKLES:
            raise InputError(
                f"{file} is a pickle, which can run any code when it is read; "
                "convert it to safetensors first"
            )


def _indexed(index: files.Path) -> dict[files.Path, set[str] | None]:
    """The shards that an index names; names with any folder part are refused."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map; download it again")
    shards: dict[files.Path, set[str] | None] = {}
    for name, file in places.items():
        plain = isinstance(file, str) and file == pathlib.PurePath(file).name and "\\" not in file
        if not plain or file in ("", ".", "..") or "\0" in file:
            raise InputError(f"{index} places {name} in {file!r}, which is not a file beside it")
        _refuse_pickles([index.with_name(file)])
        shards.setdefault(index.with_name(file), set()).add(name)
    return shards


def write_tensors(
    folder: PathLike,
    base: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5 * GIGABYTE,
    specs: Mapping[str, Any] | None = None,
) -> None:
    """Writes `tensors` as BASE.safetensors, or as shards with an index.

    Every header is written first and each tensor goes straight to its place, so that one tensor is
    in memory, whatever the order in which they come. Files of an earlier write with the same base
    are removed when all new ones are complete, so that no stale index or shard is left.

    Args:
      folder: made where it is missing.
      base: of the file names.
      tensors: (name, array), each once.
      max_shard_bytes: a larger tensor is alone in its shard.
      specs: {name: anything with the shape and dtype of its array}, in the order of the shards.
        Without it all of `tensors` is held in memory, to learn them.

    Raises:
      InputError: the folder cannot be written, or a type has no place in the format.
      ValueError: `tensors` are not those of `specs`.
    """
    folder = files.Path(folder)
    if specs is None:
        tensors = list(tensors)
        specs = dict(tensors)
    shards = _split(specs, max_shard_bytes)
    parts = [folder / f".{base}-{number}.{os.getpid()}.part" for number in range(len(shards))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_parts(dict(zip(parts, shards, strict=True)), specs, tensors)
        stale = re.compile(rf"{re.escape(base)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        for file in folder.iterdir():
            if stale.fullmatch(file.name):
                file.unlink()
        places = {}
        for number, (part, names) in enumerate(zip(parts, shards, strict=True), 1):
            count = f"-{number:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
            file = f"{base}{count}.safetensors"
            os.replace(part, folder / file)
            places.update(dict.fromkeys(names, file))
        if len(parts) > 1:
            total = sum(_size(spec) for spec in specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_json(folder / f"{base}.safetensors.index.json", index)
    except OSError as error:
        raise InputError(
            f"weights cannot be written to {folder} ({error}); free space or choose another folder"
        ) from None
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()


def _size(spec: Any) -> int:
    """Bytes of a tensor."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _split(specs: Mapping[str, Any], max_bytes: int) -> list[list[str]]:
    """The names of each shard of at most `max_bytes`, or of one tensor that is larger."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + _size(spec) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(spec)
    return shards


def _write_parts(
    parts: Mapping[files.Path, list[str]],
    specs: Mapping[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes whole files: {file: its names}."""
    due: dict[str, tuple[files.Path, int]] = {}
    for part, names in parts.items():
        text, offsets = _new_header({name: specs[name] for name in names})
        part.write_bytes(text)
        due |= {name: (part, offset) for name, offset in offsets.items()}
    for name, array in tensors:
        if name not in due:
            raise ValueError(f"tensor {name} comes twice, or has no place among the shards")
        spec = specs[name]
        if array.shape != tuple(spec.shape) or array.dtype != np.dtype(spec.dtype):
            raise ValueError(
                f"tensor {name} is {array.dtype} {array.shape}, not {spec.dtype} {spec.shape}"
            )
        part, offset = due.pop(name)
        with open(part, "r+b", buffering=0) as handle:
            handle.seek(offset)
            _drain(handle, array)
    if due:
        raise ValueError(f"{some(due)} never came")


def _new_header(specs: Mapping[str, Any]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors, and {name: where its data begin}.

    Larger types come first and the data begin at a multiple of 64, so that every tensor is aligned
    for those who map the file.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    reached = 0
    for name in sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize):
        spec, dtype = specs[name], np.dtype(specs[name].dtype)
        if dtype not in kinds:
            raise InputError(f"tensor {name} is {dtype}; convert it to one of {some(DTYPES)}")
        offsets[name] = reached
        ends = [reached, reached + _size(spec)]
        entries[name] = {"dtype": kinds[dtype], "shape": list(spec.shape), "data_offsets": ends}
        reached = ends[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + o for n, o in offsets.items()}


def _drain(handle: BinaryIO, array: np.ndarray) -> None:
    """Writes an array in C order, some rows at a time: a transposed one is not copied whole."""
    bits = array.view(f"u{array.dtype.itemsize}")
    if bits.ndim < 2 or bits.flags.c_contiguous:
        bits = np.ascontiguousarray(bits).reshape(1, -1)
    step = max(1, BLOCK // max(1, bits[:1].nbytes))
    for first in range(0, len(bits), step):
        rest = memoryview(contiguous(bits[first : first + step]).reshape(-1).view(np.uint8))
        while rest:
            rest = rest[handle.write(rest) :]


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` in C order, itself where it is so already.

    Tiles that stay in the cache transpose five times as fast as `np.ascontiguousarray`.
    """
    if array.flags.c_contiguous or array.ndim < 2:
        return array
    out = np.empty(array.shape, array.dtype)
    for row in range(0, array.shape[0], 256):
        for column in range(0, array.shape[1], 64):
            tile = slice(row, row + 256), slice(column, column + 64)
            out[tile] = array[tile]
    return out
