"""Models converted once: parts in Orbax's format, written and read layer by layer.

    OUT/qk_jax.json   what it is: the parts with their configs, and every leaf's shape
    OUT/params/       Orbax checkpoint of {part: parameters}, one file per layer
    OUT/tokenizer/ ...   the small folders of a pipeline, as they were
    OUT/vae_original/    an AutoencoderKLQwenImage as it was: exports give its video layers back

Parameters come from safetensors and go to disk without ever being in memory as a whole; a reader
takes whole leaves, layers, or the slice that a device keeps.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.base.files import PathLike, fresh_folder, read_json, write_json
from qk_jax.weights import leaves

FORMAT = 1
FILE, PARAMS = "qk_jax.json", "params"
SMALL = ("tokenizer", "processor", "scheduler")  # folders of a pipeline that go along as they are
ORIGINAL = "vae_original"  # the video autoencoder's files, of which single pictures use a part
# Files are handed to the system as `cp` does; one that a power cut tears fails its checksum.
UNSYNCED = ts.Context({"file_io_sync": False})


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, except that it writes one layer after the other.

    At most two layers are in memory: one on its way to disk while the next is read. Every chunk
    carries its checksum, which tensorstore checks whenever it reads it.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: leaves.Leaf, tspec: dict[str, Any], ts_context: Any):
        chunk = [1, *value.shape[1:]] if value.stacked else list(value.shape)
        spec = tspec | {
            "store_data_equal_to_fill_value": True,  # else a missing file reads as zeros
            "metadata": tspec["metadata"] | {
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
                ],
            }
        }  # fmt: skip
        # Without `await`: so one leaf is written after the other, and at an error nothing is left
        # to an event loop that has ended (tensorstore has threads of its own).
        store = ts.open(ts.Spec(spec), create=True, open=True, context=UNSYNCED).result()
        _write_layers(store, value)


def _write_layers(store: ts.TensorStore, leaf: leaves.Leaf) -> None:
    """Writes a leaf, at most two layers at a time; at an error it waits for what is on its way."""
    pending = []
    try:
        for index, array in leaf.layers():
            pending.append(store[index].write(array, can_reference_source_data_indefinitely=True))
            if len(pending) == 2:
                pending.pop(0).result()
    finally:
        failures = [error for error in (future.exception() for future in pending) if error]
    if failures:
        raise failures[0]


def _checkpointer() -> ocp.Checkpointer:
    """Uncompressed (weights hardly compress), a folder per leaf and a file per layer."""
    handler = ocp.type_handlers
    registry = handler.create_type_handler_registry(
        (leaves.Leaf, _LeafHandler()),
        (np.ndarray, handler.NumpyHandler()),
        (jax.Array, handler.ArrayHandler()),
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=registry
        )
    )


def write(
    out: PathLike,
    parts: Mapping[str, Mapping[str, Any]],
    configs: Mapping[str, Mapping[str, Any]],
    source: str,
    files: Mapping[str, Iterable[files.Path]] | None = None,
) -> None:
    """Writes an import; `out` appears when all of it is complete.

    Args:
      out: the folder; an earlier import there is replaced, anything else is left alone.
      parts: {part: {'a/b/c': Leaf or jax.Array}}.
      configs: {part: its config as `to_hf` gives it}.
      source: where it comes from, for the record.
      files: {folder: files} that are copied as they are, such as the tokenizer's.

    Raises:
      InputError: `out` cannot be written, or a tensor cannot be read.
    """
    flat = {f"{part}/{path}": leaf for part, tree in parts.items() for path, leaf in tree.items()}
    with fresh_folder(out, FILE) as folder:
        saver = _checkpointer()
        tree = unflatten_dict(flat, sep="/")
        # Orbax logs with a traceback what `save` raises, and warns of what is asked for.
        log = logging.getLogger("absl")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            saver.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(tree))
        except InputError:  # of a tensor that cannot be read
            raise
        except Exception as error:  # of Orbax and tensorstore, without a common class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{out} cannot be written ({reason[:200]}); free space or choose another folder"
            ) from error
        finally:
            saver.close()
            log.setLevel(level)
        described = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
            for name, leaf in flat.items()
        }
        for name, given in (files or {}).items():
            (folder / name).mkdir(exist_ok=True)
            for file in given:
                shutil.copyfile(file, folder / name / file.name)
        values = {"format": FORMAT, "source": source, "parts": dict(configs), "leaves": described}
        write_json(folder / FILE, values)


def is_import(folder: PathLike) -> bool:
    """Whether a folder is what `write` makes."""
    return (files.Path(folder) / FILE).is_file()


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(leaves.OnDisk):
    """One parameter of an import.

    Attributes:
      folder: its own, of a zarr array.
      shape: of it.
      stored: type on disk.
      dtype: what it is cast to when read.
    """

    folder: files.Path
    shape: tuple[int, ...]
    stored: np.dtype
    dtype: np.dtype

    def _open(self) -> Any:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(self.folder)},
            "fill_missing_data_reads": False,
        }
        try:
            store = ts.open(spec, read=True).result()
        except ValueError as error:
            raise self._damaged(error) from None
        if store.shape != self.shape or store.dtype.numpy_dtype != self.stored:
            raise self._damaged(f"{store.shape}, {store.dtype.numpy_dtype}")
        return store

    def _damaged(self, what: Any) -> InputError:
        return InputError(f"{self.folder} is damaged ({str(what)[:160]}); import the model again")

    def __getitem__(self, index: leaves.Index) -> np.ndarray:
        """The part at `index`.

        Raises:
          InputError: it cannot be read, or a checksum does not agree.
        """
        try:
            array = self._open()[index].read().result()
        except ValueError as error:
            raise self._damaged(error) from None
        return leaves.cast(array, self.dtype, self.folder.name)

    def layers(self) -> Iterator[np.ndarray]:
        """What lies at each place along the leading axis, one at a time; errors as above."""
        rest = (slice(None),) * (self.ndim - 1)
        for layer in range(self.shape[0]):
            yield self[(slice(layer, layer + 1), *rest)][0]


def read(
    folder: PathLike, part: str, dtype: Any = None
) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(config as `to_hf` gave it, {'a/b/c': Stored}) of one part of an import; reads no weights.

    Raises:
      InputError: no import, of another format, or without that part.
    """
    folder = files.Path(folder)
    values = read_json(folder / FILE)
    if values.get("format") != FORMAT:
        raise InputError(f"{folder} is of format {values.get('format')}; import the model again")
    if part not in values["parts"]:
        raise InputError(f"{folder} holds {', '.join(values['parts'])} and no {part}")
    found = {}
    for name, leaf in values["leaves"].items():
        head, _, path = name.partition("/")
        if head == part:
            stored = jnp.dtype(leaf["dtype"])
            place = folder / PARAMS / name.replace("/", ".")
            given = jnp.dtype(dtype or stored)
            found[path] = Stored(place, tuple(leaf["shape"]), stored, given)
    return values["parts"][part], found
