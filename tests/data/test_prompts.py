"""Prompts as tokens and pictures as patches, against transformers' own."""

import json
import pathlib
import pickle

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers import Qwen2VLImageProcessorPil

from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.models.qwen_vl import PRESETS
from qk_jax.pictures.grids import mrope_positions, vision_size
from qk_jax.pictures.roles import REFERENCE, SOURCE

FOLDER = pathlib.Path(prompts.__file__).parents[1] / "assets" / "tiny" / "tokenizer"
SIZES = ((64, 64), (48, 80))
ROLES = (SOURCE, REFERENCE)


@pytest.fixture(scope="module")
def builder():
    tokenizer = prompts.load_tokenizer(FOLDER)
    return prompts.PromptBuilder(tokenizer, max_text=12, queries=4, vlm_pixels=112 * 112)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (112, 84), (333, 500)])
def test_patches_equal_the_image_processor(height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    size = vision_size(height, width, 112 * 112)
    area = size[0] * size[1]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": area, "longest_edge": area})
    theirs = processor(picture, return_tensors="np")
    shown = tuple(14 * int(side) for side in theirs["image_grid_thw"][0, 1:])
    ours = prompts.patches(picture, shown)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs["pixel_values"], atol=1e-6)


def test_pixel_values_of_several_pictures_and_of_none():
    pictures = [np.full((*size, 3), 9, np.uint8) for size in SIZES]
    assert prompts.pixel_values(pictures, 112 * 112).shape == (64 + 60, 1176)
    assert prompts.pixel_values([], 112 * 112).shape == (0, 1176)


def test_a_prompt_equals_the_chat_template(builder):
    prompt = builder.build("paint it blue", SIZES, ROLES)
    content = [
        {"type": "image"},
        {"type": "image", "role": "reference"},
        {"type": "text", "text": "paint it blue"},
    ]
    chat = builder.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    whole = builder.tokenizer(chat)["input_ids"]
    kept = prompt["input_ids"][prompt["attention_mask"]][: -builder.queries]
    is_picture = kept == builder.image_token_id
    assert is_picture.sum() == 16 + 15
    first = is_picture & ~np.roll(is_picture, 1)
    np.testing.assert_array_equal(kept[~is_picture | first], whole)


def test_text_and_queries_are_static_slices(builder):
    length = len(builder.build("", SIZES, ROLES)["input_ids"])
    for text in ("", "a cat", "a cat " * 30):
        for pictures in (True, False):
            prompt = builder.build(text, SIZES, ROLES, pictures=pictures)
            window = -builder.queries - builder.tail_tokens
            assert prompt["input_ids"].shape == prompt["attention_mask"].shape == (length,)
            ids = prompt["input_ids"][window - builder.max_text : window][prompt["text_mask"]]
            assert builder.tokenizer.decode(ids) == builder.tokenizer.decode(
                builder.encode_text(text)
            )
            assert len(ids) == len(builder.encode_text(text)) <= builder.max_text
            assert (prompt["input_ids"][-builder.queries :] == builder.pad_id).all()
            assert prompt["attention_mask"][window:].all()
            has = (prompt["input_ids"] == builder.image_token_id).any()
            assert has == pictures
    assert builder.tail_tokens == 5


def test_positions_are_those_of_mrope(builder):
    prompt = builder.build("a cat", SIZES, ROLES)
    again = mrope_positions(
        prompt["input_ids"][None],
        prompt["attention_mask"][None],
        builder.grids(SIZES),
        builder.image_token_id,
    )
    np.testing.assert_array_equal(prompt["position_ids"], again[0])
    assert (prompt["position_ids"][:, ~prompt["attention_mask"]] == 0).all()


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<tool_call>"])
def test_special_tokens_in_a_text_are_plain_characters(builder, token):
    ids = builder.encode_text(token)
    assert builder.tokenizer.convert_tokens_to_ids(token) not in ids
    assert builder.tokenizer.decode(ids) == token


def test_any_text_comes_back(builder):
    text = "l'été 雪 🦊 ﬁn"
    plain = prompts.PromptBuilder(builder.tokenizer, 100, 4, 112 * 112)
    assert builder.tokenizer.decode(plain.encode_text(text)) == text


def learnt(*texts):
    """A builder with a small byte-level tokenizer that has read `texts`."""
    shipped = prompts.load_tokenizer(FOLDER).backend_tokenizer
    small = tokenizers.Tokenizer(models.BPE())
    small.normalizer, small.pre_tokenizer = shipped.normalizer, shipped.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    small.train_from_iterator(texts * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=small)
    return prompts.PromptBuilder(fast, max_text=12, queries=4, vlm_pixels=112 * 112)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("A red kite, on a blue background; 2 cups!", ""),
        ("the “hat” of the dog’s", ""),  # quotation marks were in the texts
        ("a red kite 🪁 and 🪁", "🪁"),
        ("日本語 text", "日本語"),
        ("Straße", "ß"),
        ("", ""),
    ],
)
def test_characters_that_the_tiny_tokenizer_does_not_know(builder, text, unknown):
    assert builder.unknown(text) == unknown


def test_what_was_merged_in_training_is_known():
    """By its words, whatever a letter alone is: merges may run across the letters of a word."""
    builder = learnt("红色的 café", "a 红色的 kite über café")
    assert builder.unknown("a 红色的 café, über") == ""
    assert builder.unknown("cafe\u0301") == ""  # composed before it is read
    assert builder.unknown("a 蓝 kite 🪁") == "蓝🪁"


def test_a_long_prompt_is_cut_in_training_and_refused_in_painting(builder):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    assert len(builder.encode_text(text)) == 12
    with pytest.raises(InputError, match="the model reads 12"):
        builder.encode_text(text, strict=True)


def test_what_is_no_unicode_is_refused(builder):
    with pytest.raises(InputError, match="prompt"):
        builder.build("\ud800")


def test_a_batch_stacks_prompts_of_the_same_pictures(builder):
    pictures = [np.full((*size, 3), 9, np.uint8) for size in SIZES]
    batch = builder.batch(["a cat", ""], [pictures, pictures], [(0, 1), (1, 0)], [True, False])
    for slot, (text, roles, shown) in enumerate((("a cat", (0, 1), True), ("", (1, 0), False))):
        for name, value in builder.build(text, SIZES, roles, pictures=shown).items():
            np.testing.assert_array_equal(batch[name][slot], value)
    assert batch["pixel_values"].shape == (2, 64 + 60, 1176)
    assert [x.shape for x in batch["conditions"]] == [(2, *size, 3) for size in SIZES]
    assert batch["roles"].tolist() == [[0, 1], [1, 0]]
    assert batch["condition_mask"].tolist() == [True, False]
    none = builder.batch(["a cat"] * 2, [(), ()], [(), ()], [True, True])
    assert none["roles"].shape == (2, 0) and none["pixel_values"].shape == (2, 0, 1176)


def test_builder_travels_to_worker_processes(builder):
    builder.build("a cat", SIZES, ROLES)
    copied = pickle.loads(pickle.dumps(builder))
    np.testing.assert_array_equal(
        copied.build("a cat", SIZES, ROLES)["input_ids"],
        builder.build("a cat", SIZES, ROLES)["input_ids"],
    )


def test_tiny_tokenizer_fits_the_tiny_preset(builder):
    config, ids = PRESETS["tiny"], builder.tokenizer.convert_tokens_to_ids
    assert len(builder.tokenizer) == config.text.vocab_size
    assert ids("<|image_pad|>") == config.image_token_id
    assert ids("<|video_pad|>") == config.video_token_id
    assert ids("<|vision_start|>") == config.vision_start_token_id
    assert ids("<|vision_end|>") == config.vision_end_token_id
    assert ids("<|endoftext|>") == config.text.bos_token_id
    assert ids("<|im_end|>") == config.text.eos_token_id == builder.tokenizer.eos_token_id


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
