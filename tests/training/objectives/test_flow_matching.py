"""The alignment term: what it gains from, what it leaves out, and that a shard sees the batch; and
the weights of what an edit changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import qk_jax
from configs.common import ASSETS
from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.data.synthesis import tasks
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models import qwen_vl
from qk_jax.pictures.grids import grid_of, vision_size
from qk_jax.training.objectives import flow_matching, regions
from qk_jax.training.objectives.flow_matching import agreement, loss_fn

KINDS = (None, 0.1)  # cosine, and InfoNCE at this temperature
NANO = "tests/training/nano.py"


def features(seed, rows=16, width=24, common=5.0):
    """Random features of which most is the same in all rows."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(rows, width)) + common, jnp.float32)


def by_hand(student, teacher, whole, temperature):
    """float64, one example after another."""
    student, teacher = (np.asarray(x, np.float64)[whole] for x in (student, teacher))
    student, teacher = (x - x.mean(0) for x in (student, teacher))
    student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (student, teacher))
    table = student @ teacher.T
    if temperature is None:
        return 1 - np.diag(table)
    logits = np.exp(table / temperature)
    return -np.log(np.diag(logits) / logits.sum(1))


@pytest.mark.parametrize("temperature", KINDS)
def test_it_is_what_is_counted_by_hand_of_the_whole_examples(temperature):
    student, teacher = features(0), features(1)
    whole = np.random.default_rng(2).random(16) < 0.7
    values = np.asarray(agreement(student, teacher, jnp.asarray(whole), temperature))
    wanted = by_hand(student, teacher, whole, temperature)
    assert values.mean() == pytest.approx(wanted.mean(), rel=1e-4)
    np.testing.assert_allclose(values[whole] * whole.mean(), wanted, rtol=1e-3, atol=1e-4)
    assert (values[~whole] == 0).all()


def test_a_constant_gains_nothing():
    """Without centring the mean feature reaches a cosine of .98 here."""
    teacher, whole = features(1), jnp.ones(16, bool)
    constant = jnp.tile(teacher.mean(0), (16, 1))
    unit = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (constant, teacher)]
    assert (unit[0] * unit[1]).sum(1).mean() > 0.97
    assert float(agreement(constant, teacher, whole).mean()) == pytest.approx(1.0, abs=1e-3)
    found = float(agreement(constant, teacher, whole, 0.1).mean())
    assert found == pytest.approx(np.log(16), abs=1e-2)


@pytest.mark.parametrize("temperature", KINDS)
def test_what_is_common_to_all_does_not_count(temperature):
    student, teacher, whole = features(0), features(1), jnp.ones(16, bool)
    values = agreement(student, teacher, whole, temperature)
    moved = agreement(student + 3, teacher - 2, whole, temperature)
    np.testing.assert_allclose(moved, values, rtol=1e-3, atol=1e-4)
    perfect = agreement(3 * teacher + 1, teacher, whole, temperature)
    assert float(perfect.mean()) < (1e-4 if temperature is None else 0.05)


@pytest.mark.parametrize("temperature", KINDS)
def test_dropped_examples_have_no_gradient_and_no_influence(temperature):
    student, teacher, whole = features(0), features(1), np.arange(16) % 4 != 0

    def mean(student, teacher, whole):
        return agreement(student, teacher, jnp.asarray(whole), temperature).mean()

    grads = np.asarray(jax.grad(mean)(student, teacher, whole))
    assert (grads[~whole] == 0).all() and (np.abs(grads[whole]) > 0).any(1).all()
    elsewhere = jnp.where(whole[:, None], teacher, 1e3)
    wanted = float(mean(student, teacher, whole))
    assert float(mean(student, elsewhere, whole)) == pytest.approx(wanted, rel=1e-5)
    nobody = np.zeros(16, bool)
    assert float(mean(student, teacher, nobody)) == 0
    assert (np.asarray(jax.grad(mean)(student, teacher, nobody)) == 0).all()


@pytest.mark.parametrize("temperature", KINDS)
def test_eight_shards_give_what_one_gives(temperature):
    """The mean, and the other pictures of InfoNCE, are those of all shards."""
    student, teacher, whole = features(0), features(1), np.arange(16) % 5 != 0
    value = jax.value_and_grad(lambda s, t, w: agreement(s, t, w, temperature).mean())
    wanted, grads = jax.jit(value)(student, teacher, jnp.asarray(whole))
    mesh = jax.make_mesh((8,), ("data",))
    where = NamedSharding(mesh, PartitionSpec("data"))
    found, sharded = jax.jit(value, in_shardings=(where,) * 3)(student, teacher, jnp.asarray(whole))
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_allclose(sharded, grads, rtol=1e-4, atol=1e-7)


def test_an_unknown_kind_is_refused():
    config = config_lib.load(f"{NANO}:stage1", {"alignment.kind": "cosin"})
    with pytest.raises(InputError, match="alignment.kind is 'cosin'; give cosine or infonce"):
        loss_fn(Plan.build(config, check=False))


@pytest.mark.parametrize(("kind", "temperature"), [("cosine", None), ("infonce", 0.3)])
def test_kind_and_temperature_of_the_config_reach_the_term(kind, temperature, monkeypatch):
    def term(model, params, batch, kontext, temperature):
        seen.append(temperature)
        return jnp.ones(2)

    seen = []
    monkeypatch.setattr(flow_matching, "flow_matching", lambda *_: (jnp.zeros((2, 3, 4)),) * 4)
    monkeypatch.setattr(flow_matching, "alignment", term)
    changes = {"alignment.kind": kind, "alignment.temperature": "0.3", "alignment.weight": "0.5"}
    plan = Plan.build(config_lib.load(f"{NANO}:stage1", changes), check=False)
    grids = np.full((2, 1, 2), (1, 3))
    values, aux = loss_fn(plan)({}, {"grids": grids}, jax.random.key(0))
    assert seen == [temperature]
    assert values.tolist() == [0.5, 0.5] and aux["alignment"].tolist() == [1, 1]


def test_a_constant_gains_nothing_of_the_tiny_vision_tower():
    """Nine tenths of its features are common to all pictures; prints what that would gain."""
    loaded = qk_jax.load_vlm(ASSETS / "tiny/vlm")
    grid = grid_of(*vision_size(64, 64, 112 * 112))
    net = qwen_vl.QwenVL(loaded.config)
    pool = jax.jit(lambda p, x: net.apply({"params": p}, x, (grid,), method="pool"))
    for task in ("text_to_image", "transformation", "editing"):
        examples = tasks.examples("validation", task, 64, size=(64, 64))
        pixels = np.stack([prompts.pixel_values([x.target], 112 * 112) for x in examples])
        teacher = pool(loaded.params, pixels)
        constant = teacher.mean(0)
        lengths = jnp.linalg.norm(teacher, axis=1)
        as_they_are = 1 - float((teacher @ constant / lengths).mean() / jnp.linalg.norm(constant))
        common = float(jnp.linalg.norm(constant) / lengths.mean())
        centred = teacher - constant
        unit = centred / jnp.linalg.norm(centred, axis=1, keepdims=True)
        half = 1 - float(jnp.linalg.norm(unit.mean(0)))
        both = agreement(jnp.tile(constant, (64, 1)), teacher, jnp.ones(64, bool))
        print(f"{task}: {as_they_are:.2f} / {half:.2f} / {float(both.mean()):.2f}, {common:.2f}")
        assert as_they_are < 0.2 and common > 0.8 and half < 0.95
        assert float(both.mean()) == pytest.approx(1.0, abs=1e-3)


def edits():
    """Four of 64 x 48: a token changed, none, all, and one that only a reference lacks."""
    rng = np.random.default_rng(0)
    source = rng.integers(0, 150, (4, 64, 48, 3)).astype(np.uint8)
    target = source.copy()
    target[0, 20:30, 35:40, 1] += 100  # in the token of the second row and third column
    target[1, ..., 2] += 40  # not visible
    target[2] += 100
    target[3, :5, :5] += 100  # of a reference, which is no source
    roles = np.array([[0, 1], [0, 1], [0, 1], [1, 1]], np.int32)
    other = np.zeros((4, 32, 32, 3), np.uint8)
    return {"target": target, "conditions": (source, other), "roles": roles}


def test_changed_tokens_of_an_edit_weigh_more():
    weights = np.asarray(regions.region(edits(), 1.0)).reshape(4, 4, 3)
    assert weights[0, 1, 2] == pytest.approx(1 + np.log2(12))
    assert weights[0].sum() == pytest.approx(12 + np.log2(12))
    assert (weights[1:] == 1).all()
    half = regions.region(edits(), 0.5)
    assert half.max() == pytest.approx(1 + np.log2(12) / 2)
    smaller = edits() | {"conditions": (np.zeros((4, 32, 32, 3), np.uint8),)}
    assert (np.asarray(regions.region(smaller, 1.0)) == 1).all()


def test_the_region_weight_changes_what_is_trained_and_not_what_is_logged(monkeypatch):
    rng = np.random.default_rng(1)
    prediction, target = (
        jnp.asarray(rng.normal(size=(4, 12, 8)), jnp.float32) for _ in range(2)
    )  # fmt: skip
    found = prediction, target, jnp.ones(4), None
    monkeypatch.setattr(flow_matching, "flow_matching", lambda *_: found)
    values = {}
    for weight in ("0", "1"):
        changes = {"loss.region_weight": weight}
        plan = Plan.build(config_lib.load(f"{NANO}:stage3", changes), check=False)
        batch = {"grids": np.full((4, 1, 2), (4, 3))}
        if plan.config.loss.region_weight:
            region = regions.region(edits(), plan.config.loss.region_weight)
            batch["region"] = jnp.asarray(region)
        values[weight], aux = loss_fn(plan)({}, batch, jax.random.key(0))
        plain = np.square(prediction - target).mean((1, 2))
        np.testing.assert_allclose(aux["flow"], plain, rtol=1e-5)
    np.testing.assert_allclose(values["0"], plain, rtol=1e-5)
    np.testing.assert_allclose(values["1"][1:], plain[1:], rtol=1e-5)
    tokens = np.square(prediction - target).mean(2)[0]
    wanted = (tokens.sum() + np.log2(12) * tokens[5]) / (12 + np.log2(12))
    assert float(values["1"][0]) == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(InputError, match="'loss.region_weight' is -1.0, expected a number 0 or"):
        config_lib.load(f"{NANO}:stage3", {"loss.region_weight": "-1"})
