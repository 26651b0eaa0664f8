"""Pretrains the tiny AutoencoderKL on the embedded pictures.

    python launch/tiny/pretrain_vae.py --minutes 20 [--steps N --batch N --out DIR --resume FILE]
    python launch/tiny/pretrain_vae.py --minutes 20 --decoder-of FOLDER --out DIR

Pictures are composed as the tasks compose them: one to three cut-outs of the training side on
white, flat or graded backgrounds, in the three bucket sizes. Loss: L1 + squared error + L1 of the
differences between neighbours at three scales + a light KL term. Writes a diffusers folder with
float16 weights whose scaling_factor and shift_factor are the measured ones, metrics.json with the
figures on held-out subjects, a sheet of held-out reconstructions, and a model card.

The second form trains the decoder of an existing folder further and keeps its encoder and
normalisation to the bit, so that models of its latents stay valid.
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
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from PIL import Image, ImageOps

from qk_jax.base.errors import InputError, exits
from qk_jax.data import records
from qk_jax.models import layers, vae
from qk_jax.weights.read import import_vae
from qk_jax.weights.write import export_vae

ASSETS = pathlib.Path(__file__).resolve().parents[2] / "qk_jax" / "assets"
CONFIG = vae.PRESETS["tiny"]
MODEL = vae.VAE(CONFIG)
BUCKETS = {(64, 64): 0.6, (48, 80): 0.2, (80, 48): 0.2}  # (height, width): share of the batches
RATE = 2e-3  # AdamW's peak learning rate
WARM_UP = 100  # steps
KL_WEIGHT = 1e-4  # of the mean KL per latent number
GRADIENT_WEIGHT = 0.5
EMA = 0.998
WHITE = (255, 255, 255)


def cut_outs(path: pathlib.Path) -> list[Image.Image]:
    """The RGBA pictures of one record file."""
    file = records.RecordFile(path)
    pictures = []
    for number in range(len(file)):
        (blob,) = file[number].blobs.values()
        pictures.append(Image.open(io.BytesIO(blob)).convert("RGBA"))
    return pictures


def background(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """White, one colour, or a gradient between two colours, as RGB."""
    kind = rng.choice(["white", "flat", "gradient"], p=[0.5, 0.3, 0.2])
    if kind == "white":
        return Image.new("RGB", (width, height), WHITE)
    first, second = rng.integers(0, 256, (2, 3))
    if kind == "flat":
        return Image.new("RGB", (width, height), tuple(int(c) for c in first))
    ramp = np.linspace(0, 1, height if rng.random() < 0.5 else width)
    ramp = ramp[:, None] if len(ramp) == height and rng.random() < 0.5 else ramp[None, :]
    mix = np.broadcast_to(ramp, (height, width) if ramp.shape[1] in (1, width) else (width, height))
    mix = mix if mix.shape == (height, width) else mix.T
    picture = first + mix[..., None] * (second - first)
    return Image.fromarray(picture.round().astype(np.uint8), "RGB")


def changed(rng: np.random.Generator, cut: Image.Image) -> Image.Image:
    """A cut-out mirrored, turned, greyed or with its colour channels permuted, now and then."""
    if rng.random() < 0.5:
        cut = ImageOps.mirror(cut)
    if rng.random() < 0.1:
        cut = cut.rotate(90 * int(rng.integers(1, 4)), expand=True)
    draw = rng.random()
    if draw < 0.1:
        cut = Image.merge("RGBA", [cut.convert("L")] * 3 + [cut.getchannel("A")])
    elif draw < 0.25:
        bands = cut.split()
        cut = Image.merge("RGBA", [bands[i] for i in rng.permutation(3)] + [bands[3]])
    return cut


def scene(rng: np.random.Generator, cuts: Sequence[Image.Image], height: int, width: int):
    """One composed picture, uint8 [height, width, 3]."""
    canvas = background(rng, height, width)
    count = rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15])
    for place in range(count):
        cut = changed(rng, cuts[rng.integers(len(cuts))])
        cell = (width / count, height) if width >= height else (width, height / count)
        share = rng.uniform(0.5, 1.0) if count == 1 else rng.uniform(0.7, 1.1)
        scale = share * min(cell[0] / cut.width, cell[1] / cut.height)
        size = (max(4, round(cut.width * scale)), max(4, round(cut.height * scale)))
        if size != cut.size:
            cut = cut.resize(size, Image.Resampling.BICUBIC)
        room = (cell[0] - size[0], cell[1] - size[1])
        x, y = (rng.uniform(min(0, r), max(0, r)) for r in room)
        x, y = (x + place * cell[0], y) if width >= height else (x, y + place * cell[1])
        canvas.paste(cut, (round(x), round(y)), cut)
    return np.asarray(canvas)


def scenes(rng: np.random.Generator, cuts, bucket: tuple[int, int], count: int) -> np.ndarray:
    """`count` composed pictures of one size, uint8 [count, H, W, 3]."""
    return np.stack([scene(rng, cuts, *bucket) for _ in range(count)])


def on_white(cuts: Sequence[Image.Image]) -> np.ndarray:
    """Each cut-out fitted in the middle of a white square, uint8 [N, 64, 64, 3]."""
    pictures = []
    for cut in cuts:
        canvas = Image.new("RGB", (64, 64), WHITE)
        cut = ImageOps.contain(cut, (64, 64), Image.Resampling.BICUBIC)
        canvas.paste(cut, ((64 - cut.width) // 2, (64 - cut.height) // 2), cut)
        pictures.append(np.asarray(canvas))
    return np.stack(pictures)


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
    params: dict, fixed: dict, pictures: jax.Array, rng: jax.Array
) -> tuple[jax.Array, dict]:
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


OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.99),
    optax.add_decayed_weights(1e-2, mask=lambda p: jax.tree.map(lambda a: a.ndim > 1, p)),
)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: dict, fixed: dict, pictures: jax.Array, rate: jax.Array) -> tuple[dict, dict]:
    """One AdamW update at learning rate `rate`, and the moving average."""
    rng = jax.random.fold_in(jax.random.key(0), state["step"])
    grads, parts = jax.grad(loss_of, has_aux=True)(state["params"], fixed, pictures, rng)
    updates, moments = OPTIMIZER.update(grads, state["moments"], state["params"])
    params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
    decay = jnp.minimum(EMA, (1.0 + state["step"]) / (10.0 + state["step"]))
    ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state["ema"], params)
    state = {"params": params, "ema": ema, "moments": moments, "step": state["step"] + 1}
    return state, parts


@jax.jit
def encode(params: dict, pictures: jax.Array) -> jax.Array:
    """uint8 pictures -> the posterior mean."""
    return MODEL.apply({"params": params}, to_float(pictures), method="encode")[0]


@jax.jit
def reconstruct(params: dict, pictures: jax.Array) -> jax.Array:
    """uint8 pictures through the posterior mean and back to uint8."""
    y = MODEL.apply({"params": params}, to_float(pictures))
    return jnp.round((jnp.clip(y, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def psnr(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each uint8 picture, dB [N]."""
    error = np.square(truth.astype(np.float64) - found).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-2))


def held_out(cuts: Sequence[Image.Image], limit: int | None = None) -> dict[str, np.ndarray]:
    """The fixed pictures that figures are measured on: cut-outs on white and three scene sizes."""
    rng = np.random.default_rng(7)
    pictures = {"on_white_64x64": on_white(cuts[:limit])}
    for height, width in BUCKETS:
        name = f"scenes_{height}x{width}"
        pictures[name] = scenes(rng, cuts, (height, width), min(limit or 96, 96))
    return pictures


def figures(params: dict, pictures: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean PSNR in dB of each set."""
    found = {}
    for name, batch in pictures.items():
        parts = [reconstruct(params, batch[i : i + 16]) for i in range(0, len(batch), 16)]
        found[name] = round(float(psnr(batch, np.concatenate(parts)).mean()), 3)
    return found


def statistics(params: dict, cuts: Sequence[Image.Image]) -> tuple[vae.AutoencoderKLConfig, dict]:
    """The config with shift and scale that bring latents of training pictures to mean 0, std 1."""
    rng = np.random.default_rng(11)
    z = [encode(params, scenes(rng, cuts, (64, 64), 16)) for _ in range(32)]
    z = np.concatenate(z).reshape(-1, CONFIG.latent_channels).astype(np.float64)
    shift, scale = round(float(z.mean()), 6), round(float(1 / z.std()), 6)
    config = dataclasses.replace(CONFIG, scaling_factor=scale, shift_factor=shift)
    channels = {"mean": z.mean(0).round(4).tolist(), "std": z.std(0).round(4).tolist()}
    return config, channels


def sheet(params: dict, pictures: dict[str, np.ndarray]) -> Image.Image:
    """Held-out pictures above their reconstructions, one pair of rows per set."""
    rows = []
    for batch in pictures.values():
        batch = batch[:16]
        pair = np.concatenate([batch, np.asarray(reconstruct(params, batch))], axis=1)
        row = np.concatenate(list(pair), axis=1)
        rows.append(np.pad(row, ((4, 4), (0, 16 * 80 - row.shape[1]), (0, 0)), constant_values=128))
    return Image.fromarray(np.concatenate(rows))


CARD = """# Tiny AutoencoderKL

A KL autoencoder for 64-pixel pictures in the diffusers format: factor 8, {latent} latent channels,
block_out_channels {widths}, {count:,} parameters in float16. Made by
`launch/tiny/pretrain_vae.py`.

- Data: {subjects:,} cut-outs of the training side of the embedded corpus (`../../corpus`, whose
  licences are stated there), one to three of them composed on white, flat or graded backgrounds
  in 64x64, 48x80 and 80x48 (height x width).
- Training: {steps:,} steps of {batch} pictures on the CPU, the last {alone:,} of them of the
  decoder alone; AdamW with peak rate {rate}, cosine; weights are the moving average ({ema}).
  Loss: L1 + squared error + {edge} x L1 of neighbour differences at three scales
  + {kl} x KL per latent number.
- Normalisation: (z - {shift}) * {scale}, measured on training scenes.
- PSNR in dB on held-out subjects (posterior mean, the float16 weights):
  {psnr}.

Small and trained for minutes: fine texture and thin lines are lost. Not meant for photographs.
"""


def save(params: dict, config, out: pathlib.Path, cuts, held, report: dict) -> dict:
    """Writes the folder beside `out` and renames it; returns the figures."""
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    export_vae(params, config, partial, jnp.float16)
    config, params = import_vae(partial, jnp.float32)
    report |= {"psnr_db": figures(params, held), "parameters": count(params)}
    report |= {"held_out_subject_pictures": len(held["on_white_64x64"])}
    (partial / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sheet(params, held).save(partial / "held_out.png")
    card = CARD.format(
        latent=config.latent_channels, widths=config.block_out_channels, count=count(params),
        subjects=len(cuts), steps=report["steps"], batch=report["batch"], rate=RATE, ema=EMA,
        alone=report["steps_of_the_decoder_alone"], edge=GRADIENT_WEIGHT, kl=KL_WEIGHT,
        shift=config.shift_factor, scale=config.scaling_factor,
        psnr=", ".join(f"{name} {value:.2f}" for name, value in report["psnr_db"].items()),
    )  # fmt: skip
    (partial / "README.md").write_text(card, encoding="utf-8")
    os.replace(partial, out)
    return report


def count(params: dict) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def rate_at(step: int, done: float) -> float:
    """Linear warm-up, then a cosine over the share `done` of the run down to 2 %."""
    return RATE * min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * min(done, 1)))


def train(state: dict, fixed: dict, args: argparse.Namespace, cuts, held) -> dict:
    """Trains until the steps or the minutes are used up; `done` drives the learning rate."""
    rng = np.random.default_rng([5, int(state["step"])])
    sizes, shares = list(BUCKETS), list(BUCKETS.values())
    start = shown = saved = time.monotonic()
    first = int(state["step"])
    for step in range(first, first + 10**9):
        now = time.monotonic()
        done = (step - first) / args.steps if args.steps else (now - start) / (60 * args.minutes)
        if done >= 1:
            break
        bucket = sizes[rng.choice(len(sizes), p=shares)]
        batch = scenes(rng, cuts, bucket, args.batch)
        state, parts = train_step(state, fixed, batch, np.float32(rate_at(step, done)))
        if now - shown > 20:
            shown = now
            text = " ".join(f"{k} {float(v):.5f}" for k, v in parts.items())
            print(f"step {step} {done:.1%} {now - start:.0f} s {text}", flush=True)
        if args.checkpoint and now - saved > 180:
            saved = now
            args.checkpoint.write_bytes(serialization.to_bytes(state))
            print(f"step {step} psnr {figures(state['ema'] | fixed, held)}", flush=True)
    if args.checkpoint:
        args.checkpoint.write_bytes(serialization.to_bytes(state))
    return state


@exits
def main() -> None:
    """Trains, measures the latents, and writes the folder with what was measured on it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--corpus", type=pathlib.Path, default=ASSETS / "corpus")
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS / "tiny" / "vae")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="written every three minutes")
    parser.add_argument("--resume", type=pathlib.Path, help="a checkpoint to go on from")
    parser.add_argument("--decoder-of", type=pathlib.Path, help="a folder to train further")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out} exists; remove it or name another --out")
    cuts = cut_outs(args.corpus / "train.array_record")
    others = cut_outs(args.corpus / "validation.array_record")
    start = time.monotonic()
    config, fixed, before = None, {}, 0
    if args.decoder_of:
        config, params = import_vae(args.decoder_of, jnp.float32)
        if dataclasses.replace(config, scaling_factor=1.0, shift_factor=0.0) != CONFIG:
            raise InputError(f"{args.decoder_of} holds no tiny autoencoder; name one that does")
        before = json.loads((args.decoder_of / "metrics.json").read_text())["steps"]
        fixed = {"encoder": params.pop("encoder")}
    else:
        params = layers.init_params(MODEL, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    params = jax.tree.map(jnp.asarray, params)
    state = {"params": params, "ema": jax.tree.map(jnp.copy, params), "step": jnp.int32(0)}
    state["moments"] = OPTIMIZER.init(params)
    if args.resume:
        state = serialization.from_bytes(state, args.resume.read_bytes())
    state = train(state, fixed, args, cuts, held_out(others, 32))
    params = state["ema"] | fixed
    measured, channels = statistics(params, cuts)
    report = {"steps": before + int(state["step"]), "steps_of_the_decoder_alone": 0}
    if args.decoder_of:
        report["steps_of_the_decoder_alone"] = int(state["step"])
    report |= {"batch": args.batch, "latent_channels": channels}
    report["minutes"] = round((time.monotonic() - start) / 60, 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = save(params, config or measured, args.out, cuts, held_out(others), report)
    print(f"{args.out}: {report['psnr_db']}")


if __name__ == "__main__":
    main()
