"""Pretrains the tiny Qwen2.5-VL: next-token prediction of captions from pictures.

    python launch/tiny/pretrain_vlm.py [--minutes N | --steps N] [--batch N] [--out DIR]

Conversations have the layout of training prompts (`qk_jax.data.prompts`), with the answer in the
slots of the queries: one or two pictures and their captions, two subjects composed in one picture,
and text alone (instructions and captions, read and repeated). Writes a Hugging Face folder:
config.json, model.safetensors in float16, metrics.json and a model card.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import common  # beside this file
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import SIZES, TINY

from qk_jax.base.errors import InputError, exits
from qk_jax.base.types import Tree
from qk_jax.data import prompts, templates
from qk_jax.data.synthesis import scenes, tasks
from qk_jax.data.synthesis.corpus import Corpus, Cutout
from qk_jax.data.synthesis.wordings import BESIDE
from qk_jax.evaluation import similarity
from qk_jax.models.qwen_vl import PRESETS, QwenVL
from qk_jax.pictures.roles import SOURCE

CONFIG = PRESETS["tiny"]
MODEL = QwenVL(CONFIG)
VLM_PIXELS = 112 * 112
TEMPLATE = templates.PRESETS["numbered"]
ANSWER = 24  # tokens, with <|im_end|>
ASK_CAPTION = ("", "what is it?", "describe the picture")
SQUARE, WIDE, TALL = SIZES
KINDS = {"one": (SQUARE,), "two": (WIDE, TALL), "text": ()}  # sizes of the pictures
SHARES = {"one": 0.45, "two": 0.4, "text": 0.15}  # of the batches
RATE, WARM_UP = 2e-3, 60  # peak learning rate; steps
OPTIMIZER = common.adamw(0.05, lambda p: jax.tree.map(lambda x: x.ndim > 2, p), b2=0.98)
SLOTS = 64  # of a batch that is measured
CANDIDATES = 50  # captions of the retrieval figures


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
    """One thing, sometimes small in a named corner."""
    what = thing(rng, subjects)
    if rng.random() < 0.2:
        x, y = rng.randrange(2), rng.randrange(2)
        box = (x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5)
        corner = f" in the {('top', 'bottom')[y]} {('left', 'right')[x]} corner"
    else:
        left, top, right, bottom = (rng.uniform(0, 0.15) for _ in range(4))
        box, corner = (left, top, 1 - right, 1 - bottom), ""
    return draw(rng, size, 0.35, [what], [box], what[1] + corner)


def two_subjects(rng: Random, subjects: Sequence[Cutout], size: tuple[int, int]) -> Shown:
    """Two things side by side or one above the other, and the relation in words."""
    things = [thing(rng, subjects), thing(rng, subjects)]
    beside = size[1] > size[0] or (size[0] == size[1] and rng.random() < 0.5)
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)] if beside else [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]
    swapped = rng.random() < 0.5
    side = ("left", "right")[swapped] if beside else ("top", "bottom")[swapped]
    caption = f"{things[0][1]} {BESIDE[side]} {things[1][1]}"
    return draw(rng, size, 0.5, things, boxes[::-1] if swapped else boxes, caption)


@functools.cache
def instructions() -> tuple[str, ...]:
    """Instructions in all wordings."""
    return tuple(tasks.template_texts())


def converse(rng: Random, kind: str, subjects: Sequence[Cutout]) -> Conversation:
    """A random conversation of one kind.

    'one' and 'two' ask for the captions of the pictures, or for that of one of them; 'text' is an
    instruction filled with names of things, or a caption.
    """
    sizes = KINDS[kind]
    if not sizes:
        text = rng.choice(subjects).caption
        if rng.random() < 0.5:
            samples = re.compile(r"\b(red apple|dog|car)\b")  # that fill the gaps of template_texts
            text = samples.sub(lambda _: thing(rng, subjects)[1], rng.choice(instructions()))
        return Conversation((), text, text, learn_text=True)
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


class Collator:
    """Conversations as batches of static shape."""

    def __init__(self):
        tokenizer = prompts.load_tokenizer(TINY / "tokenizer")
        if len(tokenizer) != CONFIG.text.vocab_size:
            raise InputError(f"the tokenizer has {len(tokenizer)} tokens; train it again")
        self.end = tokenizer.eos_token_id
        self.layouts = {
            pictured: prompts.PromptBuilder(tokenizer, length, ANSWER, VLM_PIXELS, TEMPLATE)
            for pictured, length in ((True, 8), (False, 32))
        }
        self.answers = dataclasses.replace(self.layouts[True], max_text=ANSWER - 1)

    def __call__(self, talks: Sequence[Conversation], blind: bool = False) -> tuple[dict, tuple]:
        """(arrays, grids): model inputs, and `weights` [B, L] on the last L tokens to predict.

        `blind` leaves the pictures' tokens out of the prompts.
        """
        sizes = tuple(picture.shape[:2] for picture in talks[0].pictures)
        layout = self.layouts[bool(sizes)]
        slots = [self._slot(layout, talk, sizes, blind) for talk in talks]
        batch = {name: np.stack([slot[name] for slot in slots]) for name in slots[0]}
        shown = [prompts.pixel_values(talk.pictures, VLM_PIXELS) for talk in talks]
        batch["pixel_values"] = np.stack(shown)
        return batch, layout.grids(sizes)

    def _slot(self, layout, talk: Conversation, sizes, blind: bool) -> dict[str, np.ndarray]:
        roles = (SOURCE,) * len(sizes)
        slot = layout.build(talk.text, sizes, roles, pictures=not blind)
        text_mask = slot.pop("text_mask")
        answer = np.append(self.answers.encode_text(talk.answer), self.end)
        ids, mask = slot["input_ids"], slot["attention_mask"]
        ids[-ANSWER:][: len(answer)] = answer
        mask[len(mask) - ANSWER + len(answer) :] = False
        tail = np.zeros(layout.tail_tokens, bool)
        tail[0] = talk.learn_text
        weights = [text_mask & talk.learn_text, tail, np.arange(ANSWER) < len(answer)]
        return slot | {"weights": np.concatenate(weights).astype(np.float32)}


def token_losses(params: Tree, batch: dict, grids: tuple) -> jax.Array:
    """Cross-entropy [B, L] of the last L tokens, float32, times their weights."""
    names = ("input_ids", "position_ids", "attention_mask", "pixel_values")
    hidden = MODEL.apply({"params": params}, *(batch[name] for name in names), grids)
    length = batch["weights"].shape[1]
    logits = MODEL.apply({"params": params}, hidden[:, -length - 1 : -1], method="logits")
    labels = batch["input_ids"][:, -length:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return losses * batch["weights"]


@functools.partial(jax.jit, static_argnames="grids")
def answer_losses(params: Tree, batch: dict, grids: tuple) -> tuple[jax.Array, jax.Array]:
    """Summed loss [B] and number of tokens [B] of each answer."""
    return token_losses(params, batch, grids).sum(1), batch["weights"].sum(1)


@functools.partial(jax.jit, static_argnames="grids", donate_argnums=(0, 1))
def train_step(
    params: Tree, moments, batch: dict, rate, grids: tuple
) -> tuple[Tree, tuple, jax.Array]:
    """One AdamW step on the loss per token: (params, optimizer state, loss)."""

    def loss_per_token(params):
        return token_losses(params, batch, grids).sum() / batch["weights"].sum()

    loss, grads = jax.value_and_grad(loss_per_token)(params)
    return *common.descend(OPTIMIZER, params, moments, grads, rate), loss


def losses_of(
    params: Tree, collate: Collator, talks: list[Conversation], blind: bool = False
) -> np.ndarray:
    """Summed loss and number of tokens of each conversation [n, 2]; n need not fill batches."""
    out = []
    for start in range(0, len(talks), SLOTS):
        part = talks[start : start + SLOTS]
        part = part + part[:1] * (SLOTS - len(part))  # one compiled shape
        out.append(np.stack(answer_losses(params, *collate(part, blind)), axis=1))
    return np.concatenate(out)[: len(talks)]


def plain_talk(subject: Cutout, caption: str) -> Conversation:
    """The subject, large on white, and a caption."""
    item = scenes.Item(subject.rgba, (0, 0, 1, 1))
    return Conversation((scenes.paint(scenes.flat(SQUARE, "white"), [item]),), "", caption)


def caption_figures(params: Tree, collate: Collator, subjects: list[Cutout]) -> dict[str, float]:
    """Caption loss in nats per token with the right, another and no picture, standard errors."""
    right = [plain_talk(subject, subject.caption) for subject in subjects]
    others = subjects[1:] + subjects[:1]
    wrong = [plain_talk(x, subject.caption) for x, subject in zip(others, subjects, strict=True)]
    given = {
        "right": losses_of(params, collate, right),
        "shuffled": losses_of(params, collate, wrong),
        "none": losses_of(params, collate, right, blind=True),
    }
    figures = {f"loss_{name}": float(x[:, 0].sum() / x[:, 1].sum()) for name, x in given.items()}
    margin = (given["shuffled"] - given["right"])[:, 0] / given["right"][:, 1]
    figures["margin"], figures["margin_standard_error"] = similarity.mean_and_error(margin)
    return figures


def retrieval_figures(params: Tree, collate: Collator, subjects: list[Cutout]) -> dict[str, float]:
    """Which of the captions suits a picture best: its likelihood against that without picture."""
    first = {subject.caption: subject for subject in reversed(subjects)}
    chosen = [str(c) for c in np.random.default_rng(0).permutation(sorted(first))[:CANDIDATES]]
    talks = [plain_talk(first[shown], caption) for shown in chosen for caption in chosen]
    scores = -losses_of(params, collate, talks)[:, 0].reshape(len(chosen), len(chosen))
    prior = -losses_of(params, collate, talks[: len(chosen)], blind=True)[:, 0]
    order = np.argsort(-(scores - prior), axis=1)
    return common.retrieval_figures(np.argmax(order == np.arange(len(chosen))[:, None], axis=1))


def learn(args: argparse.Namespace, collate: Collator, subjects: list[Cutout]) -> tuple[Tree, dict]:
    """(parameters, figures of the training)."""
    params = common.fresh(MODEL)
    moments, losses, step = OPTIMIZER.init(params), common.Losses(), 0
    for step, _, done in common.steps(args):
        rng = Random(f"0/{step}")
        (kind,) = rng.choices(list(SHARES), list(SHARES.values()))
        batch, grids = collate([converse(rng, kind, subjects) for _ in range(args.batch)])
        rate = common.learning_rate(step, done, RATE, WARM_UP)
        params, moments, loss = train_step(params, moments, batch, rate, grids)
        losses.add(step + 1, done, **{kind: loss})
    return params, {
        "steps": step + 1,
        "batch": args.batch,
        "rate": RATE,
        "minutes": round(losses.seconds() / 60, 1),
        "last_losses": losses.means(),
    }


@exits
def main() -> None:
    """Reads the corpus, trains, measures, writes."""
    args = common.parse(common.parser("vlm", __doc__, minutes=25, batch=16))
    collate = Collator()
    train, held = (list(Corpus(side))[: args.limit] for side in ("train", "validation"))
    print(f"{len(train)} pictures to learn, {len(held)} held out", flush=True)
    params, training = learn(args, collate, train)
    sample = [train[i] for i in np.random.default_rng(0).permutation(len(train))[:400]]
    found = {
        name: caption_figures(params, collate, side) | retrieval_figures(params, collate, side)
        for name, side in (("validation", held), ("train", sample))
    }
    metrics = {
        "parameters": common.count(params),
        "training": training,
        "warmup": WARM_UP,
        "train_pictures": len(train),
        "held_pictures": len(held),
        **found,
    }
    words = training | found["validation"]
    words |= {f"train_{name}": figure for name, figure in found["train"].items()}
    common.write(args.out, "vlm", params, CONFIG, metrics, vlm_pixels=VLM_PIXELS, **words)


if __name__ == "__main__":
    main()
