"""The law of the times, the path, and the loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.diffusion import flow

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LOG3 = math.log(3.0)


def law(distribution, mu):
    return flow.TimeLaw(distribution, base_shift=mu, max_shift=mu)


@pytest.mark.parametrize(
    ("law", "expected"),
    [  # measured on 200,000 draws of diffusers' training examples, without and with SD3's shift 3
        (law("uniform", 0.0), (0.051, 0.25, 0.499, 0.749, 0.951)),
        (law("logit_normal", 0.0), (0.162, 0.339, 0.501, 0.664, 0.839)),
        (law("uniform", LOG3), (0.139, 0.5, 0.749, 0.9, 0.983)),
        (law("logit_normal", LOG3), (0.367, 0.606, 0.751, 0.856, 0.940)),
    ],
)
def test_quantiles_of_the_time_law(law, expected):
    t = flow.sample_timesteps(jax.random.key(0), (200_000,), law, tokens=256)
    assert t.dtype == jnp.float32 and 0 < float(t.min()) and float(t.max()) < 1
    np.testing.assert_allclose(np.quantile(t, QUANTILES), expected, atol=0.004)


def test_logit_normal_has_the_mean_and_spread_asked_for():
    wide = flow.TimeLaw(mean=-0.5, std=0.7, base_shift=0.0, max_shift=0.0)
    t = flow.sample_timesteps(jax.random.key(1), (100_000,), wide, tokens=16)
    logits = np.log(t / (1 - t))
    np.testing.assert_allclose([logits.mean(), logits.std()], [-0.5, 0.7], atol=0.01)


@pytest.mark.parametrize(
    ("tokens", "mu"), [(1024, 0.53871), (4096, 0.69355), (6889, 0.83432), (10816, 1.03226)]
)
def test_the_shift_grows_with_the_picture(tokens, mu):
    assert flow.TimeLaw().mu(tokens) == pytest.approx(mu, abs=1e-5)
    moved = flow.sample_timesteps(jax.random.key(2), (1000,), flow.TimeLaw(), tokens)
    still = flow.sample_timesteps(jax.random.key(2), (1000,), law("logit_normal", 0.0), tokens)
    odds = np.log(moved / (1 - moved)) - np.log(still / (1 - still))
    np.testing.assert_allclose(odds, mu, atol=2e-3)


def test_the_path_goes_from_picture_to_noise_at_its_velocity():
    rng = np.random.default_rng(0)
    x0, noise = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    t = jnp.array([0.0, 0.25, 1.0])
    x = flow.interpolate(x0, noise, t)
    np.testing.assert_array_equal(x[0], x0[0])
    np.testing.assert_array_equal(x[2], noise[2])
    later = flow.interpolate(x0, noise, t + 0.5)
    np.testing.assert_allclose((later - x) / 0.5, flow.velocity_target(x0, noise), atol=1e-5)
    narrow = flow.interpolate(x0.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), t)
    assert narrow.dtype == jnp.float32


def test_loss_is_the_mean_of_each_row_over_its_own_tokens():
    rng = np.random.default_rng(1)
    prediction, target = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)
    error = (prediction - target) ** 2
    np.testing.assert_allclose(flow.loss(prediction, target), error.mean((1, 2)), rtol=1e-6)
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    masked = flow.loss(prediction, target, mask)
    expected = [error[0].mean(), error[1, :2].mean(), 0.0]
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    prediction = prediction.at[1, 2:].set(1e6)  # what masked tokens hold does not matter
    np.testing.assert_array_equal(flow.loss(prediction, target, mask), masked)


def test_bins_cover_the_interval():
    t = jnp.array([0.0, 0.0999, 0.1, 0.55, 0.999, 1.0])
    assert flow.t_bin(t, 10).tolist() == [0, 0, 1, 5, 9, 9]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"distribution": "normal"}, "distribution"),
        ({"std": 0.0}, "std"),
        ({"base_tokens": 8192}, "base_tokens"),
    ],
)
def test_a_law_that_makes_no_sense_is_refused(fields, word):
    with pytest.raises(InputError, match=word):
        flow.TimeLaw(**fields)
