"""Phases with sizes of their own: which step is of which, and resuming anywhere."""

import dataclasses
import itertools
import logging

import grain
import numpy as np
import pytest

from qk_jax import painting
from qk_jax.base.errors import InputError
from qk_jax.data import pipeline, settings
from qk_jax.data.example import TASKS
from qk_jax.data.plan import in_turn
from qk_jax.experiment import config as config_lib
from tests.data import stage3
from tests.data.stage3 import assert_same
from tests.painting import painters

SMALL, MIDDLE = ("32x32", "48x32"), ("48x48",)
PHASES = ((3, SMALL), (5, MIDDLE))


def config(**data):
    weights = {"text_to_image": 1.0, "editing": 1.0}
    return stage3.config(weights, 4, 2, **{"curriculum": PHASES} | data)


@pytest.fixture(scope="module")
def pipe(builder):
    return pipeline.Pipeline(config(), "train", 0, 1, builder)


def sizes_at(pipe, steps):
    """Target sizes, width x height, of the batches of these steps."""
    found = (pipe.batch(step)["target"].shape[1:3] for step in steps)
    return {f"{width}x{height}" for height, width in found}


def test_each_step_has_the_sizes_of_its_phase(pipe):
    assert sizes_at(pipe, range(3)) <= set(SMALL)
    assert sizes_at(pipe, range(3, 5)) == set(MIDDLE)
    late = sizes_at(pipe, range(5, 17))
    assert len(late) > 1 and late <= {"64x64", "80x48", "48x80"}
    for step in (0, 4, 7):  # sources have the size of their targets
        batch = pipe.batch(step)
        assert all(x.shape == batch["target"].shape for x in batch["conditions"])


@pytest.mark.parametrize("first", [2, 3, 4, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumes_within_a_phase_and_between_two(pipe, builder, first, workers):
    again = pipeline.Pipeline(config(workers=workers), "train", 0, 1, builder)
    for step, batch in zip(range(first, first + 4), again.batches(first), strict=False):
        assert_same(batch, pipe.batch(step))
    again.close()


def test_hosts_together_have_the_global_batch(pipe, builder):
    parts = [pipeline.Pipeline(config(), "train", i, 2, builder) for i in range(2)]
    for step in (2, 3, 5, 1000):
        pieces = [part.batch(step)["record"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(pieces), pipe.batch(step)["record"])


@pytest.mark.parametrize("mixed", [False, True])
def test_the_last_phase_is_the_run_without_the_others(builder, mixed):
    """But for what is dropped, which is drawn by the step of the run."""
    never = dict.fromkeys(("text", "pictures", "both"), 0.0)
    made = pipeline.Pipeline(config(mixed_batches=mixed, dropout=never), "train", 0, 1, builder)
    alone = config(mixed_batches=mixed, dropout=never, curriculum=())
    alone = pipeline.Pipeline(alone, "train", 0, 1, builder)
    for step in range(4):
        assert_same(made.batch(5 + step), alone.batch(step))


def test_phases_of_the_same_sizes_have_orders_of_their_own(builder):
    whole = ("64x64", "80x48", "48x80")
    made = pipeline.Pipeline(config(curriculum=((4, whole), (8, whole))), "train", 0, 1, builder)
    records = [[tuple(made.batch(i + j)["record"]) for j in range(4)] for i in (0, 4, 8)]
    assert all(set(a).isdisjoint(b) for a, b in itertools.combinations(records, 2))


def test_each_phase_s_step_counts_from_its_first():
    """Plans in turn, by hand: 0 1 2 | 0 1 | 0 1 2 ..."""
    count = grain.MapDataset.range(100).repeat()
    joined = in_turn([count.map(lambda x, n=n: (n, x)) for n in "abc"], [0, 3, 5])
    steps = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert [joined[i] for i in range(7)] == steps
    assert joined[5 + 10**9] == ("c", 10**9 % 100)
    assert list(itertools.islice(joined[4:], 3)) == steps[4:]


def test_every_compiled_shape_is_counted(builder, caplog):
    with caplog.at_level(logging.INFO):
        made = pipeline.Pipeline(config(), "train", 0, 1, builder)
    counts = [
        len({group.shape for group in made.groups if f"{group.size[1]}x{group.size[0]}" in sizes})
        for sizes in (SMALL, MIDDLE, config().data.sizes)
    ]
    for first, count in zip((0, 3, 5), counts, strict=True):
        assert f"train, from step {first}: {count} shapes of batches" in caplog.text
    assert f"train: {sum(counts)} shapes of batches (" in caplog.text


def test_validation_and_painting_have_the_last_sizes(builder):
    held_out = pipeline.Pipeline(config(), "validation", 0, 1, builder)
    alone = pipeline.Pipeline(config(curriculum=()), "validation", 0, 1, builder)
    for batch, other in zip(held_out.fixed(), alone.fixed(), strict=True):
        assert_same(batch, other)
    changed = painters.config().copy_and_resolve_references()
    changed.data.curriculum = PHASES
    painter = painting.of_params(dataclasses.replace(painters.plan(), config=changed), {})
    assert painter.limits.sizes == ((64, 64), (48, 80), (80, 48))


def test_a_phase_may_have_smaller_references(builder):
    tasks = {name: float(name in ("customization", "composition")) for name in TASKS}
    made = config(tasks=tasks, curriculum=((2, SMALL, (48, 32)),))
    made = pipeline.Pipeline(made, "train", 0, 1, builder)
    for step in range(6):
        batch = made.batch(step)
        side = 64 if step >= 2 else 48 if len(batch["conditions"]) == 1 else 32
        assert {x.shape[1:3] for x in batch["conditions"]} == {(side, side)}


def test_a_phase_may_have_other_tasks(builder):
    """By the step alone, so that a run goes on exactly in any phase; the last one is as without."""
    phases = ((3, {"text_to_image": 1}), (6, {"text_to_image": 1, "editing": 3}))
    weights = {"text_to_image": 1.0, "editing": 1.0, "composition": 2.0}
    every = dict.fromkeys(TASKS, 0.0) | weights
    made = pipeline.Pipeline(config(tasks=every, curriculum=phases), "train", 0, 1, builder)
    alone = pipeline.Pipeline(config(tasks=every, curriculum=()), "train", 0, 1, builder)
    tasks = [set(made.batch(step)["task"].tolist()) for step in range(12)]
    wanted = [TASKS.index(name) for name in weights]
    assert set.union(*tasks[:3]) == {wanted[0]}
    assert set.union(*tasks[3:6]) == set(wanted[:2])
    for step in range(6, 12):
        assert made.records(step) == alone.records(step - 6)
    assert sum(made.shares[3].values()) == pytest.approx(1) and len(made.shares) == 3


@pytest.mark.parametrize(
    ("curriculum", "words"),
    [
        (("32x32",), r"has '32x32'; give \(step, sizes\), \(step"),
        (((0, SMALL),), r"has \(0, "),
        (((5, SMALL, 32),), r"has .*, 32\)"),
        (((5, SMALL), (5, MIDDLE)), r"has \(5, \('48x48'"),
        (((5, "32x32"),), r"has \(5, '32x32'\)"),
        (((5, ("32x30",)),), "32x30 is no multiple of 16; 32x32 is near"),
        (((5, ()),), "is empty"),
        (((5, {"singing": 1}),), r"has \(5, \{'singing': 1\}\)"),
        (((5, {"editing": 0}),), r"has \(5, \{'editing': 0\}\)"),
        (((5, {}),), r"has \(5, \{\}\); give .* or \(step, weights of the tasks\)"),
        (((5, {"reconstruction": 1}),), "has the task reconstruction before step 5, which valid"),
        (((900, SMALL),), "ends at step 900 of 750: config.data.sizes, which validation and paint"),
    ],
)
def test_what_is_no_curriculum_is_named(curriculum, words):
    with pytest.raises(InputError, match=f"config.data.curriculum {words}"):
        settings.check(config(curriculum=curriculum))


def test_sides_of_a_phase_that_are_none_are_named():
    with pytest.raises(InputError, match="reference_sizes_by_number is .*60"):
        settings.check(config(curriculum=((5, SMALL, (60,)),)))


def test_a_curriculum_is_given_on_the_command_line_and_kept_in_a_checkpoint():
    text = "((3,('32x32','48x32')),(5,('48x48',)))"
    given = config_lib.load("configs/stage3.py:tiny", {"data.curriculum": text})
    assert given.data.curriculum == PHASES
    again = config_lib.from_dict(config_lib.to_dict(given))
    assert [phase.first for phase in settings.phases(again)] == [0, 3, 5]
    old = config_lib.to_dict(given)
    del old["data"]["curriculum"]
    ((first, data),) = settings.phases(config_lib.from_dict(old))
    assert first == 0 and data["sizes"] == ("64x64", "80x48", "48x80")
