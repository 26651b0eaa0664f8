"""One training step and one validation pass, as pure functions of state, frozen tree and batch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qk_jax import sharding
from qk_jax.data.tasks import TASKS
from qk_jax.diffusion import flow
from qk_jax.errors import InputError
from qk_jax.models import attention, mrope
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training import checkpoint, flops, optimizer, stages
from qk_jax.training import config as config_lib
from qk_jax.training.state import Layout, TrainState, build_model

log = logging.getLogger(__name__)
Tree = dict[str, Any]
Batch = dict[str, Any]
# (params, batch, rng) -> per-row loss [B] and aux with `t` [B]
LossFn = Callable[[Tree, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def loss_fn(model: QueryKontext, config: Mapping[str, Any]) -> LossFn:
    """The per-row loss: flow matching, plus the weighted alignment term where it is on."""
    law = config_lib.time_law(config)
    weight, pixels = config["alignment"]["weight"], config["model"]["vlm_pixels"]

    def loss(params: Tree, batch: Batch, rng: jax.Array):
        rows, aux = model.loss(params, batch, rng, law)
        aux = {"t": aux["t"], "kontext": aux["kontext"], "flow": rows}
        if weight:
            aux["alignment"] = alignment(model, params, batch, aux["kontext"], pixels)
            rows = rows + weight * aux["alignment"]
        del aux["kontext"]
        return rows, aux

    return loss


def alignment(
    model: QueryKontext, params: Tree, batch: Batch, kontext: jax.Array, pixels: int
) -> jax.Array:
    """1 - cosine [B] between the projected mean kontext and the vision tower's mean of the target.

    kontext [B, K, D]; batch['target_pixel_values'] [B, P, 1176] is the target at its vision size.
    The vision tower is a fixed teacher: no gradient enters it.
    """
    size = mrope.vision_size(*batch["target"].shape[1:3], pixels)
    teacher = model.vlm.apply(
        {"params": params["vlm"]},
        batch["target_pixel_values"],
        (mrope.grid_of(*size),),
        method="pool",
    )
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    pooled = jnp.mean(kontext.astype(jnp.float32), axis=1) @ params["alignment"]["proj"]["kernel"]
    return 1.0 - optax.losses.cosine_similarity(pooled, teacher, epsilon=1e-6)


def micro_batches(batch: Batch, count: int) -> Batch:
    """Leaves [B, ...] -> [count, B / count, ...]; micro-batch i has the rows i, i + count, ...

    Striding keeps every row on its device when rows are sharded in contiguous parts.
    """

    def part(x: jax.Array) -> jax.Array:
        rows = x.reshape(x.shape[0] // count, count, *x.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return jax.tree.map(part, batch)


def one_batch(parts: Batch) -> Batch:
    """Leaves [count, B / count, ...] -> [B, ...], what `micro_batches` took apart."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def gradients(
    loss: LossFn,
    params: Tree,
    frozen: Tree,
    batch: Batch,
    rng: jax.Array,
    accumulation: int,
    lay: Callable[[Tree], Tree] = lambda tree: tree,
) -> tuple[Tree, Batch]:
    """Gradient of the mean loss over all rows, and per-row values in order of micro-batches.

    The gradient is the mean over micro-batches of equal size, summed in float32: what one big
    batch gives. Micro-batch i draws from fold_in(rng, i). `lay` puts a tree of gradients in its
    place on the mesh: that of each micro-batch and the sum so far.

    Returns:
      gradients like `params`, float32; {'loss', 'task', every aux of `loss`} with B rows each.
    """

    def mean_loss(params: Tree, part: Batch, key: jax.Array):
        rows, aux = loss(stages.join(params, frozen), part, key)
        return jnp.mean(rows), {"loss": rows, "task": part["task"], **aux}

    def grad(part: Batch, index: Any):
        key = jax.random.fold_in(rng, index)
        found, rows = jax.grad(mean_loss, has_aux=True)(params, part, key)
        return jax.tree.map(lambda g: g.astype(jnp.float32), lay(found)), rows

    if accumulation == 1:
        return grad(batch, 0)

    def body(total: Tree, inputs: tuple[Batch, jax.Array]):
        grads, rows = grad(*inputs)
        return lay(jax.tree.map(lambda t, g: t + g / accumulation, total, grads)), rows

    zeros = lay(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    parts = micro_batches(batch, accumulation)
    grads, rows = jax.lax.scan(body, zeros, (parts, jnp.arange(accumulation)))
    return grads, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def summaries(rows: Batch, bins: int) -> dict[str, jax.Array]:
    """Sums and counts of the flow loss per task [6] and per t-bin [bins], and plain means."""
    tasks = jax.nn.one_hot(rows["task"], len(TASKS), dtype=jnp.float32)
    times = jax.nn.one_hot(flow.t_bin(rows["t"], bins), bins, dtype=jnp.float32)
    out = {
        "loss": jnp.mean(rows["loss"]),
        "task_sum": rows["flow"] @ tasks,
        "task_count": jnp.sum(tasks, axis=0),
        "t_sum": rows["flow"] @ times,
        "t_count": jnp.sum(times, axis=0),
    }
    if "alignment" in rows:
        out["alignment"] = jnp.mean(rows["alignment"])
    return out


def compiler_options(
    config: Mapping[str, Any], platform: str, *, step: bool = False
) -> dict[str, Any]:
    """The config's options for the platform that compiles; of those for the platform at hand, what
    its compiler does not know is left out.

    Args:
      config: of the run.
      platform: 'cpu', 'gpu' or 'tpu'.
      step: whether it is the train step that is compiled, which has some of its own.

    Raises:
      InputError: an option is not of the form name=value.
    """
    options = {}
    table = config["compiler"]
    own = table.get(f"{platform}_step", ()) if step else ()
    for text in (*table.get(platform, ()), *own):
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"config.compiler: {text!r} must be NAME=VALUE")
        try:
            option = {name: json.loads(value)}  # true, 3, 0.5
        except ValueError:
            option = {name: value}
        try:
            if platform == jax.default_backend():
                jax.jit(lambda: 0).lower().compile(compiler_options=option)
        except jax.errors.JaxRuntimeError as error:
            log.warning("compiler option %s is left out: %s", text, error)
        else:
            options |= option
    return options


def gatherer(layout: Layout, compute: Any, gradients: str) -> Callable[[Tree], Tree]:
    """The function from the trained leaves between steps to those that a step computes with.

    A leaf whose columns 'params' and 'optimizer' differ is cast to the compute dtype and brought
    to its place, once per step: under ZeRO-1 and 2 a whole copy of the weights. Its gradient then
    comes out of the backward pass in the compute dtype. The others stay as they are, and are cast
    where they are used, so that their gradients are float32 when devices sum them; with `gradients`
    the name of the compute dtype they are cast once per step too, and half the bytes are sent.

    Raises:
      InputError: `gradients` is neither float32 nor the compute dtype.
    """
    wanted = config_lib.dtype(gradients)
    if wanted not in (jnp.float32, compute):
        raise InputError(
            f"dtype.gradients {gradients!r} must be float32 or dtype.compute, "
            f"{jnp.dtype(compute).name}"
        )

    def one(leaf: jax.Array, lies: Any, used: Any) -> jax.Array:
        if lies.sharding.spec == used.spec:
            return leaf.astype(wanted)
        return jax.lax.with_sharding_constraint(leaf.astype(compute), used)

    return lambda params: jax.tree.map(one, params, layout.params, layout.weights)


def make_encoder(
    model: QueryKontext, config: Mapping[str, Any], layout: Layout
) -> Callable[[Tree, Batch], Batch]:
    """The compiled (frozen, batch) -> what `QueryKontext.encode` makes of the pictures.

    A program of its own beside the train step, which so has no convolutions: the compiler for v6e,
    when it may use the VMEM that makes large matrix products fast, does not come to an end with
    those. As many rows are encoded at a time as a micro-batch has.

    Raises:
      InputError: the autoencoder is trained.
    """
    if "vae" in layout.params:
        raise InputError(
            "config.rules train the autoencoder, whose latents the loss is made of; freeze vae/.*"
        )
    accumulation = config["optimizer"]["accumulation"]

    def encode(frozen: Tree, batch: Batch) -> Batch:
        if accumulation == 1:
            return model.encode(frozen, batch)
        pictures = {name: batch[name] for name in ("target", "conditions")}
        parts = micro_batches(pictures, accumulation)
        return one_batch(jax.lax.map(lambda part: model.encode(frozen, part), parts))

    rows = sharding.batch_sharding(layout.mesh)
    return jax.jit(
        encode,
        in_shardings=(places(layout.frozen), rows),
        out_shardings=rows,
        compiler_options=compiler_options(config, sharding.platform(layout.mesh)),
    )


def make_train_step(
    model: QueryKontext,
    config: Mapping[str, Any],
    layout: Layout,
    adam: optimizer.Optimizer,
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step (state, frozen, batch) -> (state, metrics); it consumes the state.

    The batch may hold what `make_encoder` makes of its pictures, which are encoded here otherwise.
    Every random number comes from fold_in(key(seed), step), so the step number alone decides them.
    A batch of new shapes compiles anew. Metrics are device arrays; reading them waits.
    """
    loss = loss_fn(model, config)
    accumulation, bins = config["optimizer"]["accumulation"], config["log"]["t_bins"]
    decay = config["optimizer"]["ema"]
    state_places = places(layout.state(config, adam.tx))
    param_places, frozen_places = state_places.params, places(layout.frozen)
    gather = gatherer(layout, model.dtype, config["dtype"]["gradients"])

    def moved(state: TrainState, kind: str) -> TrainState:
        """Under optimizer.offload, all leaves on the device or all where they lie between steps."""
        if not config["optimizer"]["offload"]:
            return state
        near = jax.tree.map(lambda place: place.with_memory_kind("device"), state_places)
        return jax.tree.map(jax.device_put, state, near if kind == "device" else state_places)

    def lay(grads: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(grads, layout.gradients)

    def step(state: TrainState, frozen: Tree, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(config["seed"]), state.step)
        state = moved(state, "device")
        weights = gather(state.params)
        grads, rows = gradients(loss, weights, frozen, batch, rng, accumulation, lay)
        grads = jax.lax.with_sharding_constraint(grads, param_places)
        updates, opt_state = adam.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optimizer.ema_update(state.ema, params, state.step, decay) if decay else {}
        metrics = summaries(rows, bins) | {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "lr": adam.rate(state.step),
        }
        new = TrainState(state.step + 1, params, opt_state, ema)
        return moved(new, "between"), metrics

    return jax.jit(
        step,
        in_shardings=(state_places, frozen_places, sharding.batch_sharding(layout.mesh)),
        out_shardings=(state_places, sharding.replicated(layout.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(config, sharding.platform(layout.mesh), step=True),
    )


class Compiled:
    """Encoder and train step, compiled once per batch shape, with the model FLOPs of each shape."""

    def __init__(
        self,
        model: QueryKontext,
        config: Mapping[str, Any],
        layout: Layout,
        adam: optimizer.Optimizer,
    ):
        self._encode = make_encoder(model, config, layout)
        self._step = make_train_step(model, config, layout, adam)
        # Recomputation is no work of the model, and kernels do not show theirs.
        self._plain = make_train_step(build_model(config, remat=False), config, layout, adam)
        self._known: dict[Any, tuple[Any, Any, int]] = {}

    def __call__(self, state: TrainState, frozen: Tree, batch: Batch):
        """(state, metrics, FLOPs of this step, whether it had to compile)."""
        key = tuple((name, x.shape) for name, x in checkpoint.named(batch).items())
        new = key not in self._known
        if new:
            self._known[key] = self._compiled(state, frozen, batch)
        encode, step, work = self._known[key]
        state, values = step(state, frozen, batch | encode(frozen, batch))
        return state, values, work, new

    def _compiled(self, state: TrainState, frozen: Tree, batch: Batch) -> tuple[Any, Any, int]:
        """Encoder, step and FLOPs for batches of these shapes."""
        with attention.kernel("xla"):
            plain = self._plain.trace(state, frozen, batch)
        encode = self._encode.trace(frozen, batch)
        step = self._step.lower(state, frozen, batch | encode.out_info)
        return encode.lower().compile(), step.compile(), flops.of_jaxpr(plain.jaxpr.jaxpr)


def make_eval_step(
    model: QueryKontext, config: Mapping[str, Any], layout: Layout
) -> Callable[[Tree, Tree, Batch, jax.Array], dict[str, jax.Array]]:
    """The compiled (params, frozen, batch, index) -> summaries, with noise fixed by the index.

    The same index draws the same t and noise at every step and stage, so that values compare.
    """
    loss, bins = loss_fn(model, config), config["log"]["t_bins"]

    def step(params: Tree, frozen: Tree, batch: Batch, index: jax.Array):
        rng = jax.random.fold_in(jax.random.key(config["validation"]["seed"]), index)
        values, aux = loss(stages.join(params, frozen), batch, rng)
        return summaries({"loss": values, "task": batch["task"], **aux}, bins)

    return jax.jit(
        step,
        in_shardings=(
            places(layout.params),
            places(layout.frozen),
            sharding.batch_sharding(layout.mesh),
            sharding.replicated(layout.mesh),
        ),
        out_shardings=sharding.replicated(layout.mesh),
        compiler_options=compiler_options(config, sharding.platform(layout.mesh)),
    )


def places(tree: Tree) -> Tree:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
