"""How what is made up is read: as records, with the shipped tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qk_jax.data.example import TASKS
from qk_jax.data.synthesis.corpus import EMBEDDED

TOKENIZER = str(EMBEDDED.parent / "tiny" / "tokenizer")
Load = Callable[[dict[str, str]], Any]  # {field: text} -> the config with these fields


def fields(folder: str, weights: Mapping[str, float], batch: int) -> dict[str, str]:
    """{field: text} by which a config reads a folder of records in batches of this size."""
    return {
        **{f"data.tasks.{name}": str(weights.get(name, 0.0)) for name in TASKS},
        "data.records": folder, "data.batch": str(batch), "validation.batch": str(batch),
        "data.tokenizer": TOKENIZER,
    }  # fmt: skip
