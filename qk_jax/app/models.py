"""The trained models that the app paints with: known at the start, read when they are needed."""

from __future__ import annotations

import collections
import pathlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

from qk_jax import painting
from qk_jax.base import files
from qk_jax.base.errors import InputError

SHIPPED = "shipped"  # the name of the model that the package carries


class Model(NamedTuple):
    """What is known of a model before its parameters are read.

    Attributes:
      name: by which it is asked for, 'W/stage3'.
      folder: of a stage or an export; None for the model that is shipped.
      limits: of its training.
      has_average: whether there is a moving average of its weights beside the last ones.
    """

    name: str
    folder: str | None
    limits: painting.Limits
    has_average: bool


class Models:
    """Models by name; a few of their painters are held in memory, the last ones used."""

    def __init__(self, folders: Sequence[files.PathLike], *, batch: int = 1, keep: int = 2):
        """Reads what the folders say of themselves, and the parameters of the first.

        Args:
          folders: of stages or exports, as `painting.load`; none is the model that is shipped.
          batch: slots of every program, see `painting.Painter`.
          keep: painters that are held in memory; a model with and without its average is two.

        Raises:
          InputError: a folder that holds no model, or is damaged.
        """
        self._batch, self._keep = batch, keep
        self._lock = threading.Lock()
        self._painters: collections.OrderedDict[tuple[str, bool], painting.Painter]
        self._painters = collections.OrderedDict()
        self._known = {
            name: Model(name, folder, *painting.described(folder))
            for name, folder in _named(folders).items()
        }
        first = self.named(None)
        self.painter(first, first.has_average)

    def all(self) -> list[Model]:
        """In the order in which they were given."""
        return list(self._known.values())

    def named(self, name: str | None) -> Model:
        """The model of a name, the first without one. Raises InputError for an unknown name."""
        if name is None:
            return self.all()[0]
        if name not in self._known:
            raise InputError(f"there is no model {name[:80]!r}; give one of {list(self._known)}")
        return self._known[name]

    def painter(self, model: Model, average: bool) -> painting.Painter:
        """The painter of a model, read from its folder where it is not in memory.

        Args:
          model: one of `all`.
          average: take the moving average of the weights, where there is one.

        Raises:
          InputError: the folder is damaged, or gone.
        """
        average = average or not model.has_average
        key = (model.name, average)
        with self._lock:
            if key not in self._painters:
                while len(self._painters) >= self._keep:  # before, so that both need not fit
                    self._painters.popitem(last=False)
                self._painters[key] = painting.load(model.folder, ema=average, batch=self._batch)
            self._painters.move_to_end(key)
            return self._painters[key]


def _named(folders: Sequence[files.PathLike]) -> dict[str, str | None]:
    """{name: folder} of each folder once, the name as short as it can be told apart by."""
    if not folders:
        return {SHIPPED: None}
    paths = list(dict.fromkeys(str(files.absolute(folder)) for folder in folders))
    short = ["/".join(pathlib.PurePath(path).parts[-2:]) for path in paths]
    return {
        path if short.count(name) > 1 else name: path
        for path, name in zip(paths, short, strict=True)
    }
