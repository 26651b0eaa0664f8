"""Pretrains the tiny AutoencoderKL on the embedded pictures.

    python launch/tiny/pretrain_vae.py [--minutes N | --steps N] [--batch N] [--out DIR]
    python launch/tiny/pretrain_vae.py --decoder-of FOLDER --out DIR

Pictures are composed as the tasks compose them: one to three cut-outs on white, flat or graded
backgrounds, in three sizes. Loss: L1 + squared error + L1 of the differences between neighbours at
three scales + a light KL term. Writes a diffusers folder with float16 weights whose scaling_factor
and shift_factor are the measured ones, metrics.json with the figures on held-out subjects and a
model card; and a sheet of held-out reconstructions.

The second form trains the decoder of an existing folder further and keeps its encoder and
normalisation to the bit, so that models of its latents stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import common  # beside this file
import jax
import jax.numpy as jnp
import numpy as np
from common import SIZES
from PIL import Image, ImageOps

from qk_jax.base import files
from qk_jax.base.errors import InputError, exits
from qk_jax.base.types import Tree
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.evaluation import similarity
from qk_jax.models import vae
from qk_jax.painting import sheets
from qk_jax.weights.read import import_model

CONFIG = vae.PRESETS["tiny"]
MODEL = vae.VAE(CONFIG)
SHARES = (0.6, 0.2, 0.2)  # of SIZES among the batches
RATE, WARM_UP = 2e-3, 100  # peak learning rate; steps
KL_WEIGHT = 1e-4  # of the mean KL per latent number
GRADIENT_WEIGHT = 0.5
EMA = 0.998
OPTIMIZER = common.adamw(1e-2, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))


def cut_outs(side: str, limit: int | None) -> list[Image.Image]:
    """The RGBA pictures of one side of the corpus."""
    return [Image.fromarray(cutout.rgba) for cutout in list(Corpus(side))[:limit]]


def background(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """White, one colour, or a gradient between two colours, as RGB."""
    kind = rng.choice(["white", "flat", "gradient"], p=[0.5, 0.3, 0.2])
    if kind == "white":
        return Image.new("RGB", (width, height), "white")
    first, second = rng.integers(0, 256, (2, 3))
    if kind == "flat":
        return Image.new("RGB", (width, height), tuple(first.tolist()))
    # Two draws where one would do: held-out figures stay comparable with those of earlier weights.
    down = rng.random() < 0.5 or height == width
    down = down and (rng.random() < 0.5 or height != width)
    ramp = np.linspace(0, 1, height if down else width)
    ramp = ramp[:, None, None] if down else ramp[None, :, None]
    mixed = (first + ramp * (second - first)).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(mixed, (height, width, 3))))


def changed(rng: np.random.Generator, cut: Image.Image) -> Image.Image:
    """A cut-out mirrored, turned, greyed or with its colour channels permuted, now and then."""
    if rng.random() < 0.5:
        cut = ImageOps.mirror(cut)
    if rng.random() < 0.1:
        cut = cut.rotate(90 * int(rng.integers(1, 4)), expand=True)
    chance = rng.random()
    if chance < 0.1:
        cut = Image.merge("RGBA", [cut.convert("L")] * 3 + [cut.getchannel("A")])
    elif chance < 0.25:
        bands = cut.split()
        cut = Image.merge("RGBA", [bands[i] for i in rng.permutation(3)] + [bands[3]])
    return cut


def scene(
    rng: np.random.Generator, cuts: Sequence[Image.Image], height: int, width: int
) -> np.ndarray:
    """One composed picture, uint8 [height, width, 3]; several cut-outs share the longer side."""
    canvas = background(rng, height, width)
    count = rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15])
    cell = (width / count, height) if width >= height else (width, height / count)
    for number in range(count):
        cut = changed(rng, cuts[rng.integers(len(cuts))])
        share = rng.uniform(0.5, 1.0) if count == 1 else rng.uniform(0.7, 1.1)
        scale = share * min(cell[0] / cut.width, cell[1] / cut.height)
        size = (max(4, round(cut.width * scale)), max(4, round(cut.height * scale)))
        if size != cut.size:
            cut = cut.resize(size, Image.Resampling.BICUBIC)
        rest = (cell[0] - size[0], cell[1] - size[1])
        x, y = (rng.uniform(min(0, r), max(0, r)) for r in rest)
        x, y = (x + number * cell[0], y) if width >= height else (x, y + number * cell[1])
        canvas.paste(cut, (round(x), round(y)), cut)
    return np.asarray(canvas)


def scenes(rng: np.random.Generator, cuts, size: tuple[int, int], count: int) -> np.ndarray:
    """`count` composed pictures of one size, uint8 [count, H, W, 3]."""
    return np.stack([scene(rng, cuts, *size) for _ in range(count)])


def on_white(cut: Image.Image) -> np.ndarray:
    """A cut-out fitted in the middle of a white square, uint8 [64, 64, 3]."""
    canvas = Image.new("RGB", (64, 64), "white")
    cut = ImageOps.contain(cut, (64, 64), Image.Resampling.BICUBIC)
    canvas.paste(cut, ((64 - cut.width) // 2, (64 - cut.height) // 2), cut)
    return np.asarray(canvas)


def to_float(pictures: jax.Array) -> jax.Array:
    """uint8 -> [-1, 1]."""
    return jnp.asarray(pictures, jnp.float32) / 127.5 - 1.0


def edge_loss(x: jax.Array, y: jax.Array) -> jax.Array:
    """L1 between the neighbour differences of two batches [B, H, W, 3] at scales 1, 1/2, 1/4."""
    error, total = x - y, 0.0
    for _ in range(3):
        total += jnp.mean(jnp.abs(jnp.diff(error, axis=1)))
        total += jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
        b, h, w, c = error.shape
        error = error.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
    return total / 3


def loss_of(
    params: Tree, fixed: Tree, pictures: jax.Array, rng: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss of one uint8 batch, and its parts; `fixed` are weights not trained."""
    params = params | fixed
    x = to_float(pictures)
    mean, logvar = MODEL.apply({"params": params}, x, method="encode")
    y = MODEL.apply({"params": params}, vae.sample(mean, logvar, rng), method="decode")
    squared = jnp.mean(jnp.square(x - y))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    loss = jnp.mean(jnp.abs(x - y)) + squared
    loss += GRADIENT_WEIGHT * edge_loss(x, y) + KL_WEIGHT * kl
    return loss, {"loss": loss, "squared": squared, "kl": kl}


@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: tuple, fixed: Tree, pictures: jax.Array, rate: jax.Array
) -> tuple[tuple, dict[str, jax.Array]]:
    """One step: ((parameters, average, optimizer state), parts of the loss)."""
    params, average, moments = state
    step = moments[1].count
    rng = jax.random.fold_in(jax.random.key(0), step)
    grads, parts = jax.grad(loss_of, has_aux=True)(params, fixed, pictures, rng)
    params, moments = common.descend(OPTIMIZER, params, moments, grads, rate)
    return (params, common.follow(average, params, step, EMA), moments), parts


@jax.jit
def reconstruct(params: Tree, pictures: jax.Array) -> jax.Array:
    """uint8 pictures through the posterior mean and back to uint8."""
    y = MODEL.apply({"params": params}, to_float(pictures))
    return jnp.round((jnp.clip(y, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def reconstructions(params: Tree, pictures: np.ndarray) -> np.ndarray:
    parts = [reconstruct(params, pictures[i : i + 16]) for i in range(0, len(pictures), 16)]
    return np.concatenate(parts)


def held_out(cuts: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """The fixed pictures that figures are measured on: cut-outs on white, and scenes."""
    rng = np.random.default_rng(7)
    pictures = {"on_white_64x64": np.stack([on_white(cut) for cut in cuts])}
    for height, width in SIZES:
        name = f"scenes_{height}x{width}"
        pictures[name] = scenes(rng, cuts, (height, width), min(len(cuts), 96))
    return pictures


def statistics(params: Tree, cuts: Sequence[Image.Image]) -> tuple[vae.AutoencoderKLConfig, dict]:
    """The config with shift and scale that bring latents of training pictures to mean 0, std 1."""

    @jax.jit
    def encode(pictures):
        return MODEL.apply({"params": params}, to_float(pictures), method="encode")[0]

    rng = np.random.default_rng(11)
    z = [encode(scenes(rng, cuts, SIZES[0], 16)) for _ in range(32)]
    z = np.concatenate(z).reshape(-1, CONFIG.latent_channels).astype(np.float64)
    shift, scale = round(float(z.mean()), 6), round(float(1 / z.std()), 6)
    config = dataclasses.replace(CONFIG, scaling_factor=scale, shift_factor=shift)
    return config, {"mean": z.mean(0).round(4).tolist(), "std": z.std(0).round(4).tolist()}


def begin(decoder_of: files.Path | None) -> tuple[Tree, Tree, vae.VAEConfig | None, int]:
    """(parameters to train, fixed ones, config to keep, steps that an earlier run took).

    Raises:
      InputError: the folder holds another architecture.
    """
    if decoder_of is None:
        return common.fresh(MODEL), {}, None, 0
    config, params = import_model("vae", decoder_of, jnp.float32)
    if dataclasses.replace(config, scaling_factor=1.0, shift_factor=0.0) != CONFIG:
        raise InputError(f"{decoder_of} holds no tiny autoencoder; name one that does")
    fixed = {"encoder": params.pop("encoder")}
    before = files.read_json(decoder_of / "metrics.json")["steps"]
    return jax.tree.map(jnp.asarray, params), fixed, config, before


@exits
def main() -> None:
    """Trains, measures the latents, and writes the folder with what was measured on it."""
    options = common.parser("vae", __doc__, minutes=20, batch=8)
    options.add_argument("--decoder-of", type=files.Path, help="a folder to train further")
    options.add_argument("--sheet", default="runs/tiny_vae.png", help="picture to write")
    args = common.parse(options)
    cuts, others = cut_outs("train", args.limit), cut_outs("validation", args.limit)
    params, fixed, config, before = begin(args.decoder_of)
    state = (params, jax.tree.map(jnp.copy, params), OPTIMIZER.init(params))
    rng, losses, step = np.random.default_rng([5, 0]), common.Losses(), 0
    for step, done in common.steps(args):
        size = SIZES[rng.choice(len(SIZES), p=SHARES)]
        rate = common.learning_rate(step, done, RATE, WARM_UP, final=0.02)
        state, parts = train_step(state, fixed, scenes(rng, cuts, size, args.batch), rate)
        losses.add(step, done, **parts)
    measured, channels = statistics(state[1] | fixed, cuts)
    config = config or measured
    shipped = common.as_shipped(state[1] | fixed)
    pictures = held_out(others)
    found = {name: reconstructions(shipped, batch) for name, batch in pictures.items()}
    psnr = {name: similarity.psnr(batch, found[name]).mean() for name, batch in pictures.items()}
    metrics = {
        "steps": before + step + 1,
        "steps_of_the_decoder_alone": step + 1 if args.decoder_of else 0,
        "batch": args.batch,
        "latent_channels": channels,
        "minutes": round(losses.seconds() / 60, 1),
        "psnr_db": {name: round(float(value), 3) for name, value in psnr.items()},
        "parameters": common.count(shipped),
        "held_out_subject_pictures": len(others),
    }
    words = {
        "latent": config.latent_channels, "widths": config.block_out_channels, "rate": RATE,
        "subjects": len(cuts), "ema": EMA, "edge": GRADIENT_WEIGHT, "kl": KL_WEIGHT,
        "shift": config.shift_factor, "scale": config.scaling_factor,
        "psnr": ", ".join(f"{name} {value:.2f}" for name, value in psnr.items()),
    }  # fmt: skip
    common.write(args.out, "vae", shipped, config, metrics, **words)
    rows = [
        (f"{name}, {word}", [("", picture) for picture in shown[:16]])
        for name in pictures
        for word, shown in (("held out", pictures[name]), ("reconstructed", found[name]))
    ]
    sheets.save(sheets.draw("Held-out pictures and their reconstructions", rows), args.sheet)


if __name__ == "__main__":
    main()
