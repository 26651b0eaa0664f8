"""Pretrains the tiny Qwen2.5-VL: next-token prediction of captions from pictures.

    python launch/assets/pretrain_vlm.py --minutes 20 [--steps N --batch N --out DIR]

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
import io
import json
import math
import os
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageColor

from qk_jax.convert import torch_export
from qk_jax.data import prompts, records, tasks
from qk_jax.errors import InputError, exits
from qk_jax.models import layers
from qk_jax.models.qwen_vl import PRESETS, QwenVL

ASSETS = pathlib.Path(__file__).resolve().parents[2] / "qk_jax" / "assets"
CONFIG = PRESETS["tiny"]
MODEL = QwenVL(CONFIG)
VLM_PIXELS = 112 * 112
ANSWER = 28  # tokens, with <|im_end|>
COLOURS = (
    "white", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "black",
)  # fmt: skip
ASK_CAPTION = ("", "what is it?", "describe the picture")
ASK_KEYWORDS = ("which words describe it?", "keywords")
SQUARE, WIDE, TALL = (64, 64), (48, 80), (80, 48)
KINDS = {  # what a batch shows, its picture sizes and its share of the steps
    "square": ((SQUARE,), 0.4),
    "wide": ((WIDE,), 0.15),
    "tall": ((TALL,), 0.15),
    "two": ((SQUARE, SQUARE), 0.15),
    "text": ((), 0.15),
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A cut-out RGBA with its words."""

    image: Image.Image
    caption: str
    keywords: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What the user shows and says, and the answer; `learn_text`: predict the user's words too."""

    pictures: tuple[np.ndarray, ...]
    text: str
    answer: str
    learn_text: bool = False


def load_side(corpus: pathlib.Path, side: str) -> list[Subject]:
    """All subjects of one side ("train" or "validation") of the corpus, decoded."""
    file = records.RecordFile(corpus / f"{side}.array_record")
    subjects = []
    for number in range(len(file)):
        header, blobs = file[number]
        image = Image.open(io.BytesIO(blobs["image"])).convert("RGBA")
        subjects.append(Subject(image, header["caption"], tuple(header.get("keywords", ()))))
    return subjects


def put(canvas: Image.Image, image: Image.Image, box: tuple[float, float, float, float]) -> None:
    """Pastes a cut-out centred into box (left, top, right, bottom), fractions of the canvas."""
    left, top, right, bottom = (f * side for f, side in zip(box, canvas.size * 2, strict=True))
    scale = min((right - left) / image.width, (bottom - top) / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    corner = round((left + right - size[0]) / 2), round((top + bottom - size[1]) / 2)
    canvas.alpha_composite(image, (max(0, corner[0]), max(0, corner[1])))


def canvas_of(size: tuple[int, int], colour: str) -> Image.Image:
    """An empty RGBA canvas of (height, width)."""
    return Image.new("RGBA", size[::-1], ImageColor.getrgb(colour) + (255,))


def on_background(colour: str) -> str:
    """How a caption names the background; white goes without saying."""
    return "" if colour == "white" else f" on a {colour} background"


def pixels_of(canvas: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(canvas.convert("RGB"))


def plain_picture(subject: Subject, size: tuple[int, int]) -> np.ndarray:
    """The subject as large as it goes on white."""
    canvas = canvas_of(size, "white")
    put(canvas, subject.image, (0, 0, 1, 1))
    return pixels_of(canvas)


def one_subject(rng: np.random.Generator, subjects: list[Subject], size) -> Conversation:
    """A single subject, sometimes small at a named place, sometimes on a colour."""
    subject = subjects[rng.integers(len(subjects))]
    colour = COLOURS[rng.integers(len(COLOURS))] if rng.random() < 0.35 else "white"
    canvas, place = canvas_of(size, colour), ""
    if rng.random() < 0.25:
        x, y = rng.integers(0, 2, 2)
        put(canvas, subject.image, (x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5))
        place = f" at the {('upper', 'lower')[y]} {('left', 'right')[x]}"
    else:
        inset = rng.uniform(0, 0.15, 4)
        put(canvas, subject.image, (inset[0], inset[1], 1 - inset[2], 1 - inset[3]))
    if subject.keywords and rng.random() < 0.2:
        ask = ASK_KEYWORDS[rng.integers(len(ASK_KEYWORDS))]
        return Conversation((pixels_of(canvas),), ask, ", ".join(subject.keywords))
    ask = ASK_CAPTION[rng.integers(len(ASK_CAPTION))]
    answer = subject.caption + place + on_background(colour)
    return Conversation((pixels_of(canvas),), ask, answer)


def two_subjects(rng: np.random.Generator, subjects: list[Subject], size) -> Conversation:
    """Two subjects side by side or one above the other, and the relation in words."""
    first, second = (subjects[i] for i in rng.integers(0, len(subjects), 2))
    colour = COLOURS[rng.integers(len(COLOURS))] if rng.random() < 0.5 else "white"
    canvas = canvas_of(size, colour)
    beside = size[1] > size[0] or (size[0] == size[1] and rng.random() < 0.5)
    boxes = ((0, 0, 0.5, 1), (0.5, 0, 1, 1)) if beside else ((0, 0, 1, 0.5), (0, 0.5, 1, 1))
    flipped = int(rng.integers(2))
    put(canvas, first.image, boxes[flipped])
    put(canvas, second.image, boxes[1 - flipped])
    words = ("to the left of", "to the right of") if beside else ("above", "below")
    answer = f"{first.caption} {words[flipped]} {second.caption}{on_background(colour)}"
    return Conversation((pixels_of(canvas),), ASK_CAPTION[rng.integers(3)], answer)


def two_pictures(rng: np.random.Generator, subjects: list[Subject]) -> Conversation:
    """Two pictures and both captions, or the caption of the one that is asked for."""
    chosen = [subjects[i] for i in rng.integers(0, len(subjects), 2)]
    shown = tuple(plain_picture(subject, SQUARE) for subject in chosen)
    if rng.random() < 0.5:
        both = " and ".join(subject.caption for subject in chosen)
        return Conversation(shown, "what are they?", both)
    asked = int(rng.integers(2))
    return Conversation(shown, f"what is in picture {asked + 1}?", chosen[asked].caption)


@functools.cache
def templates() -> tuple[str, ...]:
    """The wordings of all instructions."""
    return tuple(tasks.template_texts())


def words_only(rng: np.random.Generator, subjects: list[Subject]) -> Conversation:
    """An instruction filled with captions, or a caption: read, then repeated."""
    if rng.random() < 0.5:
        template = templates()[rng.integers(len(templates()))]
        text = re.sub(r"\{\w*\}", lambda _: subjects[rng.integers(len(subjects))].caption, template)
    else:
        text = subjects[rng.integers(len(subjects))].caption
    return Conversation((), text, text, learn_text=True)


def draw(rng: np.random.Generator, kind: str, subjects: list[Subject]) -> Conversation:
    """A random conversation of one kind."""
    if kind == "text":
        return words_only(rng, subjects)
    if kind == "two":
        return two_pictures(rng, subjects)
    ((size,), _) = KINDS[kind]
    return (two_subjects if rng.random() < 0.35 else one_subject)(rng, subjects, size)


class Rows:
    """Conversations as batches of static shape."""

    def __init__(self, tokenizer_folder: pathlib.Path):
        tokenizer = prompts.load_tokenizer(tokenizer_folder)
        if len(tokenizer) != CONFIG.text.vocab_size:
            raise InputError(f"{tokenizer_folder} has {len(tokenizer)} tokens; train it again")
        self.end = tokenizer.eos_token_id
        self.layouts = {
            pictured: prompts.PromptLayout(tokenizer, length, ANSWER, VLM_PIXELS)
            for pictured, length in ((True, 8), (False, 40))
        }

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
        answer = layout.encode_text(talk.answer) if talk.learn_text else self._answer(talk.answer)
        answer = np.append(answer[: ANSWER - 1], self.end)
        ids, mask = row["input_ids"], row["attention_mask"]
        ids[-ANSWER:][: len(answer)] = answer
        mask[len(mask) - ANSWER + len(answer) :] = False
        tail = np.zeros(layout.tail_tokens, bool)
        tail[0] = talk.learn_text
        weights = [text_mask & talk.learn_text, tail, np.arange(ANSWER) < len(answer)]
        return row | {"weights": np.concatenate(weights).astype(np.float32)}

    def _answer(self, text: str) -> np.ndarray:
        long = dataclasses.replace(self.layouts[False], max_text=ANSWER - 1)
        return long.encode_text(text)


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


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_step` applies; decays the blocks' kernels."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.05, lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    )


@functools.partial(jax.jit, static_argnames="grids", donate_argnums=(0, 1))
def train_step(params, state, batch, rate, grids):
    """One AdamW step: (params, state, loss per token)."""

    def loss(params):
        return token_losses(params, batch, grids).sum() / batch["weights"].sum()

    value, grads = jax.value_and_grad(loss)(params)
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


def caption_figures(params, rows: Rows, subjects: list[Subject]) -> dict[str, float]:
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


def retrieval_figures(params, rows: Rows, subjects: list[Subject], seed: int) -> dict[str, float]:
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


def pretrain(args: argparse.Namespace, rows: Rows, train: list[Subject], held: list[Subject]):
    """The training loop: (params, steps done, mean loss of the last 50 steps by kind)."""
    rng = np.random.default_rng([args.seed, 0])
    batch, grids = rows.batch([draw(rng, "square", train)])
    params = layers.init_params(
        MODEL, jax.random.key(args.seed), batch["input_ids"], batch["position_ids"],
        batch["attention_mask"], batch["pixel_values"], grids,
    )  # fmt: skip
    state = optimizer().init(params)
    shares = np.array([share for _, share in KINDS.values()])
    seen: dict[str, list[float]] = {kind: [] for kind in KINDS}
    start, step = time.monotonic(), 0
    while True:
        minutes = (time.monotonic() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        if progress >= 1:
            break
        rng = np.random.default_rng([args.seed, 1, step])
        kind = str(rng.choice(list(KINDS), p=shares / shares.sum()))
        batch, grids = rows.batch([draw(rng, kind, train) for _ in range(args.batch)])
        rate = learning_rate(step, progress, args.rate, args.warmup)
        params, state, value = train_step(params, state, batch, rate, grids)
        seen[kind].append(float(value))
        step += 1
        if step % 50 == 0:
            recent = " ".join(f"{k} {np.mean(v[-20:]):.3f}" for k, v in seen.items() if v)
            print(f"step {step} minute {minutes:.1f} rate {rate:.1e} | {recent}", flush=True)
        if step % 400 == 0:
            figures = caption_figures(params, rows, held[:128])
            print("held out", {k: round(v, 3) for k, v in figures.items()}, flush=True)
    return params, step, {kind: float(np.mean(v[-20:])) for kind, v in seen.items() if v}


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
- Objective: next token of the answer ({learnt}).
- Training: `{command}`; {steps:,} steps of {batch} rows in {minutes:.0f} minutes on
  {cores} CPU core(s), AdamW, peak rate {rate:g}, warm-up {warmup} steps, cosine to zero, float32.

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
Tokenizer: `../tokenizer`. Made by `launch/assets/pretrain_vlm.py`.
"""


def report(args, params, rows, train, held, steps, minutes, recent) -> dict[str, object]:
    """All figures of the finished model."""
    sample = [train[i] for i in np.random.default_rng(args.seed).permutation(len(train))[:400]]
    on_train = caption_figures(params, rows, sample)
    on_train |= retrieval_figures(params, rows, sample, args.seed)
    on_held = caption_figures(params, rows, held) | retrieval_figures(params, rows, held, args.seed)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "steps": steps,
        "batch": args.batch,
        "minutes": round(minutes, 1),
        "rate": args.rate,
        "warmup": args.warmup,
        "seed": args.seed,
        "train_pictures": len(train),
        "held_pictures": len(held),
        "last_losses": recent,
        "validation": on_held,
        "train": on_train,
    }


def write(out: pathlib.Path, params, metrics: dict, args: argparse.Namespace) -> None:
    """The Hugging Face folder."""
    torch_export.export_vlm(jax.device_get(params), CONFIG, out, jnp.float16)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    limits = f"--steps {args.steps} --minutes {args.minutes:g} --seed {args.seed}"
    card = CARD.format(
        **{k: v for k, v in metrics.items() if not isinstance(v, dict)},
        **metrics["validation"],
        **{f"train_{k}": v for k, v in metrics["train"].items()},
        command=f"python launch/assets/pretrain_vlm.py {limits}",
        vlm_pixels=VLM_PIXELS,
        cores=len(os.sched_getaffinity(0)),
        learnt="in rows of text alone, of the user's words too",
    )
    (out / "README.md").write_text(card)


@exits
def main() -> None:
    """Reads the corpus, trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=pathlib.Path, default=ASSETS / "corpus")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=ASSETS / "tiny" / "tokenizer")
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS / "tiny" / "vlm")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop by then at the latest")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 1 or args.minutes <= 0 or args.batch < 1:
        raise InputError("--steps, --minutes and --batch must be positive")
    rows = Rows(args.tokenizer)
    train, held = load_side(args.corpus, "train"), load_side(args.corpus, "validation")
    print(f"{len(train)} pictures to learn, {len(held)} held out", flush=True)
    start = time.monotonic()
    params, steps, recent = pretrain(args, rows, train, held)
    minutes = (time.monotonic() - start) / 60
    metrics = report(args, params, rows, train, held, steps, minutes, recent)
    print(json.dumps(metrics, indent=1), flush=True)
    write(args.out, params, metrics, args)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
