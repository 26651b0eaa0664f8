"""Made examples are what their words say, and what changes is large enough to see."""

import functools

import faults
import numpy as np
import pytest

from qk_jax.base.errors import BadRecord
from qk_jax.data.example import TASKS, TaskSettings
from qk_jax.data.synthesis import corpus as corpus_lib
from qk_jax.data.synthesis import scenes, tasks
from qk_jax.data.synthesis.wordings import TO, colours_in

COUNT = 5_000


@pytest.fixture(scope="module")
def corpora():
    return {split: corpus_lib.Corpus(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def table_of(corpora):
    """The scan of a task, made once."""
    return functools.cache(lambda task: faults.scan(task, COUNT, corpora["train"]))


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_true_to_their_words(task, table_of):
    table = table_of(task)
    found = {kind: dict(counts) for kind, counts in table.items() if len(counts) > 1}
    assert not found
    assert sum(counts[""] for counts in table.values()) == COUNT
    assert min(counts[""] for counts in table.values()) > 100


@pytest.mark.parametrize("task", TASKS)
def test_held_out_examples_are_true_to_their_words(task, corpora):
    table = faults.scan(task, 300, corpora["validation"], seed=1)
    assert not {kind: dict(counts) for kind, counts in table.items() if len(counts) > 1}


@pytest.mark.parametrize("task", ("editing", "customization", "composition"))
def test_squares_alone_are_true_to_their_words(task, corpora):
    """Nine positions; three references in a square, in which things are small."""
    table = faults.scan(task, 400, corpora["train"], sizes=((64, 64),))
    assert not {kind: dict(counts) for kind, counts in table.items() if len(counts) > 1}


def test_every_word_of_a_move_occurs(corpora):
    source = tasks.Editing(corpora["train"], TaskSettings())
    moves = [e.instruction for e in map(source.__getitem__, range(1_500)) if e.kind == "move"]
    assert {words.split(" to the ")[-1] for words in moves} == {
        words.removeprefix("to the ") for words in TO.values()
    }


def test_kinds_come_as_often_as_they_are_asked_for(table_of):
    table = table_of("editing")
    total = sum(tasks.Editing.kinds.values())
    for kind, weight in tasks.Editing.kinds.items():
        assert table[kind][""] / COUNT == pytest.approx(weight / total, abs=0.02), kind


def test_what_cannot_be_seen_is_a_bad_record(corpora):
    class Clear(corpus_lib.Corpus):
        def __getitem__(self, number):
            cutout = super().__getitem__(number)
            return cutout._replace(rgba=cutout.rgba * np.uint8([1, 1, 1, 0]))

    for task, kind in tasks.SOURCES.items():
        if task != "reconstruction":
            with pytest.raises(BadRecord, match=task) as error:
                kind(Clear("validation"), TaskSettings())[0]
            assert error.value.kind == "hardly visible"


def test_one_name_for_all_is_a_bad_record():
    class Apples(corpus_lib.Corpus):
        def __getitem__(self, number):
            cutout = super().__getitem__(number)
            return cutout._replace(caption="apple" if number % 2 else "green apple")

    with pytest.raises(BadRecord, match="apple") as error:
        tasks.Composition(Apples("validation"), TaskSettings())[0]
    assert error.value.kind == "no other name"


def test_colours_of_captions():
    assert colours_in("red apple") >= {"red"} and "blue" not in colours_in("red apple")
    assert "yellow" in colours_in("gold medal") and "red" in colours_in("red-hot pepper")


def test_a_thing_is_seen_where_it_stands_out():
    on_red = scenes.flat((64, 64), "red")
    box = (0.1, 0.1, 0.5, 0.5)
    for colour, clear in (("red", False), ("blue", True)):
        items = [scenes.Item(scenes.shape("ring", colour), box)]
        assert scenes.seen(on_red, items, scenes.paint(on_red, items)) == clear
    both = [*items, scenes.Item(scenes.shape("ring", "red"), (0.5, 0.5, 0.9, 0.9))]
    assert not scenes.seen(on_red, both, scenes.paint(on_red, both))
    thin = np.zeros((64, 64, 4), np.uint8)
    thin[:, 31, 3] = 255  # a black line, under a hundredth of the picture
    line = [scenes.Item(thin, (0.0, 0.0, 0.5, 0.5))]
    assert scenes.seen(on_red, line, scenes.paint(on_red, line))
    assert scenes.changed(on_red, on_red) == 0
    assert scenes.changed(on_red, scenes.flat((64, 64), "blue")) == 1
