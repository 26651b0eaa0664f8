"""Position laws by hand, the Qwen-Image law against diffusers, tables against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import (
    QwenEmbedRope,
    apply_rotary_emb_qwen,
)

from qk_jax.models import rotary
from qk_jax.models.rotary import PositionLaw
from qk_jax.pictures.roles import SOURCE

TARGET = (2, 3)


def positions(law, conditions, roles, target=TARGET):
    """Positions of one sample as a list of (row, column) lists, one for each picture."""
    out = rotary.image_positions(law, target, conditions, jnp.asarray([roles], jnp.int32))
    assert out.shape[0] == 1 and out.dtype == jnp.int32
    sizes = [h * w for h, w in (target, *conditions)]
    assert out.shape == (1, sum(sizes), 3)
    assert not np.any(out[..., 0]), "the shifted law is two-dimensional"
    parts = np.split(np.asarray(out[0, :, 1:]), np.cumsum(sizes)[:-1])
    return [[tuple(map(int, cell)) for cell in part] for part in parts]


def cells(grid):
    return [(i, j) for i in range(grid[0]) for j in range(grid[1])]


@pytest.mark.parametrize("base", [0, 1])
def test_target_is_row_and_column(base):
    law = PositionLaw(index_base=base)
    assert positions(law, [], [])[0] == [(i + base, j + base) for i, j in cells(TARGET)]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("reflect", lambda i, j: (-i, -j)),
        ("reflect_minus_one", lambda i, j: (-1 - i, -1 - j)),
        ("translate", lambda i, j: (i - 4, j - 2)),
    ],
)
def test_source_modes(mode, expected):
    _, source = positions(PositionLaw(source_mode=mode), [(4, 2)], [SOURCE])
    assert source == [expected(i, j) for i, j in cells((4, 2))]


@pytest.mark.parametrize("mode", ["reflect", "reflect_minus_one", "translate"])
@pytest.mark.parametrize("base", [0, 1])
def test_source_shares_at_most_the_origin_with_the_target(mode, base):
    law = PositionLaw(source_mode=mode, index_base=base)
    target, source = positions(law, [TARGET], [SOURCE])
    shared = {(0, 0)} if (mode, base) == ("reflect", 0) else set()
    assert set(target) & set(source) == shared


def test_equal_references_follow_the_paper():
    first, second = positions(PositionLaw(), [TARGET, TARGET], [1, 1])[1:]
    h, w = TARGET
    assert first == [(i + h, j + w) for i, j in cells(TARGET)]
    assert second == [(i + 2 * h, j + 2 * w) for i, j in cells(TARGET)]


def test_references_accumulate_their_own_grids():
    _, first, second, third = positions(PositionLaw(), [(4, 1), (1, 5), (2, 2)], [1, 1, 1])
    assert first == [(i + 2, j + 3) for i, j in cells((4, 1))]
    assert second == [(i + 2 + 4, j + 3 + 1) for i, j in cells((1, 5))]
    assert third == [(i + 2 + 4 + 1, j + 3 + 1 + 5) for i, j in cells((2, 2))]


@pytest.mark.parametrize("mode", ["reflect", "reflect_minus_one", "translate"])
@pytest.mark.parametrize("roles", [[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1]])
def test_pictures_never_overlap(mode, roles):
    conditions = [(5, 2), (1, 7), (3, 3)]
    law = PositionLaw(source_mode=mode, index_base=1)
    for target in [(1, 1), (2, 3), (6, 2)]:
        pictures = positions(law, conditions, roles, target)
        everything = [cell for picture in pictures for cell in picture]
        assert len(set(everything)) == len(everything)


def test_a_source_does_not_move_the_references_behind_it():
    alone = positions(PositionLaw(), [(2, 2)], [1])[1]
    behind = positions(PositionLaw(), [(3, 4), (2, 2)], [0, 1])[2]
    assert alone == behind


def test_text_is_at_zero():
    assert not np.any(rotary.text_positions(PositionLaw(), np.ones((1, 5), bool), TARGET, [(9, 9)]))


def test_roles_are_data_not_shape():
    traces = []

    @jax.jit
    def place(roles):
        traces.append(roles)
        return rotary.image_positions(PositionLaw(), TARGET, [TARGET], roles)

    mixed = place(jnp.asarray([[0], [1]]))
    as_sources = place(jnp.asarray([[0], [0]]))
    assert len(traces) == 1
    np.testing.assert_array_equal(mixed[0], as_sources[0])
    assert np.all(mixed[1, 6:, 1:] >= jnp.asarray(TARGET))


def test_a_law_with_an_unknown_mode_is_refused():
    for fields in ({"kind": "rope"}, {"source_mode": "mirror"}, {"index_base": 2}):
        with pytest.raises(ValueError, match=next(iter(fields.values())).__repr__()):
            PositionLaw(**fields)
    with pytest.raises(ValueError, match="2 pictures"):
        rotary.image_positions(PositionLaw(), TARGET, [TARGET] * 2, jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("conditions", [[], [(4, 6)], [(5, 3), (7, 8)]])
def test_qwen_image_law_equals_diffusers(conditions):
    law, axes, length = PositionLaw("qwen_image"), (8, 12, 12), 7
    rope = QwenEmbedRope(theta=10000, axes_dim=list(axes), scale_rope=True)
    shapes = [(1, h, w) for h, w in [(5, 4), *conditions]]
    torch_image, torch_text = rope([shapes], max_txt_seq_len=length, device=torch.device("cpu"))
    roles = jnp.zeros((2, len(conditions)), jnp.int32)
    image = rotary.image_positions(law, (5, 4), conditions, roles)
    mask = np.ones((1, length), bool)
    text = rotary.text_positions(law, mask, (5, 4), conditions)[0]
    for ours, theirs in ((image[1], torch_image), (text, torch_text)):
        cos, sin = rotary.cos_sin(ours, axes)
        np.testing.assert_allclose(cos, theirs.real, atol=2e-6)
        np.testing.assert_allclose(sin, theirs.imag, atol=2e-6)


@pytest.mark.parametrize("conditions", [[], [(4, 6)]])
def test_qwen_image_law_counts_words_from_the_first_real_one(conditions):
    """On the diagonal, without a hole where a row is padded: before, behind or between."""
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 1], [1] * 6], bool)
    law, start = PositionLaw("qwen_image"), 3 if conditions else 2
    found = np.asarray(rotary.text_positions(law, mask, (5, 4), conditions))
    for place, real in zip(found, mask, strict=True):
        words = place[real]
        np.testing.assert_array_equal(
            words, np.repeat(start + np.arange(len(words)), 3).reshape(-1, 3)
        )


def test_tables_against_float64():
    axes, theta = (16, 56, 56), 10000.0
    places = np.array([[0, 0, 0], [3, -255, 255], [1, 77, -128], [0, 511, 1023]])
    frequencies = [theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in axes]
    angle = np.concatenate([places[:, a, None] * f for a, f in enumerate(frequencies)], -1)
    cos, sin = rotary.cos_sin(jnp.asarray(places), axes, theta)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (4, 64)
    tolerance = 1.2e-7 * (1 + np.abs(angle))  # one rounding of the frequency, one of the product
    assert np.all(np.abs(cos - np.cos(angle)) <= tolerance)
    assert np.all(np.abs(sin - np.sin(angle)) <= tolerance)


@pytest.mark.parametrize("batched", [False, True])
def test_rotation_equals_diffusers(batched):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 3, 32)).astype(np.float32)
    place = rng.integers(-9, 9, size=(6, 3))
    cos, sin = rotary.cos_sin(jnp.asarray(place), (8, 12, 12))
    table = torch.complex(torch.from_numpy(np.array(cos)), torch.from_numpy(np.array(sin)))
    theirs = apply_rotary_emb_qwen(torch.from_numpy(x), table, use_real=False)
    if batched:
        cos, sin = (jnp.broadcast_to(t, (2, *t.shape)) for t in (cos, sin))
    ours = rotary.apply_interleaved(jnp.asarray(x), cos, sin)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    half = rotary.apply_interleaved(jnp.asarray(x, jnp.bfloat16), cos, sin)
    assert half.dtype == jnp.bfloat16
