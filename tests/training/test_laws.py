"""The laws of randomness on the real training step: what is drawn, from which law, from which key.

The step is real, the model is a probe: its velocity is linear in a parameter per slot, so that the
gradient of the real loss tells t, noise and target latents of every slot. Adam's first moment with
b1 = 0 is that gradient, and a learning rate of 0 keeps the parameters at 0.
"""

import dataclasses
import functools
import pathlib

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.diffusion import flow
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training import evals
from qk_jax.training import step as step_lib
from qk_jax.training.padding import Padding

NANO = pathlib.Path(__file__).parent / "nano.py"
SLOTS, SIDE = 256, 2  # slots of a batch, packed tokens along a side of the target
CHANNELS = 16  # of the nano autoencoder's latents
SIZE = SIDE * SIDE * 4 * CHANNELS  # numbers of a slot's latents
KS = 1e-3  # a law is refused when its sample is less likely than this


class Probe(QueryKontext):
    """velocity = a + t b + x_t c, with parameters a, b, c for each number of each slot."""

    def states(self, params, batch, rng=None):
        return None, params["probe"]["kernel"][batch["record"]]

    def connect(self, params, text, kontext, text_mask):
        return kontext, None

    def velocity_of_tokens(self, params, x_t, t, context, *rest):
        a, b, c = (x.reshape(x_t.shape) for x in jnp.moveaxis(context, 1, 0))
        return a + t[:, None, None] * b + x_t * c


def planned(devices=1, stage="stage1", **changes):
    """The plan of a nano stage around the probe."""
    overrides = {
        "optimizer.lr": 0.0, "optimizer.warmup": 0, "optimizer.b1": 0.0, "optimizer.clip": 0.0,
        "optimizer.ema": 0.0, "data.batch": SLOTS, "steps": 100,
    }  # fmt: skip
    overrides |= {name.replace("__", "."): value for name, value in changes.items()}
    config = config_lib.load(f"{NANO}:{stage}", {k: str(v) for k, v in overrides.items()})
    whole = nano_plan(stage, devices)
    where = sharding.replicated(whole.mesh)
    shape = jax.ShapeDtypeStruct((SLOTS, 3, SIZE), jnp.float32, sharding=where)
    params, shardings = {"probe": {"kernel": shape}}, {"probe": {"kernel": where}}
    return dataclasses.replace(
        whole, config=config, model=Probe(whole.model.config), params=params, frozen={},
        weights=shardings, gradients=shardings,
    )  # fmt: skip


@functools.cache
def nano_plan(stage, devices):
    mesh = sharding.build_mesh({"data": devices}, jax.devices()[:devices])
    return Plan.build(config_lib.load(f"{NANO}:{stage}"), mesh)


def batch_of(plan, mean=0.0, logvar=-30.0, slots=SLOTS):
    """Encoded targets whose posteriors are known; normally points, so that x0 is the mean."""
    shape, scale = (slots, SIDE * SIDE, 4 * CHANNELS), shift_and_scale(plan)[1]
    moments = normalised(plan, mean), np.exp(0.5 * logvar) * scale
    posterior = tuple(np.full(shape, x, np.float32) for x in moments)
    batch = {
        "grids": np.full((slots, 1, 2), SIDE, np.int32),
        "record": np.arange(slots),
        "task": np.zeros(slots, np.int32),
        "text_mask": np.ones((slots, 1), bool),
        "condition_mask": np.ones(slots, bool),
        "roles": np.zeros((slots, 0), np.int32),
        "posterior": posterior,
        "latents": (),
    }
    return jax.device_put(batch, plan.batch_sharding)


def state_of(plan, step=0):
    """Zeros, after `step` updates."""
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.state)
    return jax.device_put(state.replace(step=np.int32(step)), trees.shardings(plan.state))


@dataclasses.dataclass
class Draws:
    """What was drawn in each of some steps: t [steps, B], noise and x0 [steps, B, SIZE]."""

    t: np.ndarray
    noise: np.ndarray
    x0: np.ndarray


def drawn(plan, steps=1, first=0, **posterior):
    """What the real, compiled step draws in the steps first, first + 1, ..."""
    batch, state = batch_of(plan, **posterior), state_of(plan, first)
    rows = []
    with jax.set_mesh(plan.mesh):
        step = step_lib.make_train_step(plan)
        for _ in range(steps):
            state, _ = step(state, {}, batch)
            (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
            rows.append(np.asarray(adam.mu["probe"]["kernel"], np.float64))
    assert int(state.step) == first + steps
    assert not np.any(state.params["probe"]["kernel"])
    # the loss is mean((a + t b + x_t c - target)^2) at a = b = c = 0
    grads = np.stack(rows)
    target = -0.5 * SLOTS * SIZE * grads[:, :, 0]
    t = np.median(grads[:, :, 1] / grads[:, :, 0], axis=2)
    x_t = grads[:, :, 2] / grads[:, :, 0]
    return Draws(t, x_t + (1 - t[..., None]) * target, x_t - t[..., None] * target)


def shift_and_scale(plan):
    """Of the nano autoencoder's latents, alike in all channels."""
    return [np.unique(value).item() for value in plan.model.config.vae.shift_and_scale()]


def normalised(plan, z):
    shift, scale = shift_and_scale(plan)
    return (z - shift) * scale


def assert_uncorrelated(a, b, sigmas=4.5):
    """The sample correlation of two independent samples is about 1 / sqrt(n)."""
    a, b = np.ravel(a), np.ravel(b)
    assert abs(np.corrcoef(a, b)[0, 1]) < sigmas / np.sqrt(len(a))


def assert_no_pair_correlated(a, b, sigmas=6.5):
    """The same for each pair of columns of samples [n, p] and [n, q]."""
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
    assert np.abs(a.T @ b).max() / len(a) < sigmas / np.sqrt(len(a))


def logit(t):
    return np.log(t) - np.log1p(-t)


@pytest.fixture(scope="module")
def many():
    """Thirty-two steps of the default law."""
    return drawn(planned(), steps=32)


@pytest.fixture(scope="module")
def pair():
    """Sixteen steps of two micro-batches; slot i is in micro-batch i % 2."""
    return drawn(planned(optimizer__accumulation=2), steps=16)


@pytest.fixture(params=["many", "pair"])
def draws(request):
    return request.getfixturevalue(request.param)


def test_the_probe_sees_what_the_step_computes(many):
    plan = planned()
    assert np.all((0 < many.t) & (many.t < 1))
    np.testing.assert_allclose(many.x0, normalised(plan, 0.0), atol=2e-3)
    shifted = drawn(plan, mean=1.5)
    np.testing.assert_allclose(shifted.x0, normalised(plan, 1.5), atol=2e-3)
    np.testing.assert_allclose(shifted.noise[0], many.noise[0], atol=2e-3)


def test_noise_is_standard_normal(draws):
    assert stats.kstest(draws.noise[..., ::16].ravel(), "norm").pvalue > KS
    assert draws.noise.std() == pytest.approx(1.0, abs=0.004)
    assert draws.noise.mean() == pytest.approx(0.0, abs=0.004)
    # the same for each number, whatever token and channel it is of
    np.testing.assert_allclose(draws.noise.std((0, 1)), 1.0, atol=0.06)
    np.testing.assert_allclose(draws.noise.mean((0, 1)), 0.0, atol=0.08)


def test_no_two_slots_or_steps_share_a_draw(draws):
    t, noise = draws.t.ravel(), draws.noise.reshape(-1, SIZE)[:, :8]
    # 8,192 times in float32, recovered to five digits: a few meet by chance, none repeat
    assert len(np.unique(np.round(t, 5))) > 0.9 * len(t)
    assert len(np.unique(np.round(noise, 2), axis=0)) == len(noise)


def test_slots_are_independent(draws):
    """Neighbours, and the two halves, as micro-batches or devices would split a batch."""
    for values in (draws.t, draws.noise):
        assert_uncorrelated(values[:, ::2], values[:, 1::2])
        assert_uncorrelated(values[:, : SLOTS // 2], values[:, SLOTS // 2 :])


def test_steps_are_independent(draws):
    for values in (draws.t, draws.noise):
        assert_uncorrelated(values[:-1], values[1:])
        assert_uncorrelated(values[:1], values[-1:])


def test_time_and_noise_are_independent(draws):
    noise = draws.noise.reshape(-1, SIZE)
    assert_no_pair_correlated(logit(draws.t).reshape(-1, 1), noise)
    assert_no_pair_correlated(noise[:, ::2], noise[:, 1::2])
    assert_uncorrelated(logit(draws.t), np.square(draws.noise).mean(-1))


def test_micro_batches_draw_of_their_own_and_from_the_whole_law(pair, many):
    """Each micro-batch alone has the law, and the second is not the first again."""
    for part in (0, 1):
        assert stats.kstest(pair.noise[:, part::2, ::16].ravel(), "norm").pvalue > KS
        both = stats.ks_2samp(pair.t[:, part::2].ravel(), many.t.ravel())
        assert both.pvalue > KS
    assert np.min(np.abs(pair.noise[:, ::2] - pair.noise[:, 1::2]).max(-1)) > 1


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_eight_devices_draw_what_one_draws(accumulation):
    changes = {"optimizer__accumulation": accumulation, "time__std": 0.5}
    one, eight = (drawn(planned(devices, **changes), steps=2) for devices in (1, 8))
    np.testing.assert_allclose(eight.t, one.t, atol=1e-5)
    np.testing.assert_allclose(eight.noise, one.noise, atol=2e-3)


def test_a_resumed_run_draws_what_the_straight_one_drew(many):
    resumed = drawn(planned(), steps=2, first=5)
    np.testing.assert_allclose(resumed.t, many.t[5:7], atol=1e-5)
    np.testing.assert_allclose(resumed.noise, many.noise[5:7], atol=2e-3)


def test_the_seed_changes_every_draw(many):
    other = drawn(planned(seed=1), steps=8)
    assert_uncorrelated(other.t, many.t[:8])
    assert_uncorrelated(other.noise, many.noise[:8])
    # nor are a seed's steps another seed's steps, moved by some
    for lag in (1, 2, 3):
        assert_uncorrelated(other.noise[:-lag], many.noise[lag:8])
        assert_uncorrelated(other.noise[lag:], many.noise[: 8 - lag])


# ---- the law of the times ----------------------------------------------------------------------

# The distribution function of logit(t), before the shift of mu, for each kind of law.
LAWS = {
    "logit_normal": lambda x, law: stats.norm.cdf(x, law.mean, law.std),
    "uniform": lambda x, law: stats.logistic.cdf(x),
}
PLAIN = flow.TimeLaw()
CASES = [
    ("logit_normal", {}),
    ("logit_normal", {"mean": -0.6, "std": 0.7}),
    ("logit_normal", {"base_shift": 0.0, "max_shift": 0.0}),
    # four tokens: a line through (1, 0.2) and (7, 2.6) gives mu = 1.4
    ("logit_normal", {"base_shift": 0.2, "max_shift": 2.6, "base_tokens": 1, "max_tokens": 7}),
    ("uniform", {"base_shift": 0.0, "max_shift": 0.0}),
    ("uniform", {"base_shift": 1.1, "max_shift": 1.1}),
]


def fits(t, law, mu):
    """Whether times are a likely sample of the law with the shift mu."""
    x = logit(np.ravel(t)) - mu
    return stats.kstest(LAWS[law.distribution](x, law), "uniform").pvalue > KS


def mu_of(law, tokens):
    """The line through (base_tokens, base_shift) and (max_tokens, max_shift)."""
    share = (tokens - law.base_tokens) / (law.max_tokens - law.base_tokens)
    return law.base_shift + share * (law.max_shift - law.base_shift)


def test_every_kind_of_law_is_tested():
    assert set(LAWS) == set(flow.DISTRIBUTIONS) == {kind for kind, _ in CASES}


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_times_follow_the_law_of_the_config(kind, changes):
    """And the test sees a law that is only a little wrong."""
    section = {"distribution": kind} | changes
    law = flow.TimeLaw(**section)
    plan = planned(**{f"time__{name}": value for name, value in section.items()})
    t = drawn(plan, steps=32).t
    mu = mu_of(law, SIDE * SIDE)
    assert fits(t, law, mu)
    quantiles = np.quantile(logit(t), (0.1, 0.5, 0.9))
    middle = mu + (law.mean if kind == "logit_normal" else 0.0)
    spread = law.std * 1.2816 if kind == "logit_normal" else np.log(9.0)
    np.testing.assert_allclose(quantiles, middle + spread * np.array([-1, 0, 1]), atol=0.12)
    assert not fits(t, law, mu + 0.15) and not fits(t, law, mu - 0.15)
    other = "uniform" if kind == "logit_normal" else "logit_normal"
    assert not fits(t, dataclasses.replace(law, distribution=other), mu)
    if kind == "logit_normal":
        assert not fits(t, dataclasses.replace(law, mean=law.mean + 0.15), mu)
        assert not fits(t, dataclasses.replace(law, std=law.std * 1.2), mu)


# ---- target latents ----------------------------------------------------------------------------


def test_target_latents_are_a_sample_of_the_posterior():
    """mean + exp(logvar / 2) normal, then normalised, and drawn anew in every slot and step."""
    plan = planned()
    mean, logvar = 0.7, -1.2
    found = drawn(plan, steps=16, mean=mean, logvar=logvar)
    shift, scale = shift_and_scale(plan)
    z = (found.x0 / scale + shift - mean) / np.exp(0.5 * logvar)
    assert stats.kstest(z[..., ::16].ravel(), "norm").pvalue > KS
    assert z.std() == pytest.approx(1.0, abs=0.02)  # not 0, the mode, nor exp(logvar)'s
    np.testing.assert_allclose(z.std((0, 1)), 1.0, atol=0.07)
    assert_uncorrelated(z[:-1], z[1:])
    assert_uncorrelated(z[:, ::2], z[:, 1::2])
    # A key of its own. One that is shared gives the same numbers in another order, since latents
    # are packed after they are drawn.
    z, noise = z.reshape(-1, SIZE), found.noise.reshape(-1, SIZE)
    assert_no_pair_correlated(z, noise)
    assert_no_pair_correlated(logit(found.t).reshape(-1, 1), z)


# ---- validation --------------------------------------------------------------------------------


def evaluated(indices, **changes):
    """Histograms of t, [indices, bins], and losses of the real validation step."""
    plan = planned(log__t_bins=1 << 14, **changes)
    batch = batch_of(plan)
    params = {"probe": {"kernel": np.zeros((SLOTS, 3, SIZE), np.float32)}}
    with jax.set_mesh(plan.mesh):
        step = step_lib.make_eval_step(plan)
        found = [step(params, {}, batch, jnp.int32(index)) for index in indices]
    return np.stack([x["t_count"] for x in found]), np.stack([x["loss"] for x in found])


def test_validation_draws_the_same_for_an_index_at_every_stage():
    times, losses = evaluated((0, 1, 0))
    assert times.sum(1).tolist() == [SLOTS] * 3
    np.testing.assert_array_equal(times[0], times[2])
    assert losses[0] == losses[2] != losses[1]
    assert np.sum(times[0] * times[1]) < 0.2 * SLOTS  # few bins in common
    # whatever the stage and the seed of the training, but not the seed of the validation
    for changes in ({"stage": "stage2"}, {"seed": 5}):
        again, other = evaluated((0,), **changes)
        np.testing.assert_array_equal(again[0], times[0])
        assert other[0] == losses[0]
    moved, _ = evaluated((0,), validation__seed=5)
    assert np.sum(moved[0] * times[0]) < 0.2 * SLOTS


def test_the_evaluator_numbers_its_batches_alike_each_time(monkeypatch):
    """And judges the moving average of the weights."""
    plan = planned(optimizer__ema=0.9, evals__loss__every=1, validation__batches=3)
    seen = []

    def record(params, frozen, batch, index):
        seen.append((float(params["probe"]["kernel"][0, 0, 0]), int(index)))
        return {}

    monkeypatch.setattr(evals.pipeline, "Pipeline", batches.Pipeline)
    monkeypatch.setattr(evals.step_lib, "make_eval_step", lambda plan: record)
    monkeypatch.setattr(evals.step_lib, "Encoder", lambda plan: lambda frozen, batch: {})
    monkeypatch.setattr(evals.metrics.Window, "take", lambda self: {})
    monkeypatch.setattr(evals.metrics.Window, "add", lambda self, values: None)
    evaluator = evals.ValidationLoss(plan, plan.config.evals.loss, None, None)
    state = state_of(plan)
    state = state.replace(ema=jax.tree.map(lambda x: x + 2.0, state.ema))
    for step in (1, 2):
        evaluator.maybe_run(step, state, {})
    assert seen == [(2.0, index) for index in (0, 1, 2)] * 2


# ---- the real model ----------------------------------------------------------------------------


def test_every_slot_of_a_real_step_has_a_time_of_its_own():
    """Stage 1 with its real towers: eight slots in two micro-batches, three steps."""
    config = config_lib.load(
        f"{NANO}:stage1",
        {"optimizer.accumulation": "2", "optimizer.lr": "0.0", "log.t_bins": str(1 << 14)},
    )
    # the trained leaves do not matter here, and few compile faster
    config.rules = ((r"queries/.*", "train"), (r".*", "freeze"))
    plan = Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]))
    rng = np.random.default_rng(0)
    random = functools.partial(
        jax.tree.map, lambda x: (0.1 * rng.normal(size=x.shape)).astype(x.dtype)
    )
    padded = Padding.from_config(config)(batches.batch(config, 0))
    batch, frozen, state = {**padded}, random(plan.frozen), state_of(plan)
    state = jax.device_put(state.replace(params=random(plan.params)))
    batch = step_lib.step_batch(batch, [batch_of(plan, slots=8)["posterior"]])
    found = []
    with jax.set_mesh(plan.mesh):
        step = step_lib.make_train_step(plan)
        for _ in range(3):
            state, values = step(state, frozen, batch)
            found.append(jax.device_get(values))
    counts = np.stack([values["t_count"] for values in found])
    assert counts.sum(1).tolist() == [8] * 3
    assert np.count_nonzero(counts.sum(0)) == 24  # no time twice
    assert len({float(values["loss"]) for values in found}) == 3
