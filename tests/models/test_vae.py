"""Both autoencoders against diffusers, and the sizes of the public ones."""

import dataclasses
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from qk_jax.models import layers, vae
from qk_jax.weights import hub_configs
from tests.models import torch_copy

KL = vae.AutoencoderKLConfig(
    block_out_channels=(8, 8, 16, 16), latent_channels=4, norm_num_groups=4, sample_size=32
)
QWEN = vae.QwenImageVAEConfig(
    base_dim=8, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temperal_downsample=(False, True),
    latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.1, 0.9, 2.0, 0.5),
)  # fmt: skip


def torch_vae(config):
    values = {k: v for k, v in hub_configs.to_hf(config).items() if not k.startswith("_")}
    return torch_copy.randomize(getattr(diffusers, vae.kind(config))(**values)).eval()


def abstract(config):
    module = vae.VAE(config)
    return layers.abstract_params(module, *module.example())


def count(config):
    leaves = jax.tree.leaves(meta.unbox(abstract(config)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize(
    "config",
    [
        KL,
        dataclasses.replace(KL, use_quant_conv=False, use_post_quant_conv=False),
        dataclasses.replace(KL, mid_block_add_attention=False, layers_per_block=2),
        QWEN,
        dataclasses.replace(QWEN, num_res_blocks=2),
    ],
    ids=["quant_convs", "no_quant_convs", "no_attention", "qwen", "qwen_deep"],
)
def test_equals_diffusers_at_a_size_that_is_not_square(config):
    theirs = torch_vae(config)
    params = torch_copy.copy(theirs.state_dict(), abstract(config))
    ours = vae.VAE(config)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 4 * config.downscale, 2 * config.downscale, 3)).astype(np.float32)
    z = rng.normal(size=(2, 3, 2, config.latent_channels)).astype(np.float32)

    def to_torch(array):
        array = torch.from_numpy(array.transpose(0, 3, 1, 2))
        return array[:, :, None] if isinstance(config, vae.QwenImageVAEConfig) else array

    def to_numpy(tensor):
        tensor = tensor[:, :, 0] if tensor.ndim == 5 else tensor
        return tensor.numpy().transpose(0, 2, 3, 1)

    with torch.no_grad():
        posterior = theirs.encode(to_torch(x)).latent_dist
        picture = theirs.decode(to_torch(z)).sample
    encode = jax.jit(lambda p, x: ours.apply({"params": p}, x, method="encode"))
    decode = jax.jit(lambda p, z: ours.apply({"params": p}, z, method="decode"))
    mean, logvar = encode(params, x)
    assert mean.shape == (2, 4, 2, config.latent_channels)
    np.testing.assert_allclose(mean, to_numpy(posterior.mean), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logvar, to_numpy(posterior.logvar), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decode(params, z), to_numpy(picture), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("sd3", 83_819_683), ("flux", 83_819_683), ("sdxl", 83_653_863), ("qwen_image", 44_599_603)],
)
def test_public_sizes(preset, expected):
    assert count(vae.PRESETS[preset]) == expected


def test_normalisation_is_float32_and_inverts():
    z = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.bfloat16)
    shift = dataclasses.replace(KL, scaling_factor=0.3611, shift_factor=0.1159)
    wide = np.asarray(z, np.float32)
    for config, expected in (
        (shift, (wide - 0.1159) * 0.3611),
        (QWEN, (wide - np.array(QWEN.latents_mean)) / np.array(QWEN.latents_std)),
    ):
        normal = vae.normalize(z, config)
        assert normal.dtype == jnp.float32
        np.testing.assert_allclose(normal, expected, atol=1e-6)
        np.testing.assert_allclose(vae.denormalize(normal, config), wide, atol=1e-6)


def test_sample_has_the_posterior_moments():
    mean, logvar = jnp.full((20_000, 2), 3.0), jnp.full((20_000, 2), 2 * math.log(0.5))
    draws = vae.sample(mean, logvar, jax.random.key(0))
    np.testing.assert_allclose(draws.mean(0), 3.0, atol=0.02)
    np.testing.assert_allclose(draws.std(0), 0.5, atol=0.01)


def test_bfloat16_is_near_float32():
    config = dataclasses.replace(KL, block_out_channels=(8, 8))
    x = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (1, 8, 4, 3)), jnp.float32)
    params = jax.jit(vae.VAE(config).init)(jax.random.key(0), x)
    exact = jax.jit(vae.VAE(config).apply)(params, x)
    rough = jax.jit(vae.VAE(config, jnp.bfloat16).apply)(params, x)
    assert rough.shape == x.shape
    assert 0 < float(jnp.abs(exact - rough).max()) < 0.1 * float(jnp.abs(exact).max())
