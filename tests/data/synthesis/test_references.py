"""References of made examples: their shapes are planned, and fit the cut-outs."""

import pickle

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import buckets, plan
from qk_jax.data.batch_sizes import BatchSizes
from qk_jax.data.example import TaskSettings, reference_sizes
from qk_jax.data.synthesis import tasks
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.pictures.roles import REFERENCE

SHAPES = buckets.table(64, 16, ((1, 1), (2, 3)))
SETTINGS = TaskSettings(reference_sizes=(SHAPES,))


@pytest.fixture(scope="module")
def corpus():
    return Corpus("validation")


@pytest.mark.parametrize("task", ["customization", "composition"])
def test_references_have_the_planned_shapes_of_their_cut_outs(task, corpus):
    source = tasks.SOURCES[task](corpus, SETTINGS)
    nearest: dict[str, set] = {}  # of all cut-outs of a subject
    for number in range(len(corpus)):
        height, width = corpus[number].rgba.shape[:2]
        shape = SHAPES[int(buckets.nearest(height, width, SHAPES))]
        nearest.setdefault(corpus[number].subject, set()).add(shape)
    seen = []
    for number in np.random.default_rng(0).integers(0, len(source), 200).tolist():
        example = source[number]
        assert set(example.roles) == {REFERENCE}
        shapes = [picture.shape[:2] for picture in example.pictures]
        row = source.references_of[number]
        assert shapes == [SHAPES[i] for i in row[: len(shapes)]]
        assert all(shape in nearest[x] for shape, x in zip(shapes, example.subjects, strict=True))
        height, width = corpus[source.first[number % len(source.first)]].rgba.shape[:2]
        assert shapes[0] == SHAPES[int(buckets.nearest(height, width, SHAPES))]
        assert all(SHAPES[i] == (64, 64) for i in row[len(shapes) :])
        seen += shapes
        again = pickle.loads(pickle.dumps(source))[number]
        for a, b in zip(again.pictures, example.pictures, strict=True):
            np.testing.assert_array_equal(a, b)
    assert {seen.count(shape) > 5 for shape in SHAPES} == {True}


def test_merged_references_are_shown_at_the_shape_of_their_group(corpus):
    source = tasks.Composition(corpus, SETTINGS)
    groups = plan.groups_of(source, BatchSizes(16), 6)
    assert len(groups) == 6 and {group.size for group in groups} == set(SETTINGS.sizes)
    for group in groups:
        for number in group.numbers[:3].tolist():
            example = source[number]
            assert example.target.shape[:2] == group.size
            assert tuple(x.shape[:2] for x in example.pictures) == group.references


def test_other_tasks_and_one_size_of_references_plan_none(corpus):
    for task in ("text_to_image", "editing"):
        assert tasks.SOURCES[task](corpus, SETTINGS).references_of.shape[1] == 0
    assert tasks.Composition(corpus, TaskSettings()).references_of.shape[1] == 0


def test_examples_may_be_asked_for_by_the_size_of_their_references():
    for shape in SHAPES:
        found = tasks.examples("train", "customization", 8, settings=SETTINGS, reference=shape)
        assert {example.pictures[0].shape[:2] for example in found} == {shape}


def test_without_ratios_a_reference_has_a_square():
    """As before ratios were a field."""
    assert reference_sizes({"reference_size": 96}) == (((96, 96),),)
    assert reference_sizes({"reference_size": 100, "reference_ratios": ()}) == (((100, 100),),)
    (wide,) = reference_sizes({"reference_size": 512, "reference_ratios": ((1, 1), (2, 3))})
    assert wide == ((512, 512), (624, 416), (416, 624))
    for ratios in ((1, 1), ((1, 2, 3),), ((0, 1),)):
        with pytest.raises(InputError, match="reference_ratios is"):
            reference_sizes({"reference_size": 512, "reference_ratios": ratios})


def test_more_references_are_shown_smaller(corpus):
    """Each number has a table of its own, to which shapes of pictures and groups belong."""
    ratios = ((1, 1), (2, 3))
    data = {"reference_size": 64, "reference_ratios": ratios}
    tables = reference_sizes(data | {"reference_sizes_by_number": (96, 64)})
    assert tables == tuple(buckets.table(side, 16, ratios) for side in (96, 64))
    settings = TaskSettings(reference_sizes=tables)
    for task, numbers in (("customization", {1}), ("composition", {2, 3})):
        source = tasks.SOURCES[task](corpus, settings)
        groups = plan.groups_of(source, BatchSizes(8), 100)
        assert {group.pictures for group in groups} == numbers
        for group in groups:
            assert set(group.references) <= set(tables[min(group.pictures, 2) - 1])
            assert group.conditions == group.references
            example = source[int(group.numbers[0])]
            assert tuple(x.shape[:2] for x in example.pictures) == group.references
    found = tasks.examples("train", "composition", 4, settings=settings, reference=(64, 64))
    assert {x.shape[:2] for example in found for x in example.pictures} == {(64, 64)}


def test_squares_by_number_need_no_more_groups(corpus):
    settings = TaskSettings(reference_sizes=(((64, 64),), ((48, 48),), ((32, 32),)))
    alone = plan.groups_of(tasks.Composition(corpus, TaskSettings()), BatchSizes(8), 100)
    groups = plan.groups_of(tasks.Composition(corpus, settings), BatchSizes(8), 100)
    assert [x.numbers.tolist() for x in groups] == [x.numbers.tolist() for x in alone]
    sides = {group.pictures: group.conditions for group in groups}
    assert sides == {2: ((48, 48),) * 2, 3: ((32, 32),) * 3}


@pytest.mark.parametrize("sides", [(60,), (0,), (512, 384, 256, 128), ("64",), (64.0,)])
def test_sides_by_number_that_are_none_are_named(sides):
    with pytest.raises(InputError, match="reference_sizes_by_number is .*at most 3 references"):
        reference_sizes({"reference_size": 64, "reference_sizes_by_number": sides})
