"""What some tests of the benchmark need."""

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="nothing compiles for a TPU slice without libtpu; pip install 'qk_jax[bench]'",
)
