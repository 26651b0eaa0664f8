"""Pretrains the tiny Qwen2.5-VL: next-token prediction of captions from pictures.

    python launch/tiny/pretrain_vlm.py [--minutes N --steps N --batch N --out DIR]

Conversations have the very layout of training rows (`data/prompts.py`), with the answer in the
place of the query slots: one or two pictures and their captions, two subjects composed in one
picture, and text alone (instructions and captions, read and repeated). Only the corpus's training
side is learnt; the validation side gives the figures. Writes a Hugging Face folder: config.json,
model.safetensors in float16, metrics.json and a model card.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.base.errors import InputError, exits
from qk_jax.data import prompts
from qk_jax.data.synthesis import scenes, tasks
from qk_jax.data.synthesis.corpus import Corpus, Cutout
from qk_jax.data.synthesis.wordings import BESIDE
from qk_jax.models import layers
from qk_jax.models.qwen_vl import PRESETS, QwenVL
from qk_jax.weights.write import export_vlm

ASSETS = pathlib.Path(__file__).resolve().parents[2] / "qk_jax" / "assets"
CONFIG = PRESETS["tiny"]
MODEL = QwenVL(CONFIG)
VLM_PIXELS = 112 * 112
ANSWER = 24  # tokens, with <|im_end|>
ASK_CAPTION = ("", "what is it?", "describe the picture")
SQUARE, WIDE, TALL = (64, 64), (48, 80), (80, 48)
KINDS = {  # sizes of the pictures of a row; each compiles once
    "one": (SQUARE,),
    "two": (WIDE, TALL),
    "text": (),
}


class Conversation(NamedTuple):
    """What the user shows and says, and the answer; `learn_text`: predict the user's words too."""

    pictures: tuple[np.ndarray, ...]
    text: str
    answer: str
    learn_text: bool = False


class Shown(NamedTuple):
    """A picture uint8 [H, W, 3] and its full caption."""

    pixels: np.ndarray
    caption: str


def plain_picture(subject: Cutout, size: tuple[int, int]) -> np.ndarray:
    """The subject as large as it goes on white, uint8 [H, W, 3]."""
    return scenes.paint(scenes.flat(size, "white"), [scenes.Item(subject.rgba, (0, 0, 1, 1))])


def thing(rng: Random, subjects: Sequence[Cutout]) -> tuple[np.ndarray, str]:
    """Something to draw and its name: mostly a subject, sometimes tinted, sometimes a shape."""
    chance = rng.random()
    if chance < 0.1:
        kind, colour = rng.choice(scenes.SHAPES), rng.choice(scenes.TINTS)
        return scenes.shape(kind, colour), f"{colour} {kind}"
    subject = rng.choice(subjects)
    if chance < 0.2:
        colour = rng.choice(scenes.TINTS)
        return scenes.tinted(subject.rgba, colour), f"{colour} {subject.caption}"
    return subject.rgba, subject.caption


def draw(rng: Random, size: tuple[int, int], chance: float, things, boxes, caption: str) -> Shown:
    """Things in boxes, with `chance` on a coloured background, which the caption then names."""
    colour = "white"
    if rng.random() < chance:
        means = [np.average(x[..., :3], axis=(0, 1), weights=x[..., 3]) for x, _ in things]
        colour = scenes.contrasting(rng, np.stack(means), list(scenes.COLOURS))
    items = [scenes.Item(rgba, box) for (rgba, _), box in zip(things, boxes, strict=True)]
    pixels = scenes.paint(scenes.flat(size, colour), items)
    return Shown(pixels, caption + ("" if colour == "white" else f" on a {colour} background"))


def one_subject(rng: Random, subjects: Sequence[Cutout], size: tuple[int, int]) -> Shown:
    """One thing, sometimes small at a named place."""
    what = thing(rng, subjects)
    if rng.random() < 0.2:
        x, y = rng.randrange(2), rng.randrange(2)
        box = (x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5)
        place = f" in the {('top', 'bottom')[y]} {('left', 'right')[x]} corner"
    else:
        left, top, right, bottom = (rng.uniform(0, 0.15) for _ in range(4))
        box, place = (left, top, 1 - right, 1 - bottom), ""
    return draw(rng, size, 0.35, [what], [box], what[1] + place)


def two_subjects(rng: Random, subjects: Sequence[Cutout], size: tuple[int, int]) -> Shown:
    """Two things side by side or one above the other, and the relation in words."""
    things = [thing(rng, subjects), thing(rng, subjects)]
    beside = size[1] > size[0] or (size[0] == size[1] and rng.random() < 0.5)
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)] if beside else [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]
    swapped = rng.random() < 0.5
    side = ("left", "right")[swapped] if beside else ("top", "bottom")[swapped]
    caption = f"{things[0][1]} {BESIDE[side]} {things[1][1]}"
    return draw(rng, size, 0.5, things, boxes[::-1] if swapped else boxes, caption)


def pictured(rng: Random, subjects: Sequence[Cutout], sizes) -> Conversation:
    """One or two pictures and their captions, or the caption of the one asked for."""
    if len(sizes) == 1:
        shown = [rng.choice((one_subject, one_subject, two_subjects))(rng, subjects, sizes[0])]
        text, answer = rng.choice(ASK_CAPTION), shown[0].caption
    elif rng.random() < 0.6:
        shown = [one_subject(rng, subjects, size) for size in sizes]
        text, answer = "what are they?", " and ".join(one.caption for one in shown)
    else:
        shown = [two_subjects(rng, subjects, size) for size in sizes]
        asked = rng.randrange(2)
        text, answer = f"what is in picture {asked + 1}?", shown[asked].caption
    return Conversation(tuple(one.pixels for one in shown), text, answer)


@functools.cache
def templates() -> tuple[str, ...]:
    """Instructions in all wordings."""
    return tuple(tasks.template_texts())


def words_only(rng: Random, subjects: Sequence[Cutout]) -> Conversation:
    """An instruction filled with names of things, or a caption: read, then repeated."""
    text = rng.choice(subjects).caption
    if rng.random() < 0.5:
        samples = re.compile(r"\b(red apple|dog|car)\b")  # that fill the gaps of template_texts
        text = samples.sub(lambda _: thing(rng, subjects)[1], rng.choice(templates()))
    return Conversation((), text, text, learn_text=True)


def converse(rng: Random, kind: str, subjects: Sequence[Cutout]) -> Conversation:
    """A random conversation of one kind."""
    sizes = KINDS[kind]
    return pictured(rng, subjects, sizes) if sizes else words_only(rng, subjects)


class Rows:
    """Conversations as batches of static shape."""

    def __init__(self, tokenizer_folder: pathlib.Path):
        tokenizer = prompts.load_tokenizer(tokenizer_folder)
        if len(tokenizer) != CONFIG.text.vocab_size:
            raise InputError(f"{tokenizer_folder} has {len(tokenizer)} tokens; train it again")
        self.end = tokenizer.eos_token_id
        self.layouts = {
            pictured: prompts.PromptLayout(tokenizer, length, ANSWER, VLM_PIXELS)
            for pictured, length in ((True, 8), (False, 32))
        }
        self.answers = dataclasses.replace(self.layouts[True], max_text=ANSWER - 1)

    def batch(self, talks: list[Conversation], blind: bool = False) -> tuple[dict, tuple]:
        """(arrays, grids): model inputs, and `weights` [B, L] on the last L tokens to predict.

        `blind` leaves the pictures out of the rows (for a loss without pictures).
        """
        sizes = tuple(picture.shape[:2] for picture in talks[0].pictures)
        layout = self.layouts[bool(sizes)]
        rows = [self._row(layout, talk, sizes, blind) for talk in talks]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        shown = [prompts.pixel_values(talk.pictures, VLM_PIXELS) for talk in talks]
        batch["pixel_values"] = np.stack(shown)
        return batch, layout.grids(sizes)

    def _row(self, layout, talk: Conversation, sizes, blind: bool) -> dict[str, np.ndarray]:
        row = layout.build(talk.text, sizes, pictures=not blind)
        text_mask = row.pop("text_mask")
        answer = np.append(self.answers.encode_text(talk.answer), self.end)
        ids, mask = row["input_ids"], row["attention_mask"]
        ids[-ANSWER:][: len(answer)] = answer
        mask[len(mask) - ANSWER + len(answer) :] = False
        tail = np.zeros(layout.tail_tokens, bool)
        tail[0] = talk.learn_text
        weights = [text_mask & talk.learn_text, tail, np.arange(ANSWER) < len(answer)]
        return row | {"weights": np.concatenate(weights).astype(np.float32)}


def token_losses(params, batch, grids):
    """Cross-entropy [B, L] of the last L tokens, float32, times their weights."""
    hidden = MODEL.apply(
        {"params": params}, batch["input_ids"], batch["position_ids"], batch["attention_mask"],
        batch["pixel_values"], grids,
    )  # fmt: skip
    length = batch["weights"].shape[1]
    logits = MODEL.apply({"params": params}, hidden[:, -length - 1 : -1], method="logits")
    labels = batch["input_ids"][:, -length:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses * batch["weights"]


@functools.partial(jax.jit, static_argnames="grids")
def answer_losses(params, batch, grids):
    """Summed loss per row [B] and number of tokens [B]."""
    return token_losses(params, batch, grids).sum(1), batch["weights"].sum(1)


def answer_loss(params, batch, grids):
    """Loss per learnt token."""
    return token_losses(params, batch, grids).sum() / batch["weights"].sum()


SHARES = {"one": 0.45, "two": 0.4, "text": 0.15}  # of the KINDS among the batches


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_step` applies; decays the blocks' kernels."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.05, lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    )


@functools.partial(jax.jit, static_argnames="grids", donate_argnums=(0, 1))
def train_step(params, state, batch, rate, grids):
    """One AdamW step: (params, state, loss)."""
    value, grads = jax.value_and_grad(answer_loss)(params, batch, grids)
    updates, state = optimizer().update(grads, state, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), state, value


def learning_rate(step: int, progress: float, peak: float, warmup: int) -> float:
    """Linear warm-up in steps, then cosine to zero over `progress` in [0, 1]."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def losses_of(params, rows: Rows, talks: list[Conversation], blind=False, size=64) -> np.ndarray:
    """Summed answer loss and tokens of each conversation [n, 2]; n need not fill batches."""
    out = []
    for start in range(0, len(talks), size):
        part = talks[start : start + size]
        part = part + part[:1] * (size - len(part))  # one compiled shape
        batch, grids = rows.batch(part, blind)
        out.append(np.stack(answer_losses(params, batch, grids), axis=1))
    return np.concatenate(out)[: len(talks)]


def caption_figures(params, rows: Rows, subjects: Sequence[Cutout]) -> dict[str, float]:
    """Caption loss in nats per token with the right, another and no picture, standard errors."""
    pictures = [plain_picture(subject, SQUARE) for subject in subjects]
    right = [
        Conversation((p,), "", s.caption) for p, s in zip(pictures, subjects, strict=True)
    ]  # fmt: skip
    wrong = [
        Conversation((p,), "", s.caption)
        for p, s in zip(pictures[1:] + pictures[:1], subjects, strict=True)
    ]
    given = {
        "right": losses_of(params, rows, right),
        "shuffled": losses_of(params, rows, wrong),
        "none": losses_of(params, rows, right, blind=True),
    }
    figures = {f"loss_{name}": float(x[:, 0].sum() / x[:, 1].sum()) for name, x in given.items()}
    margin = (given["shuffled"] - given["right"])[:, 0] / given["right"][:, 1]
    figures["margin"] = float(margin.mean())
    figures["margin_standard_error"] = float(margin.std() / math.sqrt(len(margin)))
    return figures


def retrieval_figures(
    params, rows: Rows, subjects: Sequence[Cutout], seed: int
) -> dict[str, float]:
    """Which of n captions suits a picture best: the likelihood against that without picture."""
    captions = sorted({subject.caption for subject in subjects})
    first = {subject.caption: subject for subject in reversed(subjects)}
    chosen = np.random.default_rng(seed).permutation(captions)[:50]
    shown = [plain_picture(first[caption], SQUARE) for caption in chosen]
    pairs = [Conversation((picture,), "", str(c)) for picture in shown for c in chosen]
    scores = -losses_of(params, rows, pairs)[:, 0].reshape(len(chosen), len(chosen))
    prior = -losses_of(params, rows, pairs[: len(chosen)], blind=True)[:, 0]
    order = np.argsort(-(scores - prior), axis=1)
    rank = np.argmax(order == np.arange(len(chosen))[:, None], axis=1)
    return {
        "candidates": len(chosen),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "chance_top1": 1 / len(chosen),
        "chance_top5": 5 / len(chosen),
    }


def fresh(args: argparse.Namespace, rows: Rows, train) -> dict:
    """Random parameters."""
    batch, grids = rows.batch([converse(Random(args.seed), "one", train)])
    return layers.init_params(
        MODEL, jax.random.key(args.seed), batch["input_ids"], batch["position_ids"],
        batch["attention_mask"], batch["pixel_values"], grids,
    )  # fmt: skip


def learn(params: dict, args: argparse.Namespace, rows: Rows, train) -> tuple[dict, dict]:
    """The training: (params, figures)."""
    state = optimizer().init(params)
    seen: dict[str, list[float]] = {kind: [] for kind in SHARES}
    start, step = time.monotonic(), 0
    while True:
        minutes = (time.monotonic() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        if progress >= 1:
            break
        rng = Random(f"{args.seed}/{step}")
        (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
        batch, grids = rows.batch([converse(rng, kind, train) for _ in range(args.batch)])
        rate = learning_rate(step, progress, args.rate, args.warmup)
        params, state, value = train_step(params, state, batch, rate, grids)
        seen[kind].append(float(value))
        step += 1
        if step % 50 == 0:
            recent = " ".join(f"{k} {np.mean(v[-20:]):.3f}" for k, v in seen.items() if v)
            print(f"{step} minute {minutes:.1f} {rate:.1e} | {recent}", flush=True)
    return params, {
        "steps": step,
        "rows": args.batch,
        "rate": args.rate,
        "minutes": round(minutes, 1),
        "last_losses": {kind: float(np.mean(v[-20:])) for kind, v in seen.items() if v},
    }


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# Tiny Qwen2.5-VL

The architecture of Qwen2.5-VL ({parameters:,} parameters, float16) trained from scratch, so that
the small configurations of qk_jax start from a pretrained part as large ones do. It knows the
words and pictures of the embedded corpus and nothing else; it is no assistant.

- Data: {train_pictures:,} captioned cut-outs of the training side of `qk_jax/assets/corpus`
  (licences beside it), alone, in pairs, small at a named place, on coloured backgrounds, at 64x64,
  48x80 and 80x48 pixels, shown at about {vlm_pixels:,} pixels; wordings of the instructions and
  captions as text. No subject of the validation side was learnt.
- Training: next token of the answer, and of the user's words in rows of text alone, all weights;
  {steps:,} steps of {rows} rows in {minutes:.0f} minutes on a share of one CPU core, AdamW, peak
  rate {rate:g}, {warmup} steps of warm-up, cosine to zero, float32.

| validation side ({held_pictures:,} pictures) | |
| --- | --- |
| caption loss, right picture (nats per token) | {loss_right:.3f} |
| caption loss, another record's picture | {loss_shuffled:.3f} |
| caption loss, no picture | {loss_none:.3f} |
| margin of the right picture over another | {margin:.3f} ± {margin_standard_error:.3f} (s.e.) |
| right caption among {candidates} by the picture: top 1 / top 5 | {top1:.0%} / {top5:.0%} |
| chance | {chance_top1:.0%} / {chance_top5:.0%} |

On the training side: right picture {train_loss_right:.3f}, another {train_loss_shuffled:.3f};
top 1 / top 5 among {candidates} {train_top1:.0%} / {train_top5:.0%}. All figures: `metrics.json`.
Tokenizer: `../tokenizer`. Made by `launch/tiny/pretrain_vlm.py`.
"""


def report(args, params, rows, train, held, training: dict) -> dict[str, object]:
    """All figures of the finished model."""
    sample = [train[i] for i in np.random.default_rng(args.seed).permutation(len(train))[:400]]
    on_train = caption_figures(params, rows, sample)
    on_train |= retrieval_figures(params, rows, sample, args.seed)
    on_held = caption_figures(params, rows, held) | retrieval_figures(params, rows, held, args.seed)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "training": training,
        "warmup": args.warmup,
        "seed": args.seed,
        "train_pictures": len(train),
        "held_pictures": len(held),
        "validation": on_held,
        "train": on_train,
    }


def write(out: pathlib.Path, params, metrics: dict) -> None:
    """The Hugging Face folder."""
    export_vlm(jax.device_get(params), CONFIG, out, jnp.float16)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    card = CARD.format(
        **{k: v for k, v in metrics.items() if not isinstance(v, dict | list)},
        **metrics["training"],
        **metrics["validation"],
        **{f"train_{k}": v for k, v in metrics["train"].items()},
        vlm_pixels=VLM_PIXELS,
    )
    (out / "README.md").write_text(card)


@exits
def main() -> None:
    """Reads the corpus, trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=pathlib.Path, default=ASSETS / "corpus")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=ASSETS / "tiny" / "tokenizer")
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS / "tiny" / "vlm")
    parser.add_argument("--steps", type=int, default=6000, help="at most")
    parser.add_argument("--minutes", type=float, default=25.0, help="at most")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.minutes <= 0 or args.batch < 1:
        raise InputError("--steps, --minutes and --batch must be positive")
    rows = Rows(args.tokenizer)
    train, held = (list(Corpus(side, args.corpus)) for side in ("train", "validation"))
    print(f"{len(train)} pictures to learn, {len(held)} held out", flush=True)
    params, training = learn(fresh(args, rows, train), args, rows, train)
    metrics = report(args, params, rows, train, held, training)
    print(json.dumps(metrics, indent=1), flush=True)
    write(args.out, params, metrics)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
