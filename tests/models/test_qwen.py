"""Qwen2.5-VL against transformers, on a small random model, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from flax.core import meta

from qk_jax.models import mrope
from qk_jax.models.layers import abstract_params
from qk_jax.models.qwen_text import TextConfig
from qk_jax.models.qwen_vision import VisionConfig, windows_of
from qk_jax.models.qwen_vl import PRESETS, QwenVL, VLMConfig
from qk_jax.pictures.grids import mrope_positions
from qk_jax.weights import hub_configs
from tests.models import torch_copy

IMAGE = 90
CONFIG = VLMConfig(
    text=TextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, mrope_section=(2, 3, 3),
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    ),
    vision=VisionConfig(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
        window_size=56, fullatt_block_indexes=(1,),
    ),
    image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
)  # fmt: skip
GRIDS = ((6, 8), (4, 10))
GRID_THW = torch.tensor([[1, *grid] for grid in GRIDS])
MODEL = QwenVL(CONFIG)


@functools.cache
def reference():
    """(torch model with random weights, the same weights as our tree)."""
    config = transformers.Qwen2_5_VLConfig.from_dict(hub_configs.to_hf(CONFIG))
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    torch_copy.randomize(model, scale=0.2)
    state = {"lm_head.weight": model.lm_head.weight} | {
        name.removeprefix("model."): value for name, value in model.model.state_dict().items()
    }
    return model, torch_copy.copy(state, shapes(CONFIG))


def shapes(config):
    ids, positions, mask, pixels, _ = QwenVL(config).example()
    return abstract_params(QwenVL(config), ids, positions, mask, pixels[:, :0], ())


@functools.cache
def batch(padding):
    """Two rows with two pictures each, the second shorter and padded."""
    rng = np.random.default_rng(0)
    words = [rng.integers(3, IMAGE, n) for n in (5, 4, 9, 6)]
    pictures = [np.full(rows * columns // 4, IMAGE) for rows, columns in GRIDS]
    long = [words[0], pictures[0], words[1], pictures[1], words[2]]
    short = [words[1], pictures[0], words[0][:1], pictures[1], words[3]]
    rows = [np.concatenate(row) for row in (long, short)]
    ids = np.zeros((2, len(rows[0])), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, tokens in enumerate(rows):
        part = slice(len(ids[row]) - len(tokens), None) if padding == "left" else slice(len(tokens))
        ids[row, part], mask[row, part] = tokens, True
    pixels = rng.standard_normal((2, sum(h * w for h, w in GRIDS), 1176)).astype(np.float32)
    return ids, mask, pixels


def torch_inputs(ids, mask, pixels):
    return {
        "input_ids": torch.from_numpy(ids).long(),
        "attention_mask": torch.from_numpy(mask).long(),
        "pixel_values": torch.from_numpy(pixels.reshape(-1, 1176)),
        "image_grid_thw": GRID_THW.repeat(len(ids), 1),
        "mm_token_type_ids": torch.from_numpy((ids == IMAGE).astype(np.int32)),
    }


@jax.jit
def hidden_of(params, ids, positions, mask, pixels, queries=None):
    return MODEL.apply({"params": params}, ids, positions, mask, pixels, GRIDS, queries)


def close(ours, theirs, tolerance=1e-5):
    """Largest difference, relative to the largest value."""
    theirs = np.asarray(theirs)
    worst = np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-6)
    assert worst < tolerance, worst


def test_vision_tower_equals_transformers():
    model, params = reference()
    _, _, pixels = batch("left")
    ours = jax.jit(
        lambda p, x: MODEL.apply({"params": p}, x, GRIDS, method=lambda m, x, g: m.visual(x, g))
    )(params, pixels)
    for row in range(2):
        with torch.no_grad():
            theirs = model.model.visual(torch.from_numpy(pixels[row]), GRID_THW).pooler_output
        close(ours[row], theirs)
    pooled = MODEL.apply({"params": params}, jnp.asarray(pixels), GRIDS, method="pool")
    close(pooled, np.asarray(ours).mean(1))


@pytest.mark.parametrize("grids", [GRIDS, ((8, 8), (4, 12)), ((2, 2),), ((10, 6), (14, 2), (4, 4))])
def test_windows_and_vision_rotary_equal_transformers(grids):
    from transformers import vision_utils

    thw = torch.tensor([[1, *grid] for grid in grids])
    order, bounds = vision_utils.get_vision_window_index(thw, 2, 56, 14)
    ours = windows_of(grids, 56)
    np.testing.assert_array_equal(ours.order, order)
    np.testing.assert_array_equal(np.cumsum(ours.valid.sum(1)), bounds[1:])
    positions = vision_utils.get_vision_position_ids(thw, 2)
    model, _ = reference()
    cos, sin = model.model.visual.rotary_pos_emb(torch.zeros(1), positions)
    places = np.concatenate([mrope.patch_positions(*grid) for grid in grids])
    close(mrope.vision_rotary(places, 16)[0], cos)
    close(mrope.vision_rotary(places, 16)[1], sin)
    sorted_by_window = places.reshape(-1, 4, 2)[order].reshape(-1, 2)
    np.testing.assert_array_equal(ours.positions, sorted_by_window)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_equal_get_rope_index(padding):
    ids, mask, pixels = batch(padding)
    given = torch_inputs(ids, mask, pixels)
    theirs, _ = reference()[0].model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"],
        attention_mask=given["attention_mask"],
    )  # fmt: skip
    ours = mrope_positions(ids, mask, GRIDS, IMAGE)
    np.testing.assert_array_equal(ours, theirs.numpy().swapaxes(0, 1))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_hidden_states_and_logits_equal_transformers(padding):
    model, params = reference()
    ids, mask, pixels = batch(padding)
    with torch.no_grad():
        theirs = model(**torch_inputs(ids, mask, pixels), output_hidden_states=True)
    positions = mrope_positions(ids, mask, GRIDS, IMAGE)
    hidden = hidden_of(params, ids, positions, mask, pixels)
    close(np.asarray(hidden)[mask], theirs.hidden_states[-1][torch.from_numpy(mask)])
    logits = MODEL.apply({"params": params}, hidden, method="logits")
    close(np.asarray(logits)[mask], theirs.logits[torch.from_numpy(mask)])


def test_gradients_equal_transformers():
    model, params = reference()
    ids, mask, pixels = batch("left")
    weight = np.random.default_rng(1).standard_normal((*ids.shape, 100)).astype(np.float32)
    weight = weight * mask[..., None] / 10
    model.zero_grad()
    logits = model(**torch_inputs(ids, mask, pixels)).logits
    (logits * torch.from_numpy(weight)).sum().backward()
    grads = {name: value.grad for name, value in model.model.named_parameters()}
    grads["lm_head.weight"] = model.lm_head.weight.grad
    theirs = torch_copy.copy(grads, shapes(CONFIG))
    positions = mrope_positions(ids, mask, GRIDS, IMAGE)

    @jax.jit
    def gradient(params):
        def loss(params):
            hidden = hidden_of(params, ids, positions, mask, pixels)
            return jnp.sum(MODEL.apply({"params": params}, hidden, method="logits") * weight)

        return jax.grad(loss)(params)

    ours = traverse_util.flatten_dict(gradient(params), sep="/")
    for path, value in traverse_util.flatten_dict(theirs, sep="/").items():
        worst = np.abs(ours[path] - value).max() / np.abs(value).max()
        assert np.abs(value).max() > 0 and worst < 3e-5, (path, worst)


def test_a_row_without_pictures_beside_one_with():
    model, params = reference()
    ids, mask, pixels = (x.copy() for x in batch("left"))
    ids[1, -4:], mask[1] = [7, 8, 9, 10], False
    ids[1, :-4], mask[1, -4:] = 0, True
    positions = mrope_positions(ids, mask, GRIDS, IMAGE)
    np.testing.assert_array_equal(positions[1, :, -4:], np.tile(np.arange(4), (3, 1)))
    hidden = hidden_of(params, ids, positions, mask, pixels)
    with torch.no_grad():
        theirs = model.model(input_ids=torch.tensor([[7, 8, 9, 10]])).last_hidden_state
    close(hidden[1, -4:], theirs[0])


def test_queries_take_the_last_places():
    model, params = reference()
    ids, mask, pixels = batch("left")
    positions = mrope_positions(ids, mask, GRIDS, IMAGE)
    queries = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    ours = hidden_of(params, ids, positions, mask, pixels, queries)
    given = torch_inputs(ids, mask, pixels)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(given["input_ids"])
        pictures = model.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
        embeds[torch.from_numpy(ids == IMAGE)] = pictures
        embeds[:, -3:] = torch.from_numpy(queries)
        theirs = model.model.language_model(
            inputs_embeds=embeds, attention_mask=given["attention_mask"],
            position_ids=torch.from_numpy(positions.swapaxes(0, 1)).long(),
        ).last_hidden_state  # fmt: skip
    close(np.asarray(ours)[mask], theirs[torch.from_numpy(mask)])


def run_with(params, ids, positions, mask, pixels, queries=None, **switches):
    model = QwenVL(CONFIG, **switches)
    words = None if queries is None else jnp.asarray(queries)
    apply = jax.jit(lambda p, *x: model.apply({"params": p}, *x, GRIDS, words))
    return np.asarray(apply(params, ids, positions, mask, pixels))


def test_states_of_other_layers_equal_transformers():
    model, params = reference()
    ids, mask, pixels = batch("left")
    with torch.no_grad():
        theirs = model(**torch_inputs(ids, mask, pixels), output_hidden_states=True).hidden_states
    given = (params, ids, mrope_positions(ids, mask, GRIDS, IMAGE), mask, pixels)
    count, width = CONFIG.text.num_hidden_layers, CONFIG.text.hidden_size
    found = run_with(*given, read_layers=(2, 1))
    assert found.shape[-1] == 3 * width and count > 2
    for number, layer in enumerate((count, 2, 1)):
        part = found[..., number * width : (number + 1) * width]
        close(part[mask], theirs[layer][torch.from_numpy(mask)])


def test_bidirectional_queries_see_each_other_and_words_do_not_see_them():
    model, params = reference()
    ids, mask, pixels = batch("left")
    given = (params, ids, mrope_positions(ids, mask, GRIDS, IMAGE), mask, pixels)
    queries = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    causal, both = (run_with(*given, queries, bidirectional=x) for x in (False, True))
    np.testing.assert_array_equal(both[:, :-3], causal[:, :-3])
    close(both[:, -1], causal[:, -1], 0.5)  # the last saw all before, too, but not what they saw
    other = np.concatenate([queries[:2], queries[2:] + 1])
    causal_moved, moved = (run_with(*given, other, bidirectional=x) for x in (False, True))
    np.testing.assert_array_equal(causal_moved[:, -3], causal[:, -3])
    assert np.abs(moved[:, -3] - both[:, -3]).max() > 1e-3
    # A plain attention mask of transformers says the same.
    inputs = torch_inputs(ids, mask, pixels)
    length = ids.shape[1]
    sees = np.tril(np.ones((length, length), bool))
    sees[-3:] = True
    sees = sees[None] & mask[:, None]
    hidden = torch.zeros(2, 1, length, length).masked_fill(~torch.from_numpy(sees)[:, None], -1e9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
        embeds[torch.from_numpy(ids == IMAGE)] = features.pooler_output
        embeds[:, -3:] = torch.from_numpy(queries)
        theirs = model.model.language_model(
            inputs_embeds=embeds, attention_mask=hidden,
            position_ids=torch.from_numpy(given[2].swapaxes(0, 1)).long(),
        ).last_hidden_state  # fmt: skip
    close(both[mask], theirs[torch.from_numpy(mask)])


def test_rematerialisation_and_bfloat16_change_only_rounding():
    _, params = reference()
    ids, mask, pixels = batch("left")
    inputs = (ids, mrope_positions(ids, mask, GRIDS, IMAGE), mask, pixels)
    plain = hidden_of(params, *inputs)

    def run(model):
        return jax.jit(lambda p, *x: model.apply({"params": p}, *x, GRIDS))(params, *inputs)

    close(run(QwenVL(CONFIG, remat="full")), plain, 1e-6)
    half = run(QwenVL(CONFIG, dtype=jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32)[mask], plain[mask], 0.1)


def test_mrope_tables_against_float64():
    positions = jnp.array([[[0, 7, 900], [0, 40, 901], [0, 80, 902]]])
    cos, sin = mrope.mrope_cos_sin(positions, 128, 1e6, (16, 24, 24), jnp.float32)
    inverse = 1e6 ** -(np.arange(0, 128, 2) / 128)
    axis = np.repeat([0, 1, 2], (16, 24, 24))
    angles = np.asarray(positions)[0][axis].T * inverse
    np.testing.assert_allclose(cos[0, :, :64], np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(sin[0, :, 64:], np.sin(angles), atol=1e-4)
    np.testing.assert_allclose(sin[0, :2, 64:], np.sin(angles)[:2], atol=4e-6)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("3b", 3_754_622_976), ("7b", 8_292_166_656),
        ("32b", 33_452_718_336), ("72b", 73_410_777_344),
    ],
)  # fmt: skip
def test_published_parameter_counts(preset, count):
    tree = meta.unbox(shapes(PRESETS[preset]))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


def test_a_batch_without_pictures_still_makes_the_vision_tower():
    assert "blocks" in shapes(PRESETS["tiny"])["visual"]
