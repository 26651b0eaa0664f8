"""The process: its log, the revision of the program, and what the compiler at hand understands."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import absl.logging
import jax

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError

# On a CPU the older emitter at level 1 makes programs that are as fast in a quarter of the time.
CPU_OPTIONS = ("xla_cpu_use_fusion_emitters=false", "xla_backend_optimization_level=1")
log = logging.getLogger("qk_jax")
_IMPORTED = time.monotonic()


def start_logging() -> None:
    """Logs our own lines to stderr with the time; from Orbax and the like only errors.

    Orbax, and asyncio for it, log the traceback of an error in each of its threads and tasks. Orbax
    raises the error besides, and who catches that says it in one line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    quiet()
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_of_orbax)
    sys.unraisablehook = _tell_unraisable


def quiet() -> None:
    """Of Orbax only errors are logged: it warns of what we ask for. Nor does a notebook need to
    hear from tqdm that it has no ipywidgets, which no bar of ours wants."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    warnings.filterwarnings("ignore", "IProgress not found")


def _tell_unraisable(found: Any) -> None:
    """Tells of an exception that nobody can catch; not of TensorStore's answers to an event loop
    that Orbax has closed at the first error."""
    if "Event loop is closed" not in str(found.exc_value):
        sys.__unraisablehook__(found)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether a record of a log has no traceback that goes through Orbax."""
    frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
    return not any("/orbax/" in frame.f_code.co_filename for frame, _ in frames)


STOPPING = "Ctrl-C: stopping, what was trained is saved first; once more ends at once, unsaved"
_TWICE_S = 1.0  # some wrappers pass one Ctrl-C on twice
_patient = False


@contextlib.contextmanager
def answered(end: Callable[[], NoReturn]) -> Iterator[None]:
    """Within the block, Ctrl-C is heard at once: it ends the process, but for `patient` blocks.

    Python calls its handlers in the main thread, between two instructions of its own: not while a
    program is compiled or a step runs, and what KeyboardInterrupt does in the midst of JAX is not
    certain. A thread hears of the signal instead.

    Args:
      end: ends the process, called in that thread.
    """
    hear, tell = os.pipe()
    os.set_blocking(tell, False)

    def answer() -> None:
        first = None
        while number := os.read(hear, 1):
            if number[0] != signal.SIGINT:
                continue
            now = time.monotonic()
            if not _patient or first is not None and now - first > _TWICE_S:
                end()
            if first is None:
                first = now
                os.write(2, f"\n{STOPPING}\n".encode())

    thread = threading.Thread(target=answer, daemon=True, name="answers to Ctrl-C")
    thread.start()
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    old = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGINT, handler)
        os.close(tell)
        thread.join()
        os.close(hear)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Within the block, a first Ctrl-C is answered by a line alone: the process saves, and ends."""
    global _patient
    _patient = True
    try:
        yield
    finally:
        _patient = False


TPU_VENDOR = "0x1ae0"  # Google's, of the PCI devices of a TPU VM


def skip_absent_tpu() -> None:
    """Keeps JAX from looking for a TPU where there is none, which libtpu answers with six lines of
    errors. Does nothing where JAX_PLATFORMS chooses, or once JAX has started."""
    chosen: Any = jax.config.values["jax_platforms"]
    if chosen or importlib.util.find_spec("libtpu") is None:
        return
    vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    if any(vendor.read_text().strip() == TPU_VENDOR for vendor in vendors):
        return
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    has_gpu = pathlib.Path("/dev/nvidiactl").exists() and any(
        map(importlib.util.find_spec, plugins)
    )
    jax.config.update("jax_platforms", "cuda,cpu" if has_gpu else "cpu")


def keep_programs(folder: files.PathLike | None = None, *, instead: bool = False) -> None:
    """Keeps compiled programs between processes, the small ones too: JAX's persistent cache.

    A folder that JAX was already given (JAX_COMPILATION_CACHE_DIR) stays, with its own settings.
    One that cannot be written is no error: programs are then compiled anew. The folder may move:
    the key of a program does not depend on it.

    Args:
      folder: None for qk_jax/compilation_cache in the user's cache folder, which is XDG_CACHE_HOME
        or ~/.cache.
      instead: of a folder that JAX was given.
    """
    # XLA's own caches on GPUs: their path would be part of every key.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if jax.config.values["jax_compilation_cache_dir"] and not instead:
        return
    if folder is None:
        home = buckets.cache_folder()
        if home is None:
            return
        folder = home / "compilation_cache"
    try:
        files.writable_folder(folder, "the folder of compiled programs")
    except InputError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def age() -> float:
    """Seconds since this process began, where Linux tells; else since JAX was imported."""
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED


@functools.cache
def revision() -> str:
    """The git revision of the program, or 'unknown' outside a repository."""
    folder = pathlib.Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return out.stdout.strip() or "unknown"


def process_state(pid: int | None) -> str:
    """'running', 'sleeping', 'stopped' ... as /proc says of a process, or 'gone'."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "gone"
    found = next((line for line in lines if line.startswith("State:")), "(unknown)")
    return found.partition("(")[2].rstrip(")")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that make a program what it is."""
    names = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"the version of python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"the version of {name}"] = importlib.metadata.version(name)
    return found


def parse_option(text: str) -> tuple[str, Any]:
    """(name, value) of a compiler option NAME=VALUE.

    Raises:
      InputError: it has no '='.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"config.compiler: {text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)  # true, 3, 0.5
    except ValueError:
        return name, value


def compiler_options(
    table: Mapping[str, Iterable[str]], platform: str, *, step: bool = False
) -> dict[str, Any]:
    """The options that a program is compiled with on `platform`: every `jax.jit` takes its
    `compiler_options` from here.

    Options of the platform at hand that its compiler does not know, such as those of an older
    XLA, are left out with a warning, of CPU_OPTIONS with a line of the log.

    Args:
      table: config.compiler, {platform: ('name=value', ...)}; PLATFORM_step is for the train step.
      platform: 'cpu', 'gpu' or 'tpu'.
      step: whether it is the train step that is compiled.

    Raises:
      InputError: an option is not of the form name=value.
    """
    own = table.get(f"{platform}_step", ()) if step else ()
    options = dict(map(parse_option, (*table.get(platform, ()), *own)))
    if platform != jax.default_backend():
        return options
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Whether the compiler of the default backend takes an option."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        ours = (name, value) in map(parse_option, CPU_OPTIONS)  # the user cannot mend those
        level = logging.INFO if ours else logging.WARNING
        log.log(level, "compiler option %s=%s is left out: %s", name, value, reason)
        return False
    return True
