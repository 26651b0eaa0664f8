"""Folders of safetensors: any part of any tensor is read, and shards are written as they come.

The files are those of `save_pretrained` in transformers and diffusers: one `BASE.safetensors`, or
`BASE-00001-of-0000N.safetensors` with `BASE.safetensors.index.json`. Nothing is unpickled. The
`safetensors` library does not serve: it maps files into memory, where they count as resident and a
file that is cut short kills its reader, accepts a name twice, and writes only what is in memory as
a whole.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qk_jax.base import buckets, files
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
# The bits of a float's exponent: all of them set mean infinity or NaN.
EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
MAX_HEADER = 100_000_000  # bytes, the limit of the format
BLOCK = 4 << 20  # bytes: read, checked or transposed at a time
# The types of the format and their bytes; a type that is not one of DTYPES still has to fit.
_SIZES = {
    **{kind: dtype.itemsize for kind, dtype in DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64", "C64"), 8),
}
Index = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Span:
    """A tensor's file, its type in the header, and its first byte."""

    file: files.Path
    kind: str
    start: int


class TensorFolder:
    """The tensors of a model folder (or of one .safetensors file), read one at a time.

    Attributes:
      path: the folder or file.
      shapes: {name: shape}, from the headers alone.
      dtypes: {name: numpy dtype}; bfloat16 is ml_dtypes'.
      metadata: {key: text} of the headers' `__metadata__`.

    Raises:
      InputError: no weights, only pickles, a missing or truncated shard, a header that does not
        fit its file, an index that points outside the folder or at a tensor that is not there.
    """

    def __init__(self, path: PathLike):
        self.path = files.Path(path)
        self._spans: dict[str, _Span] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.metadata: dict[str, str] = {}
        for file, wanted in _shards(self.path).items():
            self._scan(file, wanted)

    def _scan(self, file: files.Path, wanted: set[str] | None) -> None:
        """Adds the tensors of one file; `wanted` are those that the index has in it."""
        if not file.is_file():
            raise InputError(f"the shard {file} is missing; download the whole folder again")
        with _clear(file):
            entries, metadata = _header(file)
        if absent := sorted((wanted or set()) - entries.keys()):
            raise InputError(
                f"{file} lacks {some(absent)}, which the index has in it; download it again"
            )
        self.metadata.update(metadata)
        for name in sorted(entries if wanted is None else wanted):
            kind, shape, start = entries[name]
            if kind not in DTYPES:
                raise InputError(
                    f"tensor {name} of {file} has the unsupported type {kind}; "
                    f"convert it to one of {', '.join(DTYPES)}"
                )
            self._spans[name] = _Span(file, kind, start)
            self.shapes[name] = shape
            self.dtypes[name] = DTYPES[kind]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The tensor `name`, or a part of it; nothing else of the file stays in memory.

        Args:
          name: one of `shapes`.
          index: slices of step 1 along the leading axes, as `Sharding.devices_indices_map` of jax
            has them. Along the first axis only the part is read; of the other axes it is picked
            from what is read, since reading on is cheaper than many seeks.

        Raises:
          InputError: it cannot be read, or holds a value that is not finite.
          ValueError: the index has another step or too many slices.
        """
        span = self._spans[name]
        bounds = _bounds(self.shapes[name], index)
        with _clear(span.file):
            bits = _read(span, self.shapes[name], bounds)
        if not _is_finite(bits, EXPONENTS[span.kind]):
            raise InputError(
                f"tensor {name} of {span.file} holds values that are not finite numbers; "
                "download it again"
            )
        return bits.view(self.dtypes[name])


def _header(file: files.Path) -> tuple[dict[str, tuple[str, Shape, int]], dict[str, str]]:
    """({name: (type, shape, first byte)}, metadata) of a .safetensors file.

    Raises:
      ValueError: the tensors do not fill the file exactly, without holes and overlaps.
      OSError, RecursionError: as for any file of JSON.
    """
    handle: Any  # etils types every file as one of text
    with file.open("rb") as handle:
        end = handle.seek(0, 2)
        handle.seek(0)
        size = int.from_bytes(handle.read(8), "little")
        start = 8 + size
        if end < 8 or start > end or size > MAX_HEADER:
            raise ValueError(f"a header of {size} bytes in a file of {end}")
        entries = json_object(handle.read(size))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata that is no text")
    checked = {name: _checked(name, entry) for name, entry in entries.items()}
    reached = 0
    for first, last, name in sorted((*ends, name) for name, (_, _, ends) in checked.items()):
        if first != reached:
            raise ValueError(f"{name} begins at byte {first}, expected {reached}")
        reached = last
    if start + reached != end:
        raise ValueError(f"tensors of {reached} bytes after a header of {start} in {end} bytes")
    found = {name: (kind, shape, start + ends[0]) for name, (kind, shape, ends) in checked.items()}
    return found, metadata


def _checked(name: str, entry: Any) -> tuple[str, Shape, tuple[int, int]]:
    """(type, shape, offsets) of one entry of a header, or ValueError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no entry of dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name} has {numbers!r}, expected sizes")
    if not isinstance(kind, str) or kind not in _SIZES:
        raise ValueError(f"{name} has the type {kind!r}")
    size = math.prod(shape) * _SIZES[kind]
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"{name} of {size} bytes ({kind} {shape}) has the offsets {offsets}")
    return kind, tuple(shape), (offsets[0], offsets[1])


def _bounds(shape: Shape, index: Index) -> list[tuple[int, int]]:
    """[(start, stop)] along each axis of `shape`."""
    if len(index) > len(shape) or any(one.step not in (None, 1) for one in index):
        raise ValueError(f"the index {index} has no unit steps, or does not fit {shape}")
    slices = [*index, *[slice(None)] * (len(shape) - len(index))]
    ends = [one.indices(size)[:2] for one, size in zip(slices, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in ends]


def _read(span: _Span, shape: Shape, bounds: list[tuple[int, int]]) -> np.ndarray:
    """A part of a tensor of `shape`, as unsigned integers of its bits."""
    unsigned = np.dtype(f"u{_SIZES[span.kind]}")
    out = np.empty([stop - start for start, stop in bounds], unsigned)
    slab = math.prod(shape[1:]) * unsigned.itemsize  # bytes of one index along the first axis
    first, last = bounds[0] if bounds else (0, 1)
    with buckets.open_range(span.file, span.start + first * slab, (last - first) * slab) as handle:
        if out.shape[1:] == shape[1:]:
            _fill(handle, out)
        elif out.size:
            columns = tuple(slice(*ends) for ends in bounds[1:])
            buffer = np.empty((max(1, BLOCK // slab), *shape[1:]), unsigned)
            for first in range(0, len(out), len(buffer)):
                slabs = buffer[: len(out) - first]
                _fill(handle, slabs)
                out[first : first + len(slabs)] = slabs[:, *columns]
    return out


def _fill(handle: Any, array: np.ndarray) -> None:
    """Fills a whole contiguous array with what `handle` gives next."""
    data = array.reshape(-1).view(np.uint8)
    if handle.readinto(data) != len(data):
        raise ValueError("it ends within a tensor")


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
        if np.bitwise_and(block, mask, out=scratch[: block.size]).max() == mask:
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
    except Exception as error:  # of a bucket's client
        if not buckets.is_failure(error):
            raise
        raise InputError(f"{file} cannot be read ({error}); try again") from None


def _shards(path: files.Path) -> dict[files.Path, set[str] | None]:
    """{file: tensors that the index has in it, or None for all}."""
    if path.is_file():
        _refuse_pickles([path])
        return {path: None}
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a model folder")
    for base in BASES:
        if (path / f"{base}.safetensors.index.json").is_file():
            return _indexed(path / f"{base}.safetensors.index.json")
    for base in BASES:
        if (path / f"{base}.safetensors").is_file():
            return {path / f"{base}.safetensors": None}
    inside = sorted(path.iterdir())
    found = [file for file in inside if file.suffix == ".safetensors"]
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise InputError(
            f"{path} holds {some(file.name for file in found)} and no index that says which to "
            "read; give the file itself"
        )
    _refuse_pickles(inside)
    raise InputError(f"{path} holds no .safetensors file; give a complete model folder")


def _refuse_pickles(paths: Iterable[files.Path]) -> None:
    for file in paths:
        if file.suffix in PICKLES:
            raise InputError(
                f"{file} is a pickle, which can run any code when it is read; "
                "convert it to safetensors first"
            )


def _indexed(index: files.Path) -> dict[files.Path, set[str] | None]:
    """The shards that an index names; names with any folder part are refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download it again")
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file == pathlib.PurePath(file).name and "\\" not in file
        if not plain or file in ("", ".", "..") or "\0" in file:
            raise InputError(f"{index} has {tensor} in {file!r}, which is no file of its folder")
        names.setdefault(file, set()).add(tensor)
    shards: dict[files.Path, set[str] | None] = {index.with_name(f): n for f, n in names.items()}
    _refuse_pickles(shards)
    return shards


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is made when it is written.

    Attributes:
      shape, dtype: what `make` returns.
      make: gives the array.
    """

    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.make()


Tensors = Mapping[str, Tensor | np.ndarray]


def write_tensors(
    folder: PathLike, base: str, tensors: Tensors, max_shard_bytes: int = 5 * GIGABYTE
) -> None:
    """Writes `tensors` as BASE.safetensors, or as shards with an index.

    Two tensors are in memory at most: one is written while the next is made. The files get their
    names when all of them are complete; those of an earlier write with the same base are removed.

    Args:
      folder: made where it is missing.
      base: of the file names.
      tensors: {name: array or Tensor}, in the order of the shards.
      max_shard_bytes: a larger tensor is alone in its shard.

    Raises:
      InputError: the folder cannot be written, or a type does not exist in the format.
    """
    folder = files.Path(folder)
    shards = _split(tensors, max_shard_bytes)
    names = [f"{base}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"{base}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    with contextlib.ExitStack() as stack:
        for name, shard in zip(names, shards, strict=True):
            _write(stack.enter_context(files.beside(folder / name)), shard)
        stale = re.compile(rf"{re.escape(base)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        for file in folder.iterdir():
            if stale.fullmatch(file.name):
                file.unlink()
    if len(shards) > 1:
        weight_map = {name: f for f, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(map(_size, tensors.values()))
        values = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{base}.safetensors.index.json", values)


def _size(tensor: Any) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _split(tensors: Tensors, max_bytes: int) -> list[dict[str, Any]]:
    """Shards of at most `max_bytes`, or of one tensor that is larger."""
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _size(tensor) > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _size(tensor)
    return shards


def _write(file: files.Path, tensors: Tensors) -> None:
    """Writes one file.

    Larger types come first and the data begin at a multiple of 64, so that every tensor is aligned
    for those who map the file.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    reached = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in kinds:
            raise InputError(
                f"tensor {name} is {tensor.dtype}; convert it to one of {some(DTYPES)}"
            )
        ends = [reached, reached + _size(tensor)]
        kind, shape = kinds[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": ends}
        reached = ends[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    handle: Any
    with file.open("wb") as handle, concurrent.futures.ThreadPoolExecutor(1) as maker:
        handle.write(len(text).to_bytes(8, "little") + text)
        coming = [maker.submit(np.asarray, tensors[name]) for name in names[:1]]
        for name, following in zip(names, [*names[1:], None], strict=True):
            array = coming.pop().result()
            if following is not None:
                coming.append(maker.submit(np.asarray, tensors[following]))
            if array.shape != tuple(tensors[name].shape) or array.dtype != tensors[name].dtype:
                raise ValueError(f"tensor {name} became {array.dtype} {array.shape}")
            _drain(handle, array)
            del array


def _drain(handle: Any, array: np.ndarray) -> None:
    """Writes an array in C order, a block at a time: a transposed one is not copied whole."""
    bits = array.view(f"u{array.dtype.itemsize}")
    if bits.ndim < 2 or bits.flags.c_contiguous:
        bits = np.ascontiguousarray(bits).reshape(1, -1)
    step = max(1, BLOCK // max(1, bits[:1].nbytes))
    for first in range(0, len(bits), step):
        handle.write(contiguous(bits[first : first + step]).reshape(-1).view(np.uint8))


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
