"""What the recipes of the tiny models share: options, optimizer, loop, figures, and the folder.

A recipe learns from the corpus's training side only; the validation side gives its figures.
"""

from __future__ import annotations

import argparse
import collections
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.base import cli, files, runtime
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.data.synthesis.corpus import EMBEDDED
from qk_jax.models import layers
from qk_jax.weights.write import export_model

HERE = pathlib.Path(__file__).parent
TINY = EMBEDDED.parent / "tiny"
SIZES = ((64, 64), (48, 80), (80, 48))  # (height, width) of the pictures
STARTED = time.monotonic()  # of the program: its minutes hold reading, encoding and compiling too
AT_ONCE = 1.0  # seconds of training that a device does without asking the host
SAVE_SECONDS = 60  # between two saves, so that an interrupted run leaves weights
REPORT_SECONDS = 10


def parser(name: str, doc: str | None, *, minutes: float, batch: int) -> cli.Parser:
    """The options of every recipe; `name` is the folder that it writes beside the other parts."""
    out = cli.Parser(prog=f"launch/tiny/pretrain_{name}.py", description=doc)
    out.add_argument(
        "--minutes", type=float, default=minutes, help="from the start to the end of the training"
    )
    out.add_argument("--steps", type=int, help="length in steps, instead of minutes")
    out.add_argument("--batch", type=int, default=batch, help="examples of a step")
    out.add_argument("--out", type=files.Path, default=files.Path(TINY / name), help="the folder")
    out.add_argument("--limit", type=int, help="at most so many examples of each kind, for a trial")
    return out


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, before JAX starts. Raises InputError for numbers that are not positive; no
    minutes are fine, they measure weights that are there."""
    args = options.parse_args()
    runtime.skip_absent_tpu()
    for name in ("minutes", "steps", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and (value < 0 or value == 0 and name != "minutes"):
            raise InputError(f"--{name} is {value}; give a positive number")
    return args


# ---- training ----------------------------------------------------------------------------------


def fresh(module: Any) -> Tree:
    """Random parameters of a model."""
    return layers.init_params(module, jax.random.key(0), *module.example())


def steps(args: argparse.Namespace, at_once: float = 0.0) -> Iterator[tuple[int, int, float]]:
    """(first, how many, done part of the training in [0, 1)) of the steps to take next.

    So many are taken at once as take about `at_once` seconds, by the time that the last took.
    """
    start, end = time.monotonic(), STARTED + 60 * args.minutes
    first, count = 0, 1
    while True:
        now = time.monotonic()
        if first >= args.steps if args.steps else now >= end:
            return
        yield first, count, first / args.steps if args.steps else (now - start) / (end - start)
        first += count
        fitting = int(count * at_once / (time.monotonic() - now))
        count = max(1, min(fitting, 4 * count))
        count = min(count, args.steps - first) if args.steps else count


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


class State(NamedTuple):
    """What a training changes: parameters, their moving average, the optimizer's state."""

    params: Tree
    average: Tree
    moments: Any

    @classmethod
    def of(cls, params: Tree, optimizer: optax.GradientTransformation) -> State:
        """At the start of a training."""
        params = jax.tree.map(jnp.asarray, params)
        return cls(params, jax.tree.map(jnp.copy, params), optimizer.init(params))


Loss = Callable[[Tree, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def program(loss_of: Loss, optimizer: optax.GradientTransformation, ema: float) -> Callable:
    """Compiled steps: (state, data, seed, count, rate) -> (state, sums of the loss's parts).

    The whole loop of `count` steps runs on the device, so a step may be shorter than the time that
    a host takes to ask for it. Any count runs the same program.

    Args:
      loss_of: (parameters, data, key) -> (loss, its parts by name); draws its batch from the data.
      optimizer: of `adamw`.
      ema: most decay of the moving average.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run(
        state: State, data: Any, seed: jax.Array, count: jax.Array, rate: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        def step(_: Any, carry: tuple[State, Any]) -> tuple[State, Any]:
            (params, average, moments), sums = carry
            number = moments[1].count
            key = jax.random.fold_in(jax.random.key(seed), number)
            grads, parts = jax.grad(loss_of, has_aux=True)(params, data, key)
            params, moments = descend(optimizer, params, moments, grads, rate)
            average = follow(average, params, number, ema)
            return State(params, average, moments), jax.tree.map(jnp.add, sums, parts)

        parts = jax.eval_shape(loss_of, state.params, data, jax.random.key(0))[1]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts)
        return jax.lax.fori_loop(0, count, step, (state, zeros))

    return run


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
      average: the moving average of the parameters.
      steps, seconds: how many there were, and how long they took.
      parts: means of the loss's parts over the last steps; empty without any.
    """

    average: Tree
    steps: int
    seconds: int
    parts: dict[str, np.ndarray]


def train(
    args: argparse.Namespace,
    run: Callable,
    state: State,
    data: Any,
    seed: int,
    rate: Callable[[int, float], np.float32],
    save: Callable[[Progress], None],
) -> Progress:
    """Takes steps until the time is up, and saves now and then and at the end.

    Args:
      args: of `parse`.
      run: of `program`.
      state, data, seed: its arguments; another seed draws other batches.
      rate: (step, done part) -> the learning rate.
      save: writes what there is.
    """
    losses, saved = Losses(), time.monotonic()
    progress = Progress(state.average, 0, 0, {})
    for first, count, done in steps(args, AT_ONCE):
        state, sums = run(state, data, seed, count, rate(first, done))
        parts = {name: np.asarray(x) / count for name, x in sums.items()}
        losses.add(first + count, done, **{k: x for k, x in parts.items() if not x.ndim})
        progress = Progress(state.average, first + count, losses.seconds(), parts)
        if time.monotonic() - saved > SAVE_SECONDS:
            save(progress)
            saved = time.monotonic()
    save(progress)
    return progress


class Losses:
    """The last losses by name, printed every REPORT_SECONDS."""

    def __init__(self) -> None:
        self.start = self.printed = time.monotonic()
        self.recent: dict[str, collections.deque] = {}

    def add(self, step: int, done: float, **losses: Any) -> None:
        """Takes in the losses after `step` steps."""
        for name, loss in losses.items():
            self.recent.setdefault(name, collections.deque(maxlen=20)).append(float(loss))
        if time.monotonic() - self.printed > REPORT_SECONDS:
            means = " ".join(f"{name} {mean:.4f}" for name, mean in self.means().items())
            print(f"step {step} {done:.1%} {self.seconds()} s {means}", flush=True)
            self.printed = time.monotonic()

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
