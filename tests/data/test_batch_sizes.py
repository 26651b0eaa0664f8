"""Batches by tokens: the more condition pictures, the fewer examples, the weights as they were."""

from collections import Counter

import jax
import numpy as np
import pytest

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.data import pipeline
from qk_jax.data.batch_sizes import BatchSizes, batch_sizes
from qk_jax.experiment.plan import Plan
from qk_jax.training import reading
from tests.data import stage3

WEIGHTS = {"text_to_image": 0.25, "editing": 0.5, "composition": 0.25}
TOKENS = 2000


def config(batch=16, **data):
    return stage3.config(WEIGHTS, batch, 4, **{"tokens": TOKENS} | data)


@pytest.fixture(scope="module", params=[False, True], ids=["of a task", "mixed"])
def pipe(request, builder):
    return pipeline.Pipeline(config(mixed_batches=request.param), "train", 0, 1, builder)


def test_a_batch_has_no_more_tokens_than_it_may(pipe):
    found = {}
    for step in range(40):
        batch = pipe.batch(step)
        examples, length = batch["input_ids"].shape
        shown = [batch["target"], *batch["conditions"]]
        pictures = sum(x.shape[1] * x.shape[2] // 256 for x in shown)
        tokens = length + batch["text_mask"].shape[1] + 16 + pictures  # 16 queries
        assert examples * tokens <= TOKENS
        found[len(batch["conditions"])] = examples
        assert len(batch["task"]) == len(batch["target"]) == examples
    # The batch is halved no further than it must be: twice as many would be too many, or all.
    assert found[0] == 16 and found == {n: pipe.batch_sizes(n) for n in found}
    assert len(set(found.values())) > 1 and set(found.values()) <= {16, 8, 4, 2}


def test_weights_are_those_of_the_examples(pipe):
    steps = 3000
    counts = Counter()
    for step in range(steps):
        counts.update(pipe.groups[index].task for index in pipe.plan[step][:, 0].tolist())
    shares = {task: count / counts.total() for task, count in counts.items()}
    assert shares == pytest.approx(WEIGHTS, abs=0.01)
    assert counts.total() / steps == pytest.approx(pipe.examples[0], rel=0.01)


def test_hosts_share_batches_of_any_size(pipe, builder):
    parts = [pipeline.Pipeline(pipe.config, "train", i, 2, builder) for i in range(2)]
    for step in range(6):
        whole, pieces = pipe.batch(step), [part.batch(step) for part in parts]
        for name in ("input_ids", "target", "task", "record"):
            np.testing.assert_array_equal(np.concatenate([x[name] for x in pieces]), whole[name])


def test_the_step_alone_names_the_batch(pipe, builder):
    workers = pipeline.Pipeline(
        {**pipe.config, "data": {**pipe.config["data"], "workers": 1}}, "train", 0, 1, builder
    )
    for step, batch in zip(range(3, 7), workers.batches(3), strict=False):
        stage3.assert_same(batch, pipe.batch(step))
    workers.close()


def test_every_batch_has_a_shape_that_is_known_before(pipe):
    kinds = lambda batch: {k: np.shape(x) for k, x in batch.items() if k != "conditions"}  # noqa: E731
    known = [kinds(one) for one in pipe.abstract()]
    assert all(kinds(pipe.batch(step)) in known for step in range(20))


def test_the_report_says_the_batches(pipe):
    told = reading.told(pipe, 0, 0)
    assert "steps of 16 (with 0 pictures), " in told
    mean = {task: pipe.config["steps"] * pipe.examples[0] * x for task, x in WEIGHTS.items()}
    for task, read in mean.items():
        assert f"| {read:,.0f} |" in next(x for x in told.splitlines() if x.startswith(f"| {task}"))


def test_without_a_budget_all_have_one_size(builder):
    assert batch_sizes(config(tokens=0), builder) == BatchSizes(16)
    plain = pipeline.Pipeline(config(tokens=0), "train", 0, 1, builder)
    generous = pipeline.Pipeline(config(tokens=10**9), "train", 0, 1, builder)
    for step in range(5):
        stage3.assert_same(plain.batch(step), generous.batch(step))
    assert plain.digest() == generous.digest()


def test_validation_has_its_own_batch(builder):
    held_out = pipeline.Pipeline(config(), "validation", 0, 1, builder)
    assert {len(batch["task"]) for batch in held_out.fixed()} == {4}


def test_what_does_not_fit_is_refused(builder):
    with pytest.raises(InputError, match=r"data.tokens is 100, and a batch of 1 with . condition"):
        pipeline.Pipeline(config(tokens=100), "train", 0, 1, builder)
    with pytest.raises(InputError, match="a power of two"):
        pipeline.Pipeline(config(batch=12, tokens=700), "train", 0, 1, builder)
    with pytest.raises(InputError, match="cannot be shared by 8 hosts"):
        pipeline.Pipeline(config(tokens=1200), "train", 0, 8, builder)
    mesh = sharding.build_mesh({"fsdp": -1}, jax.devices())
    with pytest.raises(InputError, match=r"a batch of . examples does not divide over"):
        Plan.build(config(tokens=1200), mesh)
