"""Painting: determinism whatever the company, guidance, sizes and limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import painters
import pytest
from PIL import Image

from qk_jax import painting
from qk_jax.base.errors import InputError
from qk_jax.data.example import TaskSettings
from qk_jax.data.synthesis import tasks
from qk_jax.diffusion import sampler
from qk_jax.painting.request import NO_PICTURES
from qk_jax.pictures.roles import REFERENCE, SOURCE

SETTINGS = painting.Settings(steps=2, guidance=3.0, image_guidance=1.5)


@pytest.fixture(scope="module")
def painter():
    return painters.painter()


def edit(painter, number=0, prompt="make it blue"):
    request = painter.fit(prompt, painters.picture(1), (), (32, 32), seed=7)
    return dataclasses.replace(request, number=number)


def test_a_picture_does_not_depend_on_its_company(painter):
    alone = painter.paint([edit(painter)], SETTINGS)[0]
    others = [edit(painter, n, f"paint {n}") for n in range(1, 4)]
    plain = painter.fit("a red kite", size=(32, 48))
    mixed = painter.paint([*others, plain, edit(painter)], SETTINGS)
    np.testing.assert_array_equal(mixed[-1], alone)
    assert mixed[3].shape == (32, 48, 3)
    assert all((other != alone).any() for other in mixed[:3])


def test_without_a_batch_no_slot_is_wasted(painter):
    """As many slots as pictures of one shape; the same call gives the same bits."""
    free, slots = painters.painter(batch=None), []
    original = free.programs.denoise

    def denoise(params, noise, *args, **kwargs):
        slots.append(len(noise))
        return original(params, noise, *args, **kwargs)

    free.programs.denoise = denoise
    try:
        plain = free.fit("a red kite", size=(32, 48))
        two = [edit(free), plain, edit(free, 1)]
        painted = free.paint(two, SETTINGS)
        assert slots == [2, 1]
        slots.clear()
        free.paint([dataclasses.replace(plain, number=n) for n in range(10)], SETTINGS)
        assert slots == [8, 8]
    finally:
        free.programs.denoise = original
    for one, again in zip(painted, free.paint(two, SETTINGS), strict=True):
        np.testing.assert_array_equal(one, again)


def test_the_phases_of_every_shape_are_told(painter):
    told = []
    requests = [edit(painter, n) for n in range(3)] + [painter.fit("a kite", size=(32, 48))]
    for index, _ in painter.stream(requests, SETTINGS, phase=told.append):
        told.append(index)
    assert told == [
        "compiling", "painting", 0, 1, "painting", 2, "compiling", "painting", 3,
    ]  # fmt: skip


def test_a_phase_of_painting_begins_when_everything_is_compiled(painter, monkeypatch):
    """So that a first picture says what it waits for."""
    events = []
    original = painter.programs.decode
    monkeypatch.setattr(
        painter.programs, "decode", lambda *a: (original(*a), events.append("compiled"))[0]
    )
    painter.paint([edit(painter)], SETTINGS)
    list(painter.stream([edit(painter)], SETTINGS, phase=events.append))
    assert events == ["compiled", "compiling", "compiled", "painting"]


def test_what_the_tokenizer_does_not_know_is_told_once_for_each_prompt(painter, caplog):
    for prompt in ("a red kite", "a 🪁 and a 猫", "a 🪁 and a 猫", "a 🐈"):
        painter.fit(prompt)
    first, second = (record.getMessage() for record in caplog.records)
    assert "does not know 🪁 猫 in the prompt 'a 🪁 and a 猫'" in first and "🐈" in second


def test_noise_comes_from_seed_and_number_alone(painter):
    request = edit(painter)
    same = dataclasses.replace(request, prompt="something else", source=None)
    np.testing.assert_array_equal(painter.noise(request), painter.noise(same))
    for changed in ({"number": 1}, {"seed": 8}):
        other = painter.noise(dataclasses.replace(request, **changed))
        assert (painter.noise(request) != other).all()
    assert painter.noise(request).std() == pytest.approx(1, abs=0.2)


def test_paint_is_paint_with_its_own_noise(painter):
    request = edit(painter)
    own = painter.paint([request], SETTINGS)
    given = painter.paint([request], SETTINGS, [painter.noise(request)])
    np.testing.assert_array_equal(own[0], given[0])


@pytest.mark.parametrize(
    ("guidance", "image_guidance", "pictured", "expected"),
    [
        (1, 1, True, 1), (4, 1, True, 2), (4, 1.5, True, 3), (1, 1.5, True, 3),
        (1, 1.5, False, 1), (4, 1.5, False, 2),
    ],
)  # fmt: skip
def test_guidance_evaluates_only_what_it_needs(guidance, image_guidance, pictured, expected):
    settings = painting.Settings(guidance=guidance, image_guidance=image_guidance)
    assert len(settings.variants(pictured)) == expected


def test_three_way_guidance_at_weight_one_is_two_way(painter):
    """Weights that make a conditioning vanish give what is painted without evaluating it."""
    nearly = painting.Settings(steps=2, guidance=3.0, image_guidance=1 + 1e-6)
    without = painting.Settings(steps=2, guidance=3.0, image_guidance=1.0)
    a, b = (painter.paint([edit(painter)], s)[0].astype(int) for s in (nearly, without))
    assert np.abs(a - b).max() <= 1


def test_guidance_by_time(painter):
    """Where no step has guidance nothing is guided; a constant weight is a line without slope."""
    request, two = [edit(painter)], {"steps": 3, "image_guidance": 1.0}

    def paint(**settings):
        return painter.paint(request, painting.Settings(**two | settings))[0]

    constant, none = paint(guidance=5.0), paint(guidance=1.0)
    np.testing.assert_array_equal(paint(guidance=5.0, guidance_end=5.0), constant)
    np.testing.assert_allclose(
        paint(guidance=5.0, guidance_interval=(0.0, 0.001)).astype(int), none.astype(int), atol=1
    )
    late = paint(guidance=5.0, guidance_interval=(0.5, 1.0))
    falling = paint(guidance=5.0, guidance_end=1.0)
    for one in (late, falling):
        assert (one != constant).any() and (one != none).any()


def test_first_steps_without_a_velocity_leave_the_noise(painter):
    """The rest of the schedule then starts from noise: the same as a shorter schedule."""
    whole = sampler.schedule(3, 4, painter.schedule)
    request, seen = edit(painter), []
    original = painter.programs.denoise

    def denoise(params, noise, sigmas, *args, **kwargs):
        seen.append(np.asarray(sigmas))
        return original(params, noise, sigmas, *args, **kwargs)

    painter.programs.denoise = denoise
    try:
        painter.paint([request], painting.Settings(steps=3, guidance=1, zero_init_steps=1))
    finally:
        painter.programs.denoise = original
    np.testing.assert_array_equal(seen[0], whole[1:])


def test_renormalised_and_symmetric_guidance_are_other_pictures(painter):
    request = [edit(painter)]
    plain = painter.paint(request, SETTINGS)[0]
    for change in ({"renormalize": True}, {"symmetric_guidance": True}):
        assert (painter.paint(request, dataclasses.replace(SETTINGS, **change))[0] != plain).any()
    off = dataclasses.replace(SETTINGS, renormalize=False)  # the default without Qwen-Image's law
    np.testing.assert_array_equal(painter.paint(request, off)[0], plain)
    assert len(dataclasses.replace(SETTINGS, symmetric_guidance=True).variants(True)) == 4


def test_batches_without_pictures_alone_keep_the_words(painter):
    batch = painter.collate([edit(painter)], NO_PICTURES)
    assert not batch["condition_mask"].any() and batch["text_mask"].any()
    assert not (batch["input_ids"] == painter.prompts.image_token_id).any()


def test_text_pictures_roles_and_solver_all_matter(painter):
    request = edit(painter)
    base = painter.paint([request], SETTINGS)[0]
    as_reference = dataclasses.replace(request, source=None, references=(request.source,))
    changes = [
        dataclasses.replace(request, prompt="make it red"),
        dataclasses.replace(request, source=painters.picture(2, 32, 32)),
        as_reference,
    ]
    for changed in changes:
        assert (painter.paint([changed], SETTINGS)[0] != base).any()
    heun = dataclasses.replace(SETTINGS, solver="heun")
    assert (painter.paint([request], heun)[0] != base).any()


def test_batches_without_pictures_hide_them(painter):
    batch = painter.collate([edit(painter)], painting.NOTHING)
    assert not batch["condition_mask"].any()
    assert not (batch["input_ids"] == painter.prompts.image_token_id).any()
    assert not batch["text_mask"].any()
    full = painter.collate([edit(painter)])
    assert (full["input_ids"] == painter.prompts.image_token_id).any()
    assert full["input_ids"].shape == batch["input_ids"].shape


def test_fit_shows_pictures_as_in_training(painter):
    request = painter.fit("x", painters.picture(3, 50, 100), [painters.picture(4, 30, 60)])
    assert request.size in painter.limits.sizes and request.size[1] > request.size[0]
    assert request.source.shape[:2] == request.size
    (((side, _),),) = painter.limits.reference_sizes
    assert request.references[0].shape == (side, side, 3)
    assert (request.references[0][: side // 8] == 255).all(), "white above a wide reference"
    assert request.roles == (SOURCE, REFERENCE)


def test_a_reference_keeps_its_aspect_ratio(painter):
    """It goes to the nearest size of references; tokens and positions follow the pictures."""
    known = ((64, 64), (80, 48), (48, 80))
    limits = dataclasses.replace(painter.limits, reference_sizes=(known,))
    wider = painting.Painter(painter.config, painter.params, painter.prompts, limits=limits)
    shapes = [(50, 31), (100, 90), (31, 50), (3, 100)]
    dark = [np.zeros((*shape, 3), np.uint8) for shape in shapes]
    for given, size in zip(dark, ((80, 48), (64, 64), (48, 80), (48, 80)), strict=True):
        (shown,) = wider.fit("x", references=[given]).references
        assert shown.shape == (*size, 3)
    shown = wider.fit("x", references=dark[:3]).references
    assert [(picture == 255).mean() < 0.2 for picture in shown] == [True] * 3
    again = wider.fit("x", references=shown).references
    for a, b in zip(again, shown, strict=True):
        np.testing.assert_array_equal(a, b)
    request = wider.fit("x", references=[painters.picture(0, 50, 31), painters.picture(1, 31, 50)])
    batch = wider.collate([request])
    grids = wider.prompts.grids([(80, 48), (48, 80)])
    assert batch["pixel_values"].shape[1] == sum(rows * columns for rows, columns in grids)
    assert [x.shape[1:3] for x in batch["conditions"]] == [(80, 48), (48, 80)]
    turned = dataclasses.replace(request, references=request.references[::-1])
    tall, other = (wider.paint([x], SETTINGS)[0] for x in (request, turned))
    assert tall.shape == other.shape and (tall != other).any()


def test_more_references_are_shown_smaller_as_in_training():
    config = painters.config().copy_and_resolve_references()
    config.data.reference_sizes_by_number = (64, 48, 32)
    plan = dataclasses.replace(painters.plan(), config=config)
    painter = painting.of_params(plan, painters.params())
    pictures = [painters.picture(n, 60, 70) for n in range(3)]
    for source in (None, pictures[0]):
        for count, side in ((1, 64), (2, 48), (3, 32)):
            shown = painter.fit("x", source, pictures[:count]).references
            assert {x.shape for x in shown} == {(side, side, 3)}
    settings = TaskSettings.from_config(config.data, 0)
    for task in ("customization", "composition"):
        for example in tasks.examples("train", task, 3, settings=settings):
            request = painter.fit("x", None, example.pictures)
            for ours, theirs in zip(request.references, example.pictures, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "no prompt"),
        ({"prompt": b"kite"}, "no prompt"),
        ({"prompt": "word " * 100}, "tokens"),
        ({"seed": -1}, "seed is -1"),
        ({"size": (33, 32)}, "32x32 is near"),
        ({"size": (4096, 4096)}, "choose a smaller one"),
        ({"references": (np.zeros((64, 64, 3), np.uint8),) * 4}, "at most 3"),
    ],
)
def test_what_cannot_be_painted_is_named(painter, change, words):
    with pytest.raises(InputError, match=words):
        painter.fit(**{"prompt": "a kite", **change})


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 10**6},
        {"solver": "rk4"},
        {"guidance": -1},
        {"guidance": np.nan},
        {"guidance_end": -1.0},
        {"guidance_interval": (0.6, 0.4)},
        {"guidance_interval": (0, 2)},
        {"zero_init_steps": 30},
        {"zero_init_steps": -1},
    ],  # fmt: skip
)
def test_settings_are_checked(settings):
    with pytest.raises(InputError):
        painting.Settings(**settings)


def test_the_request_of_an_example_is_what_training_shows():
    for task in ("text_to_image", "editing", "composition"):
        (example,) = tasks.examples("validation", task, 1)
        request = painting.request_of(example, seed=3, number=2)
        assert (request.prompt, request.size) == (example.instruction, example.target.shape[:2])
        assert request.roles == example.roles and (request.seed, request.number) == (3, 2)
        for a, b in zip(request.pictures, example.pictures, strict=True):
            np.testing.assert_array_equal(a, b)


def test_read_composes_on_white_and_refuses(painter, tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (painter.read(tmp_path / "clear.png") == 255).all()
    (tmp_path / "cut.png").write_bytes((tmp_path / "clear.png").read_bytes()[:40])
    for name, words in (("none.png", "cannot be read"), ("cut.png", "decoded")):
        with pytest.raises(InputError, match=words):
            painter.read(tmp_path / name)
    small = painters.painter()
    limits = dataclasses.replace(small.limits, max_pixels=100)
    bounded = painting.Painter(small.config, {}, small.prompts, limits=limits)
    with pytest.raises(InputError, match="bound"):
        bounded.read(tmp_path / "clear.png")


def test_merged_adapters_paint_as_separate_ones():
    """Painting merges LoRA; the trainer's model with the adapter apart gives the same velocity."""
    tree, model = painters.params(), painters.plan().model
    painter = painters.painter()
    batch = jax.tree.map(jnp.asarray, painter.collate([edit(painter)]))
    x = jax.random.normal(jax.random.key(0), (1, 4, 64))
    t = jnp.full(1, 0.5)

    def velocity(model, params):
        context, mask = model.context(params, batch)
        latents = tuple(model.encode_pictures(params, x) for x in batch["conditions"])
        roles, shown = batch["roles"], batch["condition_mask"]
        return model.velocity(params, x, t, context, mask, (2, 2), latents, roles, shown)

    apart = jax.jit(lambda p: velocity(model, p))(tree)
    merged = jax.jit(lambda p: velocity(painter.programs.model, p))(painter.params)
    scale = np.abs(apart).max()
    np.testing.assert_allclose(merged / scale, apart / scale, atol=1e-4)


def test_decoded_pictures_are_rounded_to_the_nearest_value(painter):
    noise = np.stack([painter.noise(edit(painter, number)) for number in range(2)])
    got = painter.programs.decode(painter.params, noise)
    exact = (jax.jit(painter.programs.model.decode)(painter.params, noise) + 1) * 127.5
    assert np.max(np.abs(np.asarray(got, np.float32) - exact)) < 0.51
