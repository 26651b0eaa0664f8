"""Schedules, decay by name, accumulation and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import optimizer
from qk_jax.training import step as step_lib
from qk_jax.training.gradients import gradients

ADAM = {
    "lr": 0.1, "schedule": "constant", "lr_end": 0.1, "warmup": 0, "b1": 0.9, "b2": 0.95,
    "eps": 1e-8, "weight_decay": 0.5, "clip": 0.0,
    "decay": ((r".*/kernel", 1.0), (r".*", 0.0)), "rates": ((r".*", 1.0),),
}  # fmt: skip


def test_schedule_warms_up_and_falls():
    cosine = optimizer.schedule(ADAM | {"schedule": "cosine", "warmup": 4}, 12)
    got = [float(cosine(i)) for i in range(13)]
    np.testing.assert_allclose(got[:5], [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(got[8], 0.055, rtol=1e-6)
    np.testing.assert_allclose(got[12], 0.01, rtol=1e-6)
    constant = optimizer.schedule(ADAM | {"warmup": 1}, 12)
    np.testing.assert_allclose([float(constant(i)) for i in (0, 1, 11)], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "change, words", [({"schedule": "linear"}, "linear"), ({"warmup": 9}, "9")]
)
def test_schedule_refuses(change, words):
    with pytest.raises(InputError, match=words):
        optimizer.schedule(ADAM | change, 8)


def test_only_kernels_decay_and_never_the_dead_text_branch():
    kernel = {"kernel": jnp.ones((3, 2, 2))}
    block = {
        "attn": {"to_add_out": kernel, "to_out_0": kernel},
        "txt_mlp": {"net_2": kernel | {"bias": jnp.ones((3, 2))}},
    }
    params = {"mmdit": {"transformer_blocks": block}, "queries": {"embedding": jnp.ones((2, 2))}}
    adam = optimizer.build(ADAM, params, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = adam.tx.update(zero, adam.tx.init(params), params)
    got = optax.apply_updates(params, updates)
    blocks = got["mmdit"]["transformer_blocks"]
    np.testing.assert_allclose(blocks["attn"]["to_out_0"]["kernel"], 0.95)
    for dead in (blocks["attn"]["to_add_out"]["kernel"], blocks["txt_mlp"]["net_2"]["kernel"]):
        np.testing.assert_allclose(dead[:2], 0.95)
        np.testing.assert_array_equal(dead[2], 1.0)
    np.testing.assert_array_equal(blocks["txt_mlp"]["net_2"]["bias"], 1.0)
    np.testing.assert_array_equal(got["queries"]["embedding"], 1.0)


def test_equals_adamw_and_scales_rates_by_name():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": jnp.array(rng.normal(size=(3, 3)), jnp.float32)}}
    params["b"] = jax.tree.map(lambda x: x, params["a"])
    grads = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape), jnp.float32), params)
    ours = optimizer.build(ADAM | {"rates": ((r"b/.*", 0.5), (r".*", 1.0))}, params, 10).tx
    theirs = optax.adamw(0.1, 0.9, 0.95, weight_decay=0.5)
    got, _ = ours.update(grads, ours.init(params), params)
    want, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_allclose(got["a"]["kernel"], want["a"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(got["b"]["kernel"], 0.5 * want["b"]["kernel"], rtol=1e-6)


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(InputError, match="optimizer.decay.*a/bias"):
        optimizer.build(ADAM | {"decay": ((r".*/kernel", 1.0),)}, {"a": {"bias": jnp.ones(2)}}, 3)


def test_clip_bounds_the_global_norm():
    params = {"a": {"kernel": jnp.zeros((2, 2))}}
    tx = optimizer.build(ADAM | {"clip": 1.0, "weight_decay": 0.0}, params, 3).tx
    _, state = tx.update({"a": {"kernel": jnp.full((2, 2), 50.0)}}, tx.init(params), params)
    mu = optax.tree_utils.tree_get(state, "mu")["a"]["kernel"]
    np.testing.assert_allclose(mu, 0.1 * 0.5, rtol=1e-6)


def _loss(params, batch, rng):
    del rng
    rows = jnp.mean(
        (batch["x"] @ params["train"]["w"] + params["frozen"]["b"] - batch["y"]) ** 2, -1
    )
    return rows, {"t": batch["t"], "flow": rows}


@pytest.mark.parametrize("count", [2, 4])
def test_accumulated_micro_batches_give_the_gradient_of_the_big_batch(count):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params, frozen = {"train": {"w": draw(5, 3)}}, {"frozen": {"b": draw(3)}}
    batch = {"x": draw(8, 5), "y": draw(8, 3), "t": draw(8), "task": jnp.arange(8) % 6}
    key = jax.random.key(0)
    want, whole = gradients(_loss, params, frozen, batch, key, 1)
    got, rows = gradients(_loss, params, frozen, batch, key, count)
    np.testing.assert_allclose(got["train"]["w"], want["train"]["w"], rtol=1e-5, atol=1e-7)
    for name in ("loss", "task", "t"):
        np.testing.assert_allclose(rows[name], whole[name], rtol=1e-6)
    sums, again = step_lib.summaries(whole, 5), step_lib.summaries(rows, 5)
    np.testing.assert_allclose(sums["task_sum"], again["task_sum"], rtol=1e-5)
    assert float(jnp.sum(sums["t_count"])) == 8


def test_moving_average_follows_at_first_and_then_keeps_its_pace():
    ema, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    early = optimizer.ema_update(ema, params, jnp.int32(0), 0.9)
    late = optimizer.ema_update(ema, params, jnp.int32(1000), 0.9)
    np.testing.assert_allclose(early["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(late["w"], 0.1, rtol=1e-6)


@pytest.mark.parametrize(("size", "rate"), [("tiny", 0.1), ("7b", 0.1), ("20b", 0.1), ("3b", 1.0)])
def test_a_connector_that_starts_as_the_identity_learns_slowly_in_stage_1(size, rate):
    rates = config_lib.load(f"stage1:{size}").optimizer.rates
    if rate == 1.0:
        assert rates == ((".*", 1.0),)
        return
    found = trees.by_rule(["connector/fc1/kernel", "queries/embedding"], rates, "rates")
    assert found == {"connector/fc1/kernel": rate, "queries/embedding": 1.0}
