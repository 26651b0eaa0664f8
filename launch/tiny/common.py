"""What the recipes of the tiny models share: options, optimizer, loop, figures, and the folder.

A recipe learns from the corpus's training side only; the validation side gives its figures.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.base import cli, files
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.data.synthesis.corpus import EMBEDDED
from qk_jax.models import layers
from qk_jax.weights.write import export_model

HERE = pathlib.Path(__file__).parent
TINY = EMBEDDED.parent / "tiny"
SIZES = ((64, 64), (48, 80), (80, 48))  # (height, width) of the pictures


def parser(name: str, doc: str | None, *, minutes: float, batch: int) -> cli.Parser:
    """The options of every recipe; `name` is the folder that it writes beside the other parts."""
    out = cli.Parser(prog=f"launch/tiny/pretrain_{name}.py", description=doc)
    out.add_argument("--minutes", type=float, default=minutes, help="length of the training")
    out.add_argument("--steps", type=int, help="length in steps, instead of minutes")
    out.add_argument("--batch", type=int, default=batch, help="examples of a step")
    out.add_argument("--out", type=files.Path, default=files.Path(TINY / name), help="the folder")
    out.add_argument("--limit", type=int, help="at most so many examples of each kind, for a trial")
    return out


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line. Raises InputError for numbers that are not positive."""
    args = options.parse_args()
    for name in ("minutes", "steps", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} is {value}; give a positive number")
    return args


# ---- training ----------------------------------------------------------------------------------


def fresh(module: Any) -> Tree:
    """Random parameters of a model."""
    return layers.init_params(module, jax.random.key(0), *module.example())


def steps(args: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """(number, done part of the training in [0, 1)) of each step."""
    start = time.monotonic()
    for step in itertools.count():
        minutes = (time.monotonic() - start) / 60
        done = step / args.steps if args.steps else minutes / args.minutes
        if done >= 1:
            return
        yield step, done


def learning_rate(
    step: int, done: float, peak: float, warm_up: int, final: float = 0.0
) -> np.float32:
    """Linear over the first `warm_up` steps, then a cosine over `done` to `final` of the peak."""
    cosine = (1 + final + (1 - final) * np.cos(np.pi * min(done, 1.0))) / 2
    return np.float32(peak * min(1.0, (step + 1) / warm_up) * cosine)


def adamw(
    decay: float, decayed: Callable[[Tree], Tree], b2: float = 0.99
) -> optax.GradientTransformation:
    """AdamW on clipped gradients without its learning rate, which `descend` applies.

    Args:
      decay: the weight decay.
      decayed: parameters -> a tree of bools, the leaves that decay.
      b2: of Adam.
    """
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=b2),
        optax.add_decayed_weights(decay, decayed),
    )


def kernels(params: Tree) -> Tree:
    """Which leaves are kernels."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def descend(
    optimizer: optax.GradientTransformation, params: Tree, moments: Any, grads: Tree, rate: Any
) -> tuple[Tree, Any]:
    """(parameters, optimizer state) after one update."""
    updates, moments = optimizer.update(grads, moments, params)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments


def follow(average: Tree, params: Tree, count: Any, most: float) -> Tree:
    """The moving average after update `count`; short at first, to forget the random weights."""
    decay = jnp.minimum(most, (1 + count) / (10 + count))
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)


class Losses:
    """The last losses by name, printed every 50 steps."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.recent: dict[str, collections.deque] = {}

    def add(self, step: int, done: float, **losses: Any) -> None:
        for name, loss in losses.items():
            self.recent.setdefault(name, collections.deque(maxlen=20)).append(float(loss))
        if step % 50 == 49:
            means = " ".join(f"{name} {mean:.4f}" for name, mean in self.means().items())
            print(f"step {step + 1} {done:.1%} {self.seconds()} s {means}", flush=True)

    def means(self) -> dict[str, float]:
        return {name: float(np.mean(losses)) for name, losses in self.recent.items()}

    def seconds(self) -> int:
        return round(time.monotonic() - self.start)


# ---- what comes out ----------------------------------------------------------------------------


def retrieval_figures(rank: np.ndarray) -> dict[str, float]:
    """How often the right one of n candidates is the best, or among the best five.

    Args:
      rank: int [n], the number of candidates before the right one.
    """
    return {
        "candidates": len(rank),
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "chance_top1": 1 / len(rank),
        "chance_top5": 5 / len(rank),
    }


def count(params: Tree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def as_shipped(params: Tree) -> Tree:
    """The parameters as float16 files hold them, float32: what the figures are measured on."""
    return jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)


def write(
    out: files.Path, name: str, params: Tree, config: Any, metrics: dict, **words: Any
) -> None:
    """Writes the folder: config, float16 weights, metrics.json and the model card.

    Args:
      out: the folder.
      name: 'vlm', 'mmdit' or 'vae'; cards/NAME.md is its card.
      params: of the model.
      config: theirs.
      metrics: for metrics.json.
      words: what the card says besides, by the names in its braces.
    """
    export_model(jax.device_get(params), config, out, jnp.float16)
    files.write_json(out / "metrics.json", metrics)
    files.write_text(out / "README.md", card(name, **metrics | words))
    print(f"{out}: {metrics}", flush=True)


def card(name: str, **words: Any) -> str:
    """The text of cards/NAME.md with its braces filled."""
    return (HERE / "cards" / f"{name}.md").read_text().format(**words)
