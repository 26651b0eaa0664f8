"""FLOPs of traced programs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from qk_jax.models import attention, connector, layers, mmdit
from qk_jax.training import flops


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_and_its_gradient():
    product = lambda w, x: jnp.sum(jnp.einsum("bsd,df->bsf", x, w))  # noqa: E731
    once = 2 * 3 * 5 * 7 * 11
    w, x = shaped(7, 11), shaped(3, 5, 7)
    assert flops.count(product, w, x) == once
    assert flops.count(jax.value_and_grad(product), w, x) == 2 * once  # forward, d w
    assert flops.count(jax.value_and_grad(product, argnums=(0, 1)), w, x) == 3 * once


def test_a_frozen_layer_on_the_path_costs_two_passes_and_off_it_one():
    def loss(train, below, above, x):
        return jnp.sum(x @ below @ train @ above)

    w, x = shaped(8, 8), shaped(4, 8)
    once = 2 * 4 * 8 * 8
    # below: forward; train: forward, d w (its input needs none); above: forward, d x
    assert flops.count(jax.value_and_grad(loss), w, w, w, x) == (1 + 2 + 2) * once


def test_a_loop_counts_its_body_times_its_length_and_a_branch_its_dearest():
    def scanned(w, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    assert flops.count(scanned, shaped(6, 8, 8), shaped(4, 8)) == 6 * 2 * 4 * 8 * 8

    def branched(w, x):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops.count(jax.jit(branched), shaped(8, 8), shaped(4, 8)) == 2 * 2 * 4 * 8 * 8


def test_recomputation_is_seen_so_models_are_counted_without_it():
    block = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))  # noqa: E731
    w, x = shaped(8, 8), shaped(4, 8)
    plain = flops.count(jax.grad(block), w, x)
    assert flops.count(jax.grad(jax.checkpoint(block)), w, x) > plain


def test_a_permutation_written_as_a_product_is_no_work():
    turn = jnp.eye(8)[::-1]
    body = lambda c, w: (jnp.tanh(c @ w @ (2 * turn)), None)  # noqa: E731
    once = 6 * 2 * 4 * 8 * 8
    given = shaped(6, 8, 8), shaped(4, 8)
    assert flops.count(lambda w, x: jax.lax.scan(body, x, w)[0], *given) == once
    loss = lambda w, x: jnp.sum(jax.lax.scan(body, x, w)[0])  # noqa: E731
    assert flops.count(jax.grad(loss, (0, 1)), *given) == 3 * once


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(stride):
    def conv(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    kernel, x = shaped(3, 3, 8, 16), shaped(2, 16, 16, 8)
    once = 2 * 2 * (16 // stride) ** 2 * 16 * 3 * 3 * 8
    assert flops.count(conv, kernel, x) == once
    grad = jax.grad(lambda k, x: jnp.sum(conv(k, x)), argnums=(0, 1))
    assert flops.count(grad, kernel, x) == 3 * once  # forward, d kernel, d x


def test_attention_with_grouped_heads():
    q, k = shaped(2, 10, 4, 8), shaped(2, 10, 2, 8)
    assert flops.count(attention.attention, q, k, k) == 2 * (2 * 2 * 4 * 10 * 10 * 8)


def generator():
    """(inputs, function of (params, inputs) that sums the velocity, products by their kind).

    The kinds: of weights behind others, of the first weights of latents, text and time, of the
    time's others, and of attention.
    """
    config = mmdit.PRESETS["tiny"]
    n, t, d, j, depth = 12, 7, config.width, config.joint_attention_dim, config.num_layers
    inputs = (
        jnp.zeros((1, n, 64)), jnp.zeros((1, t, j)), jnp.ones((1, t), bool), jnp.zeros(1),
        jnp.zeros((1, n, 3), jnp.int32), jnp.zeros((t, 3), jnp.int32),
    )  # fmt: skip
    module = mmdit.MMDiT(config)
    params = meta.unbox(layers.abstract_params(module, *inputs))
    tokens = n + t
    counts = {
        # q, k, v, out and the MLP of both streams; the end
        "linear": 2 * (depth * tokens * (4 * d * d + 8 * d * d) + n * d * 64),
        "latents": 2 * n * 64 * d,
        "text": 2 * t * j * d,
        "time": 2 * (depth * 2 * 6 * d * d + d * d + d * 2 * d),
        "time_first": 2 * 256 * d,
        "attention": 2 * depth * 2 * tokens * tokens * d,
    }
    return params, inputs, lambda p, *x: jnp.sum(module.apply({"params": p}, *x)), counts


def test_a_whole_generator():
    params, inputs, velocity, counts = generator()
    assert flops.count(velocity, params, *inputs) == sum(counts.values())


def test_a_generator_trained_frozen_and_passed_through():
    """Weights cost once forward, once for the gradient of what came in, once for their own; the
    products of attention have no weights: once forward, and one for each factor's gradient."""
    params, inputs, velocity, counts = generator()
    first = counts["latents"] + counts["time_first"]  # nothing before them is trained
    behind = sum(counts.values()) - first  # before the text's stands a norm with a scale
    assert flops.count(jax.grad(velocity), params, *inputs) == 3 * behind + 2 * first
    time = counts["time"] + counts["time_first"]
    tokens = sum(counts.values()) - time - counts["attention"]
    through = flops.count(jax.grad(velocity, argnums=(1, 2)), params, *inputs)
    assert through == 2 * tokens + 3 * counts["attention"] + time
    # whatever is done with it, all of it belongs to the generator
    for what in (velocity, jax.grad(velocity), jax.grad(velocity, argnums=(1, 2))):
        traced = jax.make_jaxpr(what)(params, *inputs).jaxpr
        assert set(flops.by_tower(traced)) == {"mmdit"}


def test_a_connector_between_trained_parts_costs_three_passes():
    module = connector.Connector(24)
    tokens = jnp.zeros((2, 5, 16))
    params = meta.unbox(layers.abstract_params(module, tokens))
    run = lambda p, x: jnp.sum(module.apply({"params": p}, x))  # noqa: E731
    once = 2 * 2 * 5 * (16 * 32 + 32 * 24)
    for what, passes in ((run, 1), (jax.grad(run, argnums=1), 2), (jax.grad(run, (0, 1)), 3)):
        traced = jax.make_jaxpr(what)(params, tokens).jaxpr
        assert flops.by_tower(traced) == {"connector": passes * once}


@pytest.mark.parametrize(
    ("scope", "tower"),
    [
        ("/jvp(QwenVL)/visual/blocks/attn/qkv", "vision"),
        ("/QwenVL.pool/visual/merger", "vision"),
        ("/transpose(jvp(QwenVL))/language_model//layers/mlp/up_proj", "text"),
        ("/transpose(jvp(MMDiT))/proj_out", "mmdit"),
        ("/jvp(VAE.encode)/encoder/conv_in", "vae"),
        ("/transpose(jvp(Connector))/fc1", "connector"),
        ("/jvp()/transpose", "other"),
    ],
)
def test_scopes_belong_to_towers(scope, tower):
    assert flops.tower(scope) == tower


def test_peaks():
    class Device:
        device_kind = "TPU v5p"

    assert flops.peak(Device()) == 459e12
    assert flops.peak(jax.devices()[0]) is None
