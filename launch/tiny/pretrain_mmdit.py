"""Pretrains the tiny diffusion transformer on the embedded pictures.

    python launch/tiny/pretrain_mmdit.py --minutes 30 [--start DIR --steps N --batch N --out DIR]

This is the "large pretrained generator" that stage 2 starts from: flow matching on latents of the
tiny VAE, conditioned on the frozen tiny VLM's last states at the words of a prompt. A part of the
steps is text-to-image; the others give a picture as a source and ask for it again, for a
transformation or for an edit, as Qwen-Image's multi-task training mixes text-to-image, instructed
editing and reconstruction (arXiv 2508.02324). References, kontext and queries are left to the three
stages. The shipped weights are those of three runs, each from the one before: 46 minutes of
text-to-image alone (--shown 0), on one core; 10 minutes with reconstruction beside it, by an
earlier form of this recipe, on two; and --minutes 68 as it stands, on two. Only the corpus's
training side is learnt; the validation side gives the held-out figures. Writes a diffusers folder
with float16 weights (the moving average), metrics.json, a model card, and a sheet to look at.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mmdit_examples  # beside this file
import numpy as np
import optax
from mmdit_examples import CONFIG, LAW, SIZES, TOKENS, Encoder, Examples, device_rows, places
from PIL import Image, ImageDraw

from qk_jax.base.errors import InputError, exits
from qk_jax.diffusion import flow, sampler
from qk_jax.models import layers, mmdit, rotary
from qk_jax.weights.read import import_mmdit
from qk_jax.weights.write import export_mmdit

TINY = pathlib.Path(__file__).resolve().parents[2] / "qk_jax" / "assets" / "tiny"
MODEL = mmdit.MMDiT(CONFIG)
TIME_LAW = flow.TimeLaw()
SCHEDULE = sampler.ScheduleConfig()
RATE = 1.2e-3  # AdamW's peak learning rate
WARM_UP = 150  # steps
DECAY = 0.01
DROP_TEXT = 0.1
EMA = 0.999
STEPS, GUIDANCE = 24, 3.0  # of the painted pictures
HELD_OUT = 256  # examples of each task with a picture that give its figures

Params = dict[str, Any]


def velocity(params: Params, x: jax.Array, t: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    """The transformer's velocity [B, TOKENS, 64] for rows of the three sizes at once."""
    positions, real = places()
    at, mask = jnp.asarray(positions)[rows["size"]], jnp.asarray(real)[rows["size"]]
    x = jnp.concatenate([x, rows["source"]], 1)
    at, mask = at[:, : x.shape[1]], jnp.concatenate([mask, mask], 1)[:, : x.shape[1]]
    text = rows["text"].astype(jnp.float32)
    words = rotary.text_positions(LAW, text.shape[1], mmdit_examples.grid_of(SIZES[0]), ())
    given = (text, rows["mask"], t, at, words, mask, TOKENS)
    return MODEL.apply({"params": params}, x, *given)[:, :TOKENS]


def losses(
    params: Params,
    rows: dict[str, jax.Array],
    t: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Flow-matching loss [B] of latents drawn from their posterior, over the real tokens."""
    posterior, noise = jax.random.normal(key, (2, *rows["mean"].shape))
    x0 = rows["mean"] + rows["std"] * posterior
    predicted = velocity(params, flow.interpolate(x0, noise, t), t, rows)
    real = jnp.asarray(places()[1])[rows["size"]]
    return flow.loss(predicted, flow.velocity_target(x0, noise), real)


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_step` applies; decay on matrices."""

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.99),
        optax.add_decayed_weights(DECAY, matrices),
    )


@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: tuple, data: dict[str, jax.Array], rows, rate, key
) -> tuple[tuple, jax.Array]:
    """One step on the examples `rows` of `data`: ((params, average, optimizer state), loss)."""
    params, average, moments = state
    batch = {name: array[rows] for name, array in data.items()}
    time_key, drop_key, noise_key = jax.random.split(key, 3)
    t = flow.sample_timesteps(time_key, rows.shape, TIME_LAW, TOKENS)
    kept = jax.random.uniform(drop_key, rows.shape) >= DROP_TEXT
    batch["mask"] = batch["mask"] & kept[:, None]

    def mean_loss(params):
        return jnp.mean(losses(params, batch, t, noise_key))

    loss, grads = jax.value_and_grad(mean_loss)(params)
    updates, moments = optimizer().update(grads, moments, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    # The average starts short, so that the first saved weights are not the random ones.
    count = moments[1].count
    decay = jnp.minimum(EMA, (1 + count) / (10 + count))
    average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
    return (params, average, moments), loss


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up in steps, then cosine to zero over `progress` in [0, 1]."""
    return (
        RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


def fresh() -> Params:
    """Random parameters."""
    one = {"text": jnp.zeros((1, 2, CONFIG.joint_attention_dim)), "mask": jnp.ones((1, 2), bool)}
    at, real = places()
    x, t = jnp.zeros((1, TOKENS, CONFIG.in_channels)), jnp.zeros(1)
    words = jnp.zeros((2, 3), jnp.int32)
    at, real = jnp.asarray(at[:1, :TOKENS]), jnp.asarray(real[:1])
    args = (x, one["text"], one["mask"], t, at, words, real)
    return layers.init_params(MODEL, jax.random.key(0), *args)


@jax.jit
def probe_losses(params: Params, rows: dict[str, jax.Array]) -> jax.Array:
    """Loss [B] averaged over a fixed ladder of times, with fixed noise for each."""
    ladder = jnp.linspace(0.1, 0.95, 8)

    def one(index):
        t = jnp.full(len(rows["size"]), ladder[index])
        return losses(params, rows, t, jax.random.fold_in(jax.random.key(1), index))

    return jax.lax.map(one, jnp.arange(len(ladder))).mean(0)


def caption_figures(params: Params, data: Examples) -> dict[str, float]:
    """Loss with the right words, with another example's and with none; paired standard error of
    the margin between the first two."""
    rows = device_rows(data)
    other = np.roll(np.arange(len(data)), len(data) // 2 + 1)
    given = {
        "right": rows,
        "shuffled": rows | {name: rows[name][other] for name in ("text", "mask")},
        "none": rows | {"mask": jnp.zeros_like(rows["mask"])},
    }
    found = {name: np.asarray(probe_losses(params, rows)) for name, rows in given.items()}
    figures = {f"loss_{name}": float(loss.mean()) for name, loss in found.items()}
    margin = found["shuffled"] - found["right"]
    figures["margin"] = float(margin.mean())
    figures["margin_standard_error"] = float(margin.std() / math.sqrt(len(margin)))
    return figures


@jax.jit
def paint(params: Params, rows: dict[str, jax.Array], noise: jax.Array) -> jax.Array:
    """Normalised packed latents [B, TOKENS, 64] painted from noise with guidance."""
    sigmas = sampler.schedule(STEPS, TOKENS, SCHEDULE)
    none = rows | {"mask": jnp.zeros_like(rows["mask"])}
    both = jax.tree.map(lambda *x: jnp.concatenate(x), rows, none)

    def guided(x, sigma):
        t = jnp.full(2 * len(x), sigma)
        full, empty = jnp.split(velocity(params, jnp.concatenate([x, x]), t, both), 2)
        return empty + GUIDANCE * (full - empty)

    return sampler.sample(guided, noise, sigmas)


def painted(params: Params, data: Examples) -> np.ndarray:
    """A painted latent [TOKENS, 64] for every example, from fixed noise."""
    noise = jax.random.normal(jax.random.key(2), (len(data), TOKENS, CONFIG.in_channels))
    return np.asarray(paint(params, device_rows(data), noise))


def retrieval_figures(latents: np.ndarray, data: Examples) -> dict[str, float]:
    """How often the painted latent is nearest to the right picture's, among all of `data`."""
    true = data.mean.reshape(len(data), -1)
    distance = np.linalg.norm(latents.reshape(len(data), 1, -1) - true[None], axis=-1)
    rank = (distance < np.diag(distance)[:, None]).sum(1)
    return {
        "candidates": len(data),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "chance_top1": 1 / len(data),
        "chance_top5": 5 / len(data),
    }


def evaluate(params: Params, probes: dict[str, Examples]) -> dict[str, Any]:
    """All figures: of retrieval for the probes so named, of captions for the others."""
    return {
        name: retrieval_figures(painted(params, data), data)
        if name.startswith("retrieval")
        else caption_figures(params, data)
        for name, data in probes.items()
    }


def sheet(params: Params, encoder: Encoder, sides: Sequence[Examples], path: pathlib.Path) -> None:
    """Writes a PNG: per side and size, prompts above the given (if any), the true and the painted
    pictures.

    The first two are shown as the autoencoder gives them back.
    """
    columns, cell, rows = 8, (248, 92), []
    for data in sides:
        order = np.random.default_rng(4).permutation(len(data))
        order = [np.resize(order[data.size[order] == i], columns) for i in range(len(SIZES))]
        chosen = data.take(np.concatenate(order))
        shown = [chosen.source] if chosen.source.shape[1] else []
        shown += [chosen.mean, painted(params, chosen)]
        for index in range(len(SIZES)):
            part = slice(index * columns, (index + 1) * columns)
            pictures = (encoder.decode(latents[part], index) for latents in shown)
            rows.append(zip(chosen.prompts[part], *pictures, strict=True))
    canvas = Image.new("RGB", (columns * cell[0], len(rows) * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        for x, (words, *pictures) in enumerate(row):
            corner = (x * cell[0], y * cell[1])
            draw.text(corner, words[:40], "black")
            for number, picture in enumerate(pictures):
                canvas.paste(Image.fromarray(picture), (corner[0] + 82 * number, corner[1] + 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def write(folder: pathlib.Path, params: Params, metrics: dict[str, Any]) -> None:
    """The diffusers folder with float16 weights, metrics.json and the model card."""
    print(json.dumps(metrics), flush=True)
    export_mmdit(params, CONFIG, folder, jnp.float16)
    for name, text in (
        ("metrics.json", json.dumps(metrics, indent=2)),
        ("README.md", card(metrics)),
    ):
        partial = folder / f".{name}.partial"
        partial.write_text(text + "\n")
        os.replace(partial, folder / name)


CARD = """# Tiny text-to-image and editing transformer

QwenImageTransformer2DModel, {parameters:,} parameters, float16: {layers} blocks, {heads} heads of
{channels} channels. The pretrained generator that stage 2 of the quickstart starts from; made by
`launch/tiny/pretrain_mmdit.py`.

- **Data**: the training side of the embedded pictures (`qk_jax/assets/corpus`) at 64x64, 48x80 and
  80x48 pixels: {examples:,} pictures with words, and with a source picture
  {pictures}.
- **Condition**: last hidden states of the tiny Qwen2.5-VL (frozen) at the words, after it has seen
  the source; the source's latents.
- **Latents**: of the tiny VAE (frozen), drawn from the posterior.
- **Training**: flow matching, logit-normal t with resolution shift, AdamW, moving average, on a
  CPU; {dropped:.0%} of the rows without words. Steps, one run from the other's weights:
{runs}
- **Positions**: the shifted law, text at zero. diffusers' pipelines place tokens by another law, so
  there it needs these positions.

| loss | right words | another's words | no words | margin | standard error |
| --- | --- | --- | --- | --- | --- |
| training pictures | {train} |
| held-out subjects | {held_out} |
| held-out, reconstruction of a source | {reconstruction} |
| held-out, transformation of a source | {transformation} |
| held-out, editing of a source | {editing} |

Margin: another's words less the right ones.

| true picture nearest to the painted latents | top-1 | top-5 | candidates |
| --- | --- | --- | --- |
| training prompts | {retrieval_train} |
| held-out prompts | {retrieval_held_out} |

Painted with guidance {guidance:g} in {euler} Euler steps. It paints clip art and emoji at thumbnail
size and knows no other subjects."""


def card(metrics: dict[str, Any]) -> str:
    """The model card."""
    rows = {
        side: " | ".join(f"{value:.4f}" for value in metrics[side].values())
        for side in ("train", "held_out", *mmdit_examples.PICTURES)
    }
    for name in ("retrieval_train", "retrieval_held_out"):
        found = metrics[name]
        rows[name] = f"{found['top1']:.0%} | {found['top5']:.0%} | {found['candidates']}"
    rows["runs"] = "\n".join(
        f"  - {run['steps']:,} in {run['seconds'] / 60:.0f} minutes, {run['shown']:.0%} with a "
        f"source: {', '.join(run['tasks'])} ({run['batch']} pictures a step)"
        for run in metrics["runs"]
    )
    pictures = (f"{count:,} of {task}" for task, count in metrics["pictures"].items())
    return CARD.format(
        **metrics | rows | {"pictures": ", ".join(pictures)},
        layers=CONFIG.num_layers,
        heads=CONFIG.num_attention_heads,
        channels=CONFIG.attention_head_dim,
        dropped=DROP_TEXT,
        guidance=GUIDANCE,
        euler=STEPS,
    )


def go_on_from(folder: pathlib.Path) -> tuple[Params, list[dict[str, Any]]]:
    """Parameters of an earlier run, and the runs that made them.

    Raises:
      InputError: the weights are of another architecture.
    """
    config, params = import_mmdit(folder, jnp.float32)
    if config != CONFIG:
        raise InputError(f"{folder} is of another architecture; give a tiny transformer")
    return params, json.loads((folder / "metrics.json").read_text())["runs"]


class Feed:
    """Which examples a step learns: of one group of similar prompt length.

    Args:
      captioned, edited: examples without and with a source picture.
      shown: part of the steps that take the latter.
    """

    def __init__(self, captioned: Examples, edited: Examples, shown: float, batch: int):
        self.groups, weights = [], []
        for data, part in ((captioned, 1 - shown), (edited, shown)):
            for group in mmdit_examples.by_length(data):
                self.groups.append(device_rows(group))
                weights.append(part * len(group) / len(data))
        self.sizes = [len(group["size"]) for group in self.groups]
        self.weights, self.batch = np.array(weights), batch
        self.rng = np.random.default_rng(0)

    def __call__(self) -> tuple[dict[str, jax.Array], np.ndarray]:
        """A group's arrays and the rows [batch] of them to learn."""
        group = self.rng.choice(len(self.groups), p=self.weights)
        return self.groups[group], self.rng.choice(self.sizes[group], self.batch)


def train(args: argparse.Namespace, params: Params, feed: Feed) -> tuple[Params, dict[str, Any]]:
    """Trains for the given minutes or steps: the moving average, and the run for metrics.json.

    Saves the weights now and then, so that an interrupted run leaves them.
    """
    state = (params, jax.tree.map(jnp.copy, params), optimizer().init(params))
    start = saved = time.monotonic()
    recent, step, progress = [], 0, 0.0
    while progress < 1:
        data, rows = feed()
        key = jax.random.fold_in(jax.random.key(5), step)
        state, loss = train_step(state, data, rows, learning_rate(step, progress), key)
        recent.append(float(loss))
        step += 1
        now = time.monotonic()
        progress = step / args.steps if args.steps else (now - start) / (60 * args.minutes)
        if step % 50 == 0:
            mean, recent = float(np.mean(recent)), []
            speed = step * args.batch / (now - start)
            print(f"step {step} {progress:.1%} loss {mean:.4f} {speed:.0f} pictures/s", flush=True)
        if now - saved > 60 * args.save_minutes:
            export_mmdit(state[1], CONFIG, args.out, jnp.float16)
            saved = now
    tasks = ["text_to_image"] * (args.shown < 1) + [*mmdit_examples.PICTURES] * (args.shown > 0)
    run = {"steps": step, "batch": args.batch, "seconds": round(time.monotonic() - start)}
    return state[1], run | {"shown": args.shown, "tasks": tasks}


def encode_probes(encoder: Encoder, limit: int | None) -> dict[str, Examples]:
    """Held-out examples of each task, and prompts for retrieval, by the names of `evaluate`."""
    count = min(HELD_OUT, limit or HELD_OUT)
    made = {"held_out": mmdit_examples.captioned("validation", 2, limit)}
    for task in mmdit_examples.PICTURES:
        made[task] = mmdit_examples.edited("validation", task, count)
    for name, side in (("retrieval_train", "train"), ("retrieval_held_out", "validation")):
        made[name] = mmdit_examples.plain_squares(side, 100)
    return {name: mmdit_examples.encode_all(encoder, examples) for name, examples in made.items()}


@exits
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="length of the training")
    parser.add_argument("--steps", type=int, help="length in steps, instead of minutes")
    parser.add_argument(
        "--shown", type=float, default=0.75, help="part of the steps that give a source picture"
    )
    parser.add_argument("--start", type=pathlib.Path, help="folder of weights to go on from")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step")
    parser.add_argument("--save-minutes", type=float, default=5, help="between two savings")
    parser.add_argument("--out", type=pathlib.Path, default=TINY / "mmdit", help="folder to write")
    parser.add_argument("--vlm", type=pathlib.Path, default=TINY / "vlm", help="tiny Qwen2.5-VL")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=TINY / "tokenizer")
    parser.add_argument("--vae", type=pathlib.Path, default=TINY / "vae", help="tiny AutoencoderKL")
    parser.add_argument("--sheet", type=pathlib.Path, default=pathlib.Path("runs/mmdit_sheet.png"))
    parser.add_argument("--limit", type=int, help="examples of each task, to try the recipe out")
    args = parser.parse_args()
    if args.batch < 1 or (args.steps is not None and args.steps < 1) or args.minutes <= 0:
        raise InputError("--batch, --steps and --minutes must be positive")
    if not 0 <= args.shown <= 1:
        raise InputError("--shown is a part of the steps; give 0 to 1")
    encoder = Encoder(args.vlm, args.tokenizer, args.vae)
    captioned = mmdit_examples.encode_all(
        encoder, mmdit_examples.captioned("train", mmdit_examples.VARIANTS, args.limit)
    )
    counts = {n: min(count, args.limit or count) for n, count in mmdit_examples.PICTURES.items()}
    edited = mmdit_examples.join(
        [
            mmdit_examples.encode_all(encoder, mmdit_examples.edited("train", task, count))
            for task, count in counts.items()
        ]
    )
    probes = encode_probes(encoder, args.limit)
    spread = np.random.default_rng(6).permutation(len(captioned))[: len(probes["held_out"])]
    probes["train"] = captioned.take(spread)
    print(f"{len(captioned)} examples with words alone, {len(edited)} with a picture", flush=True)
    params, runs = go_on_from(args.start) if args.start else (fresh(), [])
    average, run = train(args, params, Feed(captioned, edited, args.shown, args.batch))
    # The figures are those of the weights as they are shipped, in float16.
    shipped = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), average)
    metrics = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shipped)),
        "examples": len(captioned),
        "pictures": counts,
        "runs": [*runs, run],
    }
    write(args.out, shipped, metrics | evaluate(shipped, probes))
    sheet(shipped, encoder, [probes[name] for name in ("train", "held_out", "editing")], args.sheet)


if __name__ == "__main__":
    main()
