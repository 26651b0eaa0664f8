"""What a block keeps for its backward pass: other memory for each policy, one gradient for all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.models import layers, lora, mmdit, qwen_text

BLOCKS = 6
POLICIES = {
    # by the memory that they cost, the least first
    tower: (
        "full", "attention", "qkv", "attention+qkv+out", "attention+qkv+joint+out",
        "attention+qkv+joint+out+mlp",
    )
    for tower in ("mmdit", "text")
}  # fmt: skip


def build(tower, policy):
    """(loss of one picture of parameters, abstract parameters) of a tower under a policy."""
    if tower == "mmdit":
        config = mmdit.MMDiTConfig(
            num_layers=BLOCKS, num_attention_heads=2, attention_head_dim=32,
            joint_attention_dim=24, in_channels=16, out_channels=4, axes_dims_rope=(8, 12, 12),
        )  # fmt: skip
        module = mmdit.MMDiT(config, remat=policy)
        args = (
            jnp.ones((2, 256, 16)), jnp.ones((2, 64, 24)), jnp.ones((2, 64), bool), jnp.ones((2,)),
            jnp.ones((2, 256, 3), jnp.int32), jnp.ones((64, 3), jnp.int32),
        )  # fmt: skip
    else:
        config = qwen_text.TextConfig(
            vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS,
            num_attention_heads=2, num_key_value_heads=1, mrope_section=(4, 6, 6),
        )  # fmt: skip
        module = qwen_text.TextModel(config, remat=policy)
        positions = jnp.broadcast_to(jnp.arange(256), (2, 3, 256))
        args = (jnp.ones((2, 256, 64)), positions, jnp.ones((2, 256), bool))

    def loss(params, adapter=None):
        variables = {"params": params} | ({"lora": adapter} if adapter else {})
        return jnp.mean(jnp.sin(module.apply(variables, *args)))

    return loss, layers.abstract_params(module, *args)


@functools.cache
def gradient(tower, policy):
    """(gradients, bytes of temporary memory) of the compiled backward pass."""
    loss, shapes = build(tower, policy)
    flat, tree = jax.tree.flatten(layers.meta.unbox(shapes))
    rng = np.random.default_rng(0)
    params = tree.unflatten([jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype) for x in flat])
    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    return jax.device_get(compiled(params)), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("tower", POLICIES)
def test_each_policy_changes_memory_and_no_gradient(tower):
    plain, most = gradient(tower, None)
    sizes = []
    for policy in POLICIES[tower]:
        found, size = gradient(tower, policy)
        sizes.append(size)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    assert len(set(sizes)) == len(sizes) and sizes == sorted(sizes), sizes
    assert sizes[0] < 0.7 * most


def test_an_adapters_input_is_kept_at_its_low_rank():
    """Without the name the backward pass multiplies by every A anew."""
    loss, shapes = build("mmdit", "mlp")
    tower = layers.meta.unbox(shapes)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), tower, lora.MMDIT_TARGETS, 2))

    def products(policy):
        grad = jax.grad(build("mmdit", policy)[0], argnums=1)
        return str(jax.make_jaxpr(grad)(tower, adapter)).count("dot_general")

    assert products("mlp") - products("mlp+lora") == len(lora.targets(tower, lora.MMDIT_TARGETS))


def test_what_is_kept_may_lie_in_the_hosts_memory():
    """The block's own name moves there; without the name in a block nothing would."""
    loss, shapes = build("mmdit", "attention+host:mlp")
    text = str(jax.make_jaxpr(jax.grad(loss))(layers.meta.unbox(shapes)))
    assert "<host>" in text or "pinned_host" in text
    loss, shapes = build("mmdit", "attention+mlp")
    text = str(jax.make_jaxpr(jax.grad(loss))(layers.meta.unbox(shapes)))
    assert "<host>" not in text and "pinned_host" not in text


def test_names_of_jax_are_taken_and_others_are_named():
    assert layers.remat_policy("full") is None
    assert layers.remat_policy("dots_saveable") is jax.checkpoint_policies.dots_saveable
    with pytest.raises(InputError, match="'atention' unknown; give 'full', some of qkv, joint"):
        layers.remat_policy("qkv+atention")
