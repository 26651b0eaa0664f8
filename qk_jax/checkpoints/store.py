"""Checkpoints: Orbax beneath, and above it a digest of every leaf and a fall-back to good steps.

Orbax writes asynchronously and atomically, but restores flipped bits without a word and takes an
empty folder for the newest step. So every step carries, as JSON beside its arrays, the shape, type
and digest of each leaf; what does not agree with it is set aside, and the step before is used.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from qk_jax.base import buckets, distributed, files
from qk_jax.base.errors import Failure, InputError
from qk_jax.base.trees import named
from qk_jax.checkpoints.barrier import barrier
from qk_jax.checkpoints.digest import describe, of_metadata

log = logging.getLogger(__name__)
META = "meta"
FORMAT, UNDIGESTED = 2, 1  # of the metadata; that of 0.1.0 has no digest
EXISTS = "exists"
PROBE, PROBE_BYTES = "probe", 2**18  # as much as must be free for a save to begin
READ_S = 3600.0  # that others may take longer to read their shares of a step
RESTORE_GB = 32  # of host memory for what is read and not yet on its device; the largest shard fits
Meta = dict[str, Any]
Trees = dict[str, Any]


class SaveError(Failure):
    """A step could not be written; those before it are as they were."""


def is_intact(meta: Meta, step: int) -> bool:
    """Whether the metadata of `step` is what was written."""
    known, digest = meta.get("format"), meta.get("digest")
    if known not in (FORMAT, UNDIGESTED) or meta.get("step") != step:
        return False
    return known == UNDIGESTED if digest is None else digest == of_metadata(meta)


class _Damaged(Exception):
    """A step cannot be used; says why."""


class Restored(NamedTuple):
    """What a restore gives: the step, the items asked for, and the metadata of the step."""

    step: int
    items: Trees
    meta: Meta


def check_complete(meta: Meta, item: str, target: Any) -> None:
    """Raises InputError unless the saved item has exactly the leaves of `target`."""
    saved = _saved(meta, item)
    wanted = {name: (list(leaf.shape), str(leaf.dtype)) for name, leaf in named(target).items()}
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    changed = [
        f"{name} is {saved[name]}, wanted {wanted[name]}"
        for name in sorted(wanted.keys() & saved.keys())
        if saved[name] != wanted[name]
    ]
    for words, found in (("lacks", missing), ("has unknown", extra), ("has other", changed)):
        if found:
            raise InputError(
                f"the checkpoint of stage {meta['stage']!r} step {meta['step']} {words} {item}: "
                f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}; "
                "it cannot be restored in full, use the config it was trained with"
            )


def _difference(found: Restored) -> str:
    """The first leaf whose digest is not that of the metadata, in words; '' where all are. All
    processes call it alike."""
    for item, tree in found.items.items():
        for name, leaf in describe(tree).items():
            if leaf["digest"] != found.meta["leaves"][item][name]["digest"]:
                return f"the digest of {item}/{name} does not agree"
    return ""


def _saved(meta: Meta, item: str) -> dict[str, tuple[list[int], str]]:
    """{name: (shape, dtype)} of a saved item, {} when it is absent."""
    leaves = meta["leaves"].get(item, {})
    return {name: (leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX whether a host is preempted: `distributed.preempted` does, by its calls, and
    JAX lets all leave at the call after the highest number that anybody has asked with. Orbax asks
    with the step at every save: the calls of a run that was resumed would not come to it for long.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Store:
    """The steps under one folder.

    Attributes:
      root: the folder.
      writing: the step that was saved last, until it is known to be on disk or to have failed.
    """

    def __init__(
        self,
        root: files.PathLike,
        *,
        keep: int = 1,
        keep_every: int = 0,
        keep_last: tuple[int, int] | None = None,
        write: bool = True,
    ):
        """Opens `root`.

        Args:
          root: the folder; made when `write`.
          keep: newest steps that are kept.
          keep_every: steps divisible by it are kept for good; 0 for none.
          keep_last: (n, count): so many of the newest steps that n divides are kept, too.
          write: False leaves everything on disk as it is.

        Raises:
          InputError: the folder cannot be made, or does not exist and `write` is False.
        """
        self.root = files.absolute(root)
        self.write = write
        self.writing: int | None = None
        self._questions = 0
        self._stale = False  # what Orbax knows of the disk, after a failure
        buckets.check_folders(self.root)
        if not write and not self.root.is_dir():
            raise InputError(f"{self.root} does not exist; give the folder of a trained stage")
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        if keep_last:
            kept.append(policies.EveryNSteps(keep_last[0], max_to_keep=keep_last[1]))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept) if write else None,
            save_interval_steps=1 if write else 0,
            create=write,
            cleanup_tmp_directories=write,
            enable_async_checkpointing=write,
            async_options=ocp.AsyncOptions(barrier_sync_fn=barrier),
            read_only=not write,
        )
        try:
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            # zstd finds 3 % in random float32, for half of the processor time.
            plain = ocp.PyTreeCheckpointHandler(use_compression=False)
            registry.add(None, ocp.args.PyTreeSave, plain)
            self.manager = _Manager(self.root, options=options, handler_registry=registry)
        except OSError as error:
            raise InputError(f"{self.root} cannot be written: {error.strerror}") from error

    def steps(self) -> list[int]:
        """Steps on disk, oldest first; some may prove damaged."""
        self.manager.reload()
        return sorted(self.manager.all_steps())

    def is_new(self) -> bool:
        """Whether nothing was ever saved here; damaged steps count as saved."""
        return not self.steps() and not any(self.root.glob("damaged-*"))

    def save(self, step: int, items: Trees, meta: Meta) -> None:
        """Starts writing `items` (pytrees of arrays) as `step`; returns before they are on disk.

        The arrays may be donated afterwards. A step that exists already is left alone.

        Raises:
          SaveError: this step, or the one that was still being written, cannot be written.
        """
        self.wait()
        try:
            if self._stale:
                self._reload()
        except Exception as error:  # as in `restore`
            raise self._failed(step, error) from error
        if self._told(EXISTS if step in self.manager.all_steps() else "") == EXISTS:
            return
        self._probe(step)
        leaves = {name: describe(tree) for name, tree in items.items()}
        meta = meta | {"format": FORMAT, "step": step, "leaves": leaves}
        meta["digest"] = of_metadata(meta)
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        try:
            self.manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))
        except Exception as error:  # as in `restore`
            raise self._failed(step, error) from error
        finally:
            self._clear_probe()
        self.writing = step

    def _told(self, text: str) -> str:
        """What process 0 says; all ask alike. What each sees on disk may be of another moment."""
        self._questions += 1
        return distributed.told(f"store/{self.root}/{self._questions}", text)

    def _probe(self, step: int) -> None:
        """Raises SaveError on all processes where process 0 cannot write: before it has made the
        folder of the step, Orbax lets it fail alone, and the others wait.

        The file stays until the save has begun: Orbax's first save lists the folder in a thread,
        and in a bucket a folder whose only file has gone since is one that is not there.
        """
        problem = ""
        if jax.process_index() == 0:
            try:
                (self.root / PROBE).write_bytes(bytes(PROBE_BYTES))
            except Exception as error:  # as in `restore`
                problem = _reason(error, self.root)
                self._clear_probe()
        if problem := self._told(problem):
            raise SaveError(f"{self.root}: step {step} was not saved: {problem}")

    def _clear_probe(self) -> None:
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # the next save writes over it
                (self.root / PROBE).unlink(missing_ok=True)

    def is_written(self) -> bool:
        """Whether everything saved is on disk; does not wait.

        Raises:
          SaveError: it cannot be written; told once.
        """
        if self.writing is not None:
            if self.manager.is_saving_in_progress():
                return False
            self.wait()
        return True

    def wait(self) -> None:
        """Blocks until everything saved is on disk.

        Raises:
          SaveError: it cannot be written.
        """
        step, self.writing = self.writing, None
        try:
            self.manager.wait_until_finished()
        except Exception as error:  # as in `restore`
            raise self._failed(step, error) from error

    def _failed(self, step: int | None, error: Exception) -> SaveError:
        """Removes what there is of a step that could not be written; says why in one line."""
        self._stale = True
        try:
            if jax.process_index() == 0:
                for left in self.root.glob(f"{step}.*tmp*"):  # else a full disk would stay full
                    files.remove_folder(left)
            self._reload()
        except Exception as problem:  # the bucket is still away
            if not buckets.is_failure(problem):
                raise
            log.warning("%s cannot be cleared of step %s: %s", self.root, step, first_line(problem))
        return SaveError(f"{self.root}: step {step} was not saved: {_reason(error, self.root)}")

    def _reload(self) -> None:
        """Looks what is on disk: after a failure Orbax takes its step for saved, and has forgotten
        what it meant to delete after it."""
        self.manager.reload()
        self._stale = False

    def restore(self, targets: Callable[[Meta], Trees], step: int | None = None) -> Restored:
        """The newest step (or `step`) that is whole, with the items that `targets` asks for.

        Args:
          targets: from the metadata of a step, {item: tree of ShapeDtypeStructs with shardings};
            raises InputError when the step is good but not what is wanted.
          step: only this one.

        Damaged steps are set aside once an older one has proved whole: where none can be read, it
        may be the storage that is at fault.

        Raises:
          InputError: no step, none that is whole, or a saved item with other leaves than asked.
          MemoryError, JaxRuntimeError: it is this host's memory, or another process is gone.
        """
        self.wait()
        found = self.steps()[::-1]
        if step is not None and step not in found:
            raise InputError(f"{self.root} holds no step {step}; it holds {found[::-1]}")
        found = found if step is None else [step]
        if self.is_new():
            raise InputError(f"{self.root} holds no checkpoint; train that stage first")
        damage = "only steps that were set aside"
        damaged: list[int] = []
        for candidate in found:
            try:
                restored = self._restore(candidate, targets)
            except _Damaged as error:
                damage = f"step {candidate} is damaged ({error})"
                damaged.append(candidate)
                log.warning("checkpoint %s: %s; trying the step before", self.root, damage)
                continue
            for number in damaged:
                self._set_aside(number)
            return restored
        raise InputError(
            f"{self.root} holds no whole checkpoint: {damage}; restore it from a copy or delete "
            "the folder to begin anew"
        )

    def _restore(self, step: int, targets: Callable[[Meta], Trees]) -> Restored:
        """One step, or the error that all processes raise alike.

        Raises:
          InputError, MemoryError, JaxRuntimeError: as `restore`.
          _Damaged: a process cannot read its part, or what was read has another digest.
        """
        restored, problem = None, ""
        try:
            restored = self._read(step, targets)
        except (InputError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # not of what is on disk
        except Exception as error:  # Orbax and its stores raise many unrelated classes
            problem = first_line(error)
        problem = self._said_of(step, problem)
        if not problem and restored is not None:
            problem = self._said_of(step, _difference(restored))
        if problem or restored is None:
            raise _Damaged(problem)
        return restored

    def _read(self, step: int, targets: Callable[[Meta], Trees]) -> Restored:
        """What is on disk of one step, this process's shares of it. Waits for no other process, as
        Orbax's manager does: who cannot read would leave the others waiting.

        Raises:
          InputError: as `targets`, or other leaves than asked for.
          Exception: the step is damaged.
        """
        folder = self.root / str(step)
        meta = ocp.JsonCheckpointHandler().restore(folder / META)
        if not is_intact(meta, step):
            raise ValueError("its metadata is damaged, or of another format or step")
        wanted = targets(meta)
        for item, target in wanted.items():
            check_complete(meta, item, target)
        # with a bound on what is on its way to the devices
        arrays = ocp.StandardCheckpointHandler(restore_concurrent_gb=RESTORE_GB)
        items = {
            item: arrays.restore(folder / item, args=ocp.args.StandardRestore(target))
            for item, target in wanted.items()
        }
        return Restored(step, items, meta)

    def _said_of(self, step: int, problem: str) -> str:
        """The first problem that any process has with a step, '' where none has: all go on with the
        same step, or with the same one before."""
        self._questions += 1
        name = f"store/{self.root}/{self._questions}/{step}"
        said = distributed.all_said(name, problem, READ_S)
        return next((text for _, text in sorted(said.items()) if text), "")

    def drop(self, steps: Iterable[int]) -> None:
        """Removes steps for good; all processes call it alike, while nothing is being written."""
        for step in steps:
            if jax.process_index() == 0:
                files.remove_folder(self.root / str(step))
        self._told("")  # before others look
        self.manager.reload()

    def _set_aside(self, step: int) -> None:
        """Renames a damaged step, so that it is not found again and can be looked at."""
        if not self.write:
            return
        if jax.process_index() == 0 and (self.root / str(step)).is_dir():
            aside = self.root / f"damaged-{step}"
            files.remove_folder(aside)  # the same step, damaged before
            (self.root / str(step)).rename(aside)
        self._told("")  # before others look: who still sees the step would not save it again
        self.manager.reload()

    def close(self) -> None:
        """Waits and frees the threads.

        Raises:
          SaveError: the last step cannot be written.
        """
        try:
            self.wait()
        finally:
            self.manager.close()


def first_line(error: Exception) -> str:
    """The class of an error and what its first line says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _reason(error: Exception, folder: files.Path) -> str:
    """Why a write failed and what to do. TensorStore tells the number of an error in its text."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOSPC or "No space left on device" in str(error):
        free = shutil.disk_usage(folder).free / files.GIGABYTE
        return f"the disk is full, {free:.2f} GB are free; free space there"
    if number == errno.EDQUOT or "Disk quota exceeded" in str(error):
        return "the disk quota is used up; free space there"
    return f"{first_line(error)}; see whether the folder can be reached and written"
