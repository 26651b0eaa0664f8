"""What every reader of other people's sets gives, a draft, and the checks that make it a record."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from qk_jax.base.errors import BadRecord
from qk_jax.data import records
from qk_jax.data.example import MAX_REFERENCES, caption_of
from qk_jax.pictures.decoding import decode_picture

# Which pictures a task has: numbers of sources, numbers of references.
_PICTURES = {
    "text_to_image": (range(1), range(1)),
    "reconstruction": (range(1, 2), range(1)),
    "transformation": (range(1, 2), range(1)),
    "editing": (range(1, 2), range(MAX_REFERENCES["composition"] + 1)),
    "customization": (range(1), range(1, 2)),
    "composition": (range(1), range(2, MAX_REFERENCES["composition"] + 1)),
}


class Draft(NamedTuple):
    """An example as its set has it, unchecked.

    Attributes:
      key: its name in the set.
      instruction: the caption or instruction, of any type.
      target: the true picture, encoded.
      pictures: (role, encoded picture) for each condition picture; the role '' is the task's.
      source: name of its part of the set; '' for the import's.
      group: examples of one group are on one side of the split; '' for those of one picture.
      more: further fields of the header.
      members: where it lies in a tar that is read in place.
      mask: picture that is white where the subject of the target is, encoded; b'' for none.
    """

    key: str
    instruction: object
    target: bytes
    pictures: tuple[tuple[str, bytes], ...] = ()
    source: str = ""
    group: str = ""
    more: Mapping[str, Any] = {}
    members: tuple[records.Span, ...] = ()
    mask: bytes = b""


class Limits(NamedTuple):
    """What an example must keep to; 0 is no bound.

    Attributes:
      min_side: pixels of the shorter side of every picture.
      max_pixels: of every picture, before it is decoded.
      max_characters: of the instruction.
      encode: (Pillow's name of a format, quality) to write pictures in; None keeps their bytes.
    """

    min_side: int = 0
    max_pixels: int = 0
    max_characters: int = 0
    encode: tuple[str, int] | None = None


def roles_of(task: str, draft: Draft) -> tuple[str, ...]:
    """'source' or 'reference' for each condition picture.

    Where the set does not say, the first is the source and the rest are references, but all are
    references for customization and composition.

    Raises: BadRecord of kind 'roles' when the task has no such pictures.
    """
    first = "reference" if task in MAX_REFERENCES else "source"
    roles = tuple(
        role or (first if number == 0 else "reference")
        for number, (role, _) in enumerate(draft.pictures)
    )
    sources, references = _PICTURES[task]
    found = roles.count("source"), roles.count("reference")
    if found[0] not in sources or found[1] not in references:
        raise BadRecord(
            "roles", f"{draft.key}: {found[0]} sources and {found[1]} references are not for {task}"
        )
    return roles


def text_of(value: object, limit: int, name: str) -> str:
    """The text of an instruction. Raises: BadRecord: 'no text', 'not unicode' or 'long text'."""
    try:
        text = caption_of(value.decode("utf-8-sig") if isinstance(value, bytes) else value, name)
        text.encode()
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise BadRecord("not unicode", f"{name}: the text is not UTF-8 ({error.reason})") from None
    if limit and len(text) > limit:
        raise BadRecord("long text", f"{name}: {len(text)} characters, more than {limit}")
    return text.strip()


def completed(draft: Draft, source: str) -> Draft:
    """A draft with what its header has besides; `source` is the set's name where it has none."""
    source = draft.source or source
    more: dict[str, Any] = {"key": draft.key, "source": source, **draft.more}
    if draft.group:
        more["group"] = draft.group
    return draft._replace(source=source, more=more)


def entry_of(
    draft: Draft, task: str, roles: tuple[str, ...], limits: Limits, name: str
) -> records.Entry:
    """The record of a draft, every picture of it decoded once.

    Raises: BadRecord.
    """
    header, given = record_of(draft, roles, limits, name)
    blobs: dict[str, bytes] = {}
    sizes: list[tuple[int, int]] = []
    for blob, data in given.items():
        kept, size = _checked(data, limits, f"{name}, {blob}")
        blobs[blob] = kept
        sizes.append(size)
    if draft.mask:
        # Not encoded anew: what --encode loses would be at its edges.
        blobs["mask"], size = _checked(draft.mask, limits._replace(encode=None), f"{name}, mask")
        if size != sizes[0]:
            raise BadRecord("bad mask", f"{name}: the mask is {size}, the target {sizes[0]}")
    try:
        json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeError:
        raise BadRecord("not unicode", f"{name}: a name in it is not UTF-8") from None
    except (TypeError, ValueError) as error:
        raise BadRecord("bad row", f"{name}: {error}") from None
    pairs = zip(roles, sizes[1:], strict=True)
    references = tuple(size for role, size in pairs if role == "reference")
    source = draft.source[: records.NAME_LIMIT]
    return records.Entry(
        header, blobs, *sizes[0], len(roles), task, references, source, draft.members
    )


def record_of(draft: Draft, roles: tuple[str, ...], limits: Limits, name: str) -> records.Record:
    """The record of a draft whose pictures are not looked at. Raises: BadRecord for its text."""
    text = text_of(draft.instruction, limits.max_characters, name)
    names = ["target", *(f"picture_{number}" for number in range(1, len(roles) + 1))]
    pictures = (draft.target, *(data for _, data in draft.pictures))
    header = {"instruction": text, "roles": list(roles), **draft.more}
    return records.Record(header, dict(zip(names, pictures, strict=True)))


def _checked(data: bytes, limits: Limits, name: str) -> tuple[bytes, tuple[int, int]]:
    """The bytes to keep of a picture, and its (width, height) upright."""
    if not data:
        raise BadRecord("empty", f"{name}: the picture has no bytes")
    pixels = decode_picture(data, "RGB", limits.max_pixels, name)
    height, width = pixels.shape[:2]
    if min(height, width) < limits.min_side:
        raise BadRecord("too small", f"{name}: {width}x{height}, less than {limits.min_side}")
    if limits.encode:
        data = encoded(Image.fromarray(pixels), *limits.encode)
    return data, (width, height)


def encoded(image: Image.Image, form: str, quality: int = 0) -> bytes:
    """An image as a file of Pillow's format `form`."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": quality} if quality else {}))
    return buffer.getvalue()
