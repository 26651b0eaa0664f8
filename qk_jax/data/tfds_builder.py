"""A builder of TensorFlow data sets from records.

    tfds build qk_records --imports qk_jax.data.tfds_builder --manual_dir DATA --data_dir OUT

DATA is a folder of record files, or of the indexes of tars. `prepare` does the same from Python and
needs no TensorFlow. The examples keep their order, which is also that of the side index of each
split that is written beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.data import records
from qk_jax.data.importers import tar_index, tars, tfds_records

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def record_set(folder: files.PathLike, split: str) -> records.RecordSet:
    """The records of a split, of record files or of tars with an index. Raises: InputError."""
    in_place = any(files.Path(folder).glob(f"{split}-*.{tar_index.ENDING}"))
    return tars.TarSet(folder, split) if in_place else records.RecordSet(folder, split)


def splits(folder: files.PathLike) -> list[str]:
    """The names of the splits of a folder of records. Raises: InputError when there is none."""
    names = {
        _SHARD.sub("", path.name.removesuffix(ending))
        for ending in (f".{records.ENDING}.index.npy", f".{tar_index.ENDING}")
        for path in files.Path(folder).glob(f"*{ending}")
    }
    if not names:
        raise InputError(f"{folder} has no records; give a folder that `import` or `index` wrote")
    return sorted(names)


class QkRecords(tfds.core.GeneratorBasedBuilder):
    """Instructions, targets and condition pictures by role, all encoded as they were."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Give the folder that `python -m qk_jax.data import` or `index` wrote as --manual_dir."
    )
    code_path = None  # it has no downloads, whose checksums would lie beside this file

    def __init__(self, *, file_format: Any = None, **more: Any):
        """As every builder, but examples can be read by number unless another format is asked."""
        super().__init__(file_format=file_format or "array_record", **more)

    def _info(self) -> Any:
        picture = tfds.features.Tensor(shape=(), dtype=np.object_)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Text to image, edits and pictures of subjects, for qk_jax.",
            features=tfds.features.FeaturesDict(
                {
                    **{name: tfds.features.Text() for name in tfds_records.TEXTS},
                    "roles": tfds.features.Sequence(tfds.features.Text()),
                    "target": picture,
                    **{
                        name: tfds.features.Sequence(picture)
                        for name in tfds_records.PICTURES.values()
                    },
                }
            ),
            disable_shuffling=True,  # the side index has the order of the records
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        folder = dl_manager.manual_dir
        return {split: self._generate_examples(folder, split) for split in splits(folder)}

    def _generate_examples(
        self, folder: files.PathLike, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        found = record_set(folder, split)
        columns = list(records.INDEX_DTYPE.names or ())
        rows = np.concatenate(
            [index[columns].astype(records.INDEX_DTYPE) for _, index in found.indices()]
        )
        path = tfds_records.index_path(self.data_path, split)
        files.write_bytes(path, records.index_bytes(rows))
        for number, row in enumerate(rows):
            task = row["task"].decode()
            yield number, tfds_records.example_of(found[number], task, found.name(number))


def prepare(folder: files.PathLike, data_dir: files.PathLike) -> Any:
    """The builder of the records of `folder`, prepared in the folder of data sets `data_dir`.

    Raises: InputError for records that are missing or damaged.
    """
    builder = QkRecords(data_dir=str(data_dir))
    given = tfds.download.DownloadConfig(manual_dir=str(folder))
    builder.download_and_prepare(download_config=given)
    return builder
