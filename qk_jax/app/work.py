"""Painting of one job: steps, previews and PNG files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from qk_jax.app import jobs
from qk_jax.app.models import Models
from qk_jax.painting import Painter, orders

PREVIEW_SIDE = 512  # pixels; a larger preview is made smaller
LOSSLESS_SIDE = 128  # pixels; a preview up to this size is sent as it is


def paint(models: Models, job: jobs.Job) -> None:
    """Does a job; gives up between two steps when it is over for another reason.

    Raises:
      InputError: the model cannot be read.
    """
    order = job.order
    job.change(state=jobs.LOADING)
    painter = models.painter(order.model, order.average)
    steps = painter.steps(
        order.requests,
        order.settings,
        preview=order.preview,
        phase=lambda name: job.change(state=name),
    )
    for progress in steps:
        if job.is_over:
            return
        pictures = progress.pictures
        if progress.step < progress.steps:
            job.change(step=progress.step)
            if pictures is not None:
                shown = preview_of(pictures[0])
                job.change(preview=(progress.indices[0], progress.step, shown))
            continue
        assert pictures is not None
        for index, pixels in zip(progress.indices, pictures, strict=True):
            job.add_picture(index, _png(painter, order, index, pixels))
        job.change(step=0, preview=None)


def preview_of(pixels: np.ndarray) -> bytes:
    """A WebP file of uint8 [H, W, 3], no larger than is good to look at."""
    picture = Image.fromarray(pixels)
    small = max(picture.size) <= LOSSLESS_SIDE
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    data = io.BytesIO()
    picture.save(data, "WEBP", lossless=small, quality=80, method=0)
    return data.getvalue()


def _png(painter: Painter, order: jobs.Order, index: int, pixels: np.ndarray) -> bytes:
    """The file of a painted picture, which says how it was painted."""
    texts = orders.texts(
        painter.name,
        order.requests[index],
        order.settings,
        order.source,
        order.references,
        checkpoint=order.model.name,
        ema=order.average,
    )
    return orders.png_of(pixels, texts)
