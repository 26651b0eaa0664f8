"""The diffusion transformer against diffusers, its counts, its masks and its timestep embedding."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from qk_jax.models import layers, mmdit, rotary
from qk_jax.weights import hub_configs
from tests.models import torch_copy

CONFIG = mmdit.MMDiTConfig(
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=24,
    axes_dims_rope=(4, 6, 6),
)
LAW = rotary.PositionLaw("qwen_image")
TARGET, TEXT, BATCH = (4, 6), 7, 2
CONDITIONS = {0: (), 1: ((3, 5),), 2: ((6, 2), (3, 4))}


def example_args(config):
    """Arguments that touch every parameter."""
    return (
        jnp.zeros((1, 4, config.in_channels)),
        jnp.zeros((1, 2, config.joint_attention_dim)),
        jnp.ones((1, 2), bool),
        jnp.zeros((1,)),
        jnp.zeros((1, 4, 3), jnp.int32),
        jnp.zeros((2, 3), jnp.int32),
    )


CLEAN = dataclasses.replace(CONFIG, zero_cond_t=True)


@functools.cache
def peer(config=CONFIG):
    """A random diffusers model and the same weights as our tree."""
    torch_config = {k: v for k, v in hub_configs.to_hf(config).items() if not k.startswith("_")}
    model = torch_copy.randomize(QwenImageTransformer2DModel(**torch_config), seed=1)
    shapes = layers.abstract_params(mmdit.MMDiT(CONFIG), *example_args(CONFIG))
    return model, torch_copy.copy(model.state_dict(), shapes)


@functools.cache
def inputs(pictures, late=True):
    """One batch as numpy: hidden, context, right-padded mask, t near 1 or near 0, cotangent."""
    rng = np.random.default_rng(pictures)
    tokens = sum(h * w for h, w in (TARGET, *CONDITIONS[pictures]))
    mask = np.arange(TEXT)[None] < np.array([[TEXT], [4]])
    return {
        "hidden": rng.normal(size=(BATCH, tokens, CONFIG.in_channels)).astype(np.float32),
        "context": rng.normal(size=(BATCH, TEXT, CONFIG.joint_attention_dim)).astype(np.float32),
        "mask": mask,
        "t": np.array([0.9673 if late else 0.0625, 0.021], np.float32),
        "cotangent": rng.normal(size=(BATCH, math.prod(TARGET), 16)).astype(np.float32),
    }


@functools.partial(jax.jit, static_argnames=("pictures", "remat", "config"))
def ours(params, given, pictures, remat=None, hidden_mask=None, config=CONFIG):
    """Output at the target's tokens."""
    grids = CONDITIONS[pictures]
    roles = jnp.zeros((BATCH, len(grids)), jnp.int32)
    out = mmdit.MMDiT(config, remat=remat).apply(
        {"params": params},
        given["hidden"],
        given["context"],
        given["mask"],
        given["t"],
        rotary.image_positions(LAW, TARGET, grids, roles),
        rotary.text_positions(LAW, given["mask"], TARGET, grids),
        hidden_mask=hidden_mask,
        target_tokens=math.prod(TARGET),
    )
    return out[:, : math.prod(TARGET)]


def theirs(model, given, pictures):
    """diffusers' output at the target's tokens."""
    shapes = [(1, h, w) for h, w in (TARGET, *CONDITIONS[pictures])]
    out = model(
        hidden_states=torch.from_numpy(given["hidden"]),
        encoder_hidden_states=torch.from_numpy(given["context"]),
        encoder_hidden_states_mask=torch.from_numpy(given["mask"]),
        timestep=torch.from_numpy(given["t"]),
        img_shapes=[shapes] * BATCH,
        return_dict=False,
    )[0]
    return out[:, : math.prod(TARGET)]


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_forward_equals_diffusers(pictures):
    model, params = peer()
    given = inputs(pictures)
    with torch.no_grad():
        expected = theirs(model, given, pictures).numpy()
    out = ours(params, given, pictures)
    assert np.abs(expected).max() > 1
    # 967 rad in the timestep's sinusoids are known to 6e-5, which moves outputs by about 2e-5.
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    early = inputs(pictures, late=False)
    with torch.no_grad():
        expected = theirs(model, early, pictures).numpy()
    np.testing.assert_allclose(ours(params, early, pictures), expected, atol=1e-5)


@pytest.mark.parametrize("pictures", [0, 2])
def test_condition_pictures_modulated_as_clean_equal_diffusers(pictures):
    model, params = peer(CLEAN)
    given = inputs(pictures, late=False)
    with torch.no_grad():
        expected = theirs(model, given, pictures).numpy()
    out = ours(params, given, pictures, config=CLEAN)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    plain = ours(params, given, pictures)
    assert np.allclose(out, plain, atol=1e-5) == (pictures == 0)


def gradients(remat):
    """Gradients of <output, cotangent> with two condition pictures."""
    _, params = peer()
    given = inputs(2, late=False)

    def value(params):
        return jnp.sum(ours(params, given, 2, remat) * given["cotangent"])

    return jax.grad(value)(params)


@pytest.mark.parametrize("remat", [None, "full"])
def test_gradients_of_all_parameters_equal_diffusers(remat):
    model, params = peer()
    given = inputs(2, late=False)
    model.zero_grad()
    (theirs(model, given, 2) * torch.from_numpy(given["cotangent"])).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None]
    assert len(dead) == 6 and all(name.startswith("transformer_blocks.2.") for name in dead)
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    expected = torch_copy.copy(grads, params)

    def compare(path, got, want):
        scale = max(np.abs(want).max(), 1e-3)
        assert np.abs(got - want).max() <= 2e-5 * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, gradients(remat), expected)


def test_only_the_named_leaves_of_the_last_block_are_unused():
    unused = set()
    for path, grad in jax.tree_util.tree_leaves_with_path(gradients(None)):
        name = "/".join(key.key for key in path)
        is_block = name.startswith("transformer_blocks")
        if not np.any(grad[-1] if is_block else grad):
            unused.add(name)
        assert np.any(grad[0])
    # The last block's text queries end nowhere either, yet torch gives them (zero) gradients.
    queries = {n for n in unused if re.search("add_q_proj|norm_added_q", n)}
    assert len(unused - queries) == 6
    assert all(re.fullmatch(mmdit.UNUSED_IN_LAST_BLOCK, name) for name in unused - queries)


def test_padded_text_and_hidden_pictures_are_seen_by_nobody():
    _, params = peer()
    given = inputs(2)
    out = ours(params, given, 2)
    noisy = dict(given, context=np.where(given["mask"][..., None], given["context"], 9.0))
    np.testing.assert_array_equal(ours(params, noisy, 2), out)

    target = np.arange(given["hidden"].shape[1]) < math.prod(TARGET)
    hidden_mask = np.stack([target, np.ones_like(target)])
    hidden = ours(params, given, 2, hidden_mask=hidden_mask)
    other = given["hidden"].copy()
    other[:, ~target] = 5.0
    changed = ours(params, dict(given, hidden=other), 2, hidden_mask=hidden_mask)
    np.testing.assert_array_equal(hidden[0], changed[0])
    assert np.abs(hidden[1] - changed[1]).max() > 1e-2
    np.testing.assert_allclose(hidden[1], out[1], atol=1e-5)
    assert np.abs(hidden[0] - out[0]).max() > 1e-3


def test_a_hidden_picture_equals_no_picture():
    """In the shifted law the target's positions do not depend on the pictures beside it."""
    _, params = peer()
    law, model = rotary.PositionLaw(), mmdit.MMDiT(CONFIG)
    given = inputs(1)
    tokens = math.prod(TARGET)

    def run(grids, hidden, hidden_mask):
        return model.apply(
            {"params": params},
            *map(jnp.asarray, (hidden, given["context"], given["mask"], given["t"])),
            rotary.image_positions(law, TARGET, grids, jnp.zeros((BATCH, len(grids)), jnp.int32)),
            rotary.text_positions(law, given["mask"], TARGET, grids),
            hidden_mask,
        )[:, :tokens]

    length = given["hidden"].shape[1]
    target = np.broadcast_to(np.arange(length) < tokens, (BATCH, length))
    without = run((), given["hidden"][:, :tokens], None)
    hidden = run(CONDITIONS[1], given["hidden"], jnp.asarray(target))
    np.testing.assert_allclose(hidden, without, atol=1e-5)


def test_timestep_embedding_against_float64():
    t = np.array([0.0, 0.001, 0.02, 0.5, 0.721, 0.9673, 1.0], np.float32)
    frequency = np.exp(-math.log(1e4) * np.arange(128, dtype=np.float64) / 128)
    angle = 1000.0 * t.astype(np.float64)[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    out = mmdit.timestep_embedding(jnp.asarray(t))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-4)  # 1000 rad, 6e-8 relative


def test_bfloat16_keeps_the_timestep_and_stays_near_float32():
    _, params = peer()
    given = jax.tree.map(jnp.asarray, inputs(1))
    model = mmdit.MMDiT(CONFIG, dtype=jnp.bfloat16)
    out, state = model.apply(
        {"params": jax.tree.map(jnp.asarray, params)},
        given["hidden"],
        given["context"],
        given["mask"],
        given["t"],
        rotary.image_positions(LAW, TARGET, CONDITIONS[1], jnp.zeros((BATCH, 1), jnp.int32)),
        rotary.text_positions(LAW, given["mask"], TARGET, CONDITIONS[1]),
        capture_intermediates=lambda module, _: module.name == "time_text_embed",
    )
    assert out.dtype == jnp.bfloat16
    (time,) = jax.tree.leaves(state["intermediates"])
    assert time.dtype == jnp.float32
    reference = ours(params, given, 1)
    error = np.abs(out[:, : math.prod(TARGET)].astype(np.float32) - reference)
    assert error.max() < 0.1 * np.abs(reference).max()


def test_pack_equals_diffusers_and_unpack_inverts():
    z = np.random.default_rng(0).normal(size=(2, 6, 8, 5)).astype(np.float32)
    nchw = torch.from_numpy(z.transpose(0, 3, 1, 2).copy())
    expected = QwenImagePipeline._pack_latents(nchw, 2, 5, 6, 8)
    packed = mmdit.pack(jnp.asarray(z))
    np.testing.assert_array_equal(packed, expected.numpy())
    np.testing.assert_array_equal(mmdit.unpack(packed, 6, 8), z)


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [
        ("20b", 20_430_401_088, 20_430_401_088),
        ("10b", 10.1e9, 10.4e9),
        ("0.9b", 0.83e9, 0.93e9),
        ("tiny", 3.0e6, 3.2e6),
        ("tiny_head", 1.0e6, 1.6e6),
    ],
)
def test_preset_counts(preset, low, high):
    config = mmdit.PRESETS[preset]
    shapes = layers.abstract_params(mmdit.MMDiT(config), *example_args(config))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert low <= count <= high


def test_a_fresh_model_predicts_zero():
    config = mmdit.PRESETS["tiny_head"]
    args = example_args(config)
    params = layers.init_params(mmdit.MMDiT(config), jax.random.key(0), *args)
    assert not np.any(mmdit.MMDiT(config).apply({"params": params}, *args))


def test_norms_have_the_epsilon_of_diffusers():
    """1e-6, which halves the square of vectors as small as that."""
    x = jnp.array([1e-3, -1e-3, 1e-3, -1e-3])
    scaled = layers.RMSNorm().apply({"params": {"scale": jnp.ones(4)}}, x)
    for found in (scaled, layers.layer_norm(x)):
        np.testing.assert_allclose(np.abs(found), 0.5**0.5, rtol=1e-5)
