"""The recipe of the tiny generator, without training it."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax.weights.read import import_mmdit

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "launch" / "assets"))

import mmdit_examples  # noqa: E402
import pretrain_mmdit as recipe  # noqa: E402


def made(lengths, sizes, shown=True):
    """Random encoded examples with these prompt lengths and indices into SIZES."""
    rng = np.random.default_rng(0)
    count, longest = len(lengths), max(lengths)
    tokens = rng.normal(size=(3, count, recipe.TOKENS, 64)).astype(np.float32)
    return mmdit_examples.Examples(
        prompts=tuple(f"prompt {i}" for i in range(count)),
        record=np.arange(count),
        size=np.asarray(sizes),
        mean=tokens[0],
        std=0.1 * np.abs(tokens[1]),
        source=tokens[2, :, : recipe.TOKENS * shown],
        text=rng.normal(size=(count, longest, 192)).astype(np.float32),
        mask=np.arange(longest) >= longest - np.asarray(lengths)[:, None],
    )


@pytest.fixture(scope="module")
def params():
    """Parameters whose output is not zero."""
    fresh = recipe.fresh()
    return jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), fresh)


def test_groups_hold_every_example_once_and_little_padding():
    data = made([9, 2, 3, 8, 2, 5, 7, 17], [0] * 8)
    groups = mmdit_examples.by_length(data)
    assert sorted(np.concatenate([group.record for group in groups])) == list(range(8))
    assert [group.text.shape[1] for group in groups] == [8, 16, 17]
    for group in groups:
        assert group.text.shape[1] - group.mask.sum(1).min() < mmdit_examples.TEXT_STEP
        for row, number in enumerate(group.record):
            words = group.text[row][group.mask[row]]
            np.testing.assert_array_equal(words, data.text[number][data.mask[number]])


def test_tokens_beyond_a_small_picture_count_for_nothing(params):
    data = made([4, 4], [0, 1])
    rows = recipe.device_rows(data)
    t, key = jnp.asarray([0.5, 0.5]), jax.random.key(0)
    loss = recipe.losses(params, rows, t, key)
    other = dict(rows, mean=rows["mean"].at[:, -1].add(3.0))
    changed = recipe.losses(params, other, t, key)
    assert abs(loss[0] - changed[0]) > 1e-3  # sixteen tokens, all real
    assert loss[1] == changed[1]  # fifteen and one of padding


def test_a_source_lies_beside_the_target_and_is_seen(params):
    positions, _ = mmdit_examples.places()
    rows, columns = mmdit_examples.grid_of(recipe.SIZES[1])
    target, source = np.split(positions[1], 2)
    real = rows * columns
    np.testing.assert_array_equal(source[:real], target[:real] - [0, rows, columns])
    data = recipe.device_rows(made([4], [1]))
    x, t = jnp.zeros((1, recipe.TOKENS, 64)), jnp.asarray([0.5])
    other = dict(data, source=data["source"] + 1.0)
    hidden = dict(data, source=data["source"].at[:, real:].add(1.0))  # padding of a small picture

    def velocity(rows):
        return np.asarray(recipe.velocity(params, x, t, rows))

    shown = velocity(data)
    assert np.abs(shown - velocity(other)).max() > 1e-3
    np.testing.assert_array_equal(shown[:, :real], velocity(hidden)[:, :real])
    without = recipe.device_rows(made([4], [1], shown=False))
    assert np.abs(shown - velocity(without)).max() > 1e-3


def test_steps_take_the_parts_they_are_told():
    captioned, edited = made([3] * 8 + [9] * 8, [0] * 16, shown=False), made([5] * 4, [0] * 4)
    feed = recipe.Feed(captioned, edited, 0.75, batch=6)
    kinds = [group["source"].shape[1] > 0 for group, _ in (feed() for _ in range(400))]
    assert 0.68 < np.mean(kinds) < 0.82
    only = recipe.Feed(captioned, edited, 0.0, batch=6)
    assert all(only()[0]["source"].shape[1] == 0 for _ in range(50))
    assert all(len(rows) == 6 and rows.max() < len(group["size"]) for group, rows in [feed()])


def test_a_step_learns_and_the_average_follows(params):
    data = made([4] * 8, [0, 1, 2, 0, 1, 2, 0, 1])
    rows = recipe.device_rows(data)
    copy = jax.tree.map(jnp.copy, params)
    state = (copy, jax.tree.map(jnp.copy, params), recipe.optimizer().init(params))
    found = []
    for step in range(12):
        key = jax.random.key(step % 3)
        state, loss = recipe.train_step(state, rows, np.arange(8), 1e-3, key)
        found.append(float(loss))
    assert np.mean(found[-3:]) < np.mean(found[:3])
    moved, averaged = (
        sum(float(jnp.abs(a - b).sum()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((state[0], params), (state[1], params))
    )
    assert 0 < averaged < moved


def test_retrieval_counts_nearer_pictures():
    data = made([3] * 10, [0] * 10)
    figures = recipe.retrieval_figures(data.mean + 0.01, data)
    assert figures["top1"] == figures["top5"] == 1 and figures["chance_top5"] == 0.5
    swapped = data.mean.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert recipe.retrieval_figures(swapped, data)["top1"] == 0.8


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [recipe.learning_rate(step, step / 1000) for step in range(1001)]
    assert 0 < rates[0] < rates[75] < max(rates) <= recipe.RATE
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_the_folder_has_weights_figures_and_card(params, tmp_path):
    loss = dict(loss_right=1.0, loss_shuffled=1.2, loss_none=1.1)
    loss |= dict(margin=0.2, margin_standard_error=0.01)
    found = dict(candidates=100, top1=0.5, top5=0.7, chance_top1=0.01, chance_top5=0.05)
    run = dict(steps=1000, batch=3, seconds=120, shown=0.25, tasks=["text_to_image", "editing"])
    metrics = dict(parameters=1, examples=2, pictures=dict(editing=7), batch=3, runs=[run])
    metrics |= dict.fromkeys(("train", "held_out", *mmdit_examples.PICTURES), loss)
    metrics |= dict(retrieval_train=found, retrieval_held_out=found)
    recipe.write(tmp_path, params, metrics)
    config, read = import_mmdit(tmp_path)
    assert config == recipe.CONFIG
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(np.float16(b)))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    card = (tmp_path / "README.md").read_text()
    assert "editing of a source | 1.0000 | 1.2000 | 1.1000 | 0.2000 | 0.0100" in card
    assert "50% | 70% | 100" in card and "7 of editing" in card
    assert "1,000 in 2 minutes, 25% with a source: text_to_image, editing" in card
    assert recipe.go_on_from(tmp_path)[1] == [run]


def test_a_wrong_number_is_refused_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain_mmdit.py", "--batch", "0", "--vlm", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    assert capsys.readouterr().err == "error: --batch, --steps and --minutes must be positive\n"


def test_examples_are_those_of_the_tasks():
    assert len(list(mmdit_examples.captioned("validation", 1, limit=5))) == 5
    squares = mmdit_examples.plain_squares("validation", 20)
    assert len({example.subjects for example in squares}) == 20
    assert {example.target.shape for example in squares} == {(64, 64, 3)}
    edits = list(mmdit_examples.edited("validation", "editing", 6))
    assert all(len(edit.pictures) == 1 and edit.task == "editing" for edit in edits)
    assert {edit.pictures[0].shape == edit.target.shape for edit in edits} == {True}


def test_encoding_keeps_the_order_and_shows_the_source_to_the_words():
    tiny = recipe.TINY
    encoder = recipe.Encoder(tiny / "vlm", tiny / "tokenizer", tiny / "vae")
    made = list(mmdit_examples.edited("validation", "editing", 4))
    found = mmdit_examples.encode(encoder, made)
    assert found.prompts == tuple(example.instruction for example in made)
    row = made[2]
    moments = encoder.latents([row.target, row.pictures[0]])
    np.testing.assert_allclose(found.mean[2], moments[0, 0], atol=1e-4)
    np.testing.assert_allclose(found.source[2], moments[0, 1], atol=1e-4)
    blind, mask = encoder.texts([row.instruction])
    np.testing.assert_array_equal(found.mask[2], mask[0])
    assert np.abs(np.float32(blind[0] - found.text[2]))[mask[0]].max() > 0.05
    words = mmdit_examples.encode(encoder, list(mmdit_examples.captioned("validation", 1, 2)))
    assert words.source.shape == (2, 0, 64)
