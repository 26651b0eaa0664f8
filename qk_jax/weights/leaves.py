"""Parameters that are still in safetensors files: checked at once, read when and where needed.

A whole model is never held: a leaf is read whole, layer by layer, or only the slice that a device
keeps, so that memory stays near the largest tensor.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base.errors import InputError, some
from qk_jax.weights import tables
from qk_jax.weights.safetensors import Index, Shape, TensorFolder, contiguous

Shapes = Mapping[str, Shape]
FLOATS = ("float32", "bfloat16", "float16")  # dtypes that parameters can have


def float_dtype(dtype: Any) -> np.dtype | None:
    """A dtype for parameters; None stays None.

    Raises:
      InputError: none of FLOATS.
    """
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found is not None and found.name not in FLOATS:
        raise InputError(f"dtype is {dtype!r}; parameters are {', '.join(FLOATS)}")
    return found


def widest(dtypes: Iterable[Any]) -> np.dtype:
    """The dtype that holds the values of all of `dtypes`."""
    return reduce(jnp.promote_types, map(jnp.dtype, dtypes))


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter in a folder of safetensors.

    Attributes:
      source: the folder.
      names: its torch tensors: one, or one per layer.
      transform: torch tensor -> one layer of ours.
      shape: ours.
      dtype: what it is cast to when read.
      stacked: whether the leading axis counts layers.
    """

    source: TensorFolder
    names: tuple[str, ...]
    transform: tables.Transform
    shape: Shape
    dtype: np.dtype
    stacked: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self[(slice(None),) * len(self.shape)]
        return whole if dtype is None else whole.astype(dtype, copy=False)

    def __getitem__(self, index: Index) -> np.ndarray:
        """The part of the parameter at `index`, unit-step slices for all axes.

        Raises:
          InputError: a tensor cannot be read, or holds values that are not finite or beyond dtype.
        """
        index = tuple(slice(*s.indices(n)) for s, n in zip(index, self.shape, strict=True))
        if not self.stacked:
            return contiguous(self._part(self.names[0], index, self.shape))
        names = self.names[index[0]]
        out = np.empty([len(names), *(s.stop - s.start for s in index[1:])], self.dtype)
        for layer, name in enumerate(names):
            out[layer] = contiguous(self._part(name, index[1:], self.shape[1:]))
        return out

    def layer(self, number: int) -> np.ndarray:
        """One layer; layer 0 of a leaf that is not stacked is the whole."""
        shape = self.shape[1:] if self.stacked else self.shape
        return self._part(self.names[number], tuple(slice(0, size) for size in shape), shape)

    def _part(self, name: str, index: Index, shape: Shape) -> np.ndarray:
        """A part of one torch tensor, as ours."""
        is_whole = all(s.start == 0 and s.stop == n for s, n in zip(index, shape, strict=True))
        if is_whole or self.transform.axes is None:
            ours = self.transform.take(self.source.read(name))
            ours = ours if is_whole else ours[index]
        else:
            ours = self.transform.take(self.source.read(name, self.transform.axes(index)))
        return cast(ours, self.dtype, name)


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in `dtype`.

    Raises:
      InputError: a finite value is beyond the range of `dtype`.
    """
    dtype = jnp.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
        if not np.isfinite(out).all():
            raise InputError(f"{name} has values beyond the range of {dtype}; use bfloat16")
    return out


def plan(
    table: tables.Table,
    source: TensorFolder,
    shapes: Shapes,
    dtype: Any = None,
    ignore: Iterable[str] = (),
) -> dict[str, Leaf]:
    """Where every leaf comes from; reads headers only.

    Args:
      table: names and transforms.
      source: the tensors.
      shapes: every leaf to be filled.
      dtype: of the leaves; None keeps the type of the files, of a stack the widest of its layers'.
      ignore: regexes of torch names that may be left out, beyond the table's own.

    Raises:
      InputError: a tensor that no leaf takes, a leaf that no tensor fills, or a wrong shape.
    """
    _check_layers(table, source, shapes)
    wanted = {path: list(table.names(path, shape)) for path, shape in shapes.items()}
    usual = {(path, layer): name for path in wanted for name, layer, _ in wanted[path]}
    found: dict[tuple[str, int | None], str] = {}
    unknown = []
    for name in source.shapes:
        target = table.locate(name)
        key = target and (target.path, target.layer)
        if key in usual and key not in found:
            found[key] = name
        elif not table.is_ignored(name) and not any(re.fullmatch(p, name) for p in ignore):
            unknown.append(name)
    if unknown:
        raise InputError(
            f"{source.path} holds tensors that this model does not have: {some(unknown)}; "
            "check that its config.json belongs to these weights, or leave them out with --ignore"
        )
    if missing := [name for key, name in usual.items() if key not in found]:
        raise InputError(
            f"{source.path} lacks {some(missing)}; download it again, or check its config.json"
        )
    leaves = {}
    for path, parts in wanted.items():
        names = tuple(found[path, layer] for _, layer, _ in parts)
        _, layer, row = parts[0]
        stacked = layer is not None
        one = row.transform.torch_shape(shapes[path][1:] if stacked else shapes[path])
        for name in names:
            if source.shapes[name] != one:
                raise InputError(
                    f"tensor {name} of {source.path} has the shape {source.shapes[name]}, its "
                    f"config.json asks for {one}; download it again"
                )
        kind = jnp.dtype(dtype or widest({source.dtypes[name] for name in names}))
        leaves[path] = Leaf(source, names, row.transform, shapes[path], kind, stacked)
    return leaves


def _check_layers(table: tables.Table, source: TensorFolder, shapes: Shapes) -> None:
    """Raises InputError for more layers than there are tensors, whose names would never end."""
    for path, shape in shapes.items():
        if shape and shape[0] > len(source.shapes):
            _, layer, _ = next(table.names(path, shape))
            if layer is not None:
                raise InputError(
                    f"{source.path} has {len(source.shapes)} tensors, its config.json asks for "
                    f"{shape[0]} layers; download it again"
                )


def shard(leaf: Any, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
    """An array or a Leaf over devices; of a Leaf each device's slice alone is read.

    Args:
      leaf: with shape, and slices by index.
      sharding: of the result.
      dtype: of the result; None keeps the leaf's.
    """
    if not isinstance(leaf, Leaf):
        return jax.device_put(leaf if dtype is None else leaf.astype(dtype), sharding)
    leaf = leaf if dtype is None else dataclasses.replace(leaf, dtype=jnp.dtype(dtype))
    slices: dict[str, np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        if str(index) not in slices:
            slices = {str(index): leaf[index]}  # one at a time; replicas follow each other
        arrays.append(jax.device_put(slices[str(index)], device))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
