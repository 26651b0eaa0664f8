"""Folders of safetensors: lazy reading tensor by tensor, sharded writing with an index.

The layout is that of `save_pretrained` in transformers and diffusers: one `BASE.safetensors`, or
`BASE-00001-of-0000N.safetensors` with `BASE.safetensors.index.json`. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qk_jax.errors import InputError

BASES = ("model", "diffusion_pytorch_model", "pytorch_lora_weights")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
GIGABYTE = 10**9
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
Path = str | os.PathLike[str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`.

    Raises:
      InputError: the file is missing, unreadable, no JSON, or no object.
    """
    path = pathlib.Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a complete model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; download it again")
    return value


def write_text(path: Path, text: str) -> None:
    """Writes `text` beside `path`, then renames, so that no half-written file has the name."""
    path = pathlib.Path(path)
    with _beside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, beside and renamed."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be written ({error}); free space or choose another folder"
        ) from None


@contextlib.contextmanager
def fresh_folder(folder: Path, marker: str) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well.

    Args:
      folder: the final name. An earlier export there is replaced as a whole.
      marker: a file that every such export has; a non-empty folder without it is left alone.

    Raises:
      InputError: `folder` exists and is something else, or cannot be written.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if occupied and not (folder / marker).is_file():
        raise InputError(
            f"{folder} exists and is no earlier export (no {marker} in it); choose another folder"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); choose another folder") from None
    try:
        yield part
        part.chmod(0o755)
        old = part.with_name(part.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}); free space there") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


class TensorFolder:
    """The tensors of a model folder (or of one .safetensors file), read one at a time.

    Attributes:
      path: where they lie.
      shapes: {name: shape}, from the headers alone.
      dtypes: {name: numpy dtype}; bfloat16 is ml_dtypes'.

    Raises:
      InputError: no weights, only pickles, a missing or truncated shard, a header that does not
        fit its file, an index that points outside the folder or at a tensor that is not there.
    """

    def __init__(self, path: Path):
        self.path = pathlib.Path(path)
        self._files: dict[str, pathlib.Path] = {}
        self._open: tuple[pathlib.Path, Any] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for file, wanted in _shards(self.path).items():
            self._scan(file, wanted)

    def _scan(self, file: pathlib.Path, wanted: set[str] | None) -> None:
        """Notes the tensors of one file; `wanted` are those its index places there."""
        handle = self._handle(file)
        names = set(handle.keys())
        absent = sorted((wanted or set()) - names)
        if absent:
            raise InputError(
                f"{file} lacks {some(absent)}, which its index places there; download it again"
            )
        for name in sorted(names if wanted is None else wanted):
            with _clear(file):
                view = handle.get_slice(name)
                shape, kind = tuple(view.get_shape()), view.get_dtype()
            if kind not in DTYPES:
                raise InputError(
                    f"tensor {name} of {file} has the unsupported type {kind}; "
                    f"convert it to one of {', '.join(DTYPES)}"
                )
            self._files[name] = file
            self.shapes[name] = shape
            self.dtypes[name] = DTYPES[kind]

    def _handle(self, file: pathlib.Path) -> Any:
        """The open handle of `file`; one file is open at a time."""
        if self._open is None or self._open[0] != file:
            if not file.is_file():
                raise InputError(f"the shard {file} is missing; download the whole folder again")
            with _clear(file):
                self._open = (file, safe_open(file, framework="numpy"))
        return self._open[1]

    def by_file(self) -> list[str]:
        """Names ordered so that each shard is opened once."""
        return sorted(self._files, key=lambda name: (self._files[name].name, name))

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`.

        Raises:
          InputError: it cannot be read, or holds a value that is not finite.
        """
        file = self._files[name]
        with _clear(file):
            array = self._handle(file).get_tensor(name)
        if not np.isfinite(array).all():
            raise InputError(f"tensor {name} of {file} holds values that are not finite numbers")
        return array


@contextlib.contextmanager
def _clear(file: pathlib.Path) -> Iterator[None]:
    """Turns the reader's errors about `file` into one line."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise InputError(
            f"{file} is truncated or no safetensors file ({error}); download it again"
        ) from None


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _shards(path: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """{file: tensors that the index places there, or None for all}."""
    if path.is_file():
        _refuse_pickles([path])
        return {path: None}
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give a model folder")
    indices = [path / f"{base}.safetensors.index.json" for base in BASES]
    for index in indices:
        if index.is_file():
            return _indexed(index)
    for base in BASES:
        if (path / f"{base}.safetensors").is_file():
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


def _refuse_pickles(files: Iterable[pathlib.Path]) -> None:
    """Says why a pickle is not read."""
    for file in sorted(files):
        if file.suffix in PICKLES:
            raise InputError(
                f"{file} is a pickle, which can run any code when it is read; "
                "convert it to safetensors first"
            )


def _indexed(index: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """The shards that an index names; names with any folder part are refused."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map; download it again")
    shards: dict[pathlib.Path, set[str] | None] = {}
    for name, file in places.items():
        plain = isinstance(file, str) and file == pathlib.PurePath(file).name and "\\" not in file
        if not plain or file in ("", ".", "..") or "\0" in file:
            raise InputError(f"{index} places {name} in {file!r}, which is not a file beside it")
        _refuse_pickles([index.with_name(file)])
        shards.setdefault(index.with_name(file), set()).add(name)
    return shards


def write_tensors(
    folder: Path,
    base: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5 * GIGABYTE,
) -> None:
    """Writes `tensors` as BASE.safetensors, or as shards with an index, in the order given.

    At most one shard is in memory. Files of an earlier write with the same base are removed when
    all new ones are complete, so that no stale index or shard is left.

    Raises:
      InputError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    parts: list[tuple[pathlib.Path, list[str]]] = []
    total = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in _split(tensors, max_shard_bytes):
            part = folder / f".{base}-{len(parts)}.{os.getpid()}.part"
            parts.append((part, list(shard)))
            save_file(shard, part, metadata={"format": "pt"})
            total += sum(array.nbytes for array in shard.values())
        for stale in [*folder.glob(f"{base}*.safetensors"), *folder.glob(f"{base}*.index.json")]:
            stale.unlink()
        places = {}
        for number, (part, names) in enumerate(parts, 1):
            name = f"{base}.safetensors"
            if len(parts) > 1:
                name = f"{base}-{number:05d}-of-{len(parts):05d}.safetensors"
            part.chmod(0o644)
            os.replace(part, folder / name)
            places.update(dict.fromkeys(names, name))
        if len(parts) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_json(folder / f"{base}.safetensors.index.json", index)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"weights cannot be written to {folder} ({error}); free space or choose another folder"
        ) from None
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)


def _split(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors into shards of at most `max_bytes`; a larger tensor is alone in its shard."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        array = np.asarray(array, order="C")
        if shard and size + array.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard
