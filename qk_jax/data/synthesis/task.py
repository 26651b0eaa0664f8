"""What the tasks of made examples share: how one is drawn until its words can be seen."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from random import Random

import numpy as np

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import buckets
from qk_jax.data.example import Example, TaskSettings, hashed
from qk_jax.data.synthesis import scenes
from qk_jax.data.synthesis.corpus import Corpus, Cutout
from qk_jax.data.synthesis.references import References
from qk_jax.data.synthesis.scenes import COLOURS
from qk_jax.data.synthesis.wordings import WORDINGS, alike, with_article
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.roles import REFERENCE, SOURCE

# A caption with more words names a subject in tasks with one subject only: instructions stay short.
_SHORT = 4
# Draws of an example; the second half of them may change its kind.
_TRIES = 32


def uniform(key: int, numbers: np.ndarray) -> np.ndarray:
    """A number in [0, 1) drawn for each of `numbers`, by splitmix64."""
    with np.errstate(over="ignore"):
        x = (numbers.astype(np.uint64) + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64


class Task(abc.ABC):
    """A task on a corpus (a `Source`).

    Example i shows cut-out `first[i % len(first)]` and, where a task needs more, others by chance.
    """

    task: str
    variants: int  # examples per cut-out
    multiple = False  # names several subjects, so uses short captions only

    def __init__(self, corpus: Corpus, settings: TaskSettings):
        self.corpus, self.settings = corpus, settings
        self.key = hashed(settings.seed, corpus.split, self.task)
        self.first = corpus.captioned(_SHORT) if self.multiple else np.arange(len(corpus))
        if len(self.first) < 4:
            raise InputError(
                f"{corpus.file.path} has {len(self.first)} pictures fit for {self.task}; "
                "at least 4 are needed"
            )
        self.references = References(corpus, settings)
        numbers = np.arange(len(self))
        self.size_of = self._sizes(numbers).astype(np.int32)
        self.pictures_of = self._pictures(numbers).astype(np.int32)
        self.references_of = self.references.shapes(self._subjects(numbers), self.pictures_of)

    def __len__(self) -> int:
        return len(self.first) * self.variants

    def __getitem__(self, number: int) -> Example:
        """Example `number`.

        Raises: BadRecord when a picture or caption in it is bad, or when no draw shows what its
        words say.
        """
        number = int(number)
        rng = Random(self.key * 2_654_435_761 + number)
        size = self.settings.sizes[self.size_of[number]]
        cutout = self.corpus[self.first[number % len(self.first)]]
        kind = self._kind(number, rng, size)
        for tries in range(_TRIES):
            if tries >= _TRIES // 2:
                kind = self._kind(number, rng, size)
            example = self._make(number, rng, size, cutout, kind)
            if example is not None:
                return example
        raise BadRecord("hardly visible", f"{self.corpus.file.path}: {cutout.key} in {self.task}")

    # ---- what a task decides -------------------------------------------------------------------

    def _sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the target size of each example: by chance, the squarest half of the time."""
        sizes = self.settings.sizes
        order = sorted(range(len(sizes)), key=lambda i: abs(np.log(sizes[i][0] / sizes[i][1])))
        drawn = (uniform(self.key ^ 0x51, numbers) * 2 * max(1, len(sizes) - 1)).astype(np.int64)
        return np.array(order)[np.where(drawn < len(sizes), drawn, 0)]

    def _pictures(self, numbers: np.ndarray) -> np.ndarray:
        """Number of condition pictures of each example."""
        return np.ones(len(numbers))

    def _subjects(self, numbers: np.ndarray) -> np.ndarray:
        """Cut-outs [N, R] with the shapes of each example's references."""
        return np.zeros((len(numbers), 0), np.int64)

    @abc.abstractmethod
    def _kind(self, number: int, rng: Random, size: Size) -> str:
        """The kind of example `number`, a key of WORDINGS."""

    @abc.abstractmethod
    def _make(
        self, number: int, rng: Random, size: Size, first: Cutout, kind: str
    ) -> Example | None:
        """A draw of example `number` about the cut-out `first`; None when it cannot be seen."""

    # ---- what tasks share ----------------------------------------------------------------------

    def _sizes_of_cutouts(self, numbers: np.ndarray) -> np.ndarray:
        """Index of the size nearest in aspect ratio to the example's first cut-out."""
        index = self.corpus.file.index[self.first[numbers % len(self.first)]]
        return buckets.nearest(index["height"], index["width"], self.settings.sizes)

    def _others(
        self, rng: Random, taken: Sequence[Cutout], count: int, shapes: Sequence[int] = ()
    ) -> list[Cutout]:
        """`count` cut-outs with short captions whose subjects are not yet in the picture.

        No caption's words contain those of another ('apple', 'green apple'), so that every name
        means one thing. With `shapes`, of references of these if there are enough. Raises:
        BadRecord when there are none.
        """
        pool = self.corpus.captioned(_SHORT)
        shown = list(taken)
        for tried in range(100 * count):
            fit = pool
            if shapes and tried < 50 * count:
                shape = shapes[len(shown) - len(taken)]
                fit = self.references.of_shape(pool, shape, len(taken) + count)
            other = self.corpus[rng.choice(fit)]
            if not any(_same_name(other, cutout) for cutout in shown):
                shown.append(other)
            if len(shown) == len(taken) + count:
                return shown[len(taken) :]
        raise BadRecord(
            "no other name", f"{self.corpus.file.path}: beside {taken[0].caption!r:.60}"
        )

    def _ground(
        self,
        rng: Random,
        size: Size,
        cutouts: Sequence[Cutout],
        fancy: float,
        white: float = 0.0,
        unlike: np.ndarray | None = None,
    ) -> tuple[np.ndarray, str]:
        """A background and its phrase: white, one colour, or with probability `fancy` two.

        `unlike` is a canvas whose colour is left out.
        """
        if rng.random() < white:
            return scenes.flat(size, "white"), "a white background"
        shown = np.stack([cutout.colour for cutout in cutouts])
        taken = () if unlike is None else tuple(unlike[0, 0].astype(int).tolist())
        names = [name for name, colour in COLOURS.items() if colour != taken]
        first = scenes.contrasting(rng, shown, names)
        if rng.random() >= fancy:
            return scenes.flat(size, first), with_article(f"{first} background")
        rest = [name for name in names if name != first]
        second = scenes.contrasting(rng, shown, rest)
        if rng.random() < 0.4:
            phrase = f"a background from {first} at the top to {second} at the bottom"
            return scenes.gradient(size, first, second), phrase
        pattern = rng.choice(scenes.PATTERNS)
        phrase = f"a {pattern} background of {first} and {second}"
        return scenes.patterned(size, pattern, first, second), phrase

    def _example(
        self,
        number: int,
        rng: Random,
        kind: str,
        gaps: dict[str, str],
        target: np.ndarray,
        cutouts: Sequence[Cutout],
        source: np.ndarray | None = None,
        references: Sequence[Cutout] = (),
        change: float = 0.0,
    ) -> Example | None:
        """Puts an example together, with one of the wordings of its kind.

        None when less than the part `change` of the source's pixels changes visibly.
        """
        if source is not None and source.shape == target.shape:
            if scenes.changed(source, target) < change:
                return None
        instruction = rng.choice(WORDINGS[kind]).format(**gaps)
        pictures = [] if source is None else [source]
        pictures += self.references.pictures(references, self.references_of[number])
        roles = (SOURCE,) * (source is not None) + (REFERENCE,) * len(references)
        subjects = tuple(cutout.subject for cutout in cutouts)
        return Example(
            instruction, target, tuple(pictures), roles, self.task, number, kind, subjects
        )


def _same_name(one: Cutout, other: Cutout) -> bool:
    """Whether a name of one might mean the other."""
    same = {one.caption, one.subject} & {other.caption, other.subject}
    return bool(same) or alike(one.caption, other.caption)
