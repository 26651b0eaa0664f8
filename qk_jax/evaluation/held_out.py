"""What a model has learnt, in figures, on subjects that it was not trained on.

Every figure is paired: the same examples, noise and times for all phases of a training, so that
phases can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from qk_jax.data import prompts
from qk_jax.data.example import TASKS, TaskSettings
from qk_jax.data.synthesis import tasks
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.data.synthesis.scenes import COLOURS
from qk_jax.evaluation import similarity
from qk_jax.painting.painter import Painter
from qk_jax.painting.request import Request, Settings, request_of
from qk_jax.pictures.grids import grid_of, vision_size
from qk_jax.pictures.sizes import PACKED

Figures = dict[str, Any]
GROUNDED = ("customization", "composition")  # whose words name a background
PLAIN = 4.0  # levels by which the border of a background of one colour deviates at most


class Case(NamedTuple):
    """A request with the picture that it should give, uint8 [H, W, 3] of the request's size, and
    what is done in it (`Example.kind`)."""

    request: Request
    truth: np.ndarray
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
      records: held-out examples of each task; a multiple of `batch`.
      batch: slots of every program.
      times: where on the way from picture (0) to noise (1) the loss is taken.
      captions: training captions among which a painted picture is looked up.
      words: settings of pictures painted from words alone, which have many right answers.
      pictures: settings of pictures painted from pictures, which have one: with hardly any
        guidance, since the squared error is judged.
      sheet: pictures of each task that are shown to people.
    """

    records: int = 32
    batch: int = 16
    times: tuple[float, ...] = (0.15, 0.35, 0.55, 0.75, 0.95)
    captions: int = 100
    words: Settings = Settings(steps=12, guidance=3.0, image_guidance=1.0)
    pictures: Settings = Settings(steps=12, guidance=1.5, image_guidance=1.0)
    sheet: int = 8

    def __post_init__(self) -> None:
        if self.records < 2 or self.records % self.batch:
            raise ValueError(f"{self.records} records are no multiple of the batch {self.batch}")


SMOKE = Extent(
    records=8, batch=8, times=(0.3, 0.7), captions=16, sheet=4,
    words=Settings(steps=4, guidance=1.0, image_guidance=1.0),
    pictures=Settings(steps=4, guidance=1.0, image_guidance=1.0),
)  # fmt: skip
LONG = Extent(
    records=96,
    words=Settings(steps=30, guidance=3.0, image_guidance=1.0),
    pictures=Settings(steps=30, guidance=1.5, image_guidance=1.0),
)


class Evaluator:
    """Figures of one painter. All cases of a task have the same shapes."""

    def __init__(self, painter: Painter, extent: Extent):
        self.painter, self.extent = painter, extent

    # ---- validation loss, with the right condition and with another record's -------------------

    def losses(self, cases: Sequence[Case], shift: int = 0) -> np.ndarray:
        """Loss [N] of each case, averaged over `extent.times`.

        With `shift` a case gets text and pictures of the one `shift` further; its target, noise and
        times stay.
        """
        painter, slots = self.painter, self.extent.batch
        height, width = cases[0].request.size
        out = []
        for start in range(0, len(cases), slots):
            chunk = cases[start : start + slots]
            given = [cases[(start + i + shift) % len(cases)].request for i in range(slots)]
            batch = painter.collate(given)
            context, mask = painter.programs.context(painter.params, batch)
            truth = np.stack([case.truth for case in chunk])
            target = painter.programs.encode(painter.params, truth)
            latents = painter.latents(batch)
            means = []
            for time in self.extent.times:
                noise = [painter.noise(_noised(case.request, time)) for case in chunk]
                means.append(
                    painter.programs.loss(
                        painter.params, target, np.stack(noise), time, context, mask, latents,
                        batch["roles"], batch["condition_mask"],
                        grid=(height // PACKED, width // PACKED),
                    )
                )  # fmt: skip
            out.append(np.mean(np.asarray(means, np.float64), axis=0))
        return np.concatenate(out)

    def margin(self, cases: Sequence[Case]) -> Figures:
        """Validation loss with right and with shuffled conditions, and their paired difference."""
        right = self.losses(cases)
        shuffled = self.losses(cases, shift=len(cases) // 2)
        margin, error = similarity.mean_and_error(shuffled - right)
        return {
            "loss": float(right.mean()),
            "loss_shuffled": float(shuffled.mean()),
            "margin": margin,
            "margin_standard_error": error,
            "records": len(cases),
        }

    # ---- painted pictures against the truth ----------------------------------------------------

    def fidelity(self, cases: Sequence[Case], painted: Sequence[np.ndarray]) -> Figures:
        """PSNR against the truth of the painted picture, and of copying a condition picture; of all
        cases, and of those of each kind where there are several."""
        truth = np.stack([case.truth for case in cases])
        ours = similarity.psnr(np.stack(painted), truth)
        copy = best_copies(cases) if cases[0].request.pictures else None
        figures = _fidelity(ours, copy)
        kinds = np.array([case.kind for case in cases])
        if len(set(kinds)) > 1:
            figures["kinds"] = {
                str(kind): _fidelity(
                    ours[kinds == kind], None if copy is None else copy[kinds == kind]
                )
                for kind in sorted(set(kinds))
            }
        return figures

    def backgrounds(self, cases: Sequence[Case], painted: Sequence[np.ndarray]) -> Figures:
        """How often the background has the right colour: the mean of the picture's border is nearer
        to the truth's than to any other named colour. Of the cases whose background has one."""
        palette = np.array(list(COLOURS.values()), np.float64)
        right = []
        for case, picture in zip(cases, painted, strict=True):
            truth = similarity.border(case.truth)
            if truth.std(axis=0).max() < PLAIN:
                named = np.linalg.norm(palette - truth.mean(axis=0), axis=1).argmin()
                found = np.linalg.norm(palette - similarity.border(picture).mean(axis=0), axis=1)
                right.append(found.argmin() == named)
        if not right:
            return {}
        share, error = similarity.mean_and_error(np.asarray(right))
        return {"background": share, "background_standard_error": error, "backgrounds": len(right)}

    def paint(self, cases: Sequence[Case]) -> list[np.ndarray]:
        """The picture that the model paints for each example."""
        requests = [case.request for case in cases]
        has_pictures = bool(requests[0].pictures)
        return self.painter.paint(
            requests, self.extent.pictures if has_pictures else self.extent.words
        )

    # ---- which caption is this the picture of? -------------------------------------------------

    def embed(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Mean feature of the frozen vision tower: pictures of one size -> [N, D]."""
        area, slots = self.painter.config.vlm_pixels, self.extent.batch
        height, width = pictures[0].shape[:2]
        grid = grid_of(*vision_size(height, width, area))
        out = []
        for start in range(0, len(pictures), slots):
            chunk = list(pictures[start : start + slots])
            filled = chunk + chunk[-1:] * (slots - len(chunk))
            patches = np.stack([prompts.pixel_values([x], area) for x in filled])
            pooled = self.painter.programs.pool(self.painter.params, patches, grid=grid)
            out.append(np.asarray(pooled)[: len(chunk)])
        return np.concatenate(out)

    def retrieval(self, cases: Sequence[Case], painted: Sequence[np.ndarray]) -> Figures:
        """How often the right picture is the nearest to the painted one, or among the nearest five.

        Two spaces: 'pixels' are the colours of an 8 x 8 grid, 'vision' the frozen vision tower's
        pooled features; see `similarity.ranks`. Chance is 1 / N and 5 / N.
        """
        truth = [case.truth for case in cases]
        spaces = {
            "pixels": lambda x: similarity.coarse(np.stack(x)),
            "vision": self.embed,
        }
        figures: Figures = {
            "captions": len(cases),
            "chance_top1": 1 / len(cases),
            "chance_top5": min(1.0, 5 / len(cases)),
        }
        for name, features in spaces.items():
            ranks = similarity.ranks(features(list(painted)), features(truth))
            figures[name] = {
                "top1": float(np.mean(ranks < 1)),
                "top5": float(np.mean(ranks < 5)),
                "median_rank": float(np.median(ranks) + 1),
            }
        return figures

    # ---- the same picture as source and as reference (Table 9 of the paper) --------------------

    def roles(self, cases: Sequence[Case]) -> Figures:
        """Identity and freedom when one condition picture is given as source or as reference.

        Prompts, pictures, noise and weights are the same: only the positions of the picture's
        tokens differ. Identity, painted against condition picture: PSNR, and cosine of the frozen
        vision tower's pooled features, centred by the mean over all condition pictures. Freedom:
        `similarity.layout_change` and `similarity.displacement` of the contours.
        """
        pictures = np.stack([case.request.pictures[0] for case in cases])
        shown = self.embed(list(pictures))
        centre = shown.mean(axis=0)
        measured: dict[str, dict[str, np.ndarray]] = {}
        for role in ("source", "reference"):
            requests = [with_role(case.request, role) for case in cases]
            painted = np.stack(self.painter.paint(requests, self.extent.pictures))
            likeness = similarity.cosine(self.embed(list(painted)) - centre, shown - centre)
            measured[role] = {
                "identity_cosine": np.diagonal(likeness),
                "identity_psnr": similarity.psnr(painted, pictures),
                "layout_change": similarity.layout_change(pictures, painted),
                "displacement": similarity.displacement(pictures, painted),
            }
        figures: Figures = {"records": len(cases)}
        for name in measured["source"]:
            source, reference = measured["source"][name], measured["reference"][name]
            difference, error = similarity.mean_and_error(source - reference)
            figures[name] = {
                "source": float(source.mean()),
                "reference": float(reference.mean()),
                "source_minus_reference": difference,
                "standard_error": error,
            }
        return figures


def _fidelity(ours: np.ndarray, copy: np.ndarray | None) -> Figures:
    """Figures of the PSNR [N] of painted pictures, and of copies, if there can be any."""
    figures: Figures = {"psnr": float(ours.mean()), "records": len(ours)}
    figures["psnr_standard_error"] = similarity.mean_and_error(ours)[1]
    if copy is not None:
        figures["psnr_copy"] = float(copy.mean())
        gain, error = similarity.mean_and_error(ours - copy)
        figures |= {"gain_over_copy": gain, "gain_standard_error": error}
    return figures


def _noised(request: Request, time: float) -> Request:
    """The same request with noise of its own for each time, unlike that of painting."""
    return dataclasses.replace(request, number=1_000_000 + round(1000 * time))


def held_out_cases(run: ConfigDict, count: int) -> dict[str, list[Case]]:
    """`count` validation cases of every task, of one shape per task, always the same.

    All have the training's first size, compositions its widest and two references, and references
    the squarest; so few programs are compiled. Each case has a first subject of its own.

    Args:
      run: a training config, whose sizes and validation seed are used.
      count: of each task.
    """
    settings = TaskSettings.from_config(run.data, run.validation.seed)
    widest = max(settings.sizes, key=lambda size: size[1] / size[0])
    corpus = Corpus("validation", run.data.corpus)
    out = {}
    for task in TASKS:
        composed = task == "composition"
        found = tasks.examples(
            "validation", task, count, settings=settings, corpus=corpus,
            size=widest if composed else settings.sizes[0], pictures=2 if composed else None,
            reference=settings.reference_shapes[settings.squarest(2 if composed else 1)],
        )  # fmt: skip
        out[task] = [Case(request_of(x, number=n), x.target, x.kind) for n, x in enumerate(found)]
    return out


def captions(run: ConfigDict, count: int) -> list[Case]:
    """`count` captions of the training split with their pictures on white, for retrieval."""
    settings = TaskSettings.from_config(run.data, run.validation.seed)
    found = tasks.examples(
        "train", "text_to_image", count, settings=settings,
        corpus=Corpus("train", run.data.corpus), size=settings.sizes[0], kind="plain",
    )  # fmt: skip
    return [Case(request_of(x, number=10_000 + n), x.target) for n, x in enumerate(found)]


def best_copies(cases: Sequence[Case]) -> np.ndarray:
    """PSNR [N] of the condition picture that is nearest to the truth, shown whole at its size."""
    best = []
    for request, truth, _ in cases:
        copies = [
            np.asarray(ImageOps.pad(Image.fromarray(picture), request.size[::-1], color="white"))
            for picture in request.pictures
        ]
        best.append(max(float(similarity.psnr(copy, truth)) for copy in copies))
    return np.asarray(best)


def with_role(request: Request, role: str) -> Request:
    """The request with its single condition picture given as 'source' or as 'reference'."""
    (picture,) = request.pictures
    if role == "source":
        return dataclasses.replace(request, source=picture, references=())
    return dataclasses.replace(request, source=None, references=(picture,))


def evaluate(
    painter: Painter,
    extent: Extent,
    held_out: Mapping[str, Sequence[Case]],
    captions: Sequence[Case],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Figures, dict[str, list[np.ndarray]]]:
    """All figures of one model.

    Args:
      painter: with `batch` slots like the extent's.
      extent: how much is measured.
      held_out: cases of each task, from subjects that were never trained on.
      captions: text-to-image cases of the training split, for retrieval.
      say: called with a line for every finished part.

    Returns:
      ({'tasks': {task: figures}, 'retrieval': ..., ['roles': ...]}, painted pictures by task).
      'roles' only for a model that takes pictures as VAE tokens: no other knows roles.
    """
    evaluator = Evaluator(painter, extent)
    tasks: Figures = {}
    painted: dict[str, list[np.ndarray]] = {}
    for task in TASKS:
        cases = held_out[task]
        painted[task] = evaluator.paint(cases)
        figures = evaluator.margin(cases) | evaluator.fidelity(cases, painted[task])
        if task in GROUNDED:
            figures |= evaluator.backgrounds(cases, painted[task])
        tasks[task] = figures
        say(
            f"{task}: loss {figures['loss']:.4f}, with shuffled conditions "
            f"{figures['margin']:+.4f} ± {figures['margin_standard_error']:.4f}, "
            f"PSNR {figures['psnr']:.2f} dB"
        )
    out: Figures = {"tasks": tasks}
    out["retrieval"] = evaluator.retrieval(captions, evaluator.paint(captions))
    say(f"retrieval among {len(captions)}: top-1 {out['retrieval']['vision']['top1']:.2f}")
    if painter.config.condition_latents:
        out["roles"] = evaluator.roles(held_out["customization"])
        say("source against reference: done")
    return out, painted
