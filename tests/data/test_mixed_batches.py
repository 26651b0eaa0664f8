"""Batches of several tasks: one shape each, the tasks by their weights, no example twice."""

import logging
from collections import Counter, defaultdict

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import pipeline, plan
from qk_jax.data.batch_sizes import BatchSizes
from qk_jax.data.example import TASKS, Example
from qk_jax.data.plan import Group
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.roles import REFERENCE, SOURCE
from tests.data import stage3, written
from tests.data.stage3 import assert_same

WEIGHTS = {"text_to_image": 0.1, "editing": 0.45, "customization": 0.25, "composition": 0.2}
SQUARE, WIDE = (64, 64), (48, 80)
GROUPS = (
    Group("text_to_image", SQUARE, 0, np.arange(100), ()),
    Group("editing", SQUARE, 1, np.arange(61), (SQUARE,)),
    Group("editing", WIDE, 1, np.arange(40), (WIDE,)),
    Group("customization", SQUARE, 1, np.arange(37), (SQUARE,)),
    Group("customization", WIDE, 1, np.arange(23), (SQUARE,)),
    Group("composition", SQUARE, 2, np.arange(50), (SQUARE, SQUARE)),
)


def config(**data):
    return stage3.config(WEIGHTS, 8, 4, **{"mixed_batches": True} | data)


@pytest.fixture(scope="module")
def pipe(builder):
    return pipeline.Pipeline(config(), "train", 0, 1, builder)


def test_tasks_have_their_weights_and_a_batch_one_shape():
    made, steps = plan.mixed_batches(dict(enumerate(GROUPS)), WEIGHTS, BatchSizes(8), 0), 4000
    found, together = Counter(), Counter()
    for step in range(steps):
        groups = [GROUPS[index] for index in made[step][:, 0]]
        assert len({group.shape for group in groups}) == 1
        found.update((group.task, group.size) for group in groups)
        together[frozenset(group.task for group in groups)] += 1
    share = {key: count / (8 * steps) for key, count in found.items()}
    wanted = {
        (x.task, x.size): WEIGHTS[x.task] * len(x.numbers) / total
        for x in GROUPS
        for total in [sum(len(y.numbers) for y in GROUPS if y.task == x.task)]
    }
    assert share == pytest.approx(wanted, abs=0.002)
    tasks = Counter()
    for (task, _), part in share.items():
        tasks[task] += part
    assert tasks == pytest.approx(WEIGHTS, abs=0.002)
    # Only the squares of one picture are of two tasks: a wide edit has a wide picture.
    assert set(together) == {
        frozenset({"editing", "customization"}), frozenset({"editing"}),
        frozenset({"customization"}), frozenset({"composition"}), frozenset({"text_to_image"}),
    }  # fmt: skip
    both = together[frozenset({"editing", "customization"})] / steps
    assert both == pytest.approx(0.45 * 61 / 101 + 0.25 * 37 / 60, abs=0.002)


def test_an_epoch_of_a_task_and_shape_has_every_example_once():
    made = plan.mixed_batches(dict(enumerate(GROUPS)), WEIGHTS, BatchSizes(8), 0)
    seen = defaultdict(list)
    for step in range(400):
        for group, member in made[step]:
            seen[int(group)].append(int(member))
    for index, members in seen.items():
        count = len(GROUPS[index].numbers)
        epochs = [members[i : i + count] for i in range(0, len(members) - count + 1, count)]
        assert len(epochs) > 1 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_a_batch_has_sources_and_references_side_by_side(pipe):
    for step in range(30):
        batch = pipe.batch(step)
        tasks = np.array(TASKS)[batch["task"]]
        if len(set(tasks)) > 1:
            assert set(tasks) == {"editing", "customization"}
            wanted = np.where(tasks == "editing", SOURCE, REFERENCE)
            np.testing.assert_array_equal(batch["roles"][:, 0], wanted)
            assert batch["conditions"][0].shape == (8, 64, 64, 3)
            return
    raise AssertionError("no batch is of two tasks")


def test_the_step_alone_names_the_batch(pipe, builder):
    """For any number of hosts and workers, from any first step."""
    again = pipeline.Pipeline(config(workers=2), "train", 0, 1, builder)
    for step, batch in zip(range(7, 12), again.batches(7), strict=False):
        assert_same(batch, pipe.batch(step))
    again.close()
    parts = [pipeline.Pipeline(config(), "train", i, 4, builder) for i in range(4)]
    for step in (0, 5, 1001):
        whole, pieces = pipe.batch(step), [part.batch(step) for part in parts]
        for name in whole.keys() - {"conditions"}:
            np.testing.assert_array_equal(np.concatenate([x[name] for x in pieces]), whole[name])
        for index, picture in enumerate(whole["conditions"]):
            joined = np.concatenate([x["conditions"][index] for x in pieces])
            np.testing.assert_array_equal(joined, picture)


def test_what_is_dropped_follows_the_task_of_the_slot(builder):
    never = {"text": 0.0, "pictures": 0.0, "both": 0.0}
    own = dict.fromkeys(TASKS, ()) | {"editing": (0.0, 1.0, 0.0)}
    made = pipeline.Pipeline(config(dropout=never, task_dropout=own), "train", 0, 1, builder)
    shown = defaultdict(set)
    for step in range(12):
        batch = made.batch(step)
        for task, is_shown in zip(batch["task"], batch["condition_mask"], strict=True):
            shown[TASKS[task]].add(bool(is_shown))
    assert shown == {task: {task != "editing"} for task in WEIGHTS}


def test_shapes_of_several_tasks_are_told(builder, caplog):
    with caplog.at_level(logging.INFO):
        made = pipeline.Pipeline(config(), "train", 0, 1, builder)
    shapes = len(plan.by_shape(dict(enumerate(made.groups))))
    assert f"train: {shapes} shapes of batches (1 shared" in caplog.text
    assert shapes < len(made.groups)


def test_validation_stays_of_one_task(builder):
    held_out = pipeline.Pipeline(config(), "validation", 0, 1, builder)
    alone = pipeline.Pipeline(config(mixed_batches=False), "validation", 0, 1, builder)
    for batch, other in zip(held_out.fixed(), alone.fixed(), strict=True):
        assert len(set(batch["task"])) == 1
        assert_same(batch, other)


def test_a_record_of_other_roles_is_a_bad_one(builder, tmp_path):
    """What shares a shape is known before a record is read."""
    target, picture = np.zeros((48, 80, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    examples = [
        Example("x", target, (picture,), (REFERENCE if i == 3 else SOURCE,), "editing", i)
        for i in range(40)
    ]
    written.write(tmp_path / "train.array_record", examples)
    wanted = config(records=str(tmp_path), tasks={x: float(x == "editing") for x in TASKS})
    made = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    read = [number for step in range(5) for number in made.batch(step)["record"]]
    assert 3 not in read and len(read) == 40 and made.bad == {("editing", "roles"): 1}
    written.write(
        tmp_path / "train.array_record", [x._replace(roles=(REFERENCE,)) for x in examples]
    )
    made = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    with pytest.raises(InputError, match="mixed_batches the pictures of customization, compos"):
        made.batch(0)


def test_a_config_from_before_mixes_nothing(builder):
    old = config_lib.to_dict(config())
    del old["data"]["mixed_batches"]
    made = pipeline.Pipeline(config_lib.from_dict(old), "train", 0, 1, builder)
    alone = pipeline.Pipeline(config(mixed_batches=False), "train", 0, 1, builder)
    assert_same(made.batch(3), alone.batch(3))
