"""Pretrains the tiny text-to-image diffusion transformer on the embedded pictures.

    python launch/assets/pretrain_mmdit.py --minutes 30 [--start DIR --steps N --batch N --out DIR]

This is the "large pretrained generator" that stage 2 starts from: flow matching on latents of the
tiny VAE, conditioned on the frozen tiny VLM's last states at the words of a prompt. Latents and
text states are computed once, so that a step is the transformer alone. A part of the steps shows
the picture itself as a source, as Qwen-Image's editing weights were pretrained on reconstruction
beside text-to-image (arXiv 2508.02324). The shipped weights are those of --minutes 46 --shown 0,
on one core, and --minutes 10 --start from them, on two. Only the corpus's training
side is learnt; the validation side gives the held-out figures. Writes a diffusers folder with
float16 weights (the moving average), metrics.json, a model card, and a sheet to look at.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw

from qk_jax.convert import torch_export, torch_import
from qk_jax.data import corpus, prompts, tasks
from qk_jax.diffusion import flow, sampler
from qk_jax.errors import InputError, exits
from qk_jax.models import layers, mmdit, qwen_vl, rotary, vae

TINY = pathlib.Path(__file__).resolve().parents[2] / "qk_jax" / "assets" / "tiny"
CONFIG = mmdit.PRESETS["tiny"]
MODEL = mmdit.MMDiT(CONFIG)
LAW = rotary.PositionLaw("shifted", source_mode="translate")  # as configs/common.py has it
TIME_LAW = flow.TimeLaw()
SCHEDULE = sampler.ScheduleConfig()
SIZES = ((64, 64), (48, 80), (80, 48))  # (height, width) of the targets
TOKENS = 16  # of the largest size; the others are padded to it, so that one batch holds all
MAX_TEXT = 48
VLM_PIXELS = 112 * 112
GROUPS = 4  # of prompt lengths; a batch comes from one, so that short prompts cost little
RATE = 1.2e-3  # AdamW's peak learning rate
WARM_UP = 150  # steps
DECAY = 0.01
DROP_TEXT = 0.1
VARIANTS = 4  # training examples made of each cut-out, with its own wording and background
EMA = 0.999
STEPS, GUIDANCE = 24, 3.0  # of the painted pictures

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Pictures with prompts; arrays have a leading axis of length n.

    Attributes:
      prompts: the words.
      record: int [n], number of the example in its task; one cut-out has several.
      size: int [n], index into SIZES.
      mean, std: float32 [n, TOKENS, 64], posterior of the packed latents, normalised.
      text: float32 [n, T, 192], the VLM's states, right-aligned; mask: bool [n, T].
    """

    prompts: tuple[str, ...]
    record: np.ndarray
    size: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    text: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples with these numbers, their text as short as the longest of them."""
        longest = int(self.mask[rows].sum(1).max())
        arrays = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if field.name != "prompts"
        }
        for name in ("text", "mask"):
            arrays[name] = arrays[name][:, -longest:]
        return Examples(prompts=tuple(self.prompts[row] for row in rows), **arrays)


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Packed tokens (rows, columns) of a picture of (height, width) pixels."""
    return size[0] // 16, size[1] // 16


@functools.cache
def places() -> tuple[np.ndarray, np.ndarray]:
    """Positions of a picture and of itself as a source, int32 [sizes, 2 TOKENS, 3], and which of a
    picture's tokens are real, bool [sizes, TOKENS]."""
    positions, real = [], []
    roles = np.full((1, 1), rotary.SOURCE)
    for size in SIZES:
        grid = grid_of(size)
        with jax.ensure_compile_time_eval():  # the first call may come while a step is traced
            at = np.split(np.asarray(rotary.image_positions(LAW, grid, (grid,), roles)[0]), 2)
        rest = ((0, TOKENS - len(at[0])), (0, 0))
        positions.append(np.concatenate([np.pad(part, rest) for part in at]))
        real.append(np.arange(TOKENS) < len(at[0]))
    return np.stack(positions), np.stack(real)


class Encoder:
    """The frozen parts: pictures to latents and words to states, each computed once."""

    def __init__(self, vlm: pathlib.Path, tokens: pathlib.Path, autoencoder: pathlib.Path):
        vlm_config, self.vlm_params = torch_import.import_vlm(vlm)
        self.vae_config, self.vae_params = torch_import.import_vae(autoencoder)
        if vlm_config.text.hidden_size != CONFIG.joint_attention_dim:
            raise InputError(
                f"{vlm} has states of {vlm_config.text.hidden_size} channels, the transformer "
                f"reads {CONFIG.joint_attention_dim}; give the tiny Qwen2.5-VL"
            )
        vlm_model, self.vae = qwen_vl.QwenVL(vlm_config), vae.VAE(self.vae_config)
        self.states = jax.jit(vlm_model.apply, static_argnums=5)
        self.moments = jax.jit(functools.partial(self.vae.apply, method="encode"))
        self.pixels = jax.jit(functools.partial(self.vae.apply, method="decode"))
        tokenizer = prompts.load_tokenizer(tokens)
        self.layout = prompts.PromptLayout(tokenizer, MAX_TEXT, 0, VLM_PIXELS)

    def texts(self, words: Sequence[str], batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [n, T, D] at the words and their mask bool [n, T]; T the longest."""
        longest = max(len(self.layout.encode_text(text)) for text in words)
        layout = dataclasses.replace(self.layout, max_text=longest)
        none = jnp.zeros((batch, 0, 1176))
        states, masks = [], []
        for part in _batches(list(words), batch):
            rows = [layout.build(text) for text in part]
            ids, mask, at = (
                np.stack([row[name] for row in rows])
                for name in ("input_ids", "attention_mask", "position_ids")
            )
            hidden = self.states({"params": self.vlm_params}, ids, at, mask, none, ())
            end = hidden.shape[1] - layout.tail_tokens
            states.append(np.asarray(hidden[:, end - longest : end]))
            masks.append(np.stack([row["text_mask"] for row in rows]))
        return np.concatenate(states)[: len(words)], np.concatenate(masks)[: len(words)]

    def latents(self, pictures: Sequence[np.ndarray], batch: int = 64) -> np.ndarray:
        """uint8 [H, W, 3] of one size -> packed (mean, std) float32 [2, n, TOKENS, 64]."""
        parts = []
        for part in _batches(list(pictures), batch):
            x = np.stack(part).astype(np.float32) / 127.5 - 1
            mean, logvar = self.moments({"params": self.vae_params}, x)
            edge = vae.normalize(mean + jnp.exp(0.5 * logvar), self.vae_config)
            mean = vae.normalize(mean, self.vae_config)
            parts.append(np.stack([mmdit.pack(mean), mmdit.pack(edge - mean)]))
        packed = np.concatenate(parts, axis=1)[:, : len(pictures)]
        return np.pad(packed, ((0, 0), (0, 0), (0, TOKENS - packed.shape[2]), (0, 0)))

    def decode(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Normalised packed latents [n, TOKENS, 64] of one size -> uint8 [n, H, W, 3]."""
        height, width = SIZES[size]
        real = tokens[:, : math.prod(grid_of(SIZES[size]))]
        z = vae.denormalize(mmdit.unpack(real, height // 8, width // 8), self.vae_config)
        x = np.asarray(self.pixels({"params": self.vae_params}, z))
        return np.clip((x + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def _batches(rows: list, batch: int) -> Iterator[list]:
    """Slices of `batch`; the last is filled up with the first row, for one compiled shape."""
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        yield part + rows[:1] * (batch - len(part))


def encode(encoder: Encoder, made: Sequence[tasks.Example]) -> Examples:
    """Latents and text states of examples of the text-to-image task."""
    words = [example.instruction for example in made]
    size = np.array([SIZES.index(example.target.shape[:2]) for example in made])
    moments = np.zeros((2, len(made), TOKENS, CONFIG.in_channels), np.float32)
    for index in range(len(SIZES)):
        (rows,) = np.nonzero(size == index)
        if len(rows):
            moments[:, rows] = encoder.latents([made[row].target for row in rows])
    distinct = sorted(set(words))
    states, masks = encoder.texts(distinct)
    rows = np.searchsorted(distinct, words)
    record = np.array([example.record for example in made])
    return Examples(tuple(words), record, size, *moments, states[rows], masks[rows])


def source_examples(side: str, variants: int, limit: int | None = None) -> list[tasks.Example]:
    """`variants` examples of every picture of a corpus side, or the first `limit` of them."""
    subjects = corpus.Corpus(side)
    source = tasks.TextToImage(subjects, tasks.Settings(sizes=SIZES))
    return [source[number] for number in range(variants * len(subjects))[:limit]]


def plain_squares(side: str, count: int) -> list[tasks.Example]:
    """At most `count` square pictures on white, all of different subjects, for retrieval."""
    found = {}
    for example in tasks.examples(side, "text_to_image", 120, size=SIZES[0], kind="plain"):
        found.setdefault(example.subjects, example)
    return list(found.values())[:count]


def by_length(data: Examples) -> list[Examples]:
    """The examples in groups of similar prompt length."""
    order = np.argsort(data.mask.sum(1), kind="stable")
    return [data.take(rows) for rows in np.array_split(order, GROUPS)]


def velocity(
    params: Params, x: jax.Array, t: jax.Array, rows: dict[str, jax.Array], shown: bool = False
) -> jax.Array:
    """The transformer's velocity [B, TOKENS, 64] for rows of the three sizes at once.

    With `shown` the picture itself, without noise, follows the tokens x as a source.
    """
    positions, real = places()
    at, mask = jnp.asarray(positions)[rows["size"]], jnp.asarray(real)[rows["size"]]
    if shown:
        x, mask = jnp.concatenate([x, rows["mean"]], 1), jnp.concatenate([mask, mask], 1)
    words = rotary.text_positions(LAW, rows["text"].shape[1], grid_of(SIZES[0]), ())
    at = at[:, : x.shape[1]]
    given = (rows["text"], rows["mask"], t, at, words, mask, TOKENS)
    return MODEL.apply({"params": params}, x, *given)[:, :TOKENS]


def losses(
    params: Params,
    rows: dict[str, jax.Array],
    t: jax.Array,
    key: jax.Array,
    shown: bool = False,
) -> jax.Array:
    """Flow-matching loss [B] of latents drawn from their posterior, over the real tokens."""
    posterior, noise = jax.random.normal(key, (2, *rows["mean"].shape))
    x0 = rows["mean"] + rows["std"] * posterior
    predicted = velocity(params, flow.interpolate(x0, noise, t), t, rows, shown)
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


@functools.partial(jax.jit, donate_argnums=0, static_argnums=5)
def train_step(
    state: tuple, data: dict[str, jax.Array], rows, rate, key, shown: bool = False
) -> tuple[tuple, jax.Array]:
    """One step on the examples `rows` of `data`: ((params, average, optimizer state), loss).

    With `shown` every picture is its own source.
    """
    params, average, moments = state
    batch = {name: array[rows] for name, array in data.items()}
    time_key, drop_key, noise_key = jax.random.split(key, 3)
    t = flow.sample_timesteps(time_key, rows.shape, TIME_LAW, TOKENS)
    kept = jax.random.uniform(drop_key, rows.shape) >= DROP_TEXT
    batch["mask"] = batch["mask"] & kept[:, None]

    def mean_loss(params):
        return jnp.mean(losses(params, batch, t, noise_key, shown))

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


def device_rows(data: Examples) -> dict[str, jax.Array]:
    """The arrays that a step reads."""
    names = ("size", "mean", "std", "text", "mask")
    return {name: jnp.asarray(getattr(data, name)) for name in names}


@functools.partial(jax.jit, static_argnums=2)
def probe_losses(params: Params, rows: dict[str, jax.Array], shown: bool = False) -> jax.Array:
    """Loss [B] averaged over a fixed ladder of times, with fixed noise for each."""
    ladder = jnp.linspace(0.1, 0.95, 8)

    def one(index):
        t = jnp.full(len(rows["size"]), ladder[index])
        return losses(params, rows, t, jax.random.fold_in(jax.random.key(1), index), shown)

    return jax.lax.map(one, jnp.arange(len(ladder))).mean(0)


def caption_figures(params: Params, data: Examples) -> dict[str, float]:
    """Loss with the right words, with another example's, with none, and with the picture itself
    as a source; paired standard error of the words' margin."""
    rows = device_rows(data)
    other = np.roll(np.arange(len(data)), len(data) // 2 + 1)
    given = {
        "right": rows,
        "shuffled": rows | {name: rows[name][other] for name in ("text", "mask")},
        "none": rows | {"mask": jnp.zeros_like(rows["mask"])},
    }
    found = {name: np.asarray(probe_losses(params, rows)) for name, rows in given.items()}
    figures = {f"loss_{name}": float(loss.mean()) for name, loss in found.items()}
    figures["loss_source"] = float(np.asarray(probe_losses(params, rows, True)).mean())
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
    """All figures, for the probes `train`, `held_out`, `retrieval_train`, `retrieval_held_out`."""
    return {
        name: retrieval_figures(painted(params, data), data)
        if name.startswith("retrieval")
        else caption_figures(params, data)
        for name, data in probes.items()
    }


def sheet(params: Params, encoder: Encoder, sides: Sequence[Examples], path: pathlib.Path) -> None:
    """Writes a PNG: per side and size, prompts above the true and the painted pictures.

    The true ones are shown as the autoencoder gives them back.
    """
    columns, cell, rows = 10, (164, 92), []
    for data in sides:
        order = np.random.default_rng(4).permutation(len(data))
        order = [np.resize(order[data.size[order] == i], columns) for i in range(len(SIZES))]
        chosen = data.take(np.concatenate(order))
        latents = painted(params, chosen)
        for index in range(len(SIZES)):
            part = slice(index * columns, (index + 1) * columns)
            pictures = (encoder.decode(x[part], index) for x in (chosen.mean, latents))
            rows.append(zip(chosen.prompts[part], *pictures, strict=True))
    canvas = Image.new("RGB", (columns * cell[0], len(rows) * cell[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for y, row in enumerate(rows):
        for x, (words, *pictures) in enumerate(row):
            corner = (x * cell[0], y * cell[1])
            draw.text(corner, words[:26], "black")
            for offset, picture in zip((0, 80), pictures, strict=True):
                canvas.paste(Image.fromarray(picture), (corner[0] + offset, corner[1] + 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def write(folder: pathlib.Path, params: Params, metrics: dict[str, Any]) -> None:
    """The diffusers folder with float16 weights, metrics.json and the model card."""
    print(json.dumps(metrics), flush=True)
    torch_export.export_mmdit(params, CONFIG, folder, jnp.float16)
    for name, text in (
        ("metrics.json", json.dumps(metrics, indent=2)),
        ("README.md", card(metrics)),
    ):
        partial = folder / f".{name}.partial"
        partial.write_text(text + "\n")
        os.replace(partial, folder / name)


CARD = """# Tiny text-to-image transformer

QwenImageTransformer2DModel, {parameters:,} parameters, float16: {layers} blocks, {heads} heads of
{channels} channels. The pretrained generator that stage 2 of the quickstart starts from; made by
`launch/assets/pretrain_mmdit.py`.

- **Data**: the training side of the embedded pictures (`qk_jax/assets/corpus`), {examples:,}
  pictures of 64x64, 48x80 and 80x48 pixels with words of the text-to-image task.
- **Condition**: last hidden states of the tiny Qwen2.5-VL at the words (frozen).
- **Latents**: of the tiny VAE (frozen), drawn from the posterior.
- **Training**: flow matching, logit-normal t with resolution shift, {steps:,} steps of {batch} in
  {minutes:.0f} minutes on a CPU, AdamW, moving average; {dropped:.0%} of the rows without words.
  {shown:.0%} of the steps show the picture itself as a source, as pretraining for editing
  does.{before}
- **Positions**: the shifted law, text at zero. diffusers' pipelines place tokens by another law, so
  there it needs these positions.

| loss | right words | another's words | no words | itself as source | margin | standard error |
| --- | --- | --- | --- | --- | --- | --- |
| training pictures | {train} |
| held-out subjects | {held_out} |

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
        for side in ("train", "held_out")
    }
    for name in ("retrieval_train", "retrieval_held_out"):
        found = metrics[name]
        rows[name] = f"{found['top1']:.0%} | {found['top5']:.0%} | {found['candidates']}"
    before = ""
    if "before" in metrics:
        known = metrics["before"]
        before = (
            f"\n  It went on from weights of {known['steps']:,} steps of {known['batch']} in "
            f"{known['seconds'] / 60:.0f} minutes, {known['shown']:.0%} of them so."
        )
    return CARD.format(
        **metrics | rows | {"before": before},
        layers=CONFIG.num_layers,
        heads=CONFIG.num_attention_heads,
        channels=CONFIG.attention_head_dim,
        minutes=metrics["seconds"] / 60,
        dropped=DROP_TEXT,
        guidance=GUIDANCE,
        euler=STEPS,
    )


def go_on_from(folder: pathlib.Path) -> tuple[Params, dict[str, Any]]:
    """Parameters of an earlier run, and its length as `before` for metrics.json.

    Raises:
      InputError: the weights are of another architecture.
    """
    config, params = torch_import.import_mmdit(folder, jnp.float32)
    if config != CONFIG:
        raise InputError(f"{folder} is of another architecture; give a tiny transformer")
    known = json.loads((folder / "metrics.json").read_text())
    return params, {
        "before": {name: known[name] for name in ("steps", "batch", "seconds", "shown")}
    }


def train(
    args: argparse.Namespace, encoder: Encoder, data: Examples, probes: dict[str, Examples]
) -> None:
    """Trains for the given minutes or steps, measures, and writes the folder.

    Raises:
      InputError: the weights of `--start` are of another architecture.
    """
    groups = [device_rows(group) for group in by_length(data)]
    sizes = np.array([len(group["size"]) for group in groups])
    params, before = go_on_from(args.start) if args.start else (fresh(), {})
    metrics = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "examples": len(data),
        "batch": args.batch,
        "shown": args.shown,
        **before,
    }
    state = (params, jax.tree.map(jnp.copy, params), optimizer().init(params))
    rng, start = np.random.default_rng(0), time.monotonic()
    saved, recent, step, progress = start, [], 0, 0.0
    while progress < 1:
        group = rng.choice(len(groups), p=sizes / sizes.sum())
        rows = rng.choice(sizes[group], args.batch)
        key = jax.random.fold_in(jax.random.key(5), step)
        rate = learning_rate(step, progress)
        shown = bool(rng.random() < args.shown)
        state, loss = train_step(state, groups[group], rows, rate, key, shown)
        recent.append(float(loss))
        step += 1
        now = time.monotonic()
        progress = step / args.steps if args.steps else (now - start) / (60 * args.minutes)
        if step % 50 == 0:
            mean, recent = float(np.mean(recent)), []
            speed = step * args.batch / (now - start)
            print(f"step {step} {progress:.1%} loss {mean:.4f} {speed:.0f} pictures/s", flush=True)
        if now - saved > 60 * args.save_minutes:  # an interrupted run leaves its weights
            torch_export.export_mmdit(state[1], CONFIG, args.out, jnp.float16)
            saved = time.monotonic()
    metrics |= {"steps": step, "seconds": round(time.monotonic() - start)}
    # The figures are those of the weights as they are shipped, in float16.
    shipped = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), state[1])
    write(args.out, shipped, metrics | evaluate(shipped, probes))
    sheet(shipped, encoder, (data, probes["held_out"]), args.sheet)


@exits
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="length of the training")
    parser.add_argument("--steps", type=int, help="length in steps, instead of minutes")
    parser.add_argument(
        "--shown", type=float, default=0.3, help="part of the steps that show the picture as source"
    )
    parser.add_argument("--start", type=pathlib.Path, help="folder of weights to go on from")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step")
    parser.add_argument("--save-minutes", type=float, default=5, help="between two savings")
    parser.add_argument("--out", type=pathlib.Path, default=TINY / "mmdit", help="folder to write")
    parser.add_argument("--vlm", type=pathlib.Path, default=TINY / "vlm", help="tiny Qwen2.5-VL")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=TINY / "tokenizer")
    parser.add_argument("--vae", type=pathlib.Path, default=TINY / "vae", help="tiny AutoencoderKL")
    parser.add_argument("--sheet", type=pathlib.Path, default=pathlib.Path("runs/mmdit_sheet.png"))
    parser.add_argument("--limit", type=int, help="examples of each side, to try the recipe out")
    args = parser.parse_args()
    if args.batch < 1 or (args.steps is not None and args.steps < 1) or args.minutes <= 0:
        raise InputError("--batch, --steps and --minutes must be positive")
    if not 0 <= args.shown <= 1:
        raise InputError("--shown is a part of the steps; give 0 to 1")
    encoder = Encoder(args.vlm, args.tokenizer, args.vae)
    data = encode(encoder, source_examples("train", VARIANTS, args.limit))
    spread = np.random.default_rng(6).permutation(len(data))
    held_out = encode(encoder, source_examples("validation", 2, args.limit))
    probes = {"train": data.take(spread[: len(held_out)]), "held_out": held_out}
    for name, side in (("retrieval_train", "train"), ("retrieval_held_out", "validation")):
        probes[name] = encode(encoder, plain_squares(side, 100))
    print(f"{len(data)} training and {len(held_out)} held-out examples", flush=True)
    train(args, encoder, data, probes)


if __name__ == "__main__":
    main()
