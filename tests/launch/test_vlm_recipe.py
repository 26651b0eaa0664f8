"""The recipes of the tiny tokenizer and the tiny VLM, without training them."""

import importlib.util
import pathlib
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.models import layers

LAUNCH = pathlib.Path(__file__).parents[2] / "launch" / "assets"


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vlm = recipe("pretrain_vlm")


@pytest.fixture(scope="module")
def rows():
    return vlm.Rows(vlm.ASSETS / "tiny" / "tokenizer")


@pytest.fixture(scope="module")
def subjects():
    corpus = Corpus("train")
    return [corpus[i] for i in range(8)]


@pytest.mark.parametrize("kind", sorted(vlm.KINDS))
def test_the_weights_cover_the_answer_and_its_end(rows, subjects, kind):
    talks = [vlm.converse(Random(i), kind, subjects) for i in range(6)]
    batch, grids = rows.batch(talks)
    length = batch["weights"].shape[1]
    assert len(grids) == len(vlm.KINDS[kind])
    assert batch["pixel_values"].shape[1] == sum(h * w for h, w in grids)
    for row, talk in enumerate(talks):
        learnt = batch["input_ids"][row, -length:][batch["weights"][row] > 0]
        said = rows.layouts[bool(grids)].tokenizer.decode(learnt)
        want = (talk.text + "<|im_end|>" if talk.learn_text else "") + talk.answer
        assert said.endswith("<|im_end|>")
        cut = len(rows.answers.encode_text(talk.answer)) == vlm.ANSWER - 1
        said = said.removesuffix("<|im_end|>")
        assert want.startswith(said) if cut else want == said
        assert batch["attention_mask"][row, -length:][batch["weights"][row] > 0].all()


def test_blind_rows_have_no_picture_tokens(rows, subjects):
    talk = vlm.converse(Random(0), "one", subjects)
    seen, _ = rows.batch([talk])
    blind, _ = rows.batch([talk], blind=True)
    assert (seen["input_ids"] == vlm.CONFIG.image_token_id).sum() == 16
    assert (blind["input_ids"] == vlm.CONFIG.image_token_id).sum() == 0
    np.testing.assert_array_equal(seen["weights"], blind["weights"])


def test_captions_say_what_is_drawn(subjects):
    plain = vlm.plain_picture(subjects[0], (64, 64))
    assert plain.shape == (64, 64, 3) and plain.dtype == np.uint8
    for seed in range(20):
        shown = vlm.two_subjects(Random(seed), subjects, (48, 80))
        assert "to the left of" in shown.caption or "to the right of" in shown.caption
        corner = tuple(int(x) for x in shown.pixels[0, 0])
        named = [c for c in vlm.scenes.COLOURS if f"on a {c} background" in shown.caption]
        if named and corner != vlm.scenes.COLOURS[named[-1]]:
            assert shown.pixels.std() > 0  # a subject covers the corner


@pytest.mark.parametrize("kind", ["text", "one"])
def test_it_learns_from_every_kind_of_row(rows, subjects, kind):
    batch, grids = rows.batch([vlm.converse(Random(i), kind, subjects) for i in range(2)])
    params = layers.init_params(
        vlm.MODEL, jax.random.key(0), batch["input_ids"], batch["position_ids"],
        batch["attention_mask"], batch["pixel_values"], grids,
    )  # fmt: skip
    state = vlm.optimizer().init(params)
    losses = []
    for _ in range(4):
        params, state, loss = vlm.train_step(params, state, batch, jnp.float32(1e-3), grids)
        losses.append(float(loss))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [vlm.learning_rate(step, step / 100, 1.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], rel=0.05)
    assert rates[-1] == pytest.approx(0)


def test_a_tokenizer_needs_enough_text():
    with pytest.raises(InputError, match="larger corpus"):
        recipe("train_tokenizer").train(iter(["a cat"]))
