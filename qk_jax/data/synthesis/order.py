"""What a synthesis from records is asked for."""

from __future__ import annotations

import dataclasses
import shlex

from qk_jax.base import buckets
from qk_jax.base.errors import InputError
from qk_jax.data.importers.job import Work
from qk_jax.data.records import NAME_LIMIT

# Kinds, and the tasks of their examples.
KINDS = {
    "reconstruction": "reconstruction",
    "transformation": "transformation",
    "customization": "customization",
    "composition": "composition",
    "edit": "editing",
}
ON_BACKGROUNDS = ("customization", "composition", "edit")
LANGUAGES = ("en", "zh", "both")


@dataclasses.dataclass(frozen=True)
class Order(Work):
    """A synthesis, as the command line asks for it. Pickles to worker processes.

    Attributes:
      kind: a key of KINDS.
      input: folder of record files with pictures, or with cut-outs.
      backgrounds: folder of record files with the pictures that cut-outs are set on.
      count: examples of all splits; 0 is one for each usable record of the input.
      seed: of all that is drawn.
      language: of the words, one of LANGUAGES; 'both' takes that of the captions.
      validation: share of the records of a folder without a validation split that are on its side.
      name: of the set, for the index and the figures by source; '' is the kind.
      scale: (least, most) longer side of a subject, of the shorter side of the picture.
      overlap: most of a subject that another may cover, 0..1.
      side: pixels of the shorter side of a background, which is scaled down where it has more.
      commands: with {jobs} and {results}, each of which gets what the one before has left.
      shard_records: examples of a shard, and records that are looked through at once.
      max_pixels: of a picture, before it is decoded; 0 is no bound.
    """

    kind: str
    input: str
    backgrounds: str = ""
    count: int = 0
    seed: int = 0
    language: str = "en"
    validation: float = 0.0
    name: str = ""
    scale: tuple[float, float] = (0.2, 0.7)
    overlap: float = 0.1
    side: int = 1024
    commands: tuple[str, ...] = ()
    shard_records: int = 4096
    max_pixels: int = 0

    @property
    def source(self) -> str:
        """What the index calls the set."""
        return self.name or self.kind

    def folder_of(self, role: str) -> str:
        """The folder of 'input' or 'backgrounds'."""
        return self.backgrounds if role == "backgrounds" else self.input


def check(order: Order) -> None:
    """Raises InputError for an order that cannot be done; reads no data."""
    if order.kind not in KINDS:
        raise InputError(f"--kind {order.kind} is unknown; give one of {', '.join(KINDS)}")
    if order.language not in LANGUAGES:
        raise InputError(f"--language {order.language} is unknown; give en, zh or both")
    if (order.kind in ON_BACKGROUNDS) != bool(order.backgrounds):
        need = "needs --backgrounds DIR" if order.kind in ON_BACKGROUNDS else "has no --backgrounds"
        raise InputError(f"--kind {order.kind} {need}")
    if order.count < 0 or order.max_pixels < 0 or min(order.shard_records, order.side) < 1:
        raise InputError("--count and --max-pixels are 0 or more, --shard-records and --side 1")
    if not 0 <= order.validation < 1:
        raise InputError(f"--validation {order.validation:g} is no share from 0 to below 1")
    low, high = order.scale
    if not 0 < low <= high <= 0.9:
        raise InputError(f"--scale {low:g} {high:g}: give LEAST and MOST, from above 0 to 0.9")
    if not 0 <= order.overlap < 1:
        raise InputError(f"--overlap {order.overlap:g} is no share from 0 to below 1")
    if not (order.name.isascii() and len(order.name) <= NAME_LIMIT):
        raise InputError(f"--name {order.name!r} has more than 24 characters, or some beyond ASCII")
    for command in order.commands:
        _check_command(command)
    if order.commands and buckets.is_remote(order.out):
        raise InputError(f"--command reads and writes local files, but --out is {order.out}")
    buckets.check((order.input, order.backgrounds, order.out))


def _check_command(command: str) -> None:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--command {command!r} is no command line ({error})") from None
    text = " ".join(words)
    if "{jobs}" not in text or "{results}" not in text:
        raise InputError(
            f"--command {command!r} needs {{jobs}} and {{results}}, for which it gets two folders"
        )
