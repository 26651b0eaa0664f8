"""Pretrains the tiny diffusion transformer on the embedded pictures.

    python launch/tiny/pretrain_mmdit.py [--minutes N | --steps N] [--batch N] [--out DIR]
    python launch/tiny/pretrain_mmdit.py --start DIR --shown 0.75 --minutes 68

This is the "large pretrained generator" that stage 2 starts from: flow matching on latents of the
tiny VAE, conditioned on the frozen tiny VLM's last states at the words of a prompt. A part of the
steps is text-to-image; the others give a picture as a source and ask for it again, for a
transformation or for an edit, as Qwen-Image's multi-task training mixes text-to-image, instructed
editing and reconstruction (arXiv 2508.02324). References, kontext and queries are left to the three
stages. The shipped weights are those of three runs, each from the one before: 46 minutes of
text-to-image alone (--shown 0), on one core; 10 minutes with reconstruction beside it, by an
earlier form of this recipe, on two; and --minutes 68 with the defaults, on two. Writes a diffusers
folder with float16 weights (the moving average), metrics.json and a model card; and a sheet.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import common  # beside this file
import jax
import jax.numpy as jnp
import mmdit_examples  # beside this file
import numpy as np
from common import SIZES
from mmdit_examples import CONFIG, LAW, PICTURES, TOKENS, Encoder, Examples, token_positions
from PIL import Image

from qk_jax.base import files
from qk_jax.base.errors import InputError, exits
from qk_jax.base.types import Tree
from qk_jax.diffusion import flow, sampler
from qk_jax.evaluation import similarity
from qk_jax.models import mmdit, rotary
from qk_jax.painting import sheets
from qk_jax.weights.read import import_model
from qk_jax.weights.write import export_model

MODEL = mmdit.MMDiT(CONFIG)
TIME_LAW = flow.TimeLaw()
SCHEDULE = sampler.ScheduleConfig()
RATE, WARM_UP = 1.2e-3, 150  # peak learning rate; steps
OPTIMIZER = common.adamw(0.01, common.kernels)
DROP_TEXT = 0.1
EMA = 0.999
STEPS, GUIDANCE = 24, 3.0  # of the painted pictures
HELD_OUT = 256  # examples of each task with a picture that give its figures
SAVE_MINUTES = 5

Arrays = dict[str, jax.Array]


def velocity(params: Tree, x: jax.Array, t: jax.Array, batch: Arrays) -> jax.Array:
    """The transformer's velocity [B, TOKENS, 64] for slots of the three sizes at once."""
    positions, real = token_positions()
    at, mask = jnp.asarray(positions)[batch["size"]], jnp.asarray(real)[batch["size"]]
    x = jnp.concatenate([x, batch["source"]], 1)
    at, mask = at[:, : x.shape[1]], jnp.concatenate([mask, mask], 1)[:, : x.shape[1]]
    text = batch["text"].astype(jnp.float32)
    words = rotary.text_positions(LAW, text.shape[1], mmdit_examples.grid_of(SIZES[0]), ())
    given = (text, batch["mask"], t, at, words, mask, TOKENS)
    return MODEL.apply({"params": params}, x, *given)[:, :TOKENS]


def losses(params: Tree, batch: Arrays, t: jax.Array, key: jax.Array) -> jax.Array:
    """Flow-matching loss [B] of latents drawn from their posterior, over the real tokens."""
    posterior, noise = jax.random.normal(key, (2, *batch["mean"].shape))
    x0 = batch["mean"] + batch["std"] * posterior
    predicted = velocity(params, flow.interpolate(x0, noise, t), t, batch)
    real = jnp.asarray(token_positions()[1])[batch["size"]]
    return flow.loss(predicted, flow.velocity_target(x0, noise), real)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: tuple, data: Arrays, chosen, rate, key) -> tuple[tuple, jax.Array]:
    """One step on the examples `chosen` of `data`: ((params, average, optimizer state), loss)."""
    params, average, moments = state
    batch = {name: array[chosen] for name, array in data.items()}
    time_key, drop_key, noise_key = jax.random.split(key, 3)
    t = flow.sample_timesteps(time_key, chosen.shape, TIME_LAW, TOKENS)
    kept = jax.random.uniform(drop_key, chosen.shape) >= DROP_TEXT
    batch["mask"] = batch["mask"] & kept[:, None]

    def mean_loss(params):
        return jnp.mean(losses(params, batch, t, noise_key))

    loss, grads = jax.value_and_grad(mean_loss)(params)
    params, moments = common.descend(OPTIMIZER, params, moments, grads, rate)
    return (params, common.follow(average, params, moments[1].count, EMA), moments), loss


@jax.jit
def probe_losses(params: Tree, batch: Arrays) -> jax.Array:
    """Loss [B] averaged over a fixed ladder of times, with fixed noise for each."""
    ladder = jnp.linspace(0.1, 0.95, 8)

    def one(index):
        t = jnp.full(len(batch["size"]), ladder[index])
        return losses(params, batch, t, jax.random.fold_in(jax.random.key(1), index))

    return jax.lax.map(one, jnp.arange(len(ladder))).mean(0)


def caption_figures(params: Tree, data: Examples) -> dict[str, float]:
    """Loss with the right words, with another example's and with none; paired standard error of
    the margin between the first two."""
    batch = data.arrays()
    other = np.roll(np.arange(len(data)), len(data) // 2 + 1)
    given = {
        "right": batch,
        "shuffled": batch | {name: batch[name][other] for name in ("text", "mask")},
        "none": batch | {"mask": jnp.zeros_like(batch["mask"])},
    }
    found = {name: np.asarray(probe_losses(params, batch)) for name, batch in given.items()}
    figures = {f"loss_{name}": float(loss.mean()) for name, loss in found.items()}
    margin = found["shuffled"] - found["right"]
    figures["margin"], figures["margin_standard_error"] = similarity.mean_and_error(margin)
    return figures


@jax.jit
def paint(params: Tree, batch: Arrays, noise: jax.Array) -> jax.Array:
    """Normalised packed latents [B, TOKENS, 64] painted from noise with guidance."""
    sigmas = sampler.schedule(STEPS, TOKENS, SCHEDULE)
    none = batch | {"mask": jnp.zeros_like(batch["mask"])}
    both = jax.tree.map(lambda *x: jnp.concatenate(x), batch, none)

    def guided(x, sigma):
        t = jnp.full(2 * len(x), sigma)
        full, empty = jnp.split(velocity(params, jnp.concatenate([x, x]), t, both), 2)
        return empty + GUIDANCE * (full - empty)

    return sampler.sample(guided, noise, sigmas)


def painted(params: Tree, data: Examples) -> np.ndarray:
    """A painted latent [TOKENS, 64] for every example, from fixed noise."""
    noise = jax.random.normal(jax.random.key(2), (len(data), TOKENS, CONFIG.in_channels))
    return np.asarray(paint(params, data.arrays(), noise))


def retrieval_figures(latents: np.ndarray, data: Examples) -> dict[str, float]:
    """How often the painted latent is nearest to the right picture's, among all of `data`."""
    true = data.mean.reshape(len(data), -1)
    distance = np.linalg.norm(latents.reshape(len(data), 1, -1) - true[None], axis=-1)
    return common.retrieval_figures((distance < np.diag(distance)[:, None]).sum(1))


def evaluate(params: Tree, probes: dict[str, Examples]) -> dict[str, Any]:
    """All figures: of retrieval for the probes so named, of captions for the others."""
    return {
        name: retrieval_figures(painted(params, data), data)
        if name.startswith("retrieval")
        else caption_figures(params, data)
        for name, data in probes.items()
    }


def sheet(params: Tree, encoder: Encoder, probes: dict[str, Examples]) -> Image.Image:
    """Painted pictures of each size beside the true ones and the given ones, if any; the latter
    two as the autoencoder gives them back."""
    rows = []
    for name, data in probes.items():
        order = np.random.default_rng(4).permutation(len(data))
        each = [order[data.size[order] == size][:4] for size in range(len(SIZES))]
        chosen = data.take(np.concatenate(each))
        shown = {"source": chosen.source} if chosen.source.shape[1] else {}
        shown |= {"truth": chosen.mean, "painted": painted(params, chosen)}
        for i, words in enumerate(chosen.prompts):
            cells = [
                (label, encoder.decode(latents[i : i + 1], chosen.size[i])[0])
                for label, latents in shown.items()
            ]
            rows.append((f"{name}: {words}", cells))
    return sheets.draw("The tiny generator", rows)


class Feed:
    """Which examples a step learns: of one group of similar prompt length.

    Args:
      captioned, edited: examples without and with a source picture.
      shown: part of the steps that take the latter.
    """

    def __init__(self, captioned: Examples, edited: Examples, shown: float, batch: int):
        self.groups, weights = [], []
        for data, part in ((captioned, 1 - shown), (edited, shown)):
            for group in data.by_length():
                self.groups.append(group.arrays())
                weights.append(part * len(group) / len(data))
        self.sizes = [len(group["size"]) for group in self.groups]
        self.weights, self.batch = np.array(weights), batch
        self.rng = np.random.default_rng(0)

    def __call__(self) -> tuple[Arrays, np.ndarray]:
        """A group's arrays and the numbers [batch] of its examples to learn."""
        group = self.rng.choice(len(self.groups), p=self.weights)
        return self.groups[group], self.rng.choice(self.sizes[group], self.batch)


def learn(args: argparse.Namespace, params: Tree, feed: Feed) -> tuple[Tree, dict[str, Any]]:
    """Trains: the moving average, and the run for metrics.json.

    Saves the weights now and then, so that an interrupted run leaves them.
    """
    state = (params, jax.tree.map(jnp.copy, params), OPTIMIZER.init(params))
    saved, seen, step = time.monotonic(), common.Losses(), 0
    for step, done in common.steps(args):
        key = jax.random.fold_in(jax.random.key(5), step)
        rate = common.learning_rate(step, done, RATE, WARM_UP)
        state, loss = train_step(state, *feed(), rate, key)
        seen.add(step, done, loss=loss)
        if time.monotonic() - saved > 60 * SAVE_MINUTES:
            export_model(state[1], CONFIG, args.out, jnp.float16)
            saved = time.monotonic()
    tasks = ["text_to_image"] * (args.shown < 1) + [*PICTURES] * (args.shown > 0)
    run = {"steps": step + 1, "batch": args.batch, "seconds": seen.seconds()}
    return state[1], run | {"shown": args.shown, "tasks": tasks}


def encode_probes(encoder: Encoder, limit: int | None) -> dict[str, Examples]:
    """Held-out examples of each task, and prompts for retrieval, by the names of `evaluate`."""
    made = {"held_out": mmdit_examples.captioned("validation", 2, limit)}
    for task in PICTURES:
        made[task] = mmdit_examples.edited("validation", task, min(HELD_OUT, limit or HELD_OUT))
    for name, side in (("retrieval_train", "train"), ("retrieval_held_out", "validation")):
        made[name] = mmdit_examples.plain_squares(side, min(100, limit or 100))
    return {name: mmdit_examples.encode_all(encoder, examples) for name, examples in made.items()}


def card_words(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the model card says of the figures and runs."""
    words = {
        side: " | ".join(f"{value:.4f}" for value in metrics[side].values())
        for side in ("train", "held_out", *PICTURES)
    }
    for name in ("retrieval_train", "retrieval_held_out"):
        found = metrics[name]
        words[name] = f"{found['top1']:.0%} | {found['top5']:.0%} | {found['candidates']}"
    words["runs"] = "\n".join(
        f"  - {run['steps']:,} in {run['seconds'] / 60:.0f} minutes, {run['shown']:.0%} with a "
        f"source: {', '.join(run['tasks'])} ({run['batch']} pictures a step)"
        for run in metrics["runs"]
    )
    words["pictures"] = ", ".join(f"{n:,} of {task}" for task, n in metrics["pictures"].items())
    return words | {"dropped": DROP_TEXT, "guidance": GUIDANCE, "euler": STEPS, "model": CONFIG}


def go_on_from(folder: files.Path) -> tuple[Tree, list[dict[str, Any]]]:
    """Parameters of an earlier run, and the runs that made them.

    Raises:
      InputError: the weights are of another architecture.
    """
    config, params = import_model("mmdit", folder, jnp.float32)
    if config != CONFIG:
        raise InputError(f"{folder} is of another architecture; give a tiny transformer")
    return params, files.read_json(folder / "metrics.json")["runs"]


@exits
def main() -> None:
    """Encodes the corpus, trains, measures, writes."""
    options = common.parser("mmdit", __doc__, minutes=30, batch=32)
    options.add_argument("--shown", type=float, default=0.75, help="steps that give a source")
    options.add_argument("--start", type=files.Path, help="folder of weights to go on from")
    options.add_argument("--sheet", default="runs/tiny_mmdit.png", help="picture to write")
    args = common.parse(options)
    if not 0 <= args.shown <= 1:
        raise InputError("--shown is a part of the steps; give 0 to 1")
    params, runs = go_on_from(args.start) if args.start else (common.fresh(MODEL), [])
    encoder = Encoder()
    encode_all = functools.partial(mmdit_examples.encode_all, encoder)
    captioned = encode_all(mmdit_examples.captioned("train", mmdit_examples.VARIANTS, args.limit))
    counts = {task: min(count, args.limit or count) for task, count in PICTURES.items()}
    edited = mmdit_examples.join(
        encode_all(mmdit_examples.edited("train", task, count)) for task, count in counts.items()
    )
    probes = encode_probes(encoder, args.limit)
    spread = np.random.default_rng(6).permutation(len(captioned))[: len(probes["held_out"])]
    probes["train"] = captioned.take(spread)
    print(f"{len(captioned)} examples with words alone, {len(edited)} with a picture", flush=True)
    average, run = learn(args, params, Feed(captioned, edited, args.shown, args.batch))
    shipped = common.as_shipped(average)
    metrics = {
        "parameters": common.count(shipped),
        "examples": len(captioned),
        "pictures": counts,
        "runs": [*runs, run],
        **evaluate(shipped, probes),
    }
    common.write(args.out, "mmdit", shipped, CONFIG, metrics, **card_words(metrics))
    shown = {name: probes[name] for name in ("train", "held_out", "editing")}
    sheets.save(sheet(shipped, encoder, shown), args.sheet)


if __name__ == "__main__":
    main()
