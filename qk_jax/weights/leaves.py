"""Parameters that still lie in safetensors files: checked at once, read when and where needed.

A whole model is never held: a leaf is read whole, layer by layer, or only the slice that a device
keeps (DESIGN: memory stays near the largest tensor).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base.errors import InputError, some
from qk_jax.weights import tables
from qk_jax.weights.safetensors import TensorFolder, contiguous

Index = tuple[slice, ...]
Shapes = Mapping[str, tuple[int, ...]]


class OnDisk:
    """A parameter that is not in memory, with what all of its kind share.

    A subclass has `shape` and `dtype`, and reads the part at an index of slices.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole parameter."""
        whole = self[(slice(None),) * self.ndim]
        return whole if dtype is None else whole.astype(dtype, copy=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(OnDisk):
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
    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool

    def __getitem__(self, index: Index) -> np.ndarray:
        """The part of the parameter at `index`, unit-step slices for all axes.

        Raises:
          InputError: a tensor cannot be read, or holds values that are not finite or beyond dtype.
        """
        index = tuple(slice(*s.indices(n)) for s, n in zip(index, self.shape, strict=True))
        if not self.stacked:
            return self._layer(self.names[0], index, self.shape)
        layers = self.names[index[0]]
        out = np.empty([len(layers), *(s.stop - s.start for s in index[1:])], self.dtype)
        for place, name in enumerate(layers):
            out[place] = self._layer(name, index[1:], self.shape[1:])
        return out

    def layers(self) -> Iterator[tuple[Index, np.ndarray]]:
        """(index, array) of every layer, one at a time; of the whole where nothing is stacked."""
        rest = (slice(None),) * (self.ndim - 1)
        if not self.stacked:
            yield (slice(None),) * self.ndim, np.asarray(self)
            return
        for layer in range(self.shape[0]):
            index = (slice(layer, layer + 1), *rest)
            yield index, self[index]

    def _layer(self, name: str, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        """A part of one torch tensor, as ours."""
        is_whole = all(s.start == 0 and s.stop == n for s, n in zip(index, shape, strict=True))
        if is_whole or self.transform.axes is None:
            ours = self.transform.take(self.source.read(name))
            ours = ours if is_whole else ours[index]
        else:
            ours = self.transform.take(self.source.read(name, self.transform.axes(index)))
        return contiguous(cast(ours, self.dtype, name))


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
      dtype: of the leaves; None keeps the type of the files.
      ignore: regexes of torch names that may be left out, beyond the table's own.

    Raises:
      InputError: a tensor that no leaf takes, a leaf that no tensor fills, or a wrong shape.
    """
    _check_layers(table, source, shapes)
    wanted = {path: list(table.names(path, shape)) for path, shape in shapes.items()}
    found: dict[tuple[str, int | None], str] = {}
    unknown = []
    for name in source.shapes:
        slot = table.locate(name)
        place = slot and (slot.path, slot.layer)
        fits = slot and any(layer == slot.layer for _, layer, _ in wanted.get(slot.path, ()))
        if fits and place not in found:
            found[place] = name
        elif not table.is_ignored(name) and not any(re.fullmatch(p, name) for p in ignore):
            unknown.append(name)
    if unknown:
        raise InputError(
            f"{source.path} holds tensors that this model has no place for: {some(unknown)}; "
            "check that its config.json belongs to these weights, or leave them out with --ignore"
        )
    missing = [
        name
        for path, parts in wanted.items()
        for name, layer, _ in parts
        if (path, layer) not in found
    ]
    if missing:
        raise InputError(
            f"{source.path} lacks {some(missing)}; download it again, or check its config.json"
        )
    return {
        path: _leaf(source, path, parts, found, shapes[path], dtype)
        for path, parts in wanted.items()
    }


def _check_layers(table: tables.Table, source: TensorFolder, shapes: Shapes) -> None:
    """Raises InputError for more layers than there are tensors, whose names would never end."""
    for path, shape in shapes.items():
        if shape and shape[0] > len(source.shapes):
            _, layer, _ = next(table.names(path, shape))
            if layer is not None:
                raise InputError(
                    f"{source.path} has {len(source.shapes)} tensors, its config.json tells of "
                    f"{shape[0]} layers; download it again"
                )


def _leaf(
    source: TensorFolder,
    path: str,
    parts: list[tuple[str, int | None, tables.Row]],
    found: Mapping[tuple[str, int | None], str],
    shape: tuple[int, ...],
    dtype: Any,
) -> Leaf:
    """The leaf at `path`, whose torch tensors must have the shapes that give `shape`."""
    stacked = parts[0][1] is not None
    transform = parts[0][2].transform
    names = tuple(found[path, layer] for _, layer, _ in parts)
    one = shape[1:] if stacked else shape
    for name in names:
        if transform.our_shape(source.shapes[name]) != one:
            raise InputError(
                f"tensor {name} of {source.path} has the shape {source.shapes[name]}, which does "
                f"not give the shape {one} that its config.json asks for ({transform.name})"
            )
    return Leaf(
        source, names, transform, shape, jnp.dtype(dtype or source.dtypes[names[0]]), stacked
    )


def place(leaf: Any, sharding: jax.sharding.Sharding, dtype: Any = None) -> jax.Array:
    """A leaf (Leaf or array) over devices; of a Leaf each device's share alone is read.

    Args:
      leaf: with shape, and slices by index.
      sharding: where it goes.
      dtype: of the result; None keeps the leaf's.
    """
    if hasattr(leaf, "astype"):  # an array
        return jax.device_put(leaf if dtype is None else leaf.astype(dtype), sharding)
    leaf = leaf if dtype is None else dataclasses.replace(leaf, dtype=jnp.dtype(dtype))
    shares: dict[str, np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        if str(index) not in shares:
            shares = {str(index): leaf[index]}  # one at a time; replicas follow each other
        arrays.append(jax.device_put(shares[str(index)], device))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)
