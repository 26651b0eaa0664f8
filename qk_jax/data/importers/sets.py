"""What a row means in the published sets that need more than a map of columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from PIL import Image

from qk_jax.base.errors import BadRecord
from qk_jax.data.importers.columns import Format, by_columns, check_score, getter
from qk_jax.data.importers.drafts import Draft, encoded
from qk_jax.data.importers.job import Job, Row
from qk_jax.pictures.decoding import decode_picture


def llava(row: Row, job: Job, form: Format) -> Iterator[Draft]:
    """{image: name or names, conversations: [{from, value}]}: the last picture is the target.

    The text is the first of the human's when there are condition pictures (an instruction), and the
    first answer when there are none (a caption).
    """
    names, turns = row.fields.get("image"), row.fields.get("conversations")
    names = names if isinstance(names, list) else [names]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("missing field", f"{row.key} has no list 'conversations'")
    speaker = "human" if len(names) > 1 else "gpt"
    texts = [turn.get("value") for turn in turns if turn.get("from") == speaker]
    text = texts[0] if texts else None
    pictures = [row.picture(name) for name in names]
    words = text.replace("<image>", "").strip() if isinstance(text, str) else text
    key = f"{row.fields.get('id', row.key)}"
    yield Draft(key, words, pictures[-1], tuple(("", data) for data in pictures[:-1]))


def image_slots(text: str) -> str:
    """'put image 1 on image 2' for OmniGen's 'put <img><|image_1|></img> on ...'."""
    return re.sub(r"\s*<img>\s*<\|image_(\d+)\|>\s*</img>\s*", r" image \1 ", text).strip()


def imgedit(row: Row, job: Job, form: Format) -> Iterator[Draft]:
    """Several turns, {data: [{input_images, output_images, prompt}]}, or one."""
    turns = row.fields.get("data")
    if turns is None:
        yield from by_columns(row, job, form)
        return
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("bad row", f"{row.key}: 'data' is no list of turns")
    for number, turn in enumerate(turns, start=1):
        one = row._replace(key=f"{row.key}#{number}", fields=turn)
        for draft in by_columns(one, job, form):
            yield draft._replace(group=row.key)


def seed(row: Row, job: Job, form: Format) -> Iterator[Draft]:
    """Turns, source_image, instruction_1, edit_image_1, instruction_2, ..., or one edit."""
    if "instruction_1" not in row.fields:
        yield from by_columns(row, job, form)
        return
    before, number = row.fields.get("source_image"), 1
    while f"instruction_{number}" in row.fields:
        after = row.fields.get(f"edit_image_{number}")
        yield Draft(
            f"{row.key}#{number}",
            row.fields[f"instruction_{number}"],
            row.picture(after),
            (("", row.picture(before)),),
            group=row.key,
        )
        before, number = after, number + 1


def subjects200k(row: Row, job: Job, form: Format) -> Iterator[Draft]:
    """Both halves of one picture, each once the reference of the other.

    They are cut out and kept as PNG; 528 pixels of height have a margin of 8 around each half.
    """
    check_score(row, getter(row, job, form)("score"), job, form)
    described = row.fields.get("description")
    if not isinstance(described, dict):
        raise BadRecord("missing field", f"{row.key} has no 'description'")
    if described.get("description_valid") is False:
        raise BadRecord("filtered", f"{row.key}: its description is not valid")
    pixels = decode_picture(
        row.picture(row.fields.get("image")), "RGB", job.limits.max_pixels, row.key
    )
    height, width = pixels.shape[:2]
    if width != 2 * height:
        raise BadRecord("bad row", f"{row.key}: {width}x{height} is not two squares side by side")
    margin = round(height / 66)
    side = height - 2 * margin
    lefts = margin, side + 2 * margin
    halves = [
        encoded(Image.fromarray(pixels[margin : margin + side, left : left + side]), "PNG")
        for left in lefts
    ]
    for number, other in ((0, 1), (1, 0)):
        text: Any = described.get(f"description_{number}")
        pictures = (("reference", halves[other]),)
        yield Draft(f"{row.key}#{number}", text, halves[number], pictures, group=row.key)
