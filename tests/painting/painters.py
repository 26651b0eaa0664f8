"""Nano painters with random weights, and their checkpoints, for the tests of painting."""

from __future__ import annotations

import functools
import pathlib

import jax
import numpy as np

import qk_jax
from qk_jax import painting, sharding
from qk_jax.base import trees
from qk_jax.checkpoints import run_folder
from qk_jax.checkpoints.store import Store
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan

NANO = pathlib.Path(__file__).parents[1] / "training/nano.py"
TOKENIZER = pathlib.Path(qk_jax.__file__).parent / "assets/tiny/tokenizer"


@functools.cache
def config(stage="stage3"):
    """The nano config of a stage, with the embedded tokenizer and room for its prompts."""
    spec = f"{NANO}:{stage}"
    return config_lib.load(spec, {"data.tokenizer": str(TOKENIZER), "model.max_text": "48"})


@functools.cache
def plan(stage="stage3"):
    """The plan of `config` over one device."""
    mesh = sharding.build_mesh({}, jax.devices()[:1])
    return Plan.build(config(stage), mesh, check=False)


@functools.cache
def params(stage="stage3"):
    """Random parameters of every part of a stage; none is zero, so that everything matters."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) * 0.2  # noqa: E731
    return jax.tree.map(draw, plan(stage).everything)


@functools.cache
def painter(stage="stage3", batch=2):
    """A painter of `params`."""
    return painting.of_params(plan(stage), params(stage), batch=batch)


def loaded(stage="stage3", revision="unknown"):
    """`params` as if they had been read from a folder after 7 steps."""
    return run_folder.Loaded(plan(stage), params(stage), 7, revision)


def save(workdir, stage="stage3", scale=1.0, average=False):
    """Writes <workdir>/<stage> as the trainer would; returns the folder.

    The trained parameters are multiplied by `scale`; their moving average, where there is one, has
    half of them.
    """
    folder = run_folder.create(workdir, stage)
    trained, frozen = trees.split(params(stage), plan(stage).stage.rules)
    fingerprint = run_folder.save_frozen(folder, jax.device_put(frozen), plan(stage))
    store = Store(folder / run_folder.CHECKPOINTS)
    meta = run_folder.metadata(plan(stage)) | {"frozen": fingerprint}
    trained = jax.device_put(jax.tree.map(lambda leaf: leaf * scale, trained))
    mean = {"ema": jax.tree.map(lambda leaf: leaf / 2, trained)} if average else {}
    store.save(4, {"params": trained, **mean}, meta)
    store.close()
    return folder


def picture(seed, height=40, width=40):
    """A random picture, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
