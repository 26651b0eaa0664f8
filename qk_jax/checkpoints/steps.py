"""The steps of a folder read as they lie there: without a config, leaf by leaf, changing nothing.

What is read is held in memory a group of leaves at a time, so a step may be larger than the memory
of the machine that looks at it.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.base.trees import named
from qk_jax.checkpoints import run_folder
from qk_jax.checkpoints.digest import describe
from qk_jax.checkpoints.store import META, Meta, first_line, is_intact

GROUP_BYTES = files.GIGABYTE  # of the leaves that are read together


class Damage(Exception):
    """A step is not what its metadata says; names the leaf."""


class Step(NamedTuple):
    """One step on disk.

    Attributes:
      path: its folder.
      number: finished updates.
    """

    path: files.Path
    number: int

    def meta(self) -> Meta:
        """What the step says of itself.

        Raises:
          Damage: that cannot be read.
        """
        try:
            meta = files.json_object((self.path / META / "metadata").read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise Damage(f"its metadata cannot be read ({first_line(error)})") from None
        if not is_intact(meta, self.number) or "leaves" not in meta:
            raise Damage("its metadata is damaged, or of another format or step")
        return meta

    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().length for path in files.below(self.path))

    def saved(self) -> datetime.datetime | None:
        """When it was complete on disk, in local time; a copy keeps the time. None if unknown."""
        try:
            known = files.json_object((self.path / "_CHECKPOINT_METADATA").read_bytes())
            return datetime.datetime.fromtimestamp(known["commit_timestamp_nsecs"] / 1e9)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def store_folder(folder: files.PathLike) -> files.Path:
    """The folder with the steps: of a stage folder (W/stage3) its `checkpoints/`, else itself.

    Raises:
      InputError: there is none.
    """
    folder = files.Path(folder)
    for path in (folder / run_folder.CHECKPOINTS, folder):
        if path.is_dir() and (found(path) or path.name == run_folder.CHECKPOINTS):
            return path
    raise InputError(f"{folder} holds no checkpoints; give the folder of a stage, W/stage3")


def found(folder: files.Path) -> list[Step]:
    """The steps of a folder, oldest first; some may prove damaged."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (Step(path, int(path.name)) for path in paths if path.name.isdigit() and path.is_dir()),
        key=lambda step: step.number,
    )


def chosen(folder: files.Path, number: int | None = None) -> Step:
    """The step `number` of a folder, or the newest.

    Raises:
      InputError: there is no such step.
    """
    known = found(folder)
    for step in reversed(known):
        if number in (None, step.number):
            return step
    numbers = [step.number for step in known]
    raise InputError(
        f"{folder} holds no step {'' if number is None else number}; it holds {numbers}"
    )


def leaves(step: Step, meta: Meta, item: str) -> Iterator[tuple[str, jax.Array]]:
    """(name, values) of every leaf of an item, its digest compared.

    Raises:
      Damage: it cannot be read, or differs from what the metadata says.
    """
    told = meta["leaves"][item]
    with contextlib.closing(ocp.PyTreeCheckpointer()) as reader, _damage(f"{item} cannot be read"):
        told_by_orbax = reader.metadata(step.path / item).item_metadata
        if told_by_orbax is None:
            raise Damage(f"{item} cannot be read (its _METADATA or _sharding is damaged)")
        tree = told_by_orbax.tree
        known = named(tree)
        _check_same(item, known, told)
        for group in _groups(known):
            got = named(_read(reader, step.path / item, tree, group))
            for name in group:
                if describe({name: got[name]})[name] != told[name]:
                    raise Damage(f"the digest of {item}/{name} does not agree")
                yield name, got.pop(name)


@contextlib.contextmanager
def _damage(words: str) -> Iterator[None]:
    """Any error of Orbax or its stores, which raise many unrelated classes, as damage."""
    try:
        yield
    except Damage:
        raise
    except Exception as error:
        raise Damage(f"{words} ({first_line(error)})") from error


def _check_same(item: str, known: dict[str, Any], told: dict[str, Any]) -> None:
    """Raises Damage unless the arrays on disk have the names and shapes of the metadata."""
    shapes = {name: list(leaf.shape) for name, leaf in known.items()}
    for name in sorted(shapes.keys() | told.keys()):
        if name not in told or shapes.get(name) != told[name]["shape"]:
            what = f"is {shapes[name]}" if name in shapes else "is missing"
            raise Damage(f"{item}/{name} {what}, its metadata says otherwise")


def _groups(known: dict[str, Any]) -> Iterator[list[str]]:
    """Names whose leaves have at most GROUP_BYTES together, or one that has more."""
    group: list[str] = []
    held = 0
    for name, leaf in known.items():
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _read(reader: Any, path: files.Path, tree: Any, group: Sequence[str]) -> Any:
    """The tree with the leaves of `group` on one device, and placeholders for the others."""
    wanted = set(group)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(keys: Any, leaf: Any) -> Any:
        if jax.tree_util.keystr(keys, simple=True, separator="/") not in wanted:
            return ocp.PLACEHOLDER
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    targets = jax.tree_util.tree_map_with_path(target, tree)
    how = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=place), targets)
    return reader.restore(path, args=ocp.args.PyTreeRestore(targets, restore_args=how))


def verify(step: Step) -> Meta:
    """The metadata of a step, every leaf of which is read and compared.

    Raises:
      Damage: as `leaves`.
    """
    meta = step.meta()
    for item in meta["leaves"]:
        for _ in leaves(step, meta, item):
            pass
    return meta


def mean(steps: Sequence[Step], item: str) -> dict[str, jax.Array]:
    """{name: leaf}: the mean over steps, summed in float32 and rounded once to the leaf's dtype.

    Raises:
      Damage: as `leaves`.
    """
    total: dict[str, jax.Array] = {}
    dtypes: dict[str, Any] = {}
    for step in steps:
        for name, leaf in leaves(step, step.meta(), item):
            term = leaf.astype(jnp.float32)
            total[name] = total[name] + term if name in total else term
            dtypes[name] = leaf.dtype
    return {name: (total.pop(name) / len(steps)).astype(dtype) for name, dtype in dtypes.items()}
