"""Checkpoints: Orbax beneath, and above it a digest of every leaf and a fall-back to good steps.

Orbax writes asynchronously and atomically, but restores flipped bits without a word and takes an
empty folder for the newest step. So every step carries, as JSON beside its arrays, the shape, type
and digest of each leaf; what does not agree with it is set aside, and the step before is used.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from qk_jax.errors import InputError

log = logging.getLogger(__name__)
META = "meta"
HOST_SIZE = 2**22  # leaves with no more elements are digested on the host
FORMAT = 1
Meta = dict[str, Any]
Trees = dict[str, Any]


class Restored(NamedTuple):
    """What a restore gives: the step, the items asked for, and the metadata of the step."""

    step: int
    items: Trees
    meta: Meta


def _sums(x: Any, xp: Any) -> Any:
    """Two uint32 sums over the bits of `x` (uint32, any shape), each weighted by position.

    Integer sums do not depend on how `x` is sharded. The weights of the first sum are odd, so that
    one flipped bit always changes it; the second mixes bits and position (murmur3's finaliser).
    `xp` is numpy or jax.numpy, with the same result.
    """
    place = xp.zeros(x.shape, xp.uint32)
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype=xp.uint32).reshape(-1, *(1,) * (x.ndim - axis - 1))
        place = place * xp.uint32(size) + along
    linear = x * (place * xp.uint32(0x3C6EF362) + xp.uint32(0x85EBCA6B))
    mixed = x ^ (place * xp.uint32(0x27D4EB2F))
    mixed = (mixed ^ (mixed >> 16)) * xp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * xp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> 16)
    return xp.stack([xp.sum(linear, dtype=xp.uint32), xp.sum(mixed, dtype=xp.uint32)])


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@jax.jit
def _device_digest(x: jax.Array) -> jax.Array:
    """The sums of a leaf where it lies, however it is sharded."""
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    return _sums(bits.astype(jnp.uint32), jnp)


def _host_digest(x: jax.Array) -> np.ndarray:
    """The same sums with numpy: many small leaves would take long to compile for."""
    bits = np.ascontiguousarray(jax.device_get(x)).view(_UNSIGNED[x.dtype.itemsize])
    with np.errstate(over="ignore"):
        return _sums(bits.astype(np.uint32).reshape(x.shape), np)


def named(tree: Any) -> dict[str, Any]:
    """{'a/b/c': leaf} of any pytree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{name: {'shape', 'dtype', 'digest'}} of every leaf; the digest is 16 hex digits."""
    leaves = named(tree)
    small = lambda x: x.is_fully_addressable and x.size <= HOST_SIZE  # noqa: E731
    sums = [_host_digest(x) if small(x) else _device_digest(x) for x in leaves.values()]
    sums = jax.device_get(sums)
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": "".join(f"{int(part):08x}" for part in pair),
        }
        for (name, leaf), pair in zip(leaves.items(), sums, strict=True)
    }


def revision() -> str:
    """The git revision of the program, or 'unknown' outside a repository."""
    folder = pathlib.Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return out.stdout.strip() or "unknown"


def abstract(meta: Meta, item: str, place: Callable[[str], Any]) -> dict[str, Any]:
    """A nested dict of ShapeDtypeStructs of a saved item; `place` gives the sharding by name.

    Raises:
      InputError: the checkpoint has no such item.
    """
    if item not in meta["leaves"]:
        raise InputError(
            f"the checkpoint of stage {meta['stage']!r} holds no {item!r}, only "
            f"{', '.join(meta['leaves'])}"
        )
    flat = {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"], sharding=place(name))
        for name, leaf in meta["leaves"][item].items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def check_complete(meta: Meta, item: str, target: Any) -> None:
    """Raises InputError unless the saved item has exactly the leaves of `target`."""
    saved = abstract_names(meta, item)
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


def abstract_names(meta: Meta, item: str) -> dict[str, tuple[list[int], str]]:
    """{name: (shape, dtype)} of a saved item, {} when it is absent."""
    leaves = meta["leaves"].get(item, {})
    return {name: (leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}


class Store:
    """The steps under one folder."""

    def __init__(
        self, root: str | os.PathLike, *, keep: int = 1, keep_every: int = 0, write: bool = True
    ):
        """Opens `root`.

        Args:
          root: the folder; made when `write`.
          keep: newest steps that are kept.
          keep_every: steps divisible by it are kept for good; 0 for none.
          write: False leaves everything on disk as it is.

        Raises:
          InputError: the folder cannot be made, or does not exist and `write` is False.
        """
        self.root = pathlib.Path(root).absolute()
        self.write = write
        if not write and not self.root.is_dir():
            raise InputError(f"{self.root} does not exist; give the folder of a trained stage")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep if write else None,
            keep_period=keep_every or None,
            save_interval_steps=1 if write else 0,
            create=write,
            cleanup_tmp_directories=write,
            enable_async_checkpointing=write,
            read_only=not write,
        )
        try:
            self.manager = ocp.CheckpointManager(self.root, options=options)
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
        """
        if step in self.manager.all_steps():
            return
        leaves = {name: describe(tree) for name, tree in items.items()}
        meta = meta | {"format": FORMAT, "step": step, "leaves": leaves}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self.manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))

    def restore(self, targets: Callable[[Meta], Trees], step: int | None = None) -> Restored:
        """The newest step (or `step`) that is whole, with the items that `targets` asks for.

        Args:
          targets: from the metadata of a step, {item: tree of ShapeDtypeStructs with shardings};
            raises InputError when the step is good but not what is wanted.
          step: only this one.

        Raises:
          InputError: no step, none that is whole, or a saved item with other leaves than asked.
        """
        self.wait()
        found = self.steps()[::-1]
        if step is not None and step not in found:
            raise InputError(f"{self.root} holds no step {step}; it holds {found[::-1]}")
        found = found if step is None else [step]
        if self.is_new():
            raise InputError(f"{self.root} holds no checkpoint; train that stage first")
        damage = "only steps that were set aside"
        for candidate in found:
            try:
                return self._restore(candidate, targets)
            except InputError:
                raise
            except Exception as error:  # Orbax and its stores raise many unrelated classes
                damage = f"step {candidate} is damaged ({_first_line(error)})"
                log.warning("checkpoint %s: %s; trying the step before", self.root, damage)
                self._set_aside(candidate)
        raise InputError(
            f"{self.root} holds no whole checkpoint: {damage}; restore it from a copy or delete "
            "the folder to begin anew"
        )

    def _restore(self, step: int, targets: Callable[[Meta], Trees]) -> Restored:
        """One step.

        Raises:
          InputError: as `targets`, or other leaves than asked for.
          Exception: the step is damaged.
        """
        read = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        meta = read[META]
        if meta.get("format") != FORMAT or meta["step"] != step:
            raise ValueError("its metadata is of another format or step")
        wanted = targets(meta)
        for item, target in wanted.items():
            check_complete(meta, item, target)
        args = {item: ocp.args.StandardRestore(target) for item, target in wanted.items()}
        items = dict(self.manager.restore(step, args=ocp.args.Composite(**args)).items())
        for item, tree in items.items():
            for name, leaf in describe(tree).items():
                if leaf["digest"] != meta["leaves"][item][name]["digest"]:
                    raise ValueError(f"the digest of {item}/{name} does not agree")
        return Restored(step, items, meta)

    def _set_aside(self, step: int) -> None:
        """Renames a damaged step, so that it is not found again and can be looked at."""
        if not self.write:
            return
        if jax.process_index() == 0 and (self.root / str(step)).is_dir():
            aside = self.root / f"damaged-{step}"
            shutil.rmtree(aside, ignore_errors=True)  # the same step, damaged before
            os.rename(self.root / str(step), aside)
        self.manager.reload()

    def wait(self) -> None:
        """Blocks until everything saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the threads."""
        self.manager.close()


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
