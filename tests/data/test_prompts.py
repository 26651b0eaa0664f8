"""Rows of tokens and patches of pictures, against transformers' tokenizer and image processor."""

import json
import pathlib
import pickle

import numpy as np
import pytest
from transformers import Qwen2VLImageProcessorPil

from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.models.qwen_vl import PRESETS
from qk_jax.pictures.grids import grid_of, mrope_positions, smart_resize, vision_size

FOLDER = pathlib.Path(prompts.__file__).parents[1] / "assets" / "tiny" / "tokenizer"
SIZES = ((64, 64), (48, 80))


@pytest.fixture(scope="module")
def layout():
    tokenizer = prompts.load_tokenizer(FOLDER)
    return prompts.PromptLayout(tokenizer, max_text=12, queries=4, vlm_pixels=112 * 112)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (112, 84), (333, 500)])
def test_patches_equal_the_image_processor(height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    size = vision_size(height, width, 112 * 112)
    area = size[0] * size[1]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": area, "longest_edge": area})
    theirs = processor(picture, return_tensors="np")
    grid = grid_of(*smart_resize(height, width, area, area))
    assert tuple(theirs["image_grid_thw"][0, 1:]) == grid
    ours = prompts.patches(picture, smart_resize(height, width, area, area))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-6)


def test_pixel_values_of_several_pictures_and_of_none():
    pictures = [np.full((*size, 3), 9, np.uint8) for size in SIZES]
    assert prompts.pixel_values(pictures, 112 * 112).shape == (64 + 60, 1176)
    assert prompts.pixel_values([], 112 * 112).shape == (0, 1176)


@pytest.mark.parametrize("bad", [np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_patches_refuse_what_is_no_picture(bad):
    with pytest.raises(InputError, match="uint8"):
        prompts.patches(bad, (28, 28))


def test_a_row_equals_the_chat_template(layout):
    row = layout.build("paint it blue", SIZES)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "paint it blue"}]
    chat = layout.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    whole = layout.tokenizer(chat)["input_ids"]
    kept = row["input_ids"][row["attention_mask"]][: -layout.queries]
    is_picture = kept == layout.image_token_id
    assert is_picture.sum() == 16 + 15
    first = is_picture & ~np.roll(is_picture, 1)
    np.testing.assert_array_equal(kept[~is_picture | first], whole)


def test_text_and_queries_stand_at_static_places(layout):
    for text in ("", "a cat", "a cat " * 30):
        for pictures in (True, False):
            row = layout.build(text, SIZES, pictures=pictures)
            length, window = layout.length(SIZES), -layout.queries - layout.tail_tokens
            assert row["input_ids"].shape == row["attention_mask"].shape == (length,)
            ids = row["input_ids"][window - layout.max_text : window][row["text_mask"]]
            assert layout.tokenizer.decode(ids) == layout.tokenizer.decode(layout.encode_text(text))
            assert len(ids) == len(layout.encode_text(text)) <= layout.max_text
            assert (row["input_ids"][-layout.queries :] == layout.pad_id).all()
            assert row["attention_mask"][window:].all()
            has = (row["input_ids"] == layout.image_token_id).any()
            assert has == pictures
    assert layout.tail_tokens == 5


def test_positions_are_those_of_mrope(layout):
    row = layout.build("a cat", SIZES)
    again = mrope_positions(
        row["input_ids"][None], row["attention_mask"][None], layout.grids(SIZES), layout
    )
    np.testing.assert_array_equal(row["position_ids"], again[0])
    assert (row["position_ids"][:, ~row["attention_mask"]] == 0).all()


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<tool_call>"])
def test_special_tokens_in_a_text_are_plain_characters(layout, token):
    ids = layout.encode_text(token)
    assert layout.tokenizer.convert_tokens_to_ids(token) not in ids
    assert layout.tokenizer.decode(ids) == token


def test_any_text_comes_back(layout):
    text = "l'été 雪 🦊 ﬁn"
    plain = prompts.PromptLayout(layout.tokenizer, 100, 4, 112 * 112)
    assert layout.tokenizer.decode(plain.encode_text(text)) == text


def test_a_long_prompt_is_cut_in_training_and_refused_in_painting(layout):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    assert len(layout.encode_text(text)) == 12
    with pytest.raises(InputError, match="the model reads 12"):
        layout.build(text, strict=True)


@pytest.mark.parametrize("text", [None, 3, b"cat", ["cat"], "\ud800"])
def test_what_is_no_text_is_refused(layout, text):
    with pytest.raises(InputError, match="prompt"):
        layout.build(text)


def test_layout_travels_to_worker_processes(layout):
    layout.build("a cat", SIZES)
    copied = pickle.loads(pickle.dumps(layout))
    np.testing.assert_array_equal(
        copied.build("a cat", SIZES)["input_ids"], layout.build("a cat", SIZES)["input_ids"]
    )


def test_tiny_tokenizer_fits_the_tiny_preset(layout):
    config, ids = PRESETS["tiny"], layout.tokenizer.convert_tokens_to_ids
    assert len(layout.tokenizer) == config.text.vocab_size
    assert ids("<|image_pad|>") == config.image_token_id
    assert ids("<|video_pad|>") == config.video_token_id
    assert ids("<|vision_start|>") == config.vision_start_token_id
    assert ids("<|vision_end|>") == config.vision_end_token_id
    assert ids("<|endoftext|>") == config.text.bos_token_id
    assert ids("<|im_end|>") == config.text.eos_token_id == layout.tokenizer.eos_token_id


def test_a_folder_that_is_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        prompts.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        prompts.load_tokenizer(tmp_path)
    text = (FOLDER / "tokenizer.json").read_text()
    foreign = json.loads(text.replace("<|image_pad|>", "<|other|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(InputError, match="image_pad"):
        prompts.load_tokenizer(tmp_path)
