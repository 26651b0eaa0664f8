"""What is done to checkpoints beside training: looked at, verified, thinned out and averaged.

Each tool yields the lines that it prints as it goes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError, some
from qk_jax.base.trees import unflatten
from qk_jax.checkpoints import copying, run_folder, steps
from qk_jax.checkpoints.steps import Damage, Step
from qk_jax.checkpoints.store import Meta, Store

FACTS = ("stage", "size", "step", "revision", "frozen", "averaged")  # of the metadata, in order


def listing(folder: files.PathLike) -> Iterator[str]:
    """A line for each step: when, how large, of which stage, with which items.

    Raises:
      InputError: the folder holds no checkpoints.
    """
    root = steps.store_folder(folder)
    yield f"{'step':>10}  {'saved':<16}  {'size':>12}  {'stage':<10}  items"
    for step in steps.found(root):
        try:
            meta = step.meta()
            what = f"{meta['stage']:<10}  {', '.join(sorted(meta['leaves']))}"
        except Damage as damage:
            what = f"damaged: {damage}"
        saved = step.saved()
        when = "unknown" if saved is None else f"{saved:%Y-%m-%d %H:%M}"
        yield f"{step.number:>10}  {when:<16}  {step.size() / 1e6:>9,.1f} MB  {what}"
    for path in sorted(root.glob("damaged-*")):
        yield f"{path.name}  was found damaged and set aside"


def verify(folder: files.PathLike, number: int | None = None) -> Iterator[tuple[bool, str]]:
    """Reads every leaf of every step, or of one, and of the frozen tree: (whether whole, a line).

    Nothing is set aside.

    Raises:
      InputError: the folder holds no checkpoints, or not that step.
    """
    root = steps.store_folder(folder)
    chosen = steps.found(root) if number is None else [steps.chosen(root, number)]
    frozen = ""
    for step in steps.found(root.parent / run_folder.FROZEN):
        good, line, meta = _verified(step)
        frozen = run_folder.fingerprint(meta["leaves"][run_folder.FROZEN]) if good else ""
        yield good, f"{run_folder.FROZEN}: {line}"
    for step in chosen:
        good, line, meta = _verified(step)
        if good and frozen and meta.get("frozen", frozen) != frozen:
            good, line = False, "it was trained with other frozen parameters"
        yield good, f"step {step.number}: {line}"


def _verified(step: Step) -> tuple[bool, str, Meta]:
    """Whether a step is whole, the words for it, and its metadata where it is."""
    try:
        meta = steps.verify(step)
    except Damage as damage:
        return False, f"damaged: {damage}", {}
    return True, f"whole, {sum(map(len, meta['leaves'].values()))} leaves", meta


def description(
    folder: files.PathLike,
    number: int | None = None,
    *,
    norms: bool = False,
    config: bool = False,
) -> Iterator[str]:
    """The metadata and the leaves of a step, the newest by default.

    Args:
      folder: of a stage, or of its checkpoints.
      number: of the step.
      norms: read the leaves and tell the L2 norm of each, in float32.
      config: tell the config that it was trained with, as JSON.

    Raises:
      InputError: there is no such step, or it is damaged.
    """
    step = steps.chosen(steps.store_folder(folder), number)
    meta = _whole(step, read=False)
    yield from (f"{fact:<9} {meta[fact]}" for fact in FACTS if fact in meta)
    if config:
        yield f"config    {json.dumps(meta['config'], indent=2)}"
    for item, told in meta["leaves"].items():
        values = sum(math.prod(leaf["shape"]) for leaf in told.values())
        yield f"{item}: {len(told)} leaves, {values:,} values"
        yield from _leaf_lines(told, _norms(step, meta, item) if norms else {})


def _leaf_lines(told: dict[str, Any], norms: dict[str, float]) -> Iterator[str]:
    width = max(map(len, told), default=0)
    for name, leaf in told.items():
        shape = "x".join(map(str, leaf["shape"])) or "scalar"
        norm = f"  {norms[name]:.6g}" if name in norms else ""
        yield f"  {name:<{width}}  {leaf['dtype']:<8}  {shape:<16}  {leaf['digest']}{norm}"


def _norms(step: Step, meta: Meta, item: str) -> dict[str, float]:
    """{name: L2 norm}. Raises InputError for damage."""
    try:
        return {
            name: float(jnp.linalg.norm(leaf.astype(jnp.float32).ravel()))
            for name, leaf in steps.leaves(step, meta, item)
        }
    except Damage as damage:
        raise _damaged(step, damage) from None


def _whole(step: Step, *, read: bool = True) -> Meta:
    """The metadata of a step, all leaves of which are read and compared when `read`.

    Raises:
      InputError: it is damaged.
    """
    try:
        return steps.verify(step) if read else step.meta()
    except Damage as damage:
        raise _damaged(step, damage) from None


def _damaged(step: Step, damage: Damage) -> InputError:
    return InputError(f"{step.path} is damaged: {damage}; restore it from a copy or name another")


def prune(
    folder: files.PathLike, keep: int, keep_every: int = 0, *, dry_run: bool = False
) -> Iterator[str]:
    """Deletes all steps but the newest `keep` and those that `keep_every` divides.

    Args:
      folder: of a stage, or of its checkpoints.
      keep: at least 1. The newest step must be whole, or nothing is deleted.
      keep_every: 0 for none.
      dry_run: only tell.

    Raises:
      InputError: `keep` is less than 1, there are no checkpoints, the newest is damaged, or a step
        cannot be deleted.
    """
    if keep < 1 or keep_every < 0:
        raise InputError(f"--keep is {keep}, --keep-every {keep_every}; keep at least one step")
    root = steps.store_folder(folder)
    known = steps.found(root)
    spare = [s for s in known[:-keep] if not keep_every or s.number % keep_every]
    if spare:
        _whole(known[-1])
    for step in spare:
        if not dry_run:
            _delete(step)
        yield f"step {step.number} {'would be' if dry_run else 'was'} deleted"
    left = [str(step.number) for step in known if step not in spare]
    yield f"kept: {', '.join(left) or 'nothing, there are no steps'}"


def _delete(step: Step) -> None:
    """Takes a step away in one move before its files go, so that no half of it is ever found."""
    gone = step.path.with_name(f".{step.number}.{os.getpid()}.old")
    try:
        step.path.rename(gone)
        gone.rmtree()
    except Exception as error:
        if not buckets.is_failure(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{step.path} cannot be deleted: {reason}") from None


def average(
    folder: files.PathLike, numbers: Sequence[int], out: files.PathLike, item: str = "params"
) -> Iterator[str]:
    """Writes the mean of several steps as a stage folder that another stage may start from.

    Sums are in float32; each leaf keeps its dtype. The new folder has one step, numbered as the
    newest of them, with parameters alone: training cannot be resumed in it.

    Args:
      folder: of a stage.
      numbers: of the steps, two or more.
      out: to be written.
      item: 'params', or 'ema' for the mean of the moving averages.

    Raises:
      InputError: fewer than two steps, a step is missing or damaged, they do not fit together, or
        `out` exists.
    """
    folder, out = copying.stage_folder(folder), files.absolute(out)
    numbers = sorted(set(numbers))
    if len(numbers) < 2:
        raise InputError(f"steps {numbers} have no mean; name two steps or more")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is no empty folder; give another")
    root = folder / run_folder.CHECKPOINTS
    chosen = [steps.chosen(root, number) for number in numbers]
    meta = _common(chosen, item)
    try:
        tree = unflatten(steps.mean(chosen, item))
    except Damage as damage:
        raise InputError(f"{root}: {damage}; verify its steps") from None
    with files.fresh_folder(out, run_folder.CONFIG) as part:
        yield from copying.copy_rest(folder, part, whole=False)
        with contextlib.closing(Store(part / run_folder.CHECKPOINTS)) as store:
            store.save(numbers[-1], {"params": tree}, meta | {"averaged": numbers})
    yield f"{out}: step {numbers[-1]}, the mean of {item} of steps {', '.join(map(str, numbers))}"


def _common(chosen: Sequence[Step], item: str) -> Meta:
    """The metadata of the last step, without its leaves.

    Raises:
      InputError: a step is damaged or lacks the item, or they differ in stage, frozen tree or
        shapes.
    """
    metas = [_whole(step, read=False) for step in chosen]
    for meta in metas:
        if item not in meta["leaves"]:
            kept = some(sorted(meta["leaves"]))
            raise InputError(f"step {meta['step']} keeps no {item}; it keeps {kept}")
    for meta in metas:
        for what in _kind(meta, item) ^ _kind(metas[-1], item):
            raise InputError(
                f"steps {meta['step']} and {metas[-1]['step']} differ in {what[0]}; only steps of "
                "one run have a mean"
            )
    return {name: value for name, value in metas[-1].items() if name != "leaves"}


def _kind(meta: Meta, item: str) -> set[tuple[str, str]]:
    """(name, value) of everything in which steps must agree."""
    told = meta["leaves"][item]
    return {
        ("stage", meta["stage"]),
        ("frozen parameters", meta["frozen"]),
        *((name, f"{leaf['dtype']}{leaf['shape']}") for name, leaf in told.items()),
    }
