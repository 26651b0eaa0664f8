"""The connector's size and start."""

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.models import layers
from qk_jax.models.connector import Connector, noisy


def test_starts_as_the_identity_and_can_leave_it():
    connector, x = Connector(8), jax.random.normal(jax.random.key(1), (2, 3, 8)) * 5
    params = layers.init_params(connector, jax.random.key(0), x)
    np.testing.assert_allclose(connector.apply({"params": params}, x), x, atol=1e-5)

    grads = jax.grad(lambda p: jnp.sum(connector.apply({"params": p}, x) ** 3))(params)
    first = grads["fc1"]["kernel"]
    # both halves learn, and differently: the pair is no dead symmetry
    assert float(jnp.abs(first[:, :8] + first[:, 8:]).max()) > 1e-3


def test_another_width_starts_at_random():
    connector, x = Connector(12), jnp.ones((1, 1, 8))
    params = layers.init_params(connector, jax.random.key(0), x)
    assert params["fc1"]["kernel"].shape == (8, 16)
    assert len(np.unique(params["fc1"]["kernel"])) > 100


def test_other_layers_add_nothing_at_the_start_and_learn():
    plain, connector = Connector(8), Connector(8, layers=2)
    x = jax.random.normal(jax.random.key(1), (2, 3, 24)) * 5
    params = layers.init_params(connector, jax.random.key(0), x)
    alone = {name: params[name] for name in ("fc1", "fc2")}
    wanted = plain.apply({"params": alone}, x[..., :8])
    np.testing.assert_array_equal(connector.apply({"params": params}, x), wanted)
    grads = jax.grad(lambda p: jnp.sum(connector.apply({"params": p}, x) ** 3))(params)
    assert float(jnp.abs(grads["layers_fc2"]["kernel"]).max()) > 0


def test_noise_of_queries_is_new_for_each_example_and_one_draw_for_painters():
    queries = jnp.zeros((64, 32))
    first, second = (noisy(queries, 0.5, jax.random.key(seed), 8) for seed in (1, 2))
    assert first.shape == (8, 64, 32) and abs(float(first.std()) - 0.5) < 0.01
    assert float(jnp.abs(first[0] - first[1]).max()) > 0.5
    assert float(jnp.abs(first - second).max()) > 0.5
    np.testing.assert_array_equal(noisy(queries, 0.5), noisy(queries, 0.5))
    assert noisy(queries, 0.5).shape == queries.shape
    np.testing.assert_allclose(noisy(queries + 3, 0.5) - noisy(queries, 0.5), 3, atol=1e-5)


def test_size_for_the_7b_language_model():
    boxed = layers.abstract_params(Connector(3584), jnp.zeros((1, 1, 3584)))
    assert sum(leaf.size for leaf in jax.tree.leaves(boxed)) == 51_390_976
