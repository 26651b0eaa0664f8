"""The six tasks: pure, exact, and never with a held-out subject in training."""

import copy
from collections import Counter

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.data.example import TASKS, TaskSettings
from qk_jax.data.synthesis import corpus as corpus_lib
from qk_jax.data.synthesis import scenes, tasks
from qk_jax.data.synthesis.wordings import WORDINGS
from qk_jax.pictures.roles import SOURCE

TOKENIZER = corpus_lib.EMBEDDED.parent / "tiny" / "tokenizer"


@pytest.fixture(scope="module")
def corpora():
    return {split: corpus_lib.Corpus(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def sampled(corpora):
    """Task -> (source, 200 examples spread over it), training side."""
    out = {}
    for task, kind in tasks.SOURCES.items():
        source = kind(corpora["train"], TaskSettings())
        numbers = np.linspace(0, len(source) - 1, 200).astype(int)
        out[task] = source, [source[int(number)] for number in numbers]
    return out


def same(a, b):
    assert (a.instruction, a.roles, a.kind, a.subjects) == (
        b.instruction,
        b.roles,
        b.kind,
        b.subjects,
    )
    np.testing.assert_array_equal(a.target, b.target)
    for x, y in zip(a.pictures, b.pictures, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_a_pure_function_of_seed_split_task_and_number(task, corpora, sampled):
    source, examples = sampled[task]
    again = tasks.SOURCES[task](corpus_lib.Corpus("train"), TaskSettings())
    for example in examples[::-20]:
        same(again[example.record], example)
    elsewhere = copy.copy(corpora["train"])
    elsewhere.split = "elsewhere"
    for corpus, seed in ((corpora["train"], 1), (elsewhere, 0)):
        other = tasks.SOURCES[task](corpus, TaskSettings(seed=seed))
        assert any(other[e.record].instruction != e.instruction for e in examples[:20])


@pytest.mark.parametrize("task", TASKS)
def test_examples_have_the_shape_that_was_announced(task, sampled):
    source, examples = sampled[task]
    for example in examples:
        size = source.settings.sizes[source.size_of[example.record]]
        assert example.target.shape == (*size, 3) and example.target.dtype == np.uint8
        assert len(example.pictures) == len(example.roles) == source.pictures_of[example.record]
        for picture, role in zip(example.pictures, example.roles, strict=True):
            assert picture.shape == ((*size, 3) if role == SOURCE else (64, 64, 3))
            assert picture.dtype == np.uint8
    assert {source.settings.sizes[i] for i in source.size_of} == {(64, 64), (48, 80), (80, 48)}


def test_roles_and_numbers_of_pictures(sampled):
    roles = {task: {e.roles for e in examples} for task, (_, examples) in sampled.items()}
    assert roles == {
        "text_to_image": {()},
        "reconstruction": {(0,)},
        "transformation": {(0,)},
        "editing": {(0,)},
        "customization": {(1,)},
        "composition": {(1, 1), (1, 1, 1)},
    }


def test_held_out_subjects_are_never_in_training_and_the_reverse(corpora, sampled):
    subjects = {
        split: {corpus[i].subject for i in range(len(corpus))} for split, corpus in corpora.items()
    }
    for task, (_, examples) in sampled.items():
        seen = {subject for example in examples for subject in example.subjects}
        assert seen and seen <= subjects["train"]
        held_out = tasks.examples("validation", task, 30)
        seen = {subject for example in held_out for subject in example.subjects}
        assert seen and seen <= subjects["validation"] and not seen & subjects["train"]


def test_a_source_reads_pictures_of_its_own_side_only(corpora):
    """The one way to a picture is the corpus: every number it is asked for is its own side's."""

    class Spy(corpus_lib.Corpus):
        def __getitem__(self, number):
            asked.append(number)
            return super().__getitem__(number)

    spy = Spy("validation")
    for task, kind in tasks.SOURCES.items():
        asked = []
        source = kind(spy, TaskSettings())
        subjects = set(source[len(source) // 2].subjects)
        assert subjects <= {spy[number].subject for number in list(asked)}, task


def test_every_kind_occurs_and_has_four_wordings(sampled):
    assert all(len(set(wordings)) >= 4 for wordings in WORDINGS.values())
    kinds = {task: Counter(e.kind for e in ex) for task, (_, ex) in sampled.items()}
    assert set(kinds["transformation"]) == set(tasks.Transformation.kinds)
    assert len(kinds["transformation"]) >= 8
    assert set(kinds["editing"]) == set(tasks.Editing.kinds)
    assert set(kinds["customization"]) == {"centre", "placed", "small"}
    assert set(kinds["composition"]) == {"row of 2", "column of 2", "row of 3", "column of 3"}
    assert set().union(*kinds.values()) == set(WORDINGS)


def test_instructions_fit_the_text_window(sampled):
    builder = prompts.PromptBuilder(prompts.load_tokenizer(TOKENIZER), 48, 16, 112 * 112)
    for _, examples in sampled.values():
        for example in examples:
            assert "{" not in example.instruction
            builder.encode_text(example.instruction, strict=True)


def test_reconstruction_and_transformations_are_exact(sampled):
    for example in sampled["reconstruction"][1]:
        np.testing.assert_array_equal(example.target, example.pictures[0])
    for example in sampled["transformation"][1]:
        (source,) = example.pictures
        if example.kind in scenes.CHANGES:
            np.testing.assert_array_equal(example.target, scenes.CHANGES[example.kind](source))
        turned = {"turn left": 1, "turn right": -1}.get(example.kind)
        if turned:
            np.testing.assert_array_equal(np.rot90(example.target, -turned), source)
        if example.kind == "tile":
            height, width = source.shape[:2]
            quarter = example.target[: height // 2, : width // 2]
            np.testing.assert_array_equal(example.target[height // 2 :, width // 2 :], quarter)


def test_the_truth_of_edits_differs_and_keeps_what_is_not_named(sampled):
    for example in sampled["editing"][1]:
        (source,) = example.pictures
        difference = np.abs(source.astype(int) - example.target).max(-1)
        assert difference.max() > 8, example.instruction
        if example.kind in ("add", "remove", "replace"):
            half = np.array(source.shape[:2]) // 2
            quiet = [
                difference[: half[0] - 1].max(), difference[half[0] + 1 :].max(),
                difference[:, : half[1] - 1].max(), difference[:, half[1] + 1 :].max(),
            ]  # fmt: skip
            assert min(quiet) == 0, example.instruction
        if example.kind in ("bigger", "smaller"):  # on one colour, that of the corners
            drawn = [(x != x[0, 0]).any(-1).sum() for x in (source, example.target)]
            assert (drawn[1] > drawn[0]) == (example.kind == "bigger"), example.instruction


def test_position_words_say_where_the_new_thing_is(sampled):
    checked = 0
    for example in sampled["editing"][1]:
        if example.kind != "add":
            continue
        changed = np.abs(example.pictures[0].astype(int) - example.target).max(-1) > 8
        rows, columns = np.nonzero(changed)
        height, width = changed.shape
        where = {
            "to the left of": columns.mean() < width / 2,
            "to the right of": columns.mean() > width / 2,
            "above": rows.mean() < height / 2,
            "below": rows.mean() > height / 2,
        }
        said = [words for words in where if words in example.instruction]
        assert where[said[0]], example.instruction
        checked += 1
    assert checked > 20


def test_composition_keeps_the_order_of_the_pictures():
    source = tasks.Composition(corpus_lib.Corpus("validation"), TaskSettings())
    example = next(e for e in map(source.__getitem__, range(50)) if e.kind == "row of 2")
    first, second = (picture.reshape(-1, 3) for picture in example.pictures)
    width = example.target.shape[1]
    halves = example.target[:, : width // 2], example.target[:, width // 2 :]
    # The mean colour of what is not background is nearest to its own picture's.
    ground = example.target[0, 0].astype(float)

    def tone(pixels, empty):
        pixels = pixels.reshape(-1, 3).astype(float)
        return pixels[np.abs(pixels - empty).max(-1) > 40].mean(0)

    tones = [tone(half, ground) for half in halves]
    own = [tone(first, 255.0), tone(second, 255.0)]
    gaps = [[np.abs(a - b).sum() for b in own] for a in tones]
    assert gaps[0][0] + gaps[1][1] < gaps[0][1] + gaps[1][0]


def test_examples_are_a_fixed_choice_of_different_subjects():
    twice = [tasks.examples("validation", "composition", 12, seed=3, pictures=2) for _ in range(2)]
    for a, b in zip(*twice, strict=True):
        same(a, b)
    assert len({example.subjects[0] for example in twice[0]}) > 9
    plain = tasks.examples("train", "text_to_image", 100, kind="plain", size=(64, 64))
    assert {e.target.shape for e in plain} == {(64, 64, 3)} and {e.kind for e in plain} == {"plain"}
    with pytest.raises(InputError, match="ask for fewer"):
        tasks.examples("validation", "editing", 10_000)
    with pytest.raises(InputError, match="no task"):
        tasks.examples("validation", "singing", 1)


def test_other_sizes_are_drawn_at_other_sizes():
    settings = TaskSettings(sizes=((128, 128), (96, 160)), reference_sizes=(((96, 96),),))
    source = tasks.Composition(corpus_lib.Corpus("validation"), settings)
    example = source[int(np.flatnonzero(source.size_of == 1)[0])]
    assert example.target.shape == (96, 160, 3)
    assert {picture.shape for picture in example.pictures} == {(96, 96, 3)}


def test_template_texts_are_filled():
    texts = list(tasks.template_texts())
    assert len(texts) > 500 and not any("{" in text for text in texts)
    assert any("to the left of" in text for text in texts)
