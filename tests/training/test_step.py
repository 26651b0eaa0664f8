"""The programs of a train step: pictures are encoded apart, and what is logged of a step."""

import pathlib

import batches
import jax
import numpy as np
import pytest

from qk_jax import sharding
from qk_jax.base import runtime, trees
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.training import step as step_lib
from qk_jax.training.objectives.flow_matching import loss_fn

NANO = pathlib.Path(__file__).parent / "nano.py"


def planned(config):
    """The plan over one device."""
    return Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]))


def random_like(tree):
    """Not fresh parameters: a fresh generator paints nothing, whatever comes in."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype), tree)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_pictures_are_encoded_row_by_row(accumulation):
    """Target and condition pictures, row by row, in whatever micro-batches they are encoded."""
    config = config_lib.load(f"{NANO}:stage3", {"optimizer.accumulation": str(accumulation)})
    plan = planned(config)
    frozen = random_like(plan.frozen)
    batch = batches.batch(config, 0, pictures=2)
    with jax.set_mesh(plan.mesh):
        inputs = batches.encoded(plan, frozen, batch)
        encode = jax.jit(plan.model.posterior_tokens, static_argnums=2)
        direct = [encode(frozen, x, 4) for x in (batch["target"], *batch["conditions"])]
    assert not {"target", "conditions"} & inputs.keys()
    assert len(inputs["latents"]) == 2
    found = (*inputs["posterior"], *inputs["latents"])
    wanted = (*direct[0], direct[1][0], direct[2][0])
    for one, other in zip(found, wanted, strict=True):
        scale = np.max(np.abs(other))
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)
        assert np.max(np.abs(other - other[::-1])) > 1e-2 * scale  # rows are not alike


@pytest.mark.parametrize("kind", ["cosine", "infonce"])
def test_the_alignment_term_is_trained_with_the_loss_and_logged_apart(kind):
    """Of training and of validation: 'loss' is the same with and without it."""
    logged, steps = {}, {}
    for weight in ("0.5", "0.0"):
        config = config_lib.load(
            f"{NANO}:stage1", {"alignment.weight": weight, "alignment.kind": kind}
        )
        plan = planned(config)
        if weight == "0.5":
            tree = trees.join(random_like(plan.params), random_like(plan.frozen))
            batch = batches.encoded(plan, random_like(plan.frozen), batches.batch(config, 0))
        else:
            del tree["alignment"], batch["target_pixel_values"], batch["whole"]
        with jax.set_mesh(plan.mesh):
            values, aux = jax.jit(loss_fn(plan))(tree, batch, jax.random.key(1))
        logged[weight] = step_lib.summaries({"task": batch["task"], **aux}, 4)
        steps[weight] = np.mean(values)
    assert "alignment" not in logged["0.0"]
    assert logged["0.5"]["loss"] == pytest.approx(float(logged["0.0"]["loss"]), rel=1e-5)
    assert float(logged["0.5"]["alignment"]) > 0.1
    both = float(logged["0.5"]["loss"] + 0.5 * logged["0.5"]["alignment"])
    assert steps["0.5"] == pytest.approx(both, rel=1e-5)
    assert steps["0.0"] == pytest.approx(float(logged["0.0"]["loss"]), rel=1e-5)


def test_a_trained_autoencoder_is_refused():
    config = config_lib.load(f"{NANO}:stage2", {})
    config.rules = (("vae/.*", "train"), *config.rules)
    with pytest.raises(InputError, match=r"freeze vae/"):
        step_lib.Encoder(planned(config))


def test_options_of_the_step_reach_no_other_program():
    table = {"tpu": ("a=1",), "tpu_step": ("b=true",)}
    assert runtime.compiler_options(table, "tpu") == {"a": 1}
    assert runtime.compiler_options(table, "tpu", step=True) == {"a": 1, "b": True}
    assert runtime.compiler_options(table, "gpu", step=True) == {}
