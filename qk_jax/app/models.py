"""The trained models that the app paints with: known at the start, read when they are needed."""

from __future__ import annotations

import collections
import pathlib
import threading
from collections.abc import Sequence
from typing import NamedTuple

from qk_jax import painting
from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import steps
from qk_jax.experiment import config as config_lib


class Model(NamedTuple):
    """What is known of a model before its parameters are read.

    Attributes:
      name: by which it is asked for, 'W/stage3'.
      folder: of the stage; None for the model that is shipped.
      has_average: whether there is a moving average of its weights beside the last ones.
      limits: of its training.
    """

    name: str
    folder: str | None
    has_average: bool
    limits: painting.Limits


class Models:
    """Models by name; a few of their painters are held in memory, the last ones used."""

    def __init__(self, folders: Sequence[files.PathLike], *, batch: int = 1, keep: int = 2):
        """Reads what the folders say of themselves, and the parameters of the first.

        Args:
          folders: of stages that the trainer wrote; none is the model that is shipped.
          batch: slots of every program, see `painting.Painter`.
          keep: painters that are held in memory; a model with and without its average is two.

        Raises:
          InputError: a folder that is no stage, or is damaged.
        """
        self._batch, self._keep = batch, keep
        self._lock = threading.Lock()
        self._painters: collections.OrderedDict[tuple[str, bool], painting.Painter]
        self._painters = collections.OrderedDict()
        self._known = {model.name: model for model in _described(folders)}
        if not folders:
            painter = self._load(None, average=True)
            name = painter.name or "shipped"
            self._known = {name: Model(name, None, False, painter.limits)}
            self._painters[name, False] = painter
        first = next(iter(self._known.values()))
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

        Raises:
          InputError: the folder is damaged, or gone.
        """
        key = (model.name, average and model.has_average)
        with self._lock:
            if key not in self._painters:
                while len(self._painters) >= self._keep:  # before, so that both need not fit
                    self._painters.popitem(last=False)
                self._painters[key] = self._load(model.folder, average=key[1])
            self._painters.move_to_end(key)
            return self._painters[key]

    def _load(self, folder: str | None, *, average: bool) -> painting.Painter:
        given = [] if folder is None else [folder]
        return painting.load(*given, ema=average, batch=self._batch)


def _described(folders: Sequence[files.PathLike]) -> list[Model]:
    """Each folder once, its name as short as it can be told apart by.

    Raises:
      InputError: a folder holds no checkpoint that can be read.
    """
    paths = [str(files.absolute(folder)) for folder in dict.fromkeys(map(str, folders))]
    paths = list(dict.fromkeys(paths))
    short = ["/".join(pathlib.PurePath(path).parts[-2:]) for path in paths]
    found = []
    for path, name in zip(paths, short, strict=True):
        buckets.check([path])
        step = steps.chosen(steps.store_folder(path))
        try:
            meta = step.meta()
        except steps.Damage as damage:
            raise InputError(f"{path}: step {step.number} is damaged: {damage}") from None
        limits = painting.limits_of(config_lib.from_dict(meta["config"]))
        name = path if short.count(name) > 1 else name
        found.append(Model(name, path, "ema" in meta["leaves"], limits))
    return found
