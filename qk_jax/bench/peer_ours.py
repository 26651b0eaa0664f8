"""Our side of the comparison with PyTorch: `models.mmdit`, jitted, with optax's AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.bench import peer_work
from qk_jax.bench.peer_work import ADAM, GUIDANCE, SIGMA_STEP
from qk_jax.diffusion import flow
from qk_jax.models import mmdit, rotary
from qk_jax.weights.read import import_mmdit

LAW = rotary.PositionLaw("qwen_image")
Tree = dict[str, Any]
# (params, x [B, N, C], t [B], text [B, T, J], mask [B, T]) -> float32 [B, N, C]
Velocity = Callable[..., jax.Array]


def build(folder: str) -> tuple[np.ndarray, Callable[[], float], Callable[[], int]]:
    """As `peer_work.serve` asks for.

    Raises:
      DeviceMissing: JAX finds no device of the kind.
    """
    path, work, arrays = peer_work.load(folder)
    try:
        device = jax.devices(work.device)[0]
    except RuntimeError:
        raise peer_work.DeviceMissing(f"JAX finds no {work.device} device") from None
    config, params = import_mmdit(path, work.weights)
    model = mmdit.MMDiT(dataclasses.replace(config, num_layers=work.blocks), work.dtype)
    params = jax.device_put(params, device)
    params["transformer_blocks"] = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, work.blocks, axis=0), params["transformer_blocks"]
    )
    batch = jax.device_put(arrays, device)
    velocity = _velocity(model, (work.side, work.side))
    words = batch["text"], batch["mask"]
    before = jax.jit(velocity)(params, batch["noise"], batch["t"], *words)
    step = (_train if work.what == "train" else _sample)(velocity, params, batch)

    def peak() -> int:
        stats = device.memory_stats()
        return stats["peak_bytes_in_use"] if stats else peer_work.resident()

    return np.asarray(before), step, peak


def _velocity(model: mmdit.MMDiT, grid: tuple[int, int]) -> Velocity:
    """The model as a function of what changes."""

    def velocity(params: Tree, x: jax.Array, t: jax.Array, text: jax.Array, mask: jax.Array):
        rows, words = mask.shape
        places = rotary.image_positions(LAW, grid, (), jnp.zeros((rows, 0), jnp.int32))
        word_places = rotary.text_positions(LAW, words, grid, ())
        out = model.apply({"params": params}, x, text, mask, t, places, word_places)
        return out.astype(jnp.float32)

    return velocity


def _train(velocity: Velocity, params: Tree, batch: dict[str, jax.Array]) -> Callable[[], float]:
    """A training step; its value is the loss."""
    tx = optax.adamw(
        ADAM["lr"], ADAM["b1"], ADAM["b2"], ADAM["eps"], weight_decay=ADAM["weight_decay"]
    )

    def loss(params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        x = flow.interpolate(x0, noise, t)
        prediction = velocity(params, x, t, batch["text"], batch["mask"])
        return jnp.mean(flow.loss(prediction, flow.velocity_target(x0, noise)))

    def update(state: tuple[Tree, Any], batch: dict[str, jax.Array]):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    update = jax.jit(update, donate_argnums=0)
    state = params, tx.init(params)

    def step() -> float:
        nonlocal state
        state, value = jax.block_until_ready(update(state, batch))
        return float(value)

    return step


def _sample(velocity: Velocity, params: Tree, batch: dict[str, jax.Array]) -> Callable[[], float]:
    """A sampling step; its value is the mean square of the latents after it."""

    @jax.jit
    def update(params: Tree, x: jax.Array, batch: dict[str, jax.Array]):
        pair = {
            "x": (x, x), "t": (batch["t"], batch["t"]),
            "text": (batch["text"], batch["empty"]), "mask": (batch["mask"], batch["mask"]),
        }  # fmt: skip
        both = {name: jnp.concatenate(parts) for name, parts in pair.items()}
        out = velocity(params, both["x"], both["t"], both["text"], both["mask"])
        given, empty = jnp.split(out, 2)
        x = x + SIGMA_STEP * (empty + GUIDANCE * (given - empty))
        return x, jnp.mean(jnp.square(x))

    x = batch["noise"]

    def step() -> float:
        nonlocal x
        x, value = jax.block_until_ready(update(params, x, batch))
        return float(value)

    return step


if __name__ == "__main__":
    peer_work.serve(build)
