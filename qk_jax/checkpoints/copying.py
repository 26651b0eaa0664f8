"""Copies of a stage folder, proved by the digests of what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator

from qk_jax.base import buckets, files
from qk_jax.base.errors import Failure, InputError
from qk_jax.checkpoints import run_folder, steps
from qk_jax.checkpoints.steps import Damage, Step

# What is left out of a copy besides hidden files: it is copied step by step.
STEPS = (run_folder.FROZEN, run_folder.CHECKPOINTS)


def stage_folder(folder: files.PathLike) -> files.Path:
    """The folder of a stage. Raises InputError when it is none."""
    folder = files.absolute(folder)
    if not (folder / run_folder.CHECKPOINTS).is_dir():
        raise InputError(
            f"{folder} holds no {run_folder.CHECKPOINTS}/; give the folder of a stage, W/stage3"
        )
    return folder


def copy(folder: files.PathLike, out: files.PathLike, number: int | None = None) -> Iterator[str]:
    """Copies a stage folder, or one step with what it needs to be loaded; yields lines.

    The same copy again copies only what is missing, damaged, or has grown.

    Args:
      folder: of a stage.
      out: made where it is missing; it may hold an earlier copy.
      number: of the step; None for all of them, and the metrics and sheets besides.

    Raises:
      InputError: there is no such folder or step, it is damaged, or `out` holds another run.
      Failure: `out` cannot be written.
    """
    folder, out = stage_folder(folder), files.absolute(out)
    if out == folder or folder in out.parents:
        raise InputError(f"{out} lies in {folder}; give another folder")
    root = folder / run_folder.CHECKPOINTS
    chosen = steps.found(root) if number is None else [steps.chosen(root, number)]
    yield from copy_rest(folder, out, whole=number is None)
    for step in chosen:
        yield f"step {step.number}: {_copy_step(step, out / run_folder.CHECKPOINTS)}"


def copy_rest(folder: files.Path, out: files.Path, *, whole: bool) -> Iterator[str]:
    """Copies all of a stage folder but its checkpoints; only what they need unless `whole`.

    Raises:
      InputError, Failure: as `copy`.
    """
    for step in steps.found(folder / run_folder.FROZEN):  # first: it tells whether it is the run
        yield f"{run_folder.FROZEN}: {_copy_step(step, out / run_folder.FROZEN)}"
    needed = (run_folder.TOKENIZER, run_folder.CONFIG)
    for path in sorted(folder.iterdir()):
        if path.name in STEPS or path.name.startswith(".") or not (whole or path.name in needed):
            continue
        for file in [path] if path.is_file() else files.below(path):
            _copy_file(file, out / file.relative_to(folder))


def _copy_file(file: files.Path, target: files.Path) -> None:
    """Copies a file unless it is there. Raises InputError when it cannot be written."""
    if target.is_file() and target.stat().length == file.stat().length:
        if target.read_bytes() == file.read_bytes():
            return
    with files.beside(target) as part:
        file.copy(part)


def _copy_step(step: Step, root: files.Path) -> str:
    """Copies a step unless it is there and whole; tells what was done.

    Raises:
      InputError: the step is damaged, or another is there.
      Failure: it cannot be written.
    """
    target = Step(root / str(step.number), step.number)
    done = "copied"
    if target.path.exists():
        try:
            if steps.verify(target) == step.meta():
                return "was there"
            raise InputError(f"{target.path} is a step of another run; give another folder")
        except Damage as damage:
            done = f"copied again, what was there was damaged: {damage}"
    part = Step(root / f".{step.number}.{os.getpid()}.part", step.number)
    try:
        for file in files.below(step.path):
            copied = part.path / file.relative_to(step.path)
            copied.parent.mkdir(parents=True, exist_ok=True)
            file.copy(copied)
        steps.verify(part)
        files.remove_folder(target.path)
        part.path.rename(target.path)
    except Damage as damage:
        raise InputError(
            f"the copy of {step.path} is damaged: {damage}; verify where it comes from"
        ) from None
    except Exception as error:
        if not buckets.is_failure(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise Failure(f"{target.path} cannot be written: {reason}; free space there") from None
    finally:
        files.remove_folder(part.path)
    return done
