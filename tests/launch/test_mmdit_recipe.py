"""The recipe of the tiny generator, without training it."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax.convert import torch_import

RECIPE = pathlib.Path(__file__).parents[2] / "launch" / "assets" / "pretrain_mmdit.py"
# Dataclasses look their module up by name.
_spec = importlib.util.spec_from_file_location("pretrain_mmdit", RECIPE)
mmdit_recipe = sys.modules["pretrain_mmdit"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mmdit_recipe)


def made(lengths, sizes):
    """Random encoded examples with these prompt lengths and indices into SIZES."""
    rng = np.random.default_rng(0)
    count, longest = len(lengths), max(lengths)
    tokens = rng.normal(size=(2, count, mmdit_recipe.TOKENS, 64)).astype(np.float32)
    return mmdit_recipe.Examples(
        prompts=tuple(f"prompt {i}" for i in range(count)),
        record=np.arange(count),
        size=np.asarray(sizes),
        mean=tokens[0],
        std=0.1 * np.abs(tokens[1]),
        text=rng.normal(size=(count, longest, 192)).astype(np.float32),
        mask=np.arange(longest) >= longest - np.asarray(lengths)[:, None],
    )


@pytest.fixture(scope="module")
def params():
    """Parameters whose output is not zero."""
    fresh = mmdit_recipe.fresh()
    return jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), fresh)


def test_groups_hold_every_example_once_and_no_longer_text_than_needed():
    data = made([9, 2, 3, 8, 2, 5, 7, 4], [0] * 8)
    groups = mmdit_recipe.by_length(data)
    assert sorted(np.concatenate([group.record for group in groups])) == list(range(8))
    for group in groups:
        assert group.text.shape[1] == group.mask.sum(1).max()
        assert group.mask[:, -1].all()
        for row, number in enumerate(group.record):
            words = group.text[row][group.mask[row]]
            np.testing.assert_array_equal(words, data.text[number][data.mask[number]])


def test_tokens_beyond_a_small_picture_count_for_nothing(params):
    data = made([4, 4], [0, 1])
    rows = mmdit_recipe.device_rows(data)
    t, key = jnp.asarray([0.5, 0.5]), jax.random.key(0)
    loss = mmdit_recipe.losses(params, rows, t, key)
    other = dict(rows, mean=rows["mean"].at[:, -1].add(3.0))
    changed = mmdit_recipe.losses(params, other, t, key)
    assert abs(loss[0] - changed[0]) > 1e-3  # sixteen tokens, all real
    assert loss[1] == changed[1]  # fifteen and one of padding


def test_a_source_lies_beside_the_target_and_is_seen(params):
    positions, _ = mmdit_recipe.places()
    rows, columns = mmdit_recipe.grid_of(mmdit_recipe.SIZES[1])
    target, source = np.split(positions[1], 2)
    real = rows * columns
    np.testing.assert_array_equal(source[:real], target[:real] - [0, rows, columns])
    data = mmdit_recipe.device_rows(made([4], [1]))
    x, t = jnp.zeros((1, mmdit_recipe.TOKENS, 64)), jnp.asarray([0.5])
    other = dict(data, mean=data["mean"] + 1.0)
    hidden = dict(data, mean=data["mean"].at[:, real:].add(1.0))  # padding of a small picture

    def velocity(rows, shown):
        return np.asarray(mmdit_recipe.velocity(params, x, t, rows, shown))

    shown = velocity(data, True)
    assert np.abs(shown - velocity(other, True)).max() > 1e-3
    np.testing.assert_array_equal(shown[:, :real], velocity(hidden, True)[:, :real])
    np.testing.assert_array_equal(velocity(data, False), velocity(other, False))


def test_a_step_learns_and_the_average_follows(params):
    data = made([4] * 8, [0, 1, 2, 0, 1, 2, 0, 1])
    rows = mmdit_recipe.device_rows(data)
    copy = jax.tree.map(jnp.copy, params)
    state = (copy, jax.tree.map(jnp.copy, params), mmdit_recipe.optimizer().init(params))
    found = []
    for step in range(12):
        key = jax.random.key(step % 3)
        state, loss = mmdit_recipe.train_step(state, rows, np.arange(8), 1e-3, key)
        found.append(float(loss))
    assert np.mean(found[-3:]) < np.mean(found[:3])
    moved, averaged = (
        sum(float(jnp.abs(a - b).sum()) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((state[0], params), (state[1], params))
    )
    assert 0 < averaged < moved


def test_retrieval_counts_nearer_pictures():
    data = made([3] * 10, [0] * 10)
    figures = mmdit_recipe.retrieval_figures(data.mean + 0.01, data)
    assert figures["top1"] == figures["top5"] == 1 and figures["chance_top5"] == 0.5
    swapped = data.mean.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert mmdit_recipe.retrieval_figures(swapped, data)["top1"] == 0.8


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [mmdit_recipe.learning_rate(step, step / 1000) for step in range(1001)]
    assert 0 < rates[0] < rates[75] < max(rates) <= mmdit_recipe.RATE
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_the_folder_has_weights_figures_and_card(params, tmp_path):
    loss = dict(loss_right=1.0, loss_shuffled=1.2, loss_none=1.1, loss_source=0.1)
    loss |= dict(margin=0.2, margin_standard_error=0.01)
    found = dict(candidates=100, top1=0.5, top5=0.7, chance_top1=0.01, chance_top5=0.05)
    metrics = dict(parameters=1, examples=2, batch=3, steps=4, seconds=60, train=loss)
    metrics |= dict(held_out=loss, retrieval_train=found, retrieval_held_out=found)
    metrics |= dict(shown=0.3, before=dict(steps=1000, batch=3, seconds=120, shown=0.0))
    mmdit_recipe.write(tmp_path, params, metrics)
    config, read = torch_import.import_mmdit(tmp_path)
    assert config == mmdit_recipe.CONFIG
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(np.float16(b)))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    card = (tmp_path / "README.md").read_text()
    assert "1.0000 | 1.2000 | 1.1000 | 0.1000 | 0.2000 | 0.0100" in card
    assert "50% | 70% | 100" in card and "1,000 steps of 3 in 2 minutes, 0% of them so" in card


def test_a_wrong_number_is_refused_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain_mmdit.py", "--batch", "0", "--vlm", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        mmdit_recipe.main()
    assert capsys.readouterr().err == "error: --batch, --steps and --minutes must be positive\n"


def test_examples_come_from_the_text_to_image_task():
    assert len(mmdit_recipe.source_examples("validation", 1, limit=5)) == 5
    squares = mmdit_recipe.plain_squares("validation", 20)
    assert len({example.subjects for example in squares}) == 20
    assert {example.target.shape for example in squares} == {(64, 64, 3)}
