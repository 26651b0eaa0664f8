"""Training from what the frozen towers made of the pictures before (`data.cache`).

`encode` makes the rows: of every picture that a run may show the moments of its latents, and of
condition pictures the features of the vision tower. `CachedPadding` takes them into batches in
place of pixels, so that a step runs neither tower.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from ml_collections import ConfigDict

from qk_jax.base import files, trees
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.base.types import Batch, PaddedBatch, Tree
from qk_jax.checkpoints.digest import describe
from qk_jax.data.cache import MOMENTS, VISION, Cache, Writer, digest_of
from qk_jax.data.pipeline import Pipeline
from qk_jax.data.prompts import pixel_values
from qk_jax.experiment.plan import Plan
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.grids import MERGE
from qk_jax.pictures.sizes import PACKED
from qk_jax.training import start
from qk_jax.training.padding import Padding, abstractly, behind

log = logging.getLogger(__name__)
AT_ONCE = 32  # pictures of one size through a tower
Get = Callable[[str, np.ndarray], np.ndarray]  # kind, picture uint8 [H, W, 3] -> its row


@dataclasses.dataclass(frozen=True)
class CachedPadding:
    """Batch -> padded batch, with rows of a cache in place of pixels. It pickles to workers.

    Attributes:
      padding: of the run.
      cache: of the run.
    """

    padding: Padding
    cache: Cache

    def __call__(self, batch: Batch) -> PaddedBatch:
        """The padded batch. Raises InputError for a picture that the cache lacks."""
        return self._with_rows(batch, self.cache.get)

    def abstract(self, batch: Batch) -> PaddedBatch:
        """The shapes of the padded batch, of those of a batch."""
        return abstractly(lambda one: self._with_rows(one, self._zeros), batch)

    def _zeros(self, kind: str, picture: np.ndarray) -> np.ndarray:
        """A row of the shape that a picture's has."""
        model, size = self.padding.model, picture.shape[:2]
        if kind == VISION:
            (grid,) = model.vision_grids([size])
            width = model.vlm.vision.out_hidden_size
            return np.zeros((grid[0] * grid[1] // MERGE**2, width), self.cache.dtypes[kind])
        return np.zeros((2, math.prod(size) // PACKED**2, model.mmdit.in_channels), np.float32)

    def _with_rows(self, batch: Batch, get: Get) -> PaddedBatch:
        """The padded batch, whose pictures have no channels left: [B, H, W, 0]."""
        padded, tokens = self.padding(batch), self.padding.tokens(batch)
        latents = batch["conditions"] if self.padding.model.condition_latents else ()
        moments = [
            behind(np.stack([get(MOMENTS, picture) for picture in pictures]), 2, length)
            for pictures, length in zip((batch["target"], *latents), tokens, strict=False)
        ]
        found: dict[str, Any] = {
            **padded,
            "target": padded["target"][..., :0],
            "conditions": tuple(pictures[..., :0] for pictures in padded["conditions"]),
            "posterior": (moments[0][:, 0], moments[0][:, 1]),
            "latents": tuple(one[:, 0] for one in moments[1:]),
        }
        if VISION in self.cache.towers and batch["conditions"]:
            shown = [np.stack([get(VISION, x) for x in one]) for one in batch["conditions"]]
            length = padded["pixel_values"].shape[1] // MERGE**2
            found["features"] = behind(np.concatenate(shown, axis=1), 1, length)
            found["pixel_values"] = padded["pixel_values"][..., :0]
        return found  # type: ignore[return-value]


def padding_of(config: Mapping[str, Any]) -> Padding | CachedPadding:
    """What makes the batches of a run: with config.data.cache from rows in place of pixels.

    Raises:
      InputError: sizes are none, or the cache is none or half made.
    """
    padding, folder = Padding.from_config(config), config["data"].get("cache", "")
    if not folder:
        return padding
    cache = Cache(folder)
    cache.check_whole()
    log.info("%s has %d rows of %s", cache.folder, len(cache), " and ".join(cache.towers))
    return CachedPadding(padding, cache)


def check(plan: Plan, padding: Padding | CachedPadding, frozen: Tree) -> None:
    """Raises InputError unless the towers of a run are those that its cache was made by."""
    if not isinstance(padding, CachedPadding):
        return
    found, cache = towers(plan, frozen), padding.cache
    for kind, made in cache.towers.items():
        if found.get(kind) != made:
            raise InputError(
                f"{cache.folder} has the {kind} of other weights, or of another "
                "model.vlm_pixels, prompt or dtype.compute, than this run's; encode into another "
                "folder, or set config.data.cache to ''"
            )


def towers(plan: Plan, params: Tree) -> dict[str, str]:
    """{kind: digest of the frozen tower that makes its rows}. A tower that trains, or is adapted,
    has none."""
    config, dtype = plan.model.config, plan.config.dtype.compute
    trained = [name.removeprefix("lora/") for name in trees.flatten(plan.params)]
    shown = config.vlm.vision, config.vlm_pixels, config.picture_multiple
    found = {}
    if not any(name.startswith("vae/") for name in trained):
        found[MOMENTS] = _digest(params["vae"], config.vae, dtype)
    if not any(name.startswith("vlm/visual/") for name in trained):
        found[VISION] = _digest(params["vlm"]["visual"], shown, dtype)
    return found


def _digest(params: Tree, *facts: Any) -> str:
    leaves = {name: leaf["digest"] for name, leaf in describe(params).items()}
    text = json.dumps([leaves, repr(facts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Shown(NamedTuple):
    """A picture of an example, and of which kinds its rows are."""

    digest: bytes
    picture: np.ndarray
    kinds: tuple[str, ...]


class _Encoding:
    """The towers, and the pictures that wait for others of their size."""

    def __init__(self, plan: Plan, params: Tree, writer: Writer, kinds: Mapping[str, str]):
        self.plan, self.writer, self.count = plan, writer, collections.Counter[str]()
        self._params, self._slots = params, plan.fitting_batch(AT_ONCE)
        self._known = {kind: set[bytes]() for kind in kinds}
        self._waiting: dict[tuple[str, Size], list[_Shown]] = collections.defaultdict(list)
        model = plan.model

        def moments(params: Tree, pictures: jax.Array, grid: Any) -> jax.Array:
            tokens = math.prod(pictures.shape[1:3]) // PACKED**2
            return jnp.stack(model.posterior_tokens(params, pictures, tokens), axis=1)

        def vision(params: Tree, pixels: jax.Array, grid: Any) -> jax.Array:
            return model.vision_features(params, pixels, (grid,))

        self._towers = {
            kind: jax.jit(tower, static_argnums=2, compiler_options=plan.compiler_options())
            for kind, tower in ((MOMENTS, moments), (VISION, vision))
        }

    def add(self, shown: _Shown, old: Cache) -> None:
        """Encodes a picture, when there are enough of its size, unless that was done."""
        for kind in shown.kinds:
            known = self._known[kind]
            if shown.digest in known or old.has(kind, shown.digest):
                self.count["known"] += 1
                continue
            known.add(shown.digest)
            key = kind, shown.picture.shape[:2]
            self._waiting[key].append(shown)
            if len(self._waiting[key]) == self._slots:
                self._encode(*key)

    def _encode(self, kind: str, size: Size) -> None:
        shown = self._waiting.pop((kind, size))
        filled = [one.picture for one in shown]
        filled += filled[-1:] * (self._slots - len(shown))
        config, grid = self.plan.model.config, None
        if kind == VISION:
            (grid,) = config.vision_grids([size])
            multiple = config.picture_multiple
            filled = [pixel_values([x], config.vlm_pixels, multiple) for x in filled]
        inputs = jax.device_put(np.stack(filled), self.plan.batch_sharding)
        rows = jax.device_get(self._towers[kind](self._params, inputs, grid))
        self.writer.add(kind, [one.digest for one in shown], np.asarray(rows)[: len(shown)])
        self.count[kind] += len(shown)

    def close(self) -> None:
        """Encodes what waits, and writes all."""
        for key in list(self._waiting):
            self._encode(*key)
        self.writer.close()


def encode(config: ConfigDict, out: files.PathLike, workdir: files.PathLike, part: str) -> str:
    """Encodes every picture that a run may train on, and that the folder does not have.

    Args:
      config: of the run.
      out: folder, new or of the same towers.
      workdir: of the run, for a stage that inherits its towers from the stage before.
      part: 'I/N' for one of N such commands that share the work.

    Returns:
      what was done, in words.

    Raises:
      InputError: part is none, a tower has no origin, or the folder is of others.
    """
    index, count = _part(part)
    start.inherit(config, workdir)
    plan = Plan.build(config, check=False)
    with jax.set_mesh(plan.mesh):
        params = start.parameters(plan, workdir, only=("vae", "vlm"))
        kinds = towers(plan, params)
        dtypes = {MOMENTS: np.float32, VISION: plan.model.dtype}
        writer = Writer(out, kinds, {kind: dtypes[kind] for kind in kinds}, (index, count))
        encoding, old = _Encoding(plan, params, writer, kinds), Cache(out)
        pipeline, bad = Pipeline(config, "train", 0, 1, plan.prompts), 0
        for shown in _shown(pipeline, index, count, VISION in kinds):
            bad += not shown
            for one in shown:
                encoding.add(one, old)
        encoding.close()
    made = ", ".join(f"{encoding.count[kind]:,} of {kind}" for kind in kinds)
    return (
        f"{files.absolute(out)}: rows made: {made}; {encoding.count['known']:,} were known, {bad} "
        f"records are bad; a run takes them by --config.data.cache={out}"
    )


def _part(text: str) -> tuple[int, int]:
    """(I, N) of 'I/N'. Raises: InputError."""
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise InputError(f"--part is {text!r}; give I/N, such as 0/4 for the first of four")


def _shown(pipeline: Pipeline, index: int, count: int, vision: bool) -> Iterator[list[_Shown]]:
    """The pictures of every example of a plan, or of a part of them; none of a bad record."""
    sources = pipeline.loader.sources
    numbers = [group.numbers[index::count] for group in pipeline.groups]
    ends = np.cumsum([len(own) for own in numbers])
    latents = pipeline.config["model"]["condition_latents"]
    of_conditions = (MOMENTS,) * latents + (VISION,) * vision

    def read(place: int) -> list[_Shown]:
        group = int(np.searchsorted(ends, place, side="right"))
        try:
            example = sources[group][int(numbers[group][place - ends[group]])]
        except BadRecord as error:
            log.warning("left out a bad record: %s", error)
            return []  # grain would leave None out
        found = [_Shown(digest_of(example.target), example.target, (MOMENTS,))]
        for picture in example.pictures:
            found.append(_Shown(digest_of(picture), picture, of_conditions))
        return found

    data = pipeline.config["data"]
    ahead = grain.ReadOptions(max(data["threads"], 1), 2 * AT_ONCE)
    total = int(ends[-1])
    made = grain.MapDataset.range(total).map(read).to_iter_dataset(ahead)
    quiet = not sys.stderr.isatty()
    return iter(tqdm.tqdm(made, "encode", total, unit="example", disable=quiet))
