"""Groups of the batch plan: which shapes are kept, and what joins which."""

from types import SimpleNamespace

import numpy as np
import pytest

from qk_jax.data import buckets, plan
from qk_jax.data.batch_sizes import BatchSizes
from qk_jax.data.example import TaskSettings

SIZES = buckets.table(512, 16)
SHAPES = buckets.table(512, 16, ((1, 1), (2, 3)))


def source(size_of, pictures_of, references_of, shapes=SHAPES):
    """What the plan reads of a source."""
    return SimpleNamespace(
        task="composition",
        settings=TaskSettings(SIZES, (shapes,)),
        size_of=np.array(size_of),
        pictures_of=np.array(pictures_of),
        references_of=np.array(references_of, np.int32),
    )


def random_source(count=4000, seed=0):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(2, 4, count)
    references = rng.choice(3, (count, 3), p=(0.6, 0.25, 0.15))
    references[pictures < 3, 2] = 0
    return source(rng.integers(0, 13, count), pictures, references)


@pytest.mark.parametrize("limit", [4, 26, 60, 1000])
def test_every_example_is_in_one_group_of_its_shape(limit):
    made = random_source()
    before = made.pictures_of.copy()
    groups = plan.groups_of(made, BatchSizes(8), limit)
    assert len(groups) <= limit
    numbers = np.concatenate([group.numbers for group in groups])
    assert len(set(numbers.tolist())) == len(numbers) == 4000
    np.testing.assert_array_equal(made.pictures_of, before)
    for group in groups:
        assert len(group.numbers) >= 8 and len(group.references) == group.pictures
        shown = {
            (SIZES[made.size_of[n]], *(SHAPES[i] for i in made.references_of[n][: group.pictures]))
            for n in group.numbers
        }
        assert shown == {(group.size, *group.references)}


def test_references_are_joined_before_targets():
    """With a limit of all targets and numbers of pictures no target is shown at another size."""
    made = random_source()
    before = made.size_of.copy()
    assert len(plan.groups_of(made, BatchSizes(8), 26)) == 26
    np.testing.assert_array_equal(made.size_of, before)
    few = random_source()
    assert len(plan.groups_of(few, BatchSizes(8), 25)) == 25
    assert 0 < np.mean(few.size_of != before) < 0.1
    assert len(plan.groups_of(random_source(), BatchSizes(8), 30)) == 30


def test_a_rare_shape_joins_the_nearest():
    """Of a target's groups the one whose references are nearest, then of the nearest target."""
    square, tall, wide = 0, SHAPES.index((624, 416)), SHAPES.index((416, 624))
    rows = [[wide, wide]] * 20 + [[tall, tall]] * 20 + [[wide, square]] * 3
    made = source([0] * 43, [2] * 43, rows)
    plan.groups_of(made, BatchSizes(8), 100)
    assert made.references_of[40:].tolist() == [[wide, wide]] * 3
    sizes = [SIZES.index(size) for size in ((512, 512), (704, 352), (672, 384))]
    made = source([sizes[0]] * 20 + [sizes[1]] * 20 + [sizes[2]] * 3, [1] * 43, [[0]] * 43)
    assert len(plan.groups_of(made, BatchSizes(8), 100)) == 2
    assert set(made.size_of[40:].tolist()) == {sizes[1]}


def test_one_size_of_references_makes_no_group_of_its_own():
    made = source([0] * 20 + [1] * 20, [1] * 40, np.zeros((40, 0)), ((512, 512),))
    groups = plan.groups_of(made, BatchSizes(8), 100)
    assert [group.references for group in groups] == [(), ()]
