"""Pretrains the tiny AutoencoderKL on the embedded pictures.

    python launch/tiny/pretrain_vae.py [--minutes N | --steps N] [--batch N] [--out DIR]
    python launch/tiny/pretrain_vae.py --start FOLDER ...
    python launch/tiny/pretrain_vae.py --decoder-of FOLDER --out DIR ...

Scenes of one to three cut-outs are composed in the step itself (vae_scenes.py). Loss of a picture:
L1 + root of the mean squared error + L1 of the differences between neighbours at three scales + a
light KL term. Writes a diffusers folder with float16 weights (the moving average) whose
scaling_factor and shift_factor are the measured ones, every minute and at the end; then
metrics.json with the figures on held-out subjects, a model card, and a sheet.

The second form goes on from earlier weights; with --minutes 0 it measures them. The third trains
the decoder of a folder further and keeps its encoder and normalisation to the bit, so that models
of its latents stay valid.

The shipped weights come from on_gpu.sh. On two CPU cores a step of 8 pictures takes about a second,
so there twenty minutes give a trial only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import common  # beside this file
import jax
import jax.numpy as jnp
import numpy as np
import vae_scenes  # beside this file
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
from qk_jax.weights.write import export_model

CONFIG = vae.PRESETS["tiny"]
MODEL = vae.VAE(CONFIG)
RATE, FINAL, WARM_UP = 1e-3, 0.01, 300  # peak learning rate; its last part; steps
KL_WEIGHT = 2e-3  # of the mean KL per latent number
GRADIENT_WEIGHT = 0.3
EMA = 0.999
OPTIMIZER = common.adamw(1e-2, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))


# ---- held-out pictures, composed by Pillow as the pictures of the tasks are -------------------


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


def held_out(cuts: Sequence[Image.Image], known: Sequence[Image.Image]) -> dict[str, np.ndarray]:
    """The fixed pictures that figures are measured on: cut-outs on white, and scenes; beside them
    as many `known` cut-outs, of the training, on white."""
    rng = np.random.default_rng(7)
    pictures = {"on_white_64x64": np.stack([on_white(cut) for cut in cuts])}
    for height, width in SIZES:
        name = f"scenes_{height}x{width}"
        pictures[name] = scenes(rng, cuts, (height, width), min(len(cuts), 96))
    pictures["training_on_white_64x64"] = np.stack([on_white(cut) for cut in known[: len(cuts)]])
    return pictures


# ---- training ----------------------------------------------------------------------------------


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
    params: Tree, data: dict[str, Any], rng: jax.Array, batch: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss of `batch` new scenes, and its parts.

    Args:
      params: what is trained.
      data: the `pool` of cut-outs, and the `fixed` parameters.
      rng: draws the scenes and the latents.
      batch: how many scenes.
    """
    params = params | data["fixed"]
    drawn, noise = jax.random.split(rng)
    x = to_float(vae_scenes.scenes(drawn, data["pool"], batch))
    mean, logvar = MODEL.apply({"params": params}, x, method="encode")
    y = MODEL.apply({"params": params}, vae.sample(mean, logvar, noise), method="decode")
    squared = jnp.mean(jnp.square(x - y), (1, 2, 3)) + 1e-6
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    loss = jnp.mean(jnp.abs(x - y)) + jnp.mean(jnp.sqrt(squared))
    loss += GRADIENT_WEIGHT * edge_loss(x, y) + KL_WEIGHT * kl
    return loss, {
        "loss": loss,
        "psnr": jnp.mean(10 * jnp.log10(4 / squared)),
        "kl": kl,
        "noise": jnp.mean(jnp.exp(0.5 * logvar)),
        "latent": mean.mean((0, 1, 2)),
        "latent_squared": jnp.square(mean).mean((0, 1, 2)),
    }


# ---- what comes out ----------------------------------------------------------------------------


@jax.jit
def reconstruct(params: Tree, pictures: jax.Array) -> jax.Array:
    """uint8 pictures through the posterior mean and back to uint8."""
    y = MODEL.apply({"params": params}, to_float(pictures))
    return jnp.round((jnp.clip(y, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def reconstructions(params: Tree, pictures: np.ndarray) -> np.ndarray:
    parts = [reconstruct(params, pictures[i : i + 16]) for i in range(0, len(pictures), 16)]
    return np.concatenate(parts)


def normalised(parts: dict[str, np.ndarray]) -> tuple[vae.AutoencoderKLConfig, dict[str, Any]]:
    """The config with shift and scale that bring the latents of training scenes to mean 0 and
    std 1, and the figures of each channel; from the means of the loss's parts."""
    mean, square = (parts[name].astype(np.float64) for name in ("latent", "latent_squared"))
    shift, scale = round(mean.mean(), 6), round(1 / np.sqrt(square.mean() - mean.mean() ** 2), 6)
    config = dataclasses.replace(CONFIG, scaling_factor=float(scale), shift_factor=float(shift))
    std = np.sqrt(square - mean**2)
    return config, {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}


class Run:
    """One run of this recipe: what it starts from, and what it has come to.

    Attributes:
      trained, fixed: parameters.
      config: with the normalisation, once it is known.
      metrics: of the whole training, runs before this one included.

    Raises:
      InputError: the folder to start from holds another architecture.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.config, self.fixed = args, CONFIG, {}
        self.metrics = {"steps": 0, "steps_of_the_decoder_alone": 0, "minutes": 0.0}
        folder = args.start or args.decoder_of
        if folder is None:
            self.trained = common.fresh(MODEL)
        else:
            self.config, self.trained = import_model("vae", folder, jnp.float32)
            if dataclasses.replace(self.config, scaling_factor=1.0, shift_factor=0.0) != CONFIG:
                raise InputError(f"{folder} holds no tiny autoencoder; name one that does")
            self.metrics |= files.read_json(folder / "metrics.json")
        if args.decoder_of:
            self.fixed = {"encoder": self.trained.pop("encoder")}
        self.before = dict(self.metrics)

    def save(self, progress: common.Progress) -> None:
        """Writes weights, config and what is known of the training."""
        if progress.steps:
            alone = progress.steps if self.fixed else 0
            self.metrics |= {
                "steps": self.before["steps"] + progress.steps,
                "steps_of_the_decoder_alone": self.before["steps_of_the_decoder_alone"] + alone,
                "minutes": round(self.before["minutes"] + progress.seconds / 60, 1),
                "batch": self.args.batch,
            }
            if not self.fixed:
                self.config, self.metrics["latent_channels"] = normalised(progress.parts)
        params = jax.device_get(progress.average) | self.fixed
        export_model(params, self.config, self.args.out, jnp.float16)
        files.write_json(self.args.out / "metrics.json", self.metrics)

    def learn(self, cuts: Sequence[Image.Image]) -> Tree:
        """Trains on scenes of the cut-outs: the parameters as the files hold them."""
        data = {"pool": vae_scenes.pool([np.asarray(cut) for cut in cuts]), "fixed": self.fixed}
        run = common.program(functools.partial(loss_of, batch=self.args.batch), OPTIMIZER, EMA)
        state = common.State.of(self.trained, OPTIMIZER)
        rate = functools.partial(common.learning_rate, peak=RATE, warm_up=WARM_UP, final=FINAL)
        data, seed = jax.device_put(data), self.before["steps"]
        progress = common.train(self.args, run, state, data, seed, rate, self.save)
        return common.as_shipped(jax.device_get(progress.average) | self.fixed)


def measure(run: Run, params: Tree, cuts: list[Image.Image], others: list[Image.Image]) -> None:
    """Writes figures and card of the parameters, and the sheet."""
    pictures = held_out(others, cuts)
    found = {name: reconstructions(params, batch) for name, batch in pictures.items()}
    psnr = {name: similarity.psnr(batch, found[name]).mean() for name, batch in pictures.items()}
    metrics = run.metrics | {
        "psnr_db": {name: round(float(value), 3) for name, value in psnr.items()},
        "parameters": common.count(params),
        "held_out_subject_pictures": len(others),
    }
    words = {
        "latent": CONFIG.latent_channels, "widths": CONFIG.block_out_channels, "rate": RATE,
        "subjects": len(cuts), "ema": EMA, "edge": GRADIENT_WEIGHT, "kl": KL_WEIGHT,
        "shift": run.config.shift_factor, "scale": run.config.scaling_factor,
        "psnr": ", ".join(f"{name} {value:.2f}" for name, value in psnr.items()),
    }  # fmt: skip
    common.write(run.args.out, "vae", params, run.config, metrics, **words)
    rows = [
        (f"{name}, {word}", [("", picture) for picture in shown[:16]])
        for name in pictures
        for word, shown in (("given", pictures[name]), ("reconstructed", found[name]))
    ]
    sheets.save(sheets.draw("Pictures and their reconstructions", rows), run.args.sheet)


@exits
def main() -> None:
    """Trains, writes the weights, and measures them on the host: a GPU compiles convolutions for
    longer than a CPU takes for all these pictures."""
    options = common.parser("vae", __doc__, minutes=20, batch=8)
    options.add_argument("--start", type=files.Path, help="a folder to go on from")
    options.add_argument("--decoder-of", type=files.Path, help="one whose encoder is to stay")
    options.add_argument("--sheet", default="runs/tiny_vae.png", help="picture to write")
    args = common.parse(options)
    if args.start and args.decoder_of:
        raise InputError("--start and --decoder-of both name a folder to go on from; give one")
    cuts, others = cut_outs("train", args.limit), cut_outs("validation", args.limit)
    run = Run(args)
    params = run.learn(cuts)
    print("trained", flush=True)
    with jax.default_device(jax.devices("cpu")[0]):
        measure(run, params, cuts, others)


if __name__ == "__main__":
    main()
