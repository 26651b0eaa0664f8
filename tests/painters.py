"""Nano painters with random weights, and their checkpoints, for the tests of painting."""

from __future__ import annotations

import functools
import pathlib

import jax
import numpy as np

import qk_jax
from qk_jax import painting
from qk_jax.training import checkpoint, initial, stages
from qk_jax.training import config as config_lib
from qk_jax.training import state as state_lib

HERE = pathlib.Path(__file__).parent
TOKENIZER = pathlib.Path(qk_jax.__file__).parent / "assets/tiny/tokenizer"


@functools.cache
def config(stage="stage3"):
    """The nano config of a stage, with the embedded tokenizer and room for its prompts."""
    spec = f"{HERE}/training/nano.py:{stage}"
    return config_lib.load(spec, {"data.tokenizer": str(TOKENIZER), "model.max_text": "48"})


@functools.cache
def params(stage="stage3"):
    """Random parameters of every part of a stage; none is zero, so that everything matters."""
    model = state_lib.build_model(config(stage))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tuple(model._inits())))
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.2  # noqa: E731
    tree = jax.tree.map(draw, shapes)
    for part in state_lib.stage_parts(config(stage)):
        if part.startswith("lora/"):
            tower = part.removeprefix("lora/")
            fresh = lambda tower=tower: state_lib.fresh_lora(  # noqa: E731
                config(stage), jax.random.key(0), tower, shapes[tower]
            )
            tree.setdefault("lora", {})[tower] = jax.tree.map(draw, jax.eval_shape(fresh))
    return tree


@functools.cache
def painter(stage="stage3", batch=2):
    """A painter of `params`."""
    model = state_lib.build_model(config(stage))
    return painting.of_params(model.config, params(stage), config(stage), batch=batch)


def save(workdir, stage="stage3"):
    """Writes <workdir>/<stage> as the trainer would; returns the folder."""
    folder = pathlib.Path(workdir) / stage
    cfg = config(stage)
    trained, frozen = stages.split(params(stage), state_lib.stage_rules(cfg))
    folder.mkdir(parents=True)
    fingerprint = initial.save_frozen(folder, jax.device_put(frozen), cfg)
    store = checkpoint.Store(folder / initial.CHECKPOINTS)
    meta = initial.metadata(cfg) | {"frozen": fingerprint}
    store.save(4, {"params": jax.device_put(trained)}, meta)
    store.close()
    return folder


def picture(seed, height=40, width=40):
    """A random picture, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
