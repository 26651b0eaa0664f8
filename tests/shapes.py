"""What checks the shapes of jaxtyping's annotations at run time, in the tests only."""

from collections.abc import Callable
from typing import Any

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # int is a float


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked; constructors of configs check their values alone."""
    return function if function.__name__ == "__init__" else check(function)
