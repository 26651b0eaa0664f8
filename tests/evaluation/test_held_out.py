"""Evaluation: the figures come out of known models as they must; the sheets can be looked at."""

import dataclasses

import numpy as np
import painters
import pytest

from qk_jax import evaluation, painting
from qk_jax.data.example import TASKS
from qk_jax.data.synthesis.scenes import COLOURS
from qk_jax.evaluation import held_out as held_out_lib
from qk_jax.painting import sheets

EXTENT = evaluation.Extent(
    records=4, batch=4, times=(0.5,), captions=8, sheet=2,
    words=painting.Settings(steps=1, guidance=1.0, image_guidance=1.0),
    pictures=painting.Settings(steps=1, guidance=1.0, image_guidance=1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def held_out():
    return evaluation.held_out_cases(painters.config(), EXTENT.records)


@pytest.fixture(scope="module")
def evaluator():
    return evaluation.Evaluator(painters.painter(batch=EXTENT.batch), EXTENT)


def test_held_out_cases_are_fixed_distinct_and_of_one_shape(held_out):
    again = evaluation.held_out_cases(painters.config(), EXTENT.records)
    train = evaluation.captions(painters.config(), EXTENT.captions)
    prompts = {case.request.prompt for case in train}
    for task in TASKS:
        for a, b in zip(held_out[task], again[task], strict=True):
            assert a.request.prompt == b.request.prompt
            np.testing.assert_array_equal(a.truth, b.truth)
        shapes = {tuple(p.shape for p in e.request.pictures) for e in held_out[task]}
        assert len(shapes) == 1 == len({e.truth.shape for e in held_out[task]})
        assert not prompts & {e.request.prompt for e in held_out["text_to_image"]}
    assert len(held_out["composition"][0].request.references) == 2
    assert held_out["composition"][0].truth.shape == (48, 80, 3)
    assert held_out["editing"][0].request.source is not None
    assert {e.request.number for e in train}.isdisjoint(range(EXTENT.records))


def test_all_figures_of_a_random_model(held_out, evaluator):
    train = evaluation.captions(painters.config(), EXTENT.captions)
    said = []
    figures, painted = evaluation.evaluate(evaluator.painter, EXTENT, held_out, train, said.append)
    assert set(figures["tasks"]) == set(painted) == set(TASKS)
    for task, of_task in figures["tasks"].items():
        assert of_task["records"] == 4 and len(painted[task]) == 4
        assert of_task["margin"] == pytest.approx(of_task["loss_shuffled"] - of_task["loss"])
        assert ("psnr_copy" in of_task) == (task != "text_to_image")
    assert figures["tasks"]["reconstruction"]["psnr_copy"] == 99
    assert figures["retrieval"]["chance_top5"] == 5 / 8
    assert set(figures["roles"]["layout_change"]) >= {"source", "reference", "standard_error"}
    assert figures["roles"]["identity_psnr"]["source_minus_reference"] != 0
    assert len(said) == len(TASKS) + 2


def test_cases_have_one_shape_where_references_have_several():
    config = painters.config().copy_and_resolve_references()
    with config.unlocked():
        config.data.reference_ratios = ((1, 1), (2, 3))
    for cases in evaluation.held_out_cases(config, 4).values():
        assert {x.shape for case in cases for x in case.request.references} <= {(64, 64, 3)}


def test_cases_have_references_of_the_sizes_of_their_number():
    config = painters.config().copy_and_resolve_references()
    with config.unlocked():
        config.data.reference_ratios = ((1, 1), (2, 3))
        config.data.reference_sizes_by_number = (64, 48, 32)
    cases = evaluation.held_out_cases(config, 4)
    for task, side in (("customization", 64), ("composition", 48)):
        shapes = {x.shape for case in cases[task] for x in case.request.references}
        assert shapes == {(side, side, 3)}


def test_margin_is_that_of_the_conditions(held_out, evaluator):
    """With one condition for all, shuffling changes nothing; with others it changes the loss."""
    first = held_out["editing"][0].request
    same = [
        case._replace(request=dataclasses.replace(first, number=number))
        for number, case in enumerate(held_out["editing"])
    ]
    assert evaluator.margin(same)["margin"] == 0
    assert evaluator.margin(held_out["editing"])["margin"] != 0


def test_shuffling_keeps_target_and_noise(held_out, evaluator):
    cases = held_out["transformation"]
    half = len(cases) // 2
    turned = cases[half:] + cases[:half]
    given = [
        case._replace(request=dataclasses.replace(other.request, number=case.request.number))
        for case, other in zip(cases, turned, strict=True)
    ]
    np.testing.assert_array_equal(evaluator.losses(cases, shift=half), evaluator.losses(given))


def test_the_truth_has_the_highest_figures(held_out, evaluator):
    train = evaluation.captions(painters.config(), EXTENT.captions)
    truth = [case.truth for case in train]
    found = evaluator.retrieval(train, truth)
    assert found["pixels"]["top1"] == found["vision"]["top1"] == 1
    cases = held_out["editing"]
    copied = [case.request.source for case in cases]
    figures = evaluator.fidelity(cases, copied)
    assert figures["gain_over_copy"] == 0 and figures["psnr"] == figures["psnr_copy"]
    figures = evaluator.fidelity(cases, [case.truth for case in cases])
    assert figures["psnr"] == 99


def test_figures_of_each_kind_are_those_of_its_cases(held_out, evaluator):
    """Half of the kinds are solved, the others copied."""
    cases = [case for task in ("transformation", "editing") for case in held_out[task]]
    kinds = sorted({case.kind for case in cases})
    solved = set(kinds[::2])
    assert 1 < len(kinds) and solved < set(kinds)
    painted = [case.truth if case.kind in solved else case.request.source for case in cases]
    figures = evaluator.fidelity(cases, painted)
    assert list(figures["kinds"]) == kinds
    assert sum(of["records"] for of in figures["kinds"].values()) == len(cases)
    for kind, of in figures["kinds"].items():
        assert (of["psnr"] == 99) == (kind in solved)
        assert (of["gain_over_copy"] == 0) == (kind not in solved)


def test_backgrounds_are_judged_by_their_named_colour(evaluator):
    request = painting.Request("x", size=(32, 32))
    blue, red, striped = (np.full((32, 32, 3), 0, np.uint8) for _ in range(3))
    blue[:], red[:], striped[:, ::2] = COLOURS["blue"], COLOURS["red"], COLOURS["red"]
    thing = blue.copy()
    thing[8:24, 8:24] = 255  # what stands before it does not count
    cases = [evaluation.Case(request, truth) for truth in (blue, thing, striped)]
    near = np.clip(blue.astype(int) + 20, 0, 255).astype(np.uint8)
    assert evaluator.backgrounds(cases, [near, blue, red]) == {
        "background": 1.0, "background_standard_error": 0.0, "backgrounds": 2,
    }  # fmt: skip
    assert evaluator.backgrounds(cases, [blue, red, red])["background"] == 0.5
    assert evaluator.backgrounds(cases[2:], [striped]) == {}


def test_the_copy_to_beat_is_the_nearest_picture():
    truth = painters.picture(0)
    request = painting.Request("x", references=(255 - truth, truth), size=truth.shape[:2])
    assert held_out_lib.best_copies([evaluation.Case(request, truth)]).tolist() == [99.0]


def test_a_plan_that_leaves_a_rest_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        evaluation.Extent(records=20, batch=16)


def test_sheets_hold_every_picture(held_out, tmp_path):
    cases = held_out["composition"][:2]
    sheet = sheets.of_requests(
        "composition, stage 3",
        [case.request for case in cases],
        [np.full_like(case.truth, (7, 99, 7)) for case in cases],
        [case.truth for case in cases],
    )
    path = tmp_path / "new" / "sheet.png"
    sheets.save(sheet, path)
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]
    pixels = np.asarray(sheet)
    painted = (pixels == (7, 99, 7)).all(axis=-1).sum()
    assert painted == 2 * sheets.SIDE * round(sheets.SIDE * 48 / 80)
    assert sheet.width > 4 * sheets.SIDE
