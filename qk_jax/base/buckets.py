"""Buckets: what gs:// and s3:// paths need besides `etils.epath`.

Objects appear whole and cannot be appended to, and libraries written for local files cannot open
them. So files are checked before the work begins, read by range, copied to the disk of the host
(`staged`), written on it and uploaded (`local_file`, `local_folder`), or kept there and uploaded
whenever they change (`Mirror`).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from etils.epath import Path

from qk_jax.base.errors import InputError

log = logging.getLogger(__name__)
PathLike = str | os.PathLike[str]
# {scheme: (its package, the extra of setup.py, what to do without credentials)}
SCHEMES = {
    "gs": ("gcsfs", "gcs", "gcloud auth application-default login"),
    "s3": ("s3fs", "s3", "aws configure"),
}
BLOCK = 16 << 20  # bytes of one request
SILENCE_S = 30  # of a connection, after which it counts as dead
AT_ONCE = 8  # requests; the window of `Ranges` has so many blocks
CLIENTS = ("gcsfs", "s3fs", "aiohttp", "google", "requests", "botocore")
_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9]*):(?P<slashes>/+)(?P<bucket>[^/]*)")


def _forget_listings() -> None:
    """Makes fsspec ask the bucket each time; it would not see what other hosts have written."""
    for scheme in SCHEMES:
        os.environ.setdefault(f"FSSPEC_{scheme.upper()}", '{"use_listings_cache": false}')
        if "fsspec" in sys.modules:  # which has read the environment already
            known = sys.modules["fsspec"].config.conf.setdefault(scheme, {})
            known.setdefault("use_listings_cache", False)


_forget_listings()  # before `etils.epath` makes its file systems; worker processes inherit it


def _bound_silence() -> None:
    """Makes TensorStore ask again where no byte came for a while: it would wait for good for the
    answer of a connection that is dead, and a save with it."""
    for name, value in (
        ("LOW_SPEED_TIME_SECONDS", SILENCE_S), ("LOW_SPEED_LIMIT_BYTES", 1),
        ("CONNECT_TIMEOUT_SECONDS", SILENCE_S),
    ):  # fmt: skip
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(value))


_bound_silence()  # before TensorStore opens its first connection


def is_remote(path: PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def is_failure(error: BaseException) -> bool:
    """Whether an error is a file's, a bucket's or the network's, and not the program's."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENTS


def file_system(path: PathLike) -> Any:
    """fsspec's file system of a path in a bucket; one for each scheme."""
    import fsspec  # only where there are buckets

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def found(folder: PathLike) -> list[str]:
    """The path of every object below a folder in a bucket."""
    scheme = os.fspath(folder).partition("://")[0]
    return [f"{scheme}://{name}" for name in file_system(folder).find(os.fspath(folder))]


def check(values: Iterable[Any]) -> None:
    """Proves that every bucket among `values` can be reached; asks for each once in a process.

    Args:
      values: of a command line or a config; what is no text of the form gs://bucket/path is passed.

    Raises:
      InputError: a path names no bucket, the package of its scheme is not installed, there are no
        credentials or rights, or the bucket does not exist; names what is missing.
    """
    known = dict.fromkeys(_bucket(value) for value in values if isinstance(value, str))
    for bucket in known:
        if bucket is not None:
            _check_bucket(bucket)


def check_folders(path: PathLike) -> None:
    """Raises InputError for an s3:// path that should hold checkpoints or an export.

    Orbax reads and writes disks and gs:// alone, and s3fs renames no folders.
    """
    if os.fspath(path).startswith("s3://"):
        raise InputError(
            f"{path}: checkpoints and exported folders lie on a disk or in a gs:// bucket; mount "
            "the s3:// bucket and name the mounted folder"
        )


def _bucket(text: str) -> str | None:
    """'gs://name' of a path in a bucket, None for other texts."""
    found = _URL.match(text)
    if found is None or found["scheme"] not in SCHEMES:
        return None
    if len(found["slashes"]) != 2 or not found["bucket"]:
        raise InputError(f"{text} names no bucket; write {found['scheme']}://BUCKET/FOLDER")
    return f"{found['scheme']}://{found['bucket']}"


@functools.cache
def _check_bucket(bucket: str) -> None:
    scheme, _, name = bucket.partition("://")
    package, extra, login = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{bucket} needs {package}; pip install 'qk_jax[{extra}]'")
    logging.getLogger("gcsfs").setLevel(
        logging.CRITICAL
    )  # it logs what it raises, with a traceback
    try:
        fs = file_system(bucket)
        if scheme == "gs":  # Orbax asks the same before it lists steps
            fs.call("GET", "b/{}", name, json_out=True)
        else:
            fs.call_s3("head_bucket", Bucket=name)
    except Exception as error:
        if not is_failure(error):
            raise
        raise InputError(f"{bucket} {_reason(error, login)}") from None


def _reason(error: Exception, login: str) -> str:
    """What is wrong with a bucket, and the mend."""
    text = " ".join(str(error).split())[:160] or type(error).__name__
    code = str(getattr(error, "code", ""))
    if isinstance(error, FileNotFoundError):
        return "does not exist; check its name, or make it"
    if code == "401" or "credential" in text.lower() or "Credentials" in type(error).__name__:
        return f"cannot be read without credentials: {login}, or run as a service account ({text})"
    if isinstance(error, PermissionError) or text.startswith("Forbidden") or code == "403":
        return (
            "is not yours to use; the account needs roles/storage.objectUser and "
            f"roles/storage.bucketViewer on it ({text})"
        )
    return f"cannot be reached ({text}); check the network and try again"


class Ranges:
    """A part of an object as a file to read once, from its start on.

    Several requests are under way at once, and no more than a window of them is in memory.
    """

    def __init__(self, path: PathLike, start: int, size: int):
        """Nothing is read yet.

        Args:
          path: of the object.
          start: first byte.
          size: bytes that will be read.
        """
        self._path, self._fs = os.fspath(path), file_system(path)
        self._next, self._stop = start, start + size
        self._blocks: list[memoryview] = []

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, *args: object) -> None:
        self._blocks = []

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` and returns how many bytes there were.

        Raises:
          OSError, or an error of CLIENTS: the bucket does not answer after all retries.
        """
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view):
            if not self._blocks:
                self._fetch()
            if not self._blocks:
                break
            part = self._blocks[0][: len(view) - filled]
            view[filled : filled + len(part)] = part
            filled += len(part)
            rest = self._blocks.pop(0)[len(part) :]
            if len(rest):
                self._blocks.insert(0, rest)
        return filled

    def _fetch(self) -> None:
        """Reads the next window."""
        last = min(self._next + BLOCK * AT_ONCE, self._stop)
        starts = list(range(self._next, last, BLOCK))
        stops = [min(start + BLOCK, last) for start in starts]
        paths = [self._path] * len(starts)
        parts = self._fs.cat_ranges(paths, starts, stops, on_error="raise") if starts else []
        self._next = last
        self._blocks = [memoryview(part) for part in parts if part]


@contextlib.contextmanager
def open_range(path: PathLike, start: int, size: int) -> Iterator[Any]:
    """`size` bytes from `start` of a local file or an object, as a file with `readinto`."""
    if is_remote(path):
        with Ranges(path, start, size) as ranges:
            yield ranges
        return
    with open(path, "rb") as handle:
        handle.seek(start)
        yield handle


def cache_folder() -> pathlib.Path | None:
    """qk_jax in the user's cache folder, XDG_CACHE_HOME or ~/.cache; None where there is none."""
    known = os.environ.get("XDG_CACHE_HOME", "")
    home = known if os.path.isabs(known) else os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "qk_jax" if os.path.isabs(home) else None


def staged(path: PathLike) -> Path:
    """A file on the disk of this host: itself, or a copy of an object, which is kept.

    The copy lies in the user's cache folder; an object that has changed is copied again. Processes
    of one host wait for each other and copy it once.

    Raises:
      InputError: the disk is too small, or the object cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    try:
        info = file_system(path).info(os.fspath(path))
        mark = [os.fspath(path), *(info.get(key) for key in ("size", "etag", "ETag", "generation"))]
        folder = (cache_folder() or pathlib.Path(tempfile.gettempdir()) / "qk_jax") / "staged"
        copy = folder / hashlib.sha256(repr(mark).encode()).hexdigest()[:16] / Path(path).name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(copy.with_name(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_file():
                _download(path, int(info["size"]), copy)
    except Exception as error:
        if not is_failure(error):
            raise
        raise InputError(
            f"{path} cannot be copied to this host ({error}); free space or try again"
        ) from None
    return Path(copy)


def _download(path: PathLike, size: int, copy: pathlib.Path) -> None:
    free = shutil.disk_usage(copy.parent).free
    if size > free:
        raise InputError(
            f"{path} has {size / 1e9:.1f} GB, and {copy.parent} only {free / 1e9:.1f} GB free; set "
            "XDG_CACHE_HOME to a larger disk, or mount the bucket and name the mounted folder"
        )
    log.info("copying %s, %.2f GB, to %s", path, size / 1e9, copy.parent)
    part = copy.with_name(f".{copy.name}.part")
    buffer = bytearray(min(size, BLOCK))
    with open(part, "wb") as out, open_range(path, 0, size) as source:
        while count := source.readinto(buffer):
            out.write(memoryview(buffer)[:count])
    if part.stat().st_size != size:
        raise OSError(f"it ends after {part.stat().st_size} of {size} bytes")
    part.replace(copy)


@contextlib.contextmanager
def staged_folder(folder: PathLike, suffixes: tuple[str, ...] = ("",)) -> Iterator[Path]:
    """A folder on the disk of this host: itself, or a copy that is removed after the block.

    Args:
      folder: local or in a bucket.
      suffixes: of the files that are copied.
    """
    if not is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="qk_jax-") as here:
        fs = file_system(folder)
        top = os.fspath(folder).partition("://")[2].rstrip("/")
        for name in fs.find(top):
            if name.endswith(suffixes):
                target = pathlib.Path(here) / name.removeprefix(top).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                fs.get_file(name, str(target))
        yield Path(here)


@contextlib.contextmanager
def local_file(path: PathLike) -> Iterator[Path]:
    """The path itself, or a local file that is uploaded to it when the block ends well."""
    with local_folder(Path(path).parent) as here:
        yield here / Path(path).name


@contextlib.contextmanager
def local_folder(folder: PathLike) -> Iterator[Path]:
    """The folder itself, or a local one whose files are uploaded when the block ends well."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="qk_jax-") as here:
        yield Path(here)
        upload(pathlib.Path(here), Path(folder))


def upload(here: pathlib.Path, folder: Path) -> None:
    """Writes every file below `here` to the same place below `folder`, in a bucket."""
    fs = file_system(folder)
    for file in sorted(here.rglob("*")):
        if file.is_file():
            fs.put_file(str(file), os.fspath(folder / file.relative_to(here).as_posix()))


class Mirror:
    """A local folder whose files grow, and are uploaded to a bucket whenever they have changed.

    The uploads run beside the training: a bucket that does not answer delays no step, and what it
    missed is uploaded by the next change.

    Attributes:
      here: the local folder; the folder itself where that is local.
    """

    PAUSE_S = 1.0  # between two versions of one object; GCS refuses more

    def __init__(self, folder: PathLike):
        """`folder` of a run, local or in a bucket."""
        self._folder = Path(folder)
        self.here = self._folder
        self._worker: threading.Thread | None = None
        if is_remote(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="qk_jax-")
            self.here = Path(self._temporary.name)
            self._sizes: dict[str, int] = {}
            self._changed, self._closed = threading.Event(), threading.Event()
            self._worker = threading.Thread(target=self._work, daemon=True, name="mirror")
            self._worker.start()

    def changed(self) -> None:
        """Call when files have changed; returns at once."""
        if self._worker is not None:
            self._changed.set()

    def close(self) -> None:
        """Uploads what is left, and removes the local folder of a bucket."""
        if self._worker is None:
            return
        self._closed.set()
        self._changed.set()
        self._worker.join()
        self._worker = None
        self._temporary.cleanup()

    def _work(self) -> None:
        while not self._closed.is_set():
            self._changed.wait()
            self._changed.clear()
            self._upload()
            self._closed.wait(self.PAUSE_S)
        self._upload()

    def _upload(self) -> None:
        """Uploads the files that have grown; they are only ever appended to."""
        fs = file_system(self._folder)
        for file in sorted(pathlib.Path(self.here).rglob("*")):
            size = file.stat().st_size
            if not file.is_file() or self._sizes.get(str(file)) == size:
                continue
            target = self._folder / file.relative_to(self.here).as_posix()
            try:
                fs.put_file(str(file), os.fspath(target))
            except Exception as error:
                if not is_failure(error):
                    raise
                log.warning("%s is not up to date: %s", target, error)
                continue
            self._sizes[str(file)] = size
