"""What comes in from clients, and is not trusted, becomes a job or an error."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import threading

import numpy as np

from qk_jax import painting
from qk_jax.app import forms, jobs
from qk_jax.app.models import Models
from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.painting import orders
from qk_jax.pictures import sizes
from qk_jax.pictures.decoding import MAX_PIXELS, decode_picture

NAME_LENGTH = 80
_one_at_a_time = threading.Lock()  # decoding takes many times the memory of what comes in


def label(name: str) -> str:
    """What an upload is called: the last part of its name, without what cannot be printed.

    It is shown and written into PNGs; no file is ever opened by it.
    """
    last = re.split(r"[/\\]", name)[-1]
    return "".join(c for c in last if c.isprintable())[:NAME_LENGTH].strip() or "picture"


def job_of(form: forms.PaintForm, models: Models) -> jobs.Job:
    """A job, its pictures decoded and fitted to the model.

    Raises:
      InputError: a picture cannot be read, or the model cannot follow; one line.
    """
    model = models.named(form.model)
    average = form.ema and model.has_average
    size = None if form.size is None else sizes.parse_size(form.size, "size")
    painter = models.painter(model, average)
    with _one_at_a_time:
        most = model.limits.max_pixels or MAX_PIXELS
        source = None if form.source is None else _pixels(form.source, "source", most)
        references = [
            _pixels(upload, f"reference {number}", most)
            for number, upload in enumerate(form.references, start=1)
        ]
        request = painter.fit(form.prompt, source, references, size, form.seed)
    unknown = " ".join(painter.prompts.unknown(form.prompt))
    told = f"the tokenizer does not know {unknown}; say it in other words"
    order = jobs.Order(
        model=model,
        average=average,
        requests=tuple(dataclasses.replace(request, number=n) for n in range(form.num)),
        settings=painting.Settings(**dataclasses.asdict(form.settings)),
        preview=form.preview,
        source=None if form.source is None else label(form.source.name),
        references=tuple(label(upload.name) for upload in form.references),
    )
    return jobs.Job(order, (told,) if unknown else ())


def _pixels(upload: forms.Upload, role: str, most: int) -> np.ndarray:
    """The picture of an upload, uint8 [h, w, 3].

    Raises:
      InputError: it is no base64, no picture, or has more than `most` pixels.
    """
    name = f"{role} {label(upload.name)!r}"
    try:
        data = base64.b64decode(upload.data, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name} is not in base64; send the file so encoded as data") from None
    return decode_picture(data, "RGB", most, name)


def lines_of(form: forms.LinesForm) -> list[forms.LineView]:
    """The prompts of a file of JSON lines.

    Raises:
      InputError: a line is wrong or names pictures; names the line.
    """
    path, found = files.Path(label(form.name)), []
    for order in orders.orders_of(form.text.splitlines(), path, files.Path(), form.seed):
        if order.source is not None or order.references:
            raise InputError(
                f"{order.where}it names pictures, and the app opens no file by its name; paint "
                "this line with qk-sample, or from the page"
            )
        out = order.out.name
        found.append(forms.LineView(prompt=order.request.prompt, seed=order.request.seed, out=out))
    return found
