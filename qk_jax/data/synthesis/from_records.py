"""Examples made from records of any imported set: from the first check to the manifest.

All records are looked through once, in pieces, for those that can be used; then examples are made,
in pieces again. Example i of a split is a pure function of the order, its inputs and i.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import records
from qk_jax.data.example import hashed
from qk_jax.data.importers import pieces
from qk_jax.data.importers.drafts import Draft, Limits, completed, entry_of, roles_of
from qk_jax.data.importers.job import Piece
from qk_jax.data.synthesis import commands, composites, cutouts, whole
from qk_jax.data.synthesis.cutouts import SPLITS
from qk_jax.data.synthesis.order import KINDS, ON_BACKGROUNDS, Order, check
from qk_jax.data.synthesis.task import uniform

log = logging.getLogger(__name__)
INPUT, BACKGROUNDS = "input", "backgrounds"


def run(order: Order, engine: pieces.Engine) -> dict[str, Any]:
    """Makes the records of an order, and returns the manifest.

    Raises:
      InputError: the order is wrong, or its folder has files of another one.
      Failure: no record came of it, or a disk, a process or a command failed.
    """
    check(order)
    cutouts.forget()
    files.writable_folder(order.out, "--out")
    plan = pieces.plan(order, engine.resume, functools.partial(_look, order))
    if manifest := pieces.finished(order):
        return manifest
    found = dict(enumerate(plan.pieces))
    done = functools.partial(pieces.done_path, order)
    through = functools.partial(_look_through, order)
    pieces.do(order, engine, found, "records looked through", done, through)
    _join(order, plan.pieces)
    shares = _shares(order)
    count = max(1, -(-sum(shares.values()) // order.shard_records))
    first = len(found)
    made = {first + number: number for number in range(count)}
    if order.commands:  # which have the accelerators for themselves
        engine = engine._replace(workers=1)
    make = functools.partial(_make_piece, order, shares, count)
    pieces.do(order, engine, made, "shards", done, make)
    about = {
        "format": "synthesis",
        "kind": order.kind,
        "task": KINDS[order.kind],
        "name": order.source,
        "licence": _licence(order),
        "seed": order.seed,
    }
    return pieces.finish(order, plan, range(first + count), about)


def _roles(order: Order) -> tuple[str, ...]:
    return (INPUT, BACKGROUNDS) if order.kind in ON_BACKGROUNDS else (INPUT,)


def _licence(order: Order) -> str:
    """Of the inputs, as far as their manifests say."""
    found = []
    for role in _roles(order):
        path = files.Path(order.folder_of(role)) / "manifest.json"
        manifest = files.read_json(path) if path.is_file() else {}
        found.append(str(manifest.get("licence", "unknown")))
    return ", ".join(dict.fromkeys(found))


# ---- which records can be used -------------------------------------------------------------------


def _look(order: Order) -> pieces.Found:
    """Pieces of all record files; the paths of a piece are its role and its split.

    Raises: InputError for a folder without records, or a share that does not fit the splits.
    """
    found, named, own = [], set[str](), {}
    for role in _roles(order):
        folder = order.folder_of(role)
        own[folder] = cutouts.has_split(folder, "validation")
        for split in SPLITS[: 2 if own[folder] else 1]:
            file = records.RecordSet(folder, split)
            for start in range(0, len(file), order.shard_records):
                units = min(order.shard_records, len(file) - start)
                found.append(Piece((role, split), start, units))
            for one in file.files:
                named |= {str(one.path), str(records.index_path(one.path))}
    with_own = [folder for folder, has in own.items() if has]
    if order.validation and len(with_own) == len(own):
        raise InputError(
            f"--validation: {' and '.join(own)} has a validation split already, which is kept; "
            "leave the option out"
        )
    if with_own and not order.validation and len(with_own) < len(own):
        (other,) = own.keys() - with_own
        raise InputError(
            f"{with_own[0]} has a validation split and {other} has none; give --validation SHARE "
            "to divide it, too"
        )
    return pieces.Found(found, sorted(x for x in named if files.Path(x).is_file()), [])


def _usable_path(order: Order, number: int) -> files.Path:
    """Numbers and sides of the records of a piece that can be used."""
    return order.folder / f"{number:05d}.usable.npy"


def _look_through(order: Order, number: int, piece: Piece) -> None:
    """Writes which records of a piece can be used, and the others as rejects."""
    role, split = piece.paths
    folder, share = order.folder_of(role), order.validation
    if cutouts.has_split(folder, "validation"):
        share = 0.0
    usable, rejects = [], []
    for record in range(piece.start, piece.start + piece.units):
        try:
            group = _group(order, role, split, record)
        except BadRecord as error:
            rejects.append(error)
            continue
        picture = b""
        if share and not group:
            picture = cutouts.whole(folder, split, record).data
        side = pieces.side(share, group, picture) if share else split
        usable.append((record, SPLITS.index(side)))
    _save(_usable_path(order, number), np.array(usable, np.int64).reshape(-1, 2))
    pieces.write(order, number, {}, rejects)


def _group(order: Order, role: str, split: str, record: int) -> str:
    """The group of a record that can be used. Raises: BadRecord."""
    folder = order.folder_of(role)
    if role == BACKGROUNDS:
        cutouts.ground(folder, split, record, order.max_pixels)
        return ""
    if order.kind in ON_BACKGROUNDS:
        return cutouts.cutout(folder, split, record, order.max_pixels).group
    return cutouts.whole(folder, split, record).group


def _save(path: files.Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    files.write_bytes(path, buffer.getvalue())


def _load(path: files.Path) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return found


def _joined_path(order: Order, role: str, side: str) -> files.Path:
    return order.folder / f"{role}-{side}.npy"


def _join(order: Order, found: list[Piece]) -> None:
    """Writes the usable records of each role and side of the split."""
    for role in _roles(order):
        parts = [
            _load(_usable_path(order, number))
            for number, piece in enumerate(found)
            if piece.paths[0] == role
        ]
        rows = np.concatenate([np.zeros((0, 2), np.int64), *parts])
        for number, side in enumerate(SPLITS):
            _save(_joined_path(order, role, side), rows[rows[:, 1] == number, 0])


def _shares(order: Order) -> dict[str, int]:
    """Examples of each split that has usable records.

    Raises: InputError when a split has subjects, but no backgrounds.
    """
    sizes = {
        role: {side: len(_load(_joined_path(order, role, side))) for side in SPLITS}
        for role in _roles(order)
    }
    own = sizes[INPUT]
    total = order.count or sum(own.values())
    for side in SPLITS:
        if own[side] and not sizes.get(BACKGROUNDS, own)[side]:
            raise InputError(
                f"{order.backgrounds} has no background for the split {side} that can be used; "
                "give others, or with --validation more of them"
            )
    held = round(total * own["validation"] / max(1, sum(own.values())))
    if own["validation"] and own["train"] and total > 1:
        held = min(max(held, 1), total - 1)
    shares = {"train": total - held, "validation": held}
    return {side: shares[side] for side in SPLITS if own[side]}


# ---- examples ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
    """The usable records of one side of the split (a `composites.Pool`).

    Attributes:
      order: what is made.
      side: 'train' or 'validation'.
    """

    order: Order
    side: str

    @functools.cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """{role: numbers of the records}."""
        return {x: _load(_joined_path(self.order, x, self.side)) for x in _roles(self.order)}

    def split_of(self, role: str) -> str:
        """In which split of its folder they are."""
        divided = cutouts.has_split(self.order.folder_of(role), "validation")
        return self.side if divided else "train"

    @functools.cached_property
    def splits(self) -> dict[str, str]:
        """{role: `split_of`}."""
        return {role: self.split_of(role) for role in _roles(self.order)}

    @functools.cached_property
    def sequence(self) -> np.ndarray:
        """The records of the input in the order in which examples are about them."""
        numbers = self.numbers[INPUT]
        key = hashed(self.order.seed, self.side, "order")
        return numbers[np.argsort(uniform(key, np.arange(len(numbers))), kind="stable")]

    def of(self, number: int) -> int:
        """The record of the input that example `number` is about."""
        return int(self.sequence[number % len(self.sequence)])

    def cutout(self, rng: Random) -> cutouts.Cutout:
        """One by chance. Raises: BadRecord."""
        return self.cutout_of(int(rng.choice(self.numbers[INPUT])))

    def cutout_of(self, record: int) -> cutouts.Cutout:
        """That of a record. Raises: BadRecord."""
        order = self.order
        return cutouts.cutout(order.input, self.splits[INPUT], record, order.max_pixels)

    def ground(self, rng: Random) -> cutouts.Ground:
        """One by chance. Raises: BadRecord."""
        record, order = int(rng.choice(self.numbers[BACKGROUNDS])), self.order
        split = self.splits[BACKGROUNDS]
        return cutouts.ground(order.backgrounds, split, record, order.max_pixels)

    def example(self, number: int) -> Draft:
        """Example `number` of this side. Raises: BadRecord."""
        order, record = self.order, self.of(number)
        rng = Random(hashed(order.seed, self.side, order.kind) * 2_654_435_761 + number)
        key = f"{self.side} {number}"
        if order.kind in ON_BACKGROUNDS:
            return composites.draft(order, rng, self.cutout_of(record), self, key)
        make = whole.reconstruction if order.kind == "reconstruction" else whole.transformation
        return make(order, rng, cutouts.whole(order.input, self.splits[INPUT], record), key)


def _make_piece(order: Order, shares: dict[str, int], count: int, number: int, piece: int) -> None:
    """Writes the shards of piece `piece` of `count`; `number` is its number in all of the work."""
    names = {side: records.shard_name(side, piece, count) for side in shares}
    pieces.write(order, number, names, _entries(order, shares, count, piece))


def _entries(
    order: Order, shares: dict[str, int], count: int, piece: int
) -> Iterator[tuple[str, records.Entry] | BadRecord]:
    """(side, record) of each example of a piece, or why there is none."""
    for side, total in shares.items():
        made: Iterator[Draft | BadRecord] = _examples(order, side, piece, count, total)
        if order.commands:
            folder = order.folder / f"{side}-{piece:05d}"
            made = commands.results(order.commands, KINDS[order.kind], made, folder)
        for draft in made:
            try:
                if isinstance(draft, BadRecord):
                    raise draft
                task, limits = KINDS[order.kind], Limits(max_pixels=order.max_pixels)
                named = completed(draft, order.source)
                yield side, entry_of(named, task, roles_of(task, draft), limits, draft.key)
            except BadRecord as error:
                yield error


def _examples(
    order: Order, side: str, piece: int, count: int, total: int
) -> Iterator[Draft | BadRecord]:
    """The examples of a side that belong to a piece."""
    of = Side(order, side)
    for number in range(total * piece // count, total * (piece + 1) // count):
        try:
            yield of.example(number)
        except BadRecord as error:
            yield error
