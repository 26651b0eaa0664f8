"""Adapters against peft on the diffusion transformer: forward, gradients, merge, and targets."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from qk_jax.base.errors import InputError
from qk_jax.base.trees import flatten
from qk_jax.models import layers, lora, mmdit, qwen_vl, rotary
from qk_jax.weights import hub_configs
from tests.models import torch_copy

CONFIG = mmdit.MMDiTConfig(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(4, 6, 6),
)
RANK, ALPHA = 4, 10
SCALE = ALPHA / RANK
GRID, TEXT = (2, 3), 5
ADAPTED = 12  # Linears per block: four attention projections and two MLP Linears a stream
PEFT_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
]


def inputs():
    """Positional arguments of MMDiT, and a cotangent of its output."""
    rng = np.random.default_rng(0)
    tokens = math.prod(GRID)
    law = rotary.PositionLaw("qwen_image")
    arguments = (
        jnp.asarray(rng.normal(size=(2, tokens, CONFIG.in_channels)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, TEXT, CONFIG.joint_attention_dim)), jnp.float32),
        jnp.ones((2, TEXT), bool),
        jnp.array([0.25, 0.0625]),
        rotary.image_positions(law, GRID, (), jnp.zeros((2, 0), jnp.int32)),
        rotary.text_positions(law, jnp.ones((2, TEXT), bool), GRID, ()),
    )
    return arguments, rng.normal(size=(2, tokens, 16)).astype(np.float32)


@jax.jit
def ours(params, adapter):
    """Our output with an adapter (or none)."""
    collections = {"lora": lora.scaled(adapter, SCALE)} if adapter else {}
    return mmdit.MMDiT(CONFIG).apply({"params": params, **collections}, *inputs()[0])


def theirs(model):
    """The torch model's output."""
    hidden, context, mask, t = (torch.from_numpy(np.array(x)) for x in inputs()[0][:4])
    return model(hidden, context, mask, t, [[(1, *GRID)]] * 2, return_dict=False)[0]


@functools.cache
def peer():
    """A random peft model, the base weights and the factors in our layout."""
    torch_config = {k: v for k, v in hub_configs.to_hf(CONFIG).items() if not k.startswith("_")}
    base = torch_copy.randomize(QwenImageTransformer2DModel(**torch_config), seed=3)
    shapes = layers.abstract_params(mmdit.MMDiT(CONFIG), *mmdit.MMDiT(CONFIG).example())
    params = torch_copy.copy(base.state_dict(), shapes)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS, init_lora_weights=False
    )
    model = peft.inject_adapter_in_model(config, base, "default")
    fresh = lora.init(jax.random.key(0), shapes, lora.MMDIT_TARGETS, RANK)
    return model, params, factors(model, fresh, lambda weight: weight)


def factors(model, tree, read):
    """An adapter tree filled by read(torch factor), transposed and stacked over the blocks."""
    names = dict(model.named_parameters())
    short = {name.replace(".", "_"): name for name in names}

    def leaf(path, _):
        module = "_".join(key.key for key in path[1:-1])
        kind = {"lora_a": "lora_A", "lora_b": "lora_B"}[path[-1].key]
        numbered = (
            f"transformer_blocks_{layer}_{module}_{kind}_default_weight"
            for layer in range(CONFIG.num_layers)
        )
        return np.stack([read(names[short[name]]).detach().numpy().T for name in numbered])

    return jax.tree_util.tree_map_with_path(leaf, tree)


def test_adapted_forward_equals_peft():
    model, params, adapter = peer()
    with torch.no_grad():
        expected = theirs(model).numpy()
    out = ours(params, adapter)
    effect = np.abs(out - ours(params, None)).max()
    assert effect > 0.1
    np.testing.assert_allclose(out, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_gradients_of_the_factors_equal_peft():
    model, params, adapter = peer()
    cotangent = inputs()[1]
    model.zero_grad()
    (theirs(model) * torch.from_numpy(cotangent)).sum().backward()
    zero = torch.zeros_like
    expected = factors(model, adapter, lambda p: zero(p) if p.grad is None else p.grad)
    got = jax.grad(lambda adapter: jnp.sum(ours(params, adapter) * cotangent))(adapter)

    def compare(path, got, want):
        scale = max(np.abs(want).max(), 1e-2)
        assert np.abs(got - want).max() <= 3e-5 * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, got, expected)


def test_merge_equals_peft():
    model, params, adapter = peer()
    merged = lora.merge(params, adapter, SCALE)
    deltas = {
        name.replace(".", "_"): module.get_delta_weight("default").detach().numpy().T
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert len(deltas) == ADAPTED * CONFIG.num_layers
    before, after = flatten(params), flatten(merged)
    assert before.keys() == after.keys()
    changed = 0
    for path, kernel in after.items():
        if not np.array_equal(kernel, before[path]):
            changed += 1
            module = path.split("/", 1)[1].removesuffix("/kernel").replace("/", "_")
            for layer in range(CONFIG.num_layers):
                expected = before[path][layer] + deltas[f"transformer_blocks_{layer}_{module}"]
                np.testing.assert_allclose(kernel[layer], expected, atol=1e-6)
    assert changed == ADAPTED
    expected = ours(params, adapter)
    np.testing.assert_allclose(
        ours(merged, None), expected, atol=1e-5 * max(1, np.abs(expected).max())
    )


def test_merge_sums_in_float32_and_rounds_once():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.bfloat16)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 3), (2, 3, 6)))
    params = {"m": {"kernel": kernel, "bias": jnp.ones(6)}}
    merged = lora.merge(params, {"m": {"lora_a": a, "lora_b": b}}, 0.5)
    exact = np.asarray(kernel, np.float64) + 0.5 * a.astype(np.float64) @ b.astype(np.float64)
    assert merged["m"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        merged["m"]["kernel"], jnp.asarray(exact.astype(np.float32), jnp.bfloat16)
    )
    assert merged["m"]["bias"] is params["m"]["bias"]


@functools.cache
def whole():
    """Shapes of a tree with both towers."""
    towers = {"vlm": qwen_vl.QwenVL(qwen_vl.PRESETS["tiny"]), "mmdit": mmdit.MMDiT(CONFIG)}
    return {name: layers.abstract_params(tower, *tower.example()) for name, tower in towers.items()}


def test_default_targets_are_every_linear_of_the_blocks():
    vlm = lora.targets(whole(), lora.VLM_TARGETS)
    assert len(vlm) == 7 and all(name.startswith("vlm/language_model/layers/") for name in vlm)
    assert len(lora.targets(whole(), lora.MMDIT_TARGETS)) == ADAPTED
    assert lora.targets(whole()["vlm"], lora.VLM_TARGETS) == [n.removeprefix("vlm/") for n in vlm]


def test_a_fresh_adapter_keeps_layers_and_changes_nothing():
    _, params, _ = peer()
    adapter = lora.init(jax.random.key(0), params, lora.MMDIT_TARGETS, 3)
    flat = flatten(adapter)
    assert flat["transformer_blocks/img_mlp/net_2/lora_a"].shape == (2, 128, 3)
    assert flat["transformer_blocks/img_mlp/net_2/lora_b"].shape == (2, 3, 32)
    for path, leaf in flat.items():
        assert leaf.dtype == jnp.float32
        if path.endswith("lora_a"):
            bound = leaf.shape[-2] ** -0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            assert not np.array_equal(leaf[0], leaf[1])
    np.testing.assert_array_equal(ours(params, adapter), ours(params, None))
    gaussian = lora.init(jax.random.key(0), params, lora.MMDIT_TARGETS, 3, kind="gaussian")
    draws = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gaussian) if np.any(x)])
    assert abs(draws.std() - 1 / 3) < 0.02


def test_each_module_draws_from_its_own_name():
    shapes = whole()
    few = lora.init(jax.random.key(0), shapes, r"mmdit/.*/to_q", 2)
    many = lora.init(jax.random.key(0), shapes, [lora.MMDIT_TARGETS, lora.VLM_TARGETS], 2)
    np.testing.assert_array_equal(
        few["mmdit"]["transformer_blocks"]["attn"]["to_q"]["lora_a"],
        many["mmdit"]["transformer_blocks"]["attn"]["to_q"]["lora_a"],
    )


def test_logical_axes_follow_the_kernel():
    shapes = whole()
    adapter = lora.init(jax.random.key(0), shapes, lora.MMDIT_TARGETS, 2)
    axes = lora.logical_axes(shapes, adapter)["mmdit"]["transformer_blocks"]
    assert axes["attn"]["to_q"]["lora_a"] == ("layers", "embed", None)
    assert axes["attn"]["to_q"]["lora_b"] == ("layers", None, "adapter")
    assert axes["img_mlp"]["net_2"]["lora_a"] == ("layers", "adapter", None)
    assert axes["img_mlp"]["net_2"]["lora_b"] == ("layers", None, "adapter")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("mmdit/transformer_blocks/attn/to_p", "nearest are .*transformer_blocks/attn/to_q"),
        ([lora.MMDIT_TARGETS, "vlm/language_model/layers/self_attn/q"], "q_proj"),
        ("vlm/(", "no regular expression"),
    ],
)
def test_a_pattern_without_match_names_near_modules(pattern, message):
    with pytest.raises(InputError, match=message):
        lora.init(jax.random.key(0), whole(), pattern, 2)


def test_convolutions_ranks_and_foreign_adapters_are_input_errors():
    with pytest.raises(InputError, match="conv_in is a convolution"):
        lora.targets({"conv_in": {"kernel": np.zeros((3, 3, 4, 4))}}, ".*")
    with pytest.raises(InputError, match="rank is 0"):
        lora.init(jax.random.key(0), whole(), lora.MMDIT_TARGETS, 0)
    adapter = {"m": {"lora_a": np.zeros((4, 2)), "lora_b": np.zeros((2, 5))}}
    with pytest.raises(InputError, match=r"m is for a kernel \[4, 5\], which here is \[4, 6\]"):
        lora.merge({"m": {"kernel": jnp.zeros((4, 6))}}, adapter, 1.0)
