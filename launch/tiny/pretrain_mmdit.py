"""Pretrains the tiny diffusion transformer on the embedded pictures.

    python launch/tiny/pretrain_mmdit.py [--minutes N | --steps N] [--batch N] [--out DIR]
    python launch/tiny/pretrain_mmdit.py --preset small --out DIR ...
    python launch/tiny/pretrain_mmdit.py --start DIR ...

This is the "large pretrained generator" that stage 2 starts from, of preset `small` that of
stages.sh: flow matching on latents of the tiny VAE, conditioned on the frozen tiny VLM's last
states at the words of a prompt. A part of the examples is text-to-image; the others give a
picture as a source and ask for it again, for a transformation or for an edit, as Qwen-Image's
multi-task training mixes text-to-image, instructed editing and reconstruction (arXiv 2508.02324).
References, kontext and queries are left to the three stages. Writes a diffusers folder with
float16 weights (the moving average), every minute and at the end; then metrics.json, a model card
and a sheet.

The third form goes on from earlier weights; with --minutes 0 it measures them. The shipped weights
come from on_gpu.sh.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import common  # beside this file
import jax
import jax.numpy as jnp
import mmdit_examples  # beside this file
import mmdit_latents  # beside this file
import numpy as np
from common import SIZES, TINY
from mmdit_examples import PICTURES
from mmdit_latents import LAWS, TOKENS, Autoencoder, Examples, token_positions
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

TIME_LAW = flow.TimeLaw()
SCHEDULE = sampler.ScheduleConfig()
RATE, WARM_UP = 1.2e-3, 200  # peak learning rate of a width of 128 and batches of 32; steps
OPTIMIZER = common.adamw(0.01, common.kernels)
DROP_TEXT = 0.1
EMA = 0.9995
STEPS, GUIDANCE = 24, 3.0  # of the painted pictures
SLOTS = 64  # of a batch that is measured

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Generator:
    """The transformer on packed latents of the three sizes at once.

    Attributes:
      config: its architecture.
      law: where the tokens of target and source lie.
    """

    config: mmdit.MMDiTConfig
    law: rotary.PositionLaw = LAWS["translate"]  # as configs/common.py has it

    @property
    def model(self) -> mmdit.MMDiT:
        return mmdit.MMDiT(self.config)

    def velocity(self, params: Tree, x: jax.Array, t: jax.Array, batch: Arrays) -> jax.Array:
        """The velocity [B, TOKENS, 64]."""
        positions, real = token_positions(self.law)
        at, mask = jnp.asarray(positions)[batch["size"]], jnp.asarray(real)[batch["size"]]
        mask = jnp.concatenate([mask, mask & batch["shown"][:, None]], 1)
        x = jnp.concatenate([x, batch["source"].astype(jnp.float32)], 1)
        text = batch["text"].astype(jnp.float32)
        words = rotary.text_positions(self.law, batch["mask"], mmdit_latents.grid_of(SIZES[0]), ())
        given = (text, batch["mask"], t, at, words, mask, TOKENS)
        return self.model.apply({"params": params}, x, *given)[:, :TOKENS]

    def losses(self, params: Tree, batch: Arrays, t: jax.Array, key: jax.Array) -> jax.Array:
        """Flow-matching loss [B] of latents drawn from their posterior, over the real tokens."""
        posterior, noise = jax.random.normal(key, (2, *batch["mean"].shape))
        x0 = batch["mean"] + batch["std"] * posterior
        predicted = self.velocity(params, flow.interpolate(x0, noise, t), t, batch)
        real = jnp.asarray(token_positions(self.law)[1])[batch["size"]]
        return flow.loss(predicted, flow.velocity_target(x0, noise), real)

    def loss_of(
        self, params: Tree, data: dict[str, Any], key: jax.Array, batch: int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss of `batch` examples of `Data`."""
        which, time_key, drop_key, noise_key = jax.random.split(key, 4)
        chosen = draw(which, data["tasks"], batch)
        examples = {name: array[chosen] for name, array in data["examples"].items()}
        t = flow.sample_timesteps(time_key, (batch,), TIME_LAW, TOKENS)
        kept = jax.random.uniform(drop_key, (batch,)) >= DROP_TEXT
        examples["mask"] = examples["mask"] & kept[:, None]
        loss = jnp.mean(self.losses(params, examples, t, noise_key))
        return loss, {"loss": loss}

    @functools.partial(jax.jit, static_argnums=0)
    def probe_losses(self, params: Tree, batch: Arrays) -> jax.Array:
        """Loss [B] averaged over a fixed ladder of times, with fixed noise for each."""
        ladder = jnp.linspace(0.1, 0.95, 8)

        def one(index):
            t = jnp.full(len(batch["size"]), ladder[index])
            return self.losses(params, batch, t, jax.random.fold_in(jax.random.key(1), index))

        return jax.lax.map(one, jnp.arange(len(ladder))).mean(0)

    @functools.partial(jax.jit, static_argnums=0)
    def paint(self, params: Tree, batch: Arrays) -> jax.Array:
        """Normalised packed latents [B, TOKENS, 64] painted from fixed noise with guidance."""
        noise = jax.random.normal(jax.random.key(2), batch["mean"].shape)
        sigmas = sampler.schedule(STEPS, TOKENS, SCHEDULE)
        none = batch | {"mask": jnp.zeros_like(batch["mask"])}
        both = jax.tree.map(lambda *x: jnp.concatenate(x), batch, none)

        def guided(x, sigma):
            t = jnp.full(2 * len(x), sigma)
            full, empty = jnp.split(self.velocity(params, jnp.concatenate([x, x]), t, both), 2)
            return empty + GUIDANCE * (full - empty)

        return sampler.sample(guided, noise, sigmas)


# ---- what a step learns ------------------------------------------------------------------------


def shares(shown: float) -> dict[str, float]:
    """Part of the examples of each task; `shown` give a source."""
    total = sum(PICTURES.values())
    with_source = {task: shown * count / total for task, count in PICTURES.items()}
    return {"text_to_image": 1 - shown, **with_source}


def together(examples: dict[str, Examples], shown: float) -> dict[str, Any]:
    """What `Generator.loss_of` reads: all examples, and for each task the number of its first
    example, how many it has and its share of a batch."""
    parts = shares(shown)
    counts = np.array([len(examples[task]) for task in parts], np.int32)
    return {
        "examples": mmdit_latents.join(examples[task] for task in parts).arrays(),
        "tasks": {
            "first": np.cumsum(counts, dtype=np.int32) - counts,
            "count": counts,
            "share": np.array(list(parts.values()), np.float32),
        },
    }


def draw(key: jax.Array, tasks: Arrays, batch: int) -> jax.Array:
    """The numbers [batch] of examples drawn by the shares of their tasks."""
    which, number = jax.random.uniform(key, (2, batch))
    task = jnp.sum(which[:, None] > jnp.cumsum(tasks["share"])[:-1], axis=1)
    within = jnp.floor(number * tasks["count"][task]).astype(jnp.int32)
    return tasks["first"][task] + jnp.minimum(within, tasks["count"][task] - 1)


# ---- figures -----------------------------------------------------------------------------------


def in_slots(data: Examples) -> Iterator[tuple[int, Arrays]]:
    """(how many count, arrays) of batches of SLOTS examples; the last is filled up."""
    for start in range(0, len(data), SLOTS):
        count = min(SLOTS, len(data) - start)
        yield count, data.take(np.resize(np.arange(start, start + count), SLOTS)).arrays()


def probed(generator: Generator, params: Tree, data: Examples) -> np.ndarray:
    """`probe_losses` of any number of examples."""
    parts = [np.asarray(generator.probe_losses(params, x))[:n] for n, x in in_slots(data)]
    return np.concatenate(parts)


def painted(generator: Generator, params: Tree, data: Examples) -> np.ndarray:
    """A painted latent [TOKENS, 64] for every example."""
    parts = [np.asarray(generator.paint(params, x))[:n] for n, x in in_slots(data)]
    return np.concatenate(parts)


def caption_figures(generator: Generator, params: Tree, data: Examples) -> dict[str, float]:
    """Loss with the right words, with another example's and with none; paired standard error of
    the margin between the first two."""
    other = np.roll(np.arange(len(data)), len(data) // 2 + 1)
    given = {
        "right": data,
        "shuffled": dataclasses.replace(data, text=data.text[other], mask=data.mask[other]),
        "none": dataclasses.replace(data, mask=np.zeros_like(data.mask)),
    }
    found = {name: probed(generator, params, examples) for name, examples in given.items()}
    figures = {f"loss_{name}": float(loss.mean()) for name, loss in found.items()}
    margin = found["shuffled"] - found["right"]
    figures["margin"], figures["margin_standard_error"] = similarity.mean_and_error(margin)
    return figures


def retrieval_figures(latents: np.ndarray, data: Examples) -> dict[str, float]:
    """How often the painted latent is nearest to the right picture's, among all of `data`."""
    true = data.mean.astype(np.float32).reshape(len(data), -1)
    distance = np.linalg.norm(latents.reshape(len(data), 1, -1) - true[None], axis=-1)
    return common.retrieval_figures((distance < np.diag(distance)[:, None]).sum(1))


def evaluate(generator: Generator, params: Tree, probes: dict[str, Examples]) -> dict[str, Any]:
    """All figures: of retrieval for the probes so named, of captions for the others."""
    return {
        name: retrieval_figures(painted(generator, params, data), data)
        if name.startswith("retrieval")
        else caption_figures(generator, params, data)
        for name, data in probes.items()
    }


def sheet(
    generator: Generator, params: Tree, autoencoder: Autoencoder, probes: dict[str, Examples]
) -> Image.Image:
    """Painted pictures of each size beside the true ones and the given ones, if any; the latter
    two as the autoencoder gives them back."""
    rows = []
    for name, data in probes.items():
        order = np.random.default_rng(4).permutation(len(data))
        each = [order[data.size[order] == size][:4] for size in range(len(SIZES))]
        chosen = data.take(np.concatenate(each))
        shown = {"source": chosen.source} if chosen.shown.all() else {}
        shown |= {"truth": chosen.mean, "painted": painted(generator, params, chosen)}
        pictures = {label: decoded(autoencoder, x, chosen.size) for label, x in shown.items()}
        for i, words in enumerate(chosen.prompts):
            cells = [(label, found[i]) for label, found in pictures.items()]
            rows.append((f"{name}: {words}", cells))
    return sheets.draw("The tiny generator", rows)


def decoded(autoencoder: Autoencoder, latents: np.ndarray, size: np.ndarray) -> list[np.ndarray]:
    """Pictures of latents [n, TOKENS, 64] of the sizes [n]."""
    every = [autoencoder.decode(latents, index) for index in range(len(SIZES))]
    return [every[index][i] for i, index in enumerate(size)]


def card_words(config: mmdit.MMDiTConfig, metrics: dict[str, Any]) -> dict[str, Any]:
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
    return words | {"dropped": DROP_TEXT, "guidance": GUIDANCE, "euler": STEPS, "model": config}


# ---- a run -------------------------------------------------------------------------------------


class Run:
    """One run of this recipe: what it starts from, and what it has come to.

    Attributes:
      config: the architecture.
      params: what is trained.
      metrics: of the whole training; `runs` has those before this one too.

    Raises:
      InputError: the folder to start from holds another architecture.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.config, self.metrics = args, mmdit.PRESETS[args.preset], {"runs": []}
        if args.start is None:
            self.params = common.fresh(mmdit.MMDiT(self.config))
        else:
            config, self.params = import_model("mmdit", args.start, jnp.float32)
            if config != self.config:
                raise InputError(f"{args.start} is of another architecture than {args.preset}")
            self.metrics |= files.read_json(args.start / "metrics.json")
        self.before = self.metrics["runs"]

    def save(self, progress: common.Progress, counts: dict[str, int]) -> None:
        """Writes weights, config and what is known of the training: its runs, and the `counts` of
        examples by task."""
        if progress.steps or not self.before:  # a short time may be over before the first step
            run = {"steps": progress.steps, "batch": self.args.batch, "seconds": progress.seconds}
            tasks = [task for task, share in shares(self.args.shown).items() if share]
            self.metrics |= {
                "parameters": common.count(progress.average),
                "examples": counts["text_to_image"],
                "pictures": {task: counts[task] for task in PICTURES},
                "runs": [*self.before, run | {"shown": self.args.shown, "tasks": tasks}],
            }
        export_model(jax.device_get(progress.average), self.config, self.args.out, jnp.float16)
        files.write_json(self.args.out / "metrics.json", self.metrics)

    def learn(self, examples: dict[str, Examples]) -> Tree:
        """Trains on encoded examples by task: the parameters as the files hold them."""
        loss_of = functools.partial(
            Generator(self.config, LAWS[self.args.law]).loss_of, batch=self.args.batch
        )
        run = common.program(loss_of, OPTIMIZER, EMA)
        state = common.State.of(self.params, OPTIMIZER)
        # Larger batches have less noise and bear a higher rate, wider models a lower one.
        peak = RATE * (self.args.batch / 32) ** 0.25 * (128 / self.config.width) ** 0.5
        rate = functools.partial(common.learning_rate, peak=peak, warm_up=WARM_UP)
        data = jax.device_put(together(examples, self.args.shown))
        save = functools.partial(self.save, counts={task: len(x) for task, x in examples.items()})
        seed = sum(run["steps"] for run in self.before)
        return common.as_shipped(
            common.train(self.args, run, state, data, seed, rate, save).average
        )


def probes_of(examples: dict[str, Examples]) -> dict[str, Examples]:
    """What is measured, by the names of `evaluate`: held-out examples, and some of the training."""
    held_out, known = examples["held_out"], examples["text_to_image"]
    spread = np.random.default_rng(6).permutation(len(known))[: len(held_out)]
    return {
        "held_out": held_out,
        **{task: examples[f"held_out_{task}"] for task in PICTURES},
        **{name: examples[name] for name in ("retrieval_train", "retrieval_held_out")},
        "train": known.take(spread),
    }


@exits
def main() -> None:
    """Encodes the examples, trains, writes, measures."""
    options = common.parser("mmdit", __doc__, minutes=30, batch=32)
    options.add_argument("--preset", choices=("tiny", "small"), default="tiny", help="its size")
    options.add_argument("--shown", type=float, default=0.75, help="part that gives a source")
    options.add_argument("--law", choices=LAWS, default="translate", help="positions of tokens")
    options.add_argument("--start", type=files.Path, help="folder of weights to go on from")
    options.add_argument("--vae", type=files.Path, default=TINY / "vae", help="folder of the VAE")
    options.add_argument(
        "--examples", type=files.Path, default=mmdit_examples.FOLDER, help="of mmdit_examples.py"
    )
    options.add_argument("--sheet", default="runs/tiny_mmdit.png", help="picture to write")
    args = common.parse(options)
    if not 0 <= args.shown <= 1:
        raise InputError("--shown is a part of the examples; give 0 to 1")
    run = Run(args)
    drawn = mmdit_examples.load(args.examples, args.limit)
    autoencoder = Autoencoder(args.vae)
    examples = {name: mmdit_latents.encoded(autoencoder, x) for name, x in drawn.items()}
    print(f"{sum(map(len, examples.values()))} examples encoded", flush=True)
    shipped = run.learn(examples)
    print("trained", flush=True)
    generator, probes = Generator(run.config, LAWS[args.law]), probes_of(examples)
    metrics = run.metrics | evaluate(generator, shipped, probes)
    words = card_words(run.config, metrics)
    common.write(args.out, "mmdit", shipped, run.config, metrics, **words)
    shown = {name: probes[name] for name in ("train", "held_out", "editing", "transformation")}
    sheets.save(sheet(generator, shipped, autoencoder, shown), args.sheet)


if __name__ == "__main__":
    main()
