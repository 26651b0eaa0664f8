"""Painting with a trained model: requests in, pictures and sheets out, always the same bits.

It stands below the trainer, so that evaluation and objectives may paint.
"""

from qk_jax.painting.loading import described, load, of_loaded, of_params
from qk_jax.painting.painter import Painter, Progress
from qk_jax.painting.programs import programs
from qk_jax.painting.request import (
    FULL,
    NO_TEXT,
    NOTHING,
    Limits,
    Request,
    Settings,
    request_of,
)

__all__ = [
    "FULL", "NOTHING", "NO_TEXT", "Limits", "Painter", "Progress", "Request", "Settings",
    "described", "load", "of_loaded", "of_params", "programs", "request_of",
]  # fmt: skip
