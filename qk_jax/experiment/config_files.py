"""Config files: the shipped ones by name, any other by path, and how they are run.

A config file says `from configs import common`. Within a run `configs` is the folder of the file,
then the shipped one, wherever those are: nothing has to be on sys.path.
"""

from __future__ import annotations

import contextlib
import inspect
import pathlib
import runpy
import sys
import types
from collections.abc import Iterator

from ml_collections import ConfigDict

import qk_jax
from qk_jax.base.errors import InputError

PACKAGE = "configs"


def shipped() -> pathlib.Path:
    """The folder of the shipped configs: inside an installed package, beside it in a checkout."""
    package = pathlib.Path(qk_jax.__file__).resolve().parent
    inside = package / PACKAGE
    return inside if inside.is_dir() else package.parent / PACKAGE


def names() -> list[str]:
    """The shipped configs; the folder also holds what they share."""
    files = sorted(shipped().glob("*.py"))
    return [file.stem for file in files if "\ndef get_config(" in file.read_text(encoding="utf-8")]


def find(path: str) -> pathlib.Path:
    """The file of a shipped config's name, or of a path that ends in .py.

    Raises:
      InputError: there is none.
    """
    is_path = path.endswith(".py")
    if is_path and pathlib.Path(path).is_file():
        return pathlib.Path(path).resolve()
    if path in names():
        return shipped() / f"{path}.py"
    what = f"config file {path!r}" if is_path else f"config {path!r}"
    raise InputError(
        f"{what} does not exist; give {', '.join(names())}, or the path of a file such as mine.py"
    )


def run(file: pathlib.Path, size: str) -> ConfigDict:
    """What `get_config(size)` of a file returns; without a size, or for one that takes none,
    `get_config()`.

    Raises:
      InputError: it has no get_config.
    """
    with _importable(file):
        get_config = runpy.run_path(str(file)).get("get_config")
        if get_config is None:
            raise InputError(f"config file {str(file)!r} has no function get_config(size)")
        takes_size = bool(inspect.signature(get_config).parameters)
        config = get_config(size) if size and takes_size else get_config()
        if not isinstance(config, ConfigDict):
            raise InputError(
                f"get_config of {str(file)!r} returns a {type(config).__name__}; return a "
                "ConfigDict"
            )
        return config


@contextlib.contextmanager
def _importable(file: pathlib.Path) -> Iterator[None]:
    """Within the block `configs` is a package of its own for this file, and a file that is not
    shipped also finds what lies beside its folder."""
    root, own = file.parent.parent, file.parent != shipped()

    def loaded() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] == PACKAGE]

    others = {name: sys.modules.pop(name) for name in loaded()}
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(root / PACKAGE), str(shipped())]
    sys.modules[PACKAGE] = package
    if own:
        sys.path.insert(0, str(root))
    try:
        yield
    finally:
        if own:
            sys.path.remove(str(root))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(others)
