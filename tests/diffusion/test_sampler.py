"""The schedule and Euler's method against diffusers; Heun's order; guidance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from qk_jax.base.errors import InputError
from qk_jax.diffusion import flow, sampler

QWEN = sampler.ScheduleConfig()
FLUX = dataclasses.replace(QWEN, max_shift=1.15, max_image_seq_len=4096, shift_terminal=None)
SD3 = dataclasses.replace(FLUX, use_dynamic_shifting=False, shift=3.0)


def torch_scheduler(config, steps, tokens):
    """diffusers' scheduler, set as its pipelines set it."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config.to_hf())
    found = scheduler.config
    mu = calculate_shift(
        tokens,
        found.base_image_seq_len,
        found.max_image_seq_len,
        found.base_shift,
        found.max_shift,
    )
    sigmas = np.linspace(1.0, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu if found.use_dynamic_shifting else None)
    return scheduler


@pytest.mark.parametrize("config", [QWEN, FLUX, SD3], ids=["qwen", "flux", "sd3"])
@pytest.mark.parametrize("tokens", [16, 256, 4096, 10816])
@pytest.mark.parametrize("steps", [2, 7, 50])
def test_schedule_equals_diffusers(config, tokens, steps):
    expected = torch_scheduler(config, steps, tokens).sigmas.numpy()
    sigmas = sampler.schedule(steps, tokens, config)
    assert sigmas.dtype == np.float32 and sigmas.shape == (steps + 1,)
    np.testing.assert_allclose(sigmas, expected, rtol=0, atol=6e-8)


def test_published_values_and_the_single_step():
    sigmas = sampler.schedule(50, 4096, QWEN)
    np.testing.assert_allclose(sigmas[:4], [1, 0.9897, 0.97919, 0.96847], atol=1e-5)
    np.testing.assert_allclose(sigmas[-3:], [0.05848, 0.02, 0], atol=1e-5)
    assert sampler.schedule(1, 4096, QWEN).tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="steps"):
        sampler.schedule(0, 4096, QWEN)


def test_config_in_the_form_of_diffusers():
    for config in (QWEN, SD3):
        theirs = FlowMatchEulerDiscreteScheduler.from_config(config.to_hf()).config
        assert dataclasses.asdict(config).items() <= dict(theirs).items()
        assert theirs["time_shift_type"] == "exponential"


def test_euler_loop_equals_diffusers():
    steps, tokens = 9, 64
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 6, 4)).astype(np.float32)
    mix = rng.normal(size=(4, 4)).astype(np.float32)
    scheduler = torch_scheduler(QWEN, steps, tokens)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        v = torch.tanh(x @ torch.from_numpy(mix)) + t / 1000
        x = scheduler.step(v, t, x, return_dict=False)[0]
    sigmas = sampler.schedule(steps, tokens, QWEN)
    ours = jax.jit(lambda n: sampler.sample(lambda x, s: jnp.tanh(x @ mix) + s, n, sigmas))(noise)
    np.testing.assert_allclose(ours, x, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """dx/ds = x cos(s) has x(0) = x(1) exp(-sin 1); halving the steps' size shows the order."""
    noise = jnp.array([1.0, -2.0])
    exact = noise * np.exp(-np.sin(1.0))
    errors = []
    for steps in (8, 16, 32):
        sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
        found = sampler.sample(lambda x, s: x * jnp.cos(s), noise, sigmas, solver)
        errors.append(float(jnp.abs(found - exact).max()))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, order, atol=0.25)


def test_heun_never_asks_the_model_at_zero():
    def velocity(x, sigma):
        return jnp.where(sigma > 0, x, jnp.nan)

    sigmas = sampler.schedule(4, 16, QWEN)
    assert bool(jnp.isfinite(sampler.sample(velocity, jnp.ones(3), sigmas, "heun")).all())
    single = sampler.schedule(1, 16, QWEN)
    both = [sampler.sample(velocity, jnp.ones(3), single, solver) for solver in sampler.SOLVERS]
    np.testing.assert_array_equal(*both)
    with pytest.raises(InputError, match="rk4"):
        sampler.sample(velocity, jnp.ones(3), sigmas, "rk4")


def test_a_row_does_not_depend_on_its_batch():
    sigmas = sampler.schedule(5, 16, QWEN)
    noise = jax.random.normal(jax.random.key(0), (3, 4))
    together = sampler.sample(lambda x, s: jnp.sin(x) * s, noise, sigmas)
    alone = sampler.sample(lambda x, s: jnp.sin(x) * s, noise[1:2], sigmas)
    np.testing.assert_array_equal(together[1:2], alone)


def test_guidance_over_text_and_pictures():
    full, pictures, neither = jax.random.normal(jax.random.key(1), (3, 2, 5))
    np.testing.assert_allclose(sampler.guide(full, pictures, neither, 1, 1), full, atol=1e-6)
    np.testing.assert_allclose(sampler.guide(full, pictures, neither, 0, 1), pictures, atol=1e-6)
    np.testing.assert_allclose(sampler.guide(full, pictures, neither, 0, 0), neither, atol=1e-6)
    expected = neither + 1.5 * (pictures - neither) + 4 * (full - pictures)
    np.testing.assert_allclose(sampler.guide(full, pictures, neither, 4, 1.5), expected, atol=1e-6)
    text = jax.random.normal(jax.random.key(2), (2, 5))
    both = sampler.guide(full, pictures, neither, 4, 1.5, text)
    other = neither + 4 * (text - neither) + 1.5 * (full - text)
    np.testing.assert_allclose(both, 0.5 * (expected + other), atol=1e-6)
    same = sampler.guide(full, full, neither, 7.0, 3.0)  # text then changes nothing
    np.testing.assert_allclose(same, neither + 3 * (full - neither), atol=1e-5)


def test_a_renormalised_velocity_has_the_length_of_the_full_one():
    guided, full = jax.random.normal(jax.random.key(3), (2, 4, 6, 8))
    found = sampler.renormalize(guided, full)
    length = functools.partial(np.linalg.norm, axis=-1, keepdims=True)
    np.testing.assert_allclose(length(found), length(full), rtol=1e-5)
    np.testing.assert_allclose(found / length(found), guided / length(guided), atol=1e-6)


def test_the_schedule_shifts_as_the_times_of_the_training():
    law = flow.TimeLaw(base_shift=0.2, max_shift=1.5, base_tokens=16, max_tokens=4096)
    config = sampler.ScheduleConfig.of(law)
    assert sampler.ScheduleConfig.of(flow.TimeLaw()) == QWEN
    for tokens in (16, 1000):
        assert config.mu(tokens) == law.mu(tokens) != QWEN.mu(tokens)
