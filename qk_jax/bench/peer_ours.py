"""Our side of the comparison with PyTorch: `models.mmdit`, jitted, with optax's AdamW."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qk_jax.base.types import Tree
from qk_jax.bench import peer_work
from qk_jax.bench.peer_work import ADAM, GUIDANCE, SIGMA_STEP, Built, Work
from qk_jax.diffusion import flow
from qk_jax.models import mmdit, rotary
from qk_jax.weights.read import import_model

LAW = rotary.PositionLaw("qwen_image")
Arrays = dict[str, jax.Array]
# (params, x [B, N, C], t [B], text [B, T, J], mask [B, T]) -> float32 [B, N, C]
Velocity = Callable[..., jax.Array]


def build(folder: pathlib.Path, work: Work) -> Built:
    """See `peer_work.serve`."""
    try:
        device = jax.devices(work.device)[0]
    except RuntimeError:
        raise peer_work.DeviceMissing(f"JAX finds no {work.device} device") from None
    config, params = import_model("mmdit", folder, work.weights)
    model = mmdit.MMDiT(dataclasses.replace(config, num_layers=work.blocks), work.dtype)
    params = jax.device_put(params, device)
    params["transformer_blocks"] = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, work.blocks, axis=0), params["transformer_blocks"]
    )
    batch = jax.device_put(work.arrays(config.in_channels), device)

    def velocity(
        params: Tree, x: jax.Array, t: jax.Array, text: jax.Array, mask: jax.Array
    ) -> jax.Array:
        grid, no_roles = (work.side, work.side), jnp.zeros((len(x), 0), jnp.int32)
        at = rotary.image_positions(LAW, grid, (), no_roles)
        text_at = rotary.text_positions(LAW, mask, grid, ())
        out: Any = model.apply({"params": params}, x, text, mask, t, at, text_at)
        return out.astype(jnp.float32)

    before = jax.jit(velocity)(params, batch["noise"], batch["t"], batch["text"], batch["mask"])
    step = (_train if work.what == "train" else _sample)(velocity, params, batch)

    def peak() -> int:
        stats = device.memory_stats()
        return stats["peak_bytes_in_use"] if stats else peer_work.resident()

    return np.asarray(before), step, peak


def _train(velocity: Velocity, params: Tree, batch: Arrays) -> Callable[[], float]:
    """A training step; its value is the loss."""
    tx = optax.adamw(
        ADAM["lr"], ADAM["b1"], ADAM["b2"], ADAM["eps"], weight_decay=ADAM["weight_decay"]
    )

    def loss(params: Tree, batch: Arrays) -> jax.Array:
        x0, noise, t = batch["latents"], batch["noise"], batch["t"]
        x = flow.interpolate(x0, noise, t)
        prediction = velocity(params, x, t, batch["text"], batch["mask"])
        return jnp.mean(flow.loss(prediction, flow.velocity_target(x0, noise)))

    def update(state: tuple[Tree, Any], batch: Arrays) -> tuple[tuple[Tree, Any], jax.Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return _steps(jax.jit(update, donate_argnums=0), (params, tx.init(params)), batch)


def _sample(velocity: Velocity, params: Tree, batch: Arrays) -> Callable[[], float]:
    """A sampling step; its value is the mean square of the latents after it."""

    def update(x: jax.Array, given: tuple[Tree, Arrays]) -> tuple[jax.Array, jax.Array]:
        params, batch = given
        inputs = [(x, x), (batch["t"],) * 2, (batch["text"], batch["empty"]), (batch["mask"],) * 2]
        both = velocity(params, *map(jnp.concatenate, inputs))
        prompted, empty = jnp.split(both, 2)
        x = x + SIGMA_STEP * (empty + GUIDANCE * (prompted - empty))
        return x, jnp.mean(jnp.square(x))

    return _steps(jax.jit(update), batch["noise"], (params, batch))


def _steps(update: Callable[..., Any], state: Any, given: Any) -> Callable[[], float]:
    """update(state, given) -> (state, value) as a step that keeps its state."""

    def step() -> float:
        nonlocal state
        state, value = jax.block_until_ready(update(state, given))
        return float(value)

    return step


if __name__ == "__main__":
    peer_work.serve(build)
