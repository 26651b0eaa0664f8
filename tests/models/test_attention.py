"""Every path of attention computes the same, alone and over a mesh, with its gradients."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax import sharding
from qk_jax.models import attention as attention_lib
from qk_jax.models import flash
from qk_jax.sharding.rules import Activations

CASES = {
    # T, S, H, K, D, causal, segments
    "joint": (160, 160, 2, 2, 128, False, "padding"),
    "causal": (200, 200, 4, 2, 128, True, "padding"),
    "queries": (40, 200, 4, 1, 128, True, "padding"),
    "pictures": (192, 192, 2, 2, 80, False, "three"),
    "whole": (256, 256, 2, 2, 64, False, None),
    "odd": (130, 130, 1, 1, 128, False, None),
}


def forced(name):
    """Every device computes with the kernel `name`; outside a TPU, splash is interpreted."""
    return mock.patch.object(attention_lib, "choice", lambda query, key: name)


def inputs(name, rows=2):
    length, span, heads, groups, dim, causal, kind = CASES[name]
    rng = np.random.default_rng(len(name))
    arrays = [
        jnp.asarray(rng.normal(size=(rows, *shape, dim)), jnp.float32)
        for shape in ((length, heads), (span, groups), (span, groups))
    ]
    segments = None
    if kind == "padding":  # the first row has 30 padded tokens before it
        ids = np.ones((rows, span), np.int32)
        ids[0, :30] = 0
        segments = (jnp.asarray(ids[:, span - length :]), jnp.asarray(ids))
    elif kind == "three":
        ids = jnp.broadcast_to(jnp.asarray(np.arange(span) // 64, jnp.int32), (rows, span))
        segments = (ids, ids)
    return arrays, segments, causal


def with_gradients(arrays, segments, causal, activations=None):
    """(output, gradients) of a loss that reads only tokens that are not padding."""
    seen = 1.0 if segments is None else (segments[0] > 0).astype(jnp.float32)[..., None, None]

    def loss(*arrays):
        out = attention_lib.attention(*arrays, segments, causal=causal, activations=activations)
        return jnp.sum(jnp.sin(out) * seen), out * seen

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize("name", CASES)
def test_splash_attention_is_the_definition(name):
    arrays, segments, causal = inputs(name)
    results = {}
    for kernel in ("xla", "splash"):
        with forced(kernel):
            results[kernel] = with_gradients(arrays, segments, causal)
    for found, wanted in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_the_definition_hides_what_it_should():
    """Against a sum over the keys that a query may see, written out."""
    (query, key, value), segments, _ = inputs("queries")
    out = attention_lib.attention(query, key, value, segments, causal=True)
    query, key, value = map(np.asarray, (query, key, value))
    for row, position, head in ((0, 0, 0), (1, 39, 3), (0, 17, 2)):
        last = 200 - 40 + position
        keys = [k for k in range(last + 1) if segments[1][row, k] == 1]
        scores = key[row, keys, 0] @ query[row, position, head] / np.sqrt(128)
        weights = np.exp(scores - scores.max())
        wanted = (weights / weights.sum()) @ value[row, keys, 0]
        np.testing.assert_allclose(out[row, position, head], wanted, atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ({"fsdp": 2, "tensor": 2}, "causal"),
        ({"context": 2}, "pictures"),
        ({"context": 2, "tensor": 2, "fsdp": 2}, "causal"),
        ({"context": 4}, "joint"),  # more devices than heads: some compute the same
    ],
)
def test_a_mesh_changes_nothing(kernel, shape, name):
    arrays, segments, causal = inputs(name)
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    with forced("xla"):
        wanted = with_gradients(arrays, segments, causal)
    with forced(kernel), jax.set_mesh(sharding.build_mesh(shape, devices)):
        found = with_gradients(arrays, segments, causal, Activations())
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(np.asarray(one), other, atol=2e-5)


def test_context_devices_exchange_tokens_for_heads():
    """Tokens cut over 'context' come together by all-to-all, not by a copy of all heads."""
    mesh = sharding.build_mesh({"context": 2}, jax.devices()[:2])
    activations = Activations()

    @jax.jit
    def attend(x):
        x = sharding.constrain(x, activations, "batch", "sequence", None, None)
        with forced("splash"):
            out = attention_lib.attention(x, x, x, activations=activations)
        return sharding.constrain(out, activations, "batch", "sequence", None, None)

    with jax.set_mesh(mesh):
        text = attend.lower(jnp.zeros((1, 256, 2, 128))).compile().as_text()
    assert "all-to-all" in text and "all-gather" not in text


def test_the_device_decides(monkeypatch):
    target = functools.partial(monkeypatch.setattr, sharding, "target")
    x = jnp.zeros((1, 512, 2, 128), jnp.bfloat16)
    for platform, kind, wanted in (
        ("tpu", "TPU v5", "splash"),
        ("tpu", "TPU v2", "xla"),
        ("gpu", "NVIDIA H200", "cudnn"),
        ("cpu", "cpu", "xla"),
    ):
        target(lambda platform=platform, kind=kind: (platform, kind))
        assert attention_lib.choice(x, x) == wanted
        assert attention_lib.choice(x[:, :64], x[:, :64]) == "xla"
    target(lambda: ("gpu", "NVIDIA H200"))
    assert attention_lib.choice(x.astype(jnp.float32), x) == "xla"


@pytest.mark.parametrize("kind", flash.BLOCKS)
def test_wider_heads_have_smaller_blocks(kind):
    blocks = flash.BLOCKS[kind]
    assert blocks.of(80) == blocks.of(128) == blocks
    for dim in (384, 2048):
        found = blocks.of(dim)
        for size, most in zip(
            (*found[:3], *found.backward), (*blocks[:3], *blocks.backward), strict=True
        ):
            assert size % 128 == 0 and 128 <= size <= max(128, most * 128 / dim)


@pytest.mark.parametrize("kind", flash.BLOCKS)
def test_blocks_fill_the_length_up(kind):
    most = flash.BLOCKS[kind].query
    for length in (1, 128, 129, 922, 1024, 1664, 2048, 3712, 8832):
        size = flash.block(length, most)
        assert size % 128 == 0 and size <= most
        padded = -(-length // size) * size
        assert length <= padded < length + max(256, length // 8)
