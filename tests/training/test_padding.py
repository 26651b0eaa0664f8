"""Padded steps: few programs, and the loss and gradients of the same pictures without padding."""

import functools
import itertools
import pathlib

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.bench import batches as abstract_batches
from qk_jax.data import settings
from qk_jax.data.example import MAX_REFERENCES, reference_sizes
from qk_jax.diffusion import flow
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models import mmdit
from qk_jax.pictures.grids import grid_of, vision_size
from qk_jax.pictures.sizes import for_number, parse_sizes
from qk_jax.training.objectives.flow_matching import agreement, loss_fn
from qk_jax.training.objectives.regions import region
from qk_jax.training.padding import Padding

NANO = pathlib.Path(__file__).parent / "nano.py"
ONE, EIGHT = {"data": 1}, {"data": 2, "fsdp": 2, "context": 2}
ROWS = {f"sharding.{tower}": "fsdp" for tower in ("vision", "text", "connector", "mmdit")}

# ---- programs ----------------------------------------------------------------------------------


def shapes_of(config):
    """Every (target size, sizes of the condition pictures) that a config can train."""
    tasks = {task for task, weight in config.data.tasks.items() if weight}
    targets = parse_sizes(config.data.sizes, "sizes")
    found = [(size, ()) for size in targets]
    if tasks - MAX_REFERENCES.keys() - {"text_to_image"}:
        found += [(size, (size,)) for size in targets]
    for number in range(1, max(MAX_REFERENCES.get(task, 0) for task in tasks) + 1):
        table = for_number(reference_sizes(config.data), number)
        shown = itertools.product(table, repeat=number)
        found += itertools.product(targets, shown)
    return dict.fromkeys(found)


def programs(config):
    """(shapes of the batches that a step reads, those that an encoder does)."""
    pad, steps, encoders = Padding.from_config(config), set(), set()
    for size, shown in shapes_of(config):
        batch = abstract_batches.abstract(config, size, shown, 1)
        tokens = pad.tokens(batch)
        encoders |= set(zip((size, *shown), tokens, strict=True))
        shapes = trees.named(pad.abstract(batch))
        pixels = ("target", *(f"conditions/{i}" for i in range(len(shown))))
        steps.add((*((k, x.shape) for k, x in shapes.items() if k not in pixels), *tokens))
    return steps, encoders


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        ("stage1:7b", 2),
        ("stage2:20b", 2),
        ("stage3:20b", 4),
        ("highres:20b", 4),
        ("stage3:tiny", 4),
    ],
)
def test_a_stage_has_as_many_programs_as_numbers_of_pictures(spec, numbers):
    """And the encoder one for each size."""
    config = config_lib.load(f"configs/{spec.replace(':', '.py:')}")
    steps, encoders = programs(config)
    assert len(steps) == numbers
    assert len(encoders) == len(config.data.sizes) <= 14


def test_references_of_other_sizes_have_programs_of_their_own_size():
    """Smaller with more of them: three are not padded to what one would have."""
    config = config_lib.load("configs/stage3.py:20b").copy_and_resolve_references()
    with config.unlocked():
        config.data.reference_sizes_by_number = (512, 384, 256)
    pad = Padding.from_config(config)
    steps, encoders = programs(config)
    assert len(steps) == 4 and len(encoders) == 13 + 3 + 3
    assert pad.family((384, 384), 2) == reference_sizes(config.data)[1]
    assert (256, 256) in pad.family((256, 256), 3) and (512, 512) not in pad.family((256, 256), 3)


def test_phases_of_a_curriculum_are_padded_apart():
    config = config_lib.load("configs/stage2.py:tiny").copy_and_resolve_references()
    with config.unlocked():
        config.steps, config.data.curriculum = 10, ((4, ("32x32", "48x32")),)
    assert len(settings.phases(config)) == 2
    pad = Padding.from_config(config)
    assert pad.family((32, 32)) == ((32, 32), (32, 48))
    assert set(pad.family((80, 48))) == {(64, 64), (80, 48), (48, 80)}
    assert pad.family((96, 96)) == ((96, 96),)  # in no table


# ---- the same loss without padding -------------------------------------------------------------

CASES = {
    "stage1": ("stage1", {"alignment.weight": "0.5"}),
    "stage2": ("stage2", {}),
    "stage3": ("stage3", {"loss.region_weight": "1.0"}),
    "qwen_image": ("stage3", {"prompt": "qwen_image", "model.law.kind": "qwen_image"}),
}
TARGET, SHOWN = (80, 48), ((80, 48), (64, 64))  # of tables whose largest have more tokens


def config_of(name):
    stage, changes = CASES[name]
    return config_lib.load(f"{NANO}:{stage}", ROWS | {"sharding_limit": "1.0"} | changes)


def values(tree):
    """Random values for every leaf by its name: not fresh, as a fresh generator paints nothing."""
    out = {}
    for name, leaf in trees.named(tree).items():
        rng = np.random.default_rng(sum(name.encode()))
        spread = rng.normal(size=leaf.shape) * (0.1 if leaf.ndim > 1 else 0.02)
        out[name] = (spread + name.endswith("scale")).astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(tree), out.values())


def batch_of(config):
    batch = batches.batch(config, 0, pictures=2, size=TARGET, shown=SHOWN)
    changed = batch["target"].copy()
    changed[:, :20] = batch["conditions"][0][:, :20]  # an edit of the rest
    return batch | {"target": changed}


def unpadded_loss(plan, batch, tokens):
    """(params, rng) -> losses [B], from the model's own functions for painting. What is drawn are
    the first numbers of those for so many padded tokens."""
    model, config = plan.model, plan.config
    law, rows, columns = config_lib.time_law(config), TARGET[0] // 16, TARGET[1] // 16

    weights = None
    if config.loss.region_weight:
        weights = jnp.asarray(region(batch, config.loss.region_weight))
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(tree, rng):
        keys, shape = jax.random.split(rng, 3), (len(batch["task"]), tokens, 64)
        drawn = [jax.random.normal(keys[i], shape)[:, : rows * columns] for i in (0, 2)]
        mean, logvar = (mmdit.pack(x) for x in model.posterior(tree, batch["target"]))
        shift, scale = (np.repeat(x, 4) for x in model.config.vae.shift_and_scale())
        x0 = (mean + jnp.exp(0.5 * logvar) * drawn[0] - shift) * scale
        t = flow.sample_timesteps(keys[1], shape[:1], law, jnp.full(shape[:1], rows * columns))
        text, kontext = model.states(tree, batch)
        context, mask = model.connect(tree, text, kontext, batch["text_mask"])
        latents = tuple(
            model.encode_pictures(tree, x)
            for x in batch["conditions"][: 2 * model.config.condition_latents]
        )
        prediction = model.velocity(
            tree, flow.interpolate(x0, drawn[1], t), t, context, mask, (rows, columns), latents,
            batch["roles"], batch["condition_mask"],
        )  # fmt: skip
        found = flow.loss(prediction, flow.velocity_target(x0, drawn[1]), weights)
        if config.alignment.weight:
            grid = grid_of(*vision_size(*TARGET, config.model.vlm_pixels))
            teacher = model.vlm.apply(
                {"params": tree["vlm"]}, batch["target_pixel_values"], (grid,), method="pool"
            )
            pooled = kontext.mean(1) @ tree["alignment"]["proj"]["kernel"]
            teacher = jax.lax.stop_gradient(teacher)
            found += config.alignment.weight * agreement(pooled, teacher, batch["whole"])
        return found

    return loss


def gradient(plan, loss, rng):
    """The compiled (params, frozen, inputs) -> losses, gradients of their mean."""

    def mean(params, frozen, *inputs):
        found = loss(trees.join(params, frozen), *inputs, rng)
        return jnp.mean(found), found

    return jax.jit(jax.grad(mean, has_aux=True), compiler_options=plan.compiler_options())


def norm(leaves):
    return np.linalg.norm([np.linalg.norm(leaf) for leaf in leaves.values()])


@functools.cache
def unpadded(name):
    """(losses, gradients) without padding, on one device."""
    config = config_of(name)
    mesh = sharding.build_mesh(ONE, jax.devices()[:1])
    plan = Plan.build(config, mesh, check=False)
    batch = batch_of(config)
    tokens = Padding.from_config(config).tokens(batch)[0]
    assert tokens == 16 > 15
    arguments = values(plan.params), values(plan.frozen)
    with jax.set_mesh(mesh):
        run = gradient(plan, unpadded_loss(plan, batch, tokens), jax.random.key(1))
        grads, losses = run(*arguments)
    return jax.device_get((losses, trees.named(grads)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, ONE) for name in ("stage1", "stage2", "stage3", "qwen_image")]
    + [(name, EIGHT) for name in ("stage1", "stage3", "qwen_image")],
    ids=lambda x: x if isinstance(x, str) else f"{np.prod(list(x.values()))}",
)
def test_a_padded_step_is_the_unpadded_one(name, shape):
    """Loss of each example and all gradients, over one device and over eight, two of 'context'."""
    config, count = config_of(name), int(np.prod(list(shape.values())))
    mesh = sharding.build_mesh(shape, jax.devices()[:count])
    plan = Plan.build(config, mesh, check=False)
    params = jax.device_put(values(plan.params), trees.shardings(plan.params))
    frozen = jax.device_put(values(plan.frozen), trees.shardings(plan.frozen))
    batch = batch_of(config)
    with jax.set_mesh(mesh):
        inputs = batches.encoded(plan, frozen, batch)
        loss = loss_fn(plan)
        run = gradient(plan, lambda *given: loss(*given)[0], jax.random.key(1))
        grads, losses = run(params, frozen, inputs)
    assert inputs["input_ids"].shape[1] >= batch["input_ids"].shape[1]
    assert inputs["posterior"][0].shape[1] == 16
    wanted_losses, wanted = unpadded(name)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
    found = trees.named(grads)
    assert found.keys() == wanted.keys()
    gaps = {leaf: np.asarray(found[leaf]) - other for leaf, other in wanted.items()}
    assert norm(gaps) <= 1e-5 * norm(wanted)
    for leaf, other in wanted.items():
        scale = max(np.abs(other).max(initial=0), 1e-6)
        worst = np.abs(gaps[leaf]).max(initial=0)
        assert worst <= 3e-5 * scale, f"{leaf}: {worst:.1e} of {scale:.1e}"
