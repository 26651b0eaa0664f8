"""Painting with a trained model: requests in, pictures and sheets out, bit for bit again.

It stands below the trainer, so that evaluation and objectives may paint.
"""

from qk_jax.painting.painter import Painter, load, of_loaded, of_params
from qk_jax.painting.programs import programs
from qk_jax.painting.request import (
    FULL,
    MAX_STEPS,
    NO_TEXT,
    NOTHING,
    SEEDS,
    Limits,
    Request,
    Settings,
    request_of,
)

__all__ = [
    "FULL", "MAX_STEPS", "NOTHING", "NO_TEXT", "SEEDS", "Limits", "Painter", "Request", "Settings",
    "load", "of_loaded", "of_params", "programs", "request_of",
]  # fmt: skip
