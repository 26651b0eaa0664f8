"""What holds of every batch plan, whatever its sources, weights, batch, seed and resume point."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qk_jax.data import plan
from qk_jax.data.batch_sizes import BatchSizes
from qk_jax.data.plan import Group

SIZES = ((64, 64), (48, 80), (80, 48))
PICTURES = {"text_to_image": 0, "editing": 1, "transformation": 1, "composition": 2}
WEIGHTS = st.sampled_from((0.1, 0.25, 1 / 3, 1, 2, 7.5))
STEPS = 200
some = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def plans(draw):
    """(groups, weights of the tasks, batch, seed, mixed)."""
    weights = draw(st.dictionaries(st.sampled_from(sorted(PICTURES)), WEIGHTS, min_size=1))
    groups = []
    for task in weights:
        names = draw(st.sampled_from(((), ("a",), ("a", "b"), ("a", "b", "c"))))
        for name in names or ("",):
            own = draw(WEIGHTS) if names else 1.0
            for size in draw(st.sets(st.sampled_from(SIZES), min_size=1)):
                count = draw(st.integers(1, 40))
                shown = (size,) * PICTURES[task]
                groups.append(Group(task, size, len(shown), np.arange(count), shown, (), name, own))
    most = draw(st.sampled_from((1, 2, 4, 8)))
    fewer = st.dictionaries(st.integers(0, 2), st.sampled_from((1, 2, 4)), max_size=3)
    batch = BatchSizes(most, {n: min(size, most) for n, size in draw(fewer).items()})
    return dict(enumerate(groups)), weights, batch, draw(st.integers(0, 2**20)), draw(st.booleans())


def made(groups, weights, batch, seed, mixed):
    """The plan, as the pipeline joins it."""
    if mixed:
        return plan.mixed_batches(groups, weights, batch, seed)
    of_task = [plan.batches_of(name, groups, batch, seed) for name in weights]
    share = plan.shares(groups, weights, batch, mixed)
    means = [plan.mean_batch(groups, share, batch, name) for name in weights]
    steps = [plan.exactly(x) / mean for x, mean in zip(weights.values(), means, strict=True)]
    return plan.interleaved(of_task, steps)


@some
@given(plans())
def test_a_batch_has_one_shape_and_members_of_its_groups(given):
    groups, made_plan = given[0], made(*given)
    for step in range(40):
        element = made_plan[step]
        assert element.shape == (given[2](groups[int(element[0, 0])].pictures), 2)
        assert len({groups[index].shape for index in element[:, 0]}) == 1
        assert all(0 <= member < len(groups[index].numbers) for index, member in element)


@some
@given(plans(), st.integers(0, 10**9))
def test_a_step_depends_on_nothing_but_its_number(given, step):
    """So a run goes on anywhere, on any number of hosts, as if it had not been interrupted."""
    alone = made(*given)[step]
    np.testing.assert_array_equal(alone, made(*given)[step:][0])
    np.testing.assert_array_equal(alone, made(*given)[max(step - 3, 0) :][min(step, 3)])


@some
@given(plans(), st.integers(0, 10**6), st.integers(1, STEPS))
def test_weights_hold_in_every_window(given, first, length):
    """Of tasks; with mixed batches of shapes. In steps, of which a task or shape has the more the
    fewer examples its batches have."""
    groups, weights, batch, _, mixed = given
    window = made(*given)[first : first + length]
    found, wanted = Counter(), Counter()
    key = (lambda group: group.shape) if mixed else (lambda group: group.task)
    for step in range(length):
        found[key(groups[int(window[step][0, 0])])] += 1
    for index, share in plan.shares(groups, weights, batch, mixed).items():
        wanted[key(groups[index])] += share / batch(groups[index].pictures)
    for name, share in wanted.items():
        assert abs(found[name] - length * share / wanted.total()) <= len(wanted)


@some
@given(plans())
def test_weights_are_shares_of_the_examples(given):
    """Whatever the batches of each number of condition pictures are."""
    groups, weights, batch, _, mixed = given
    share, total = (
        plan.shares(groups, weights, batch, mixed),
        sum(map(plan.exactly, weights.values())),
    )
    for task, weight in weights.items():
        own = sum(x for index, x in share.items() if groups[index].task == task)
        assert own == plan.exactly(weight) / total
    made_plan, steps = made(*given), 400
    read = [made_plan[step][:, 0].tolist() for step in range(steps)]
    counts = Counter(groups[index].task for step in read for index in step)
    assert abs(counts.total() / steps - plan.mean_batch(groups, share, batch)) < 1
    for task, weight in weights.items():
        # Off by a constant, and by the epochs that the window cuts.
        epochs = sum(len(x.numbers) + batch.most for x in groups.values() if x.task == task)
        wanted = counts.total() * plan.exactly(weight) / total
        assert abs(counts[task] - wanted) <= 2 * batch.most * len(groups) + epochs


@some
@given(plans())
def test_shares_are_those_of_the_plan(given):
    groups, weights, batch, _, mixed = given
    found = plan.shares(groups, weights, batch, mixed)
    assert sum(found.values()) == 1
    made_plan, steps = made(*given), 150
    counts = Counter(index for step in range(steps) for index in made_plan[step][:, 0].tolist())
    for index, share in found.items():
        # An epoch of a task's batches may be cut, and a part is off by a constant.
        epoch = len(groups[index].numbers) + batch.most
        off = epoch + 3 * batch.most * len(groups)
        assert abs(counts[index] - counts.total() * share) <= off


@some
@given(plans(), st.integers(0, 3))
def test_no_example_comes_twice_in_an_epoch(given, epoch):
    """Of a group; where it is not cut into whole batches, its examples come in turn."""
    groups, weights, batch, seed, mixed = given
    for task in weights:
        own = {index: group for index, group in groups.items() if group.task == task}
        if mixed or any(group.source for group in own.values()):
            in_turn(plan.mixed_batches(groups, weights, batch, seed), groups, epoch)
            continue
        size = {i: batch(group.pictures) for i, group in own.items()}
        whole = {i: len(group.numbers) // size[i] for i, group in own.items()}
        length = sum(max(count, 1) for count in whole.values())
        batches = plan.batches_of(task, groups, batch, seed)
        seen = np.concatenate([batches[epoch * length + n] for n in range(length)])
        for index, count in whole.items():
            members = seen[seen[:, 0] == index, 1].tolist()
            assert len(members) == max(count, 1) * size[index]
            often = Counter(members).values()
            assert max(often) == 1 if count else max(often) - min(often) <= 1 or min(often) >= 1


def in_turn(batches, groups, epoch):
    """Each group's members, in the order of the plan, come all once in every epoch of the group."""
    seen = {index: [] for index in groups}
    for step in range(120):
        for index, member in batches[step].tolist():
            seen[index].append(member)
    for index, members in seen.items():
        length = len(groups[index].numbers)
        part = members[epoch * length : (epoch + 1) * length]
        assert len(set(part)) == len(part)


@some
@given(st.lists(st.fractions(Fraction(1, 50), 20), min_size=1, max_size=6), st.integers(0, 10**12))
def test_parts_are_never_far_from_their_shares(shares, first):
    """Nor does one element of a part come twice, or one be left out."""
    chosen = plan._Interleaving(shares)
    total, found = sum(shares), [chosen[first + n] for n in range(200)]
    for part, share in enumerate(shares):
        own = [place for which, place in found if which == part]
        assert all(later == place + 1 for place, later in itertools.pairwise(own))
        for place in own[:1]:
            before = next(n for n, (which, _) in enumerate(found) if which == part)
            assert abs(place - (first + before) * share / total) <= len(shares)
