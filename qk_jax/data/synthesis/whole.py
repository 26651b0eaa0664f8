"""Stage 1's tasks from any pictures: the same picture again, and changes of a whole picture."""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

from qk_jax.base.errors import BadRecord
from qk_jax.data.importers.drafts import Draft, encoded
from qk_jax.data.synthesis import bilingual, scenes
from qk_jax.data.synthesis.cutouts import Whole, is_jpeg
from qk_jax.data.synthesis.order import Order
from qk_jax.data.synthesis.tasks import Transformation
from qk_jax.pictures.decoding import decode_picture

QUALITY = 95  # of pictures made from JPEGs
_LEAST = 16  # pixels of the shorter side of a picture that is changed
_TRIES = 16


def reconstruction(order: Order, rng: Random, shown: Whole, key: str) -> Draft:
    """A picture -> the same bytes."""
    tongue = bilingual.language(order.language, rng, [])
    words = bilingual.instruction(rng, tongue, "copy", {})
    return _draft(key, words, "copy", shown, shown.data)


def transformation(order: Order, rng: Random, shown: Whole, key: str) -> Draft:
    """A picture and what to do with the whole of it -> the changed picture.

    Raises: BadRecord of kind 'too small', or 'hardly visible' when no change that was drawn shows.
    """
    source = decode_picture(shown.data, "RGB", order.max_pixels, shown.key)
    height, width = source.shape[:2]
    if min(height, width) < _LEAST:
        raise BadRecord("too small", f"{shown.key}: {width}x{height} cannot be changed")
    for _ in range(_TRIES):
        kind, gaps = rng.choice([*scenes.CHANGES, "tint"]), {}
        least = Transformation.least
        if kind == "tint":
            gaps, least = {"colour": rng.choice(scenes.TINTS)}, Transformation.least_tint
        target = scenes.tinted(source, gaps["colour"]) if gaps else scenes.CHANGES[kind](source)
        if target.shape != source.shape or scenes.changed(source, target) >= least:
            tongue = bilingual.language(order.language, rng, [])
            words = bilingual.instruction(rng, tongue, kind, gaps)
            return _draft(key, words, kind, shown, as_file(target, is_jpeg(shown.data)))
    raise BadRecord("hardly visible", f"{shown.key}: no change of it that was drawn shows")


def as_file(pixels: np.ndarray, jpeg: bool) -> bytes:
    """uint8 [H, W, 3] as JPEG or PNG."""
    image = Image.fromarray(pixels)
    return encoded(image, "JPEG", QUALITY) if jpeg else encoded(image, "PNG")


def _draft(key: str, words: str, kind: str, shown: Whole, target: bytes) -> Draft:
    more = {"kind": kind, "made_from": [shown.key]}
    return Draft(key, words, target, (("source", shown.data),), group=shown.group, more=more)
