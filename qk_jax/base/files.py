"""Files: paths, strict JSON, and one way to write: beside the final name, then renamed.

Paths are `etils.epath`'s, which open local folders and buckets alike.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils.epath import Path as Path  # re-exported: what every room calls a path

from qk_jax.base import buckets
from qk_jax.base.errors import InputError, some

PathLike = str | os.PathLike[str]
GIGABYTE = 10**9


def absolute(path: PathLike) -> Path:
    """The path from the root of disk or bucket; etils takes gs://a for a folder of this one."""
    return Path(path) if buckets.is_remote(path) else Path(path).absolute()


def read_json(path: PathLike) -> dict[str, Any]:
    """A JSON object from `path`.

    Raises:
      InputError: the file is missing, unreadable, no JSON, no object, or has a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing; give a complete model folder")
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON ({error}); download it again") from None


def json_object(text: bytes) -> dict[str, Any]:
    """A JSON object, read strictly.

    Raises:
      ValueError: no JSON, no object, a key twice in one object, NaN or infinity.
      RecursionError: it is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number])]
            raise ValueError(f"duplicate key {some(map(repr, twice))}")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def write_text(path: PathLike, text: str) -> None:
    """Writes `text`; no half-written file has the name. Raises InputError if it cannot."""
    write_bytes(path, text.encode())


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes `data`, as `write_text` does."""
    with beside(path) as part:
        part.write_bytes(data)


def write_json(path: PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def beside(path: PathLike) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block ends well.

    Raises:
      InputError: the file or its folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except Exception as error:
        raise _unwritable(path, error, "free space or choose another folder") from None


@contextlib.contextmanager
def fresh_folder(folder: PathLike, marker: str) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it when the block ends well.

    Args:
      folder: the final name. An earlier export there is replaced as a whole.
      marker: a file that every such export has; a non-empty folder without it is left alone.

    Raises:
      InputError: `folder` exists and is something else, or cannot be written.
    """
    folder = absolute(folder)
    occupied = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if occupied and not (folder / marker).is_file():
        raise InputError(
            f"{folder} exists and is no earlier export (no {marker} in it); choose another folder"
        )
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        if part.exists():
            part.rmtree()
        part.mkdir(parents=True)
    except Exception as error:
        raise _unwritable(folder, error, "choose another folder") from None
    try:
        yield part
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except Exception as error:
        raise _unwritable(folder, error, "free space there") from None
    finally:
        for left in (part, old):
            remove_folder(left)


def below(folder: PathLike) -> Iterator[Path]:
    """Every file of a folder and of the folders in it."""
    if buckets.is_remote(folder):  # where etils walks through names without their scheme
        scheme = os.fspath(folder).partition("://")[0]
        for name in buckets.file_system(folder).find(os.fspath(folder)):
            yield Path(f"{scheme}://{name}")
        return
    for here, _, names in Path(folder).walk():
        yield from (here / name for name in names)


def _unwritable(path: Path, error: Exception, mend: str) -> Exception:
    """An InputError for a failure of disk, bucket or network; any other error as it is."""
    if not buckets.is_failure(error):
        return error
    return InputError(f"{path} cannot be written ({error}); {mend}")


def remove_folder(folder: PathLike) -> None:
    """Removes a folder with its contents where there is one."""
    folder = Path(folder)
    if folder.exists():
        with contextlib.suppress(OSError):
            folder.rmtree()


def writable_folder(folder: PathLike, what: str) -> Path:
    """Makes `folder` and proves that files can be written into it.

    Raises:
      InputError: they cannot; the message begins with `what`.
    """
    folder = Path(folder)
    probe = folder / f".write-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except Exception as error:
        if not buckets.is_failure(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{what} {folder} cannot be written: {reason}; choose another") from None
    return folder
