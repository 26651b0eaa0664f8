"""One training step is the same on one device and on eight, however the towers are sharded."""

import functools
import pathlib

import batches
import jax
import numpy as np
import pytest

from configs import recipes
from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.checkpoints.store import Store
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import step as step_lib

NANO = pathlib.Path(__file__).parent / "nano.py"
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"fsdp": 4, "context": 2},
}
ROWS = {row: dict.fromkeys(("vision", "text", "connector", "mmdit"), row) for row in sharding.ROWS}
ROWS["paper"] = recipes.PAPER.rows


def config_of(stage, rows="fsdp", **changes):
    """A nano config whose towers are sharded by `rows` of the table.

    With a small eps, Adam's first step is the sign of the gradient, which no two sums share; with
    a large one it is smooth, so that the new parameters can be compared.
    """
    overrides = {f"sharding.{tower}": row for tower, row in ROWS[rows].items()}
    overrides |= {"optimizer.eps": "1.0", "sharding_limit": "1.0"}
    overrides |= {key.replace("__", "."): str(value) for key, value in changes.items()}
    return config_lib.load(f"{NANO}:{stage}", overrides)


def values(tree):
    """Random values for every leaf by its name, in numpy, so that nothing is compiled."""
    flat = trees.named(tree)
    out = {}
    for name, leaf in flat.items():
        rng = np.random.default_rng(sum(name.encode()))
        spread = rng.normal(size=leaf.shape) * (0.1 if leaf.ndim > 1 else 0.02)
        out[name] = (spread + name.endswith("scale")).astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(tree), out.values())


def prepared(config, mesh):
    """(step, its arguments) over `mesh`; the values depend on names and shapes alone."""
    plan = Plan.build(config, mesh)
    target = plan.state
    params = values(target.params)
    state = target.replace(
        step=np.int32(0),
        params=params,
        opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), target.opt_state),
        ema=params,
    )
    frozen = jax.device_put(values(plan.frozen), trees.shardings(plan.frozen))
    inputs = batches.encoded(plan, frozen, batches.batch(config, 0, pictures=1))
    state = jax.device_put(state, trees.shardings(target))
    return step_lib.make_train_step(plan), (state, frozen, inputs)


def stepped(config, mesh):
    """(new parameters, gradients, metrics) of one step; the gradients as the first moments, which
    are a tenth of them, clipped."""
    with jax.set_mesh(mesh):
        step, arguments = prepared(config, mesh)
        state, metrics = step(*arguments)
    (moments,) = (part.mu for part in state.opt_state if hasattr(part, "mu"))
    return trees.named(state.params), trees.named(moments), metrics


@functools.cache
def alone(stage):
    return jax.device_get(stepped(config_of(stage), sharding.build_mesh({}, jax.devices()[:1])))


def assert_close(found, wanted, tolerance=1e-5):
    """Within `tolerance` of the largest entry of each leaf."""
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        scale = max(np.max(np.abs(leaf), initial=0.0), 1e-6)
        worst = np.max(np.abs(np.asarray(found[name]) - leaf), initial=0.0)
        assert worst <= tolerance * scale, f"{name}: {worst:.2e} of {scale:.2e}"


@pytest.mark.parametrize(
    ("stage", "rows", "mesh"),
    [
        ("stage1", "zero1", "all"),
        ("stage1", "fsdp", "context"),
        ("stage1", "paper", "all"),
        ("stage2", "zero1", "tensor"),
        ("stage2", "zero2", "fsdp"),
        ("stage2", "fsdp", "data"),
        ("stage2", "tensor", "all"),
        ("stage2", "paper", "tensor"),
        ("stage3", "zero2", "context"),
        ("stage3", "fsdp", "all"),
        ("stage3", "paper", "all"),
    ],
)
def test_a_step_on_eight_devices_is_the_step_on_one(stage, rows, mesh):
    params, grads, metrics = stepped(config_of(stage, rows), sharding.build_mesh(MESHES[mesh]))
    wanted_params, wanted_grads, wanted = alone(stage)
    for name in ("loss", "grad_norm", "task_sum"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    assert_close(grads, wanted_grads)
    assert_close(params, wanted_params)


@pytest.mark.parametrize("kind", ["cosine", "infonce"])
def test_the_alignment_term_sees_the_batch_of_all_devices(kind):
    config = config_of("stage1", alignment__weight=0.5, alignment__kind=kind)
    _, wanted_grads, wanted = stepped(config, sharding.build_mesh({}, jax.devices()[:1]))
    _, grads, metrics = stepped(config, sharding.build_mesh(MESHES["fsdp"]))
    for name in ("loss", "alignment", "grad_norm"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    assert_close(grads, wanted_grads, 1e-4)
    assert np.abs(wanted_grads["alignment/proj/kernel"]).max() > 0


def test_an_offloaded_state_takes_the_same_step():
    """Moments and average stay in the host's memory between steps, and nothing else changes."""
    mesh = sharding.build_mesh({"fsdp": 2}, jax.devices()[:2])
    results = {}
    for offload in (False, True):
        config = config_of("stage2", optimizer__offload=offload)
        with jax.set_mesh(mesh):
            step, (state, frozen, batch) = prepared(config, mesh)
            state, metrics = step(state, frozen, batch)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.ema)}
        assert kinds == {"pinned_host" if offload else "device"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
        results[offload] = jax.device_get((state, metrics))
    for found, wanted in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_checkpoint_of_one_mesh_goes_on_under_another(tmp_path):
    """Written by fsdp=8, read by data=2,fsdp=2,tensor=2 with other table rows: the same values,
    sharded over the new mesh."""
    one, many = sharding.build_mesh(MESHES["fsdp"]), sharding.build_mesh(MESHES["all"])
    before = Plan.build(config_of("stage3"), one)
    params = jax.device_put(values(before.params), trees.shardings(before.params))
    store = Store(tmp_path)
    store.save(3, {"params": params}, {})
    store.close()
    after = Plan.build(config_of("stage3", "paper"), many)
    got = Store(tmp_path, write=False).restore(lambda meta: {"params": after.params})
    found = trees.named(got.items["params"])
    for name, leaf in trees.named(params).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
        wanted = trees.named(after.params)[name].sharding
        assert found[name].sharding.is_equivalent_to(wanted, leaf.ndim), name
