"""Data of a training: examples, prompts, the batch plan and the pipeline of batches.

`importers` reads examples that were made elsewhere, `synthesis` makes them from cut-outs, and
`Writer` writes them from Python. What the models do with a batch is not here.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "Writer":  # when it is asked for: rooms that need no records import no ArrayRecord
        return importlib.import_module("qk_jax.data.writer").Writer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
