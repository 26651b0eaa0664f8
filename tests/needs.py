"""What a test needs that may be missing: named where it is skipped, an error in CI."""

import importlib
import os
import types
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skips a test, or a file of them, by name; fails it where the variable CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}", allow_module_level=True)


def module(name: str) -> types.ModuleType:
    """A module that the extra `test` brings."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"{name.partition('.')[0]}: pip install 'qk_jax[test]'")
