"""Times train steps on the devices at hand, from random parameters and synthetic examples."""

from __future__ import annotations

import math
import time
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.base.types import Batch, Tree
from qk_jax.bench import batches
from qk_jax.bench.compile import Executables
from qk_jax.experiment import train_state
from qk_jax.experiment.plan import Plan
from qk_jax.training.padding import Padding


class Measured(NamedTuple):
    """Steps on the devices at hand.

    Attributes:
      seconds: median of one.
      loss, grad_norm: of the first, before anything has changed.
    """

    seconds: float
    loss: float
    grad_norm: float


def measure(plan: Plan, shapes: Batch, executables: Executables, steps: int) -> Measured:
    """Times `steps` steps after one that warms up.

    Neither parameters nor examples depend on the layout.

    Args:
      plan: of the step.
      shapes: the abstract batch.
      executables: compiled for both.
      steps: to time.
    """
    with jax.set_mesh(plan.mesh):
        trained, frozen = (random_params(plan, tree) for tree in (plan.params, plan.frozen))
        state = train_state.create(trained, plan.optimizer.tx, plan.state)
        examples = batches.synthetic(shapes, plan.model.config.vlm.image_token_id)
        padded = Padding.from_config(plan.config)(examples)
        batch = jax.device_put(padded, plan.batch_sharding)
        seconds, values = [], []
        for _ in range(steps + 1):
            start = time.perf_counter()
            state, found = jax.block_until_ready(executables(state, frozen, batch))
            seconds.append(time.perf_counter() - start)
            values.append(found)
    first = values[0]
    return Measured(float(np.median(seconds[1:])), float(first["loss"]), float(first["grad_norm"]))


def random_params(plan: Plan, tree: Tree) -> Tree:
    """Values for an abstract tree of parameters, by name and index alone: the same on every mesh.

    Kernels keep the scale of their input, norms' scales are near 1 and the rest near 0. Fresh
    parameters would not do: with them a generator paints nothing, whatever its input.
    """
    axes = {name: axes for name, axes, _ in sharding.leaves(plan.boxed)}
    flat = trees.named(tree)

    def one(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = math.prod(
            size for axis, size in zip(axes[name][:-1], leaf.shape, strict=False)
            if axis != "layers"
        )  # fmt: skip
        spread = (3 / fan_in) ** 0.5 if name.endswith(("kernel", "lora_a", "lora_b")) else 0.05
        middle = float(name.endswith("scale"))
        noise = uniform(leaf.shape, zlib.crc32(name.encode()))
        return (middle + spread * noise).astype(leaf.dtype)

    def make() -> list[jax.Array]:
        return [one(name, leaf) for name, leaf in flat.items()]

    shardings = [leaf.sharding for leaf in flat.values()]
    values = jax.jit(make, out_shardings=shardings, compiler_options=plan.compiler_options())()
    return jax.tree.unflatten(jax.tree.structure(tree), values)


def uniform(shape: tuple[int, ...], seed: int) -> jax.Array:
    """float32 in [-1, 1) by a hash of each element's index, cheap to compile and to compute."""
    bits = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        bits = (bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        bits ^= bits >> 15
    bits *= jnp.uint32(0x85EBCA6B)
    return (bits >> 8).astype(jnp.float32) / 2**23 - 1
