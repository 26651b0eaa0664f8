"""FLOPs of a training step against its traced gradient, and both against counts by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxpr_flops
import pytest

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.bench import batches
from qk_jax.data.example import TASKS
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models import attention
from qk_jax.training import flops
from qk_jax.training import step as step_lib
from qk_jax.training.padding import Padding

NANO = "tests/training/nano.py"
SIZES = ((64, 64), (48, 80))  # of condition pictures


@functools.cache
def plan_of(spec, alignment=0.0, rules=None, layers="()"):
    changes = {"alignment.weight": str(alignment), "model.vlm_layers": layers}
    config = config_lib.load(spec, changes)
    if rules:
        with config.unlocked():
            config.rules = rules
    return Plan.build(config, check=False)


def batch_of(plan, pictures=0, examples=8):
    return batches.abstract(plan.config, (64, 64), SIZES[:pictures], examples)


@pytest.mark.parametrize(
    ("spec", "pictures", "alignment"),
    [
        (f"{NANO}:stage1", 0, 0.0),
        (f"{NANO}:stage1", 2, 0.5),
        (f"{NANO}:stage2", 0, 0.5),
        (f"{NANO}:stage2", 1, 0.0),
        (f"{NANO}:stage3", 0, 0.0),
        (f"{NANO}:stage3", 2, 0.0),
        (f"{NANO}:highres", 1, 0.5),
        ("configs/stage3.py:tiny", 2, 0.0),
        ("configs/stage1.py:7b", 1, 0.0),
        ("configs/stage3.py:20b", 2, 0.0),
    ],
)
def test_a_step_costs_what_its_traced_gradient_does(spec, pictures, alignment):
    plan = plan_of(spec, alignment)
    batch = batch_of(plan, pictures)
    found = flops.by_tower_of_step(plan, batch)
    assert found == jaxpr_flops.by_tower_of_step(plan, batch)
    assert set(found) <= {tower for _, tower in sharding.TOWERS} | {flops.OTHER}
    assert flops.of_step(plan, batch) == found.total()


def test_states_of_other_layers_cost_their_products():
    plan, plain = plan_of(f"{NANO}:stage1", layers="(1,)"), plan_of(f"{NANO}:stage1")
    batch = batch_of(plan, 1)
    found = flops.by_tower_of_step(plan, batch)
    assert found == jaxpr_flops.by_tower_of_step(plan, batch)
    states = 8 * (batch["text_mask"].shape[1] + plan.config.model.num_queries)
    more = found["connector"] - flops.by_tower_of_step(plain, batch)["connector"]
    assert more == 3 * 2 * states * (32 * 64 + 64 * 32)


TRAIN, FREEZE = trees.TRAIN, trees.FREEZE
REST = (r"(vlm|queries|connector|mmdit|vae|lora)/.*", FREEZE)


@pytest.mark.parametrize(
    "rules",
    [
        ((r"vlm/language_model/layers/mlp/.*", TRAIN), REST),
        ((r"vlm/visual/merger/ln_q/.*", TRAIN), REST),
        ((r"connector/fc1/bias", TRAIN), REST),
        ((r"mmdit/transformer_blocks/(img|txt)_mod_1/.*", TRAIN), REST),
        ((r"mmdit/time_text_embed/.*/linear_2/.*", TRAIN), (r"lora/.*/lora_a", TRAIN), REST),
        ((r"mmdit/proj_out/.*", TRAIN), REST),
    ],
    ids=lambda rules: rules[0][0].replace("/.*", ""),
)
def test_a_step_that_trains_something_else(rules):
    plan = plan_of(f"{NANO}:stage3", rules=rules)
    batch = batch_of(plan, 1)
    assert flops.by_tower_of_step(plan, batch) == jaxpr_flops.by_tower_of_step(plan, batch)


def test_the_train_step_has_no_other_products():
    plan = plan_of(f"{NANO}:stage3")
    batch = batch_of(plan, 1)
    padded = Padding.from_config(plan.config).exact().abstract(batch)
    encoder = step_lib.Encoder(plan)
    with jax.set_mesh(plan.mesh):
        encoders = [encoder.program.trace(plan.frozen, *x) for x in encoder.pictures(padded)]
        inputs = step_lib.step_batch(padded, [one.out_info for one in encoders])
        traced = step_lib.make_train_step(plan).trace(plan.state, plan.frozen, inputs)
    whole = jaxpr_flops.by_tower(traced.jaxpr.jaxpr)
    for one in encoders:
        whole += jaxpr_flops.by_tower(one.jaxpr.jaxpr)
    assert whole.pop("other") == 2 * 8 * (len(TASKS) + plan.config.log.t_bins)  # sums for the log
    assert flops.by_tower_of_step(plan, batch) == whole


def test_padding_does_not_count():
    plan = plan_of(f"{NANO}:stage3")
    batch = batches.abstract(plan.config, (80, 48), [(64, 64)], 8)
    padded = Padding.from_config(plan.config).abstract(batch)
    assert padded["input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert flops.by_tower_of_step(plan, padded) == flops.by_tower_of_step(plan, batch)


def test_flops_grow_with_pictures_and_with_examples():
    plan = plan_of(f"{NANO}:stage3")
    two, four, pictured = (
        flops.of_step(plan, batch_of(plan, *given)) for given in ((0, 2), (0, 4), (1, 2))
    )
    assert 0 < two < pictured and four == 2 * two


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mmdit/proj_out/kernel", "mmdit/to_pixels/kernel"),
        ("connector/fc1/kernel", "connector/fc1/weight"),
        ("lora/mmdit/transformer_blocks/attn/to_q/lora_a", "lora/mmdit/blocks/to_q/lora_a"),
    ],
)
def test_a_parameter_with_another_name_is_an_error(old, new):
    plan = plan_of(f"{NANO}:stage3")
    renamed = {}
    for field in ("params", "frozen"):
        flat = trees.flatten(getattr(plan, field))
        renamed[field] = trees.unflatten({new if k == old else k: v for k, v in flat.items()})
    with pytest.raises(ValueError, match=new):
        flops.by_tower_of_step(dataclasses.replace(plan, **renamed), batch_of(plan))


def test_a_trained_and_a_frozen_generator_by_hand():
    """Weights cost once forward, once for the gradient of what came in, once for their own; the
    products of attention have no weights: once forward, and one for each factor's gradient."""
    plan = plan_of(f"{NANO}:stage2")
    batch = batch_of(plan, examples=1)
    config = plan.model.config
    d, depth, j = config.mmdit.width, config.mmdit.num_layers, config.mmdit.joint_attention_dim
    n, t = 4 * 4, batch["text_mask"].shape[1] + config.num_queries
    tokens = 2 * depth * (n + t) * (4 * d * d + 8 * d * d) + 2 * n * d * 64  # blocks and the end
    text, latents = 2 * t * j * d, 2 * n * 64 * d
    time = 2 * (depth * 2 * 6 * d * d + d * d + 2 * d * d)
    time_first = 2 * 256 * d
    joint = 2 * depth * 2 * (n + t) ** 2 * d
    found = flops.by_tower_of_step(plan, batch)["mmdit"]
    # nothing before the latents and the time is trained
    assert found == 3 * (tokens + text + time + joint) + 2 * (latents + time_first)
    plan = plan_of(f"{NANO}:stage2", rules=((r"queries/.*", TRAIN), REST))
    found = flops.by_tower_of_step(plan, batch)["mmdit"]
    assert found == 2 * (tokens + text) + time + time_first + latents + 3 * joint


def test_peaks():
    class Device:
        device_kind = "TPU v5p"

    assert flops.peak(Device()) == 459e12
    assert flops.peak(jax.devices()[0]) is None


# --- the count of a traced program ----------------------------------------------------------------


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_and_its_gradient():
    product = lambda w, x: jnp.sum(jnp.einsum("bsd,df->bsf", x, w))  # noqa: E731
    once = 2 * 3 * 5 * 7 * 11
    w, x = shaped(7, 11), shaped(3, 5, 7)
    assert jaxpr_flops.count(product, w, x) == once
    assert jaxpr_flops.count(jax.value_and_grad(product), w, x) == 2 * once  # forward, d w
    assert jaxpr_flops.count(jax.value_and_grad(product, argnums=(0, 1)), w, x) == 3 * once


def test_a_loop_counts_its_body_times_its_length_and_a_branch_its_most_expensive():
    def scanned(w, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    assert jaxpr_flops.count(scanned, shaped(6, 8, 8), shaped(4, 8)) == 6 * 2 * 4 * 8 * 8

    def branched(w, x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x @ w)

    assert jaxpr_flops.count(jax.jit(branched), shaped(8, 8), shaped(4, 8)) == 2 * 2 * 4 * 8 * 8


def test_a_permutation_written_as_a_product_does_not_count():
    turn = jnp.eye(8)[::-1]
    body = lambda c, w: (jnp.tanh(c @ w @ (2 * turn)), None)  # noqa: E731
    once = 6 * 2 * 4 * 8 * 8
    given = shaped(6, 8, 8), shaped(4, 8)
    assert jaxpr_flops.count(lambda w, x: jax.lax.scan(body, x, w)[0], *given) == once
    loss = lambda w, x: jnp.sum(jax.lax.scan(body, x, w)[0])  # noqa: E731
    assert jaxpr_flops.count(jax.grad(loss, (0, 1)), *given) == 3 * once


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(stride):
    def conv(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    kernel, x = shaped(3, 3, 8, 16), shaped(2, 16, 16, 8)
    once = 2 * 2 * (16 // stride) ** 2 * 16 * 3 * 3 * 8
    assert jaxpr_flops.count(conv, kernel, x) == once
    grad = jax.grad(lambda k, x: jnp.sum(conv(k, x)), argnums=(0, 1))
    assert jaxpr_flops.count(grad, kernel, x) == 3 * once  # forward, d kernel, d x


def test_attention_with_grouped_heads():
    q, k = shaped(2, 10, 4, 8), shaped(2, 10, 2, 8)
    assert jaxpr_flops.count(attention.attention, q, k, k) == 2 * (2 * 2 * 4 * 10 * 10 * 8)
