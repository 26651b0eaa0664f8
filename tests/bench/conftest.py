"""Some tests of the benchmark compile for TPU slices, which needs libtpu."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def libtpu():
    """Skips what compiles for a TPU slice where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("nothing compiles for a TPU slice without libtpu; pip install 'qk_jax[bench]'")
