"""Examples from imported records: what they show is what they say, and their bytes are a law."""

import collections
import dataclasses
import io
import json
import random
import sys

import numpy as np
import pytest
from PIL import Image

from qk_jax.base.errors import BadRecord, Failure, InputError
from qk_jax.data import Writer, records
from qk_jax.data import __main__ as command
from qk_jax.data.importers import importing, pieces
from qk_jax.data.importers.job import Job
from qk_jax.data.synthesis import bilingual, composites, from_records, scenes, shadows
from qk_jax.data.synthesis.order import Order
from qk_jax.data.synthesis.scenes import COLOURS, Item
from qk_jax.pictures.decoding import decode_picture
from tests.data.importers.test_importing import content

COLOURED = ("red", "green", "blue", "yellow", "purple", "orange")


def cutout(colour, form="circle", side=80):
    """A shape in one colour, uint8 [side, side, 4]."""
    return np.asarray(Image.fromarray(scenes.shape(form, colour)).resize((side, side)))


def jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def photograph(seed, height=128, width=128):
    """Grey noise, in which no colour of a cut-out occurs."""
    grey = np.random.default_rng(seed).integers(120, 150, (height, width, 1), np.uint8)
    return np.repeat(grey, 3, axis=-1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of cut-outs and of backgrounds, both with two splits."""
    folder = tmp_path_factory.mktemp("sets")
    with Writer(folder / "cut/train.array_record") as writer:
        for colour in COLOURED:
            writer.add("text_to_image", f"a {colour} thing", cutout(colour), group=colour)
        writer.add("text_to_image", "the thing", cutout("pink"), group="pink")
        mask = cutout("red")[..., 3]
        writer.add("text_to_image", "brown box", np.full((80, 80, 3), 90, np.uint8), mask=mask)
        writer.add("text_to_image", "a wall", photograph(1))
        writer.add("editing", "make it red", cutout("red"), source=cutout("blue"))
        cut = np.zeros((80, 80), np.uint8)
        cut[20:60, 40:] = 255
        writer.add("text_to_image", "half a box", photograph(2, 80, 80), mask=cut)
        writer.add("text_to_image", "a tiny thing", cutout("red", side=40))
    with Writer(folder / "cut/validation.array_record") as writer:
        for colour in ("pink", "light blue", "brown"):
            writer.add("text_to_image", f"a {colour} cup", cutout(colour, "square"))
    for split, first in (("train", 0), ("validation", 50)):
        with Writer(folder / f"ground/{split}.array_record") as writer:
            for number in range(6):
                sides = [(128, 128), (128, 192), (192, 128)][number % 3]
                shown = photograph(first + number, *sides)
                shown = jpeg(shown) if number % 2 else shown
                writer.add("text_to_image", f"a grey wall {first + number}", shown)
    return folder


def make(sets, out, kind, engine=pieces.Engine(), **more):  # noqa: B008
    ground = str(sets / "ground") if kind in ("customization", "composition", "edit") else ""
    order = {"kind": kind, "input": str(sets / "cut"), "backgrounds": ground, **more}
    return from_records.run(Order(out=str(out), **order), engine)


def examples(out, split="train"):
    """(header, {blob: pixels}, {blob: bytes}) of each record."""
    for header, blobs in records.RecordSet(out, split):
        pixels = {name: decode_picture(data, "RGB", 0, name) for name, data in blobs.items()}
        yield header, pixels, blobs


def rejects(out):
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def where(picture, colour):
    """(x, y, share of the pixels) of a colour, in fractions of the picture."""
    far = np.abs(picture.astype(int) - COLOURS[colour]).max(-1) < 40
    rows, columns = np.nonzero(far)
    if not len(rows):
        return None
    return (
        columns.mean() / picture.shape[1], rows.mean() / picture.shape[0], len(rows) / far.size
    )  # fmt: skip


# ---- whole pictures ------------------------------------------------------------------------------


def test_a_reconstruction_keeps_the_bytes_and_the_splits(sets, tmp_path):
    manifest = make(sets, tmp_path, "reconstruction", count=30)
    assert manifest["records"] == {"train": 24, "validation": 6}
    for split in manifest["records"]:
        known = {blobs["target"] for _, blobs in records.RecordSet(sets / "cut", split)}
        made = list(examples(tmp_path, split))
        assert {blobs["target"] for _, _, blobs in made} == known
        for header, _, blobs in made:
            assert blobs["target"] == blobs["picture_1"] and header["roles"] == ["source"]
            assert header["instruction"] in bilingual.ENGLISH["copy"]
    assert records.RecordSet(tmp_path, "train").tasks() == {"reconstruction"}


def test_a_transformation_is_what_its_kind_says(sets, tmp_path):
    make(sets, tmp_path, "transformation", input=str(sets / "ground"), count=60, language="both")
    kinds, tongues = collections.Counter(), collections.Counter()
    sources = {blobs["target"] for _, blobs in records.RecordSet(sets / "ground", "train")}
    for header, pixels, blobs in examples(tmp_path):
        kind, before, after = header["kind"], pixels["picture_1"], pixels["target"]
        assert blobs["picture_1"] in sources
        is_jpeg = blobs["picture_1"].startswith(b"\xff\xd8")
        assert blobs["target"].startswith(b"\xff\xd8" if is_jpeg else b"\x89PNG")
        kinds[kind] += 1
        tongues[bilingual.is_chinese(header["instruction"])] += 1
        if kind == "tint":
            fits = [scenes.tinted(before, colour) for colour in scenes.TINTS]
            errors = [np.abs(x.astype(int) - after).mean() for x in fits]
            assert min(errors) < (6 if is_jpeg else 1e-9)
            continue
        expected = scenes.CHANGES[kind](before)
        assert after.shape == expected.shape
        assert np.abs(expected.astype(int) - after).mean() < (6 if is_jpeg else 1e-9)
    assert len(kinds) >= 5 and min(tongues.values()) > 10 and len(tongues) == 2


# ---- composites ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(sets, tmp_path_factory):
    """{kind: folder} of examples of each kind of composite."""
    folder = tmp_path_factory.mktemp("made")
    for kind, count in (("customization", 24), ("composition", 18), ("edit", 50)):
        make(sets, folder / kind, kind, count=count, shard_records=20)
    return folder


def test_what_cannot_be_used_is_counted_with_its_reason(made):
    manifest = json.loads((made / "edit/manifest.json").read_text())
    lines = rejects(made / "edit")
    assert manifest["rejected"] == collections.Counter(line["reason"] for line in lines)
    assert manifest["rejected"] == {
        "no cut-out": 1, "no caption": 1, "cut off": 1, "too small": 1, **(
            {"hardly visible": n} if (n := manifest["rejected"].get("hardly visible")) else {}
        ),
    }  # fmt: skip
    assert sum(manifest["records"].values()) >= 45


def colour_of(caption):
    return next((colour for colour in COLOURED if colour in caption), None)


def test_subjects_of_a_composition_stand_in_the_order_of_the_pictures(made):
    seen = collections.Counter()
    for header, pixels, _ in examples(made / "composition"):
        order = [where(pixels[f"picture_{n + 1}"], c) for n, c in enumerate(_named(header))]
        assert all(order), header  # each reference shows the subject that the words name there
        places = [where(pixels["target"], colour) for colour in _named(header)]
        axis = 0 if header["kind"].startswith("row") else 1
        along = [place[axis] for place in places]
        assert along == sorted(along), header
        seen[header["kind"]] += 1
    assert len(seen) >= 3


def _named(header):
    """Colours of the subjects, in the order of the references; only of those that have one."""
    text = header["instruction"]
    keys = header["made_from"][:-1]
    number = {f"train {n}": colour for n, colour in enumerate(COLOURED)}
    found = [number.get(key) for key in keys]
    assert all(f"{colour} thing" in text for colour in found if colour)
    return [colour for colour in found if colour] if all(found) else []


def test_a_subject_is_where_the_words_say(made):
    count = 0
    for header, pixels, _ in examples(made / "customization"):
        for colour in _named(header):
            x, y, _ = where(pixels["target"], colour)
            text = header["instruction"]
            count += 1
            assert ("left" in text) <= (x < 0.5) and ("right" in text) <= (x > 0.5)
            assert ("at the top" in text) <= (y < 0.5) and ("bottom" in text) <= (y > 0.5)
    assert count > 10


SIDES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def is_near(before, after, colour):
    """Whether two pictures differ only around a thing of a colour that is in one of them."""
    shown = np.minimum(*(np.abs(x.astype(int) - COLOURS[colour]).max(-1) for x in (before, after)))
    for axis in (0, 1):
        thing = np.flatnonzero((shown < 40).any(axis=axis))
        differs = np.flatnonzero((before != after).any(-1).any(axis=axis))
        room = 0.8 * (thing[-1] - thing[0])  # for its shadow
        if differs[0] < thing[0] - room or differs[-1] > thing[-1] + room:
            return False
    return True


def test_an_edit_does_what_it_says_and_nothing_else(made):
    kinds = collections.Counter()
    for header, pixels, blobs in examples(made / "edit"):
        colours, kind = _named(header), header["kind"]
        if not colours:
            continue
        before, after = (where(pixels[x], colours[0]) for x in ("picture_1", "target"))
        if kind.startswith("add"):
            assert before is None and after
            assert ("picture_2" in blobs) == (kind == "add shown")
        elif kind == "remove":
            assert before and after is None
        elif kind == "move":
            assert abs(before[0] - after[0]) + abs(before[1] - after[1]) > 0.1
            assert abs(before[2] / after[2] - 1) < 0.2
        else:
            factor = after[2] / before[2]
            assert abs((factor if kind == "bigger" else 1 / factor) - 4) < 0.8
        if kind == "add beside":
            x, y, _ = where(pixels["target"], colours[1])
            axis, sign = SIDES[next(words for words in SIDES if words in header["instruction"])]
            assert sign * (after[axis] - (x, y)[axis]) > 0, header
        png = blobs["target"].startswith(b"\x89PNG")  # where no pixel differs by its encoding
        if png and (before is None or after is None):
            assert is_near(pixels["picture_1"], pixels["target"], colours[0]), header
        kinds[kind] += 1
    assert set(kinds) == set(composites._EDITS)


def test_processes_give_the_same_bytes_and_a_seed_other_ones(sets, made, tmp_path):
    more = {"count": 24, "shard_records": 20}
    make(sets, tmp_path / "two", "customization", pieces.Engine(workers=2), **more)
    assert content(tmp_path / "two") == content(made / "customization")
    make(sets, tmp_path / "other", "customization", seed=1, **more)
    one, other = (content(x) for x in (made / "customization", tmp_path / "other"))
    assert one.keys() == other.keys() and one != other


def test_an_interrupted_synthesis_goes_on_to_the_same_bytes(sets, made, tmp_path, monkeypatch):
    real = from_records._make_piece

    def stopped(order, shares, count, number, piece):
        if piece == 1:
            raise InputError("stop")
        real(order, shares, count, number, piece)

    with monkeypatch.context() as patch:
        patch.setattr(from_records, "_make_piece", stopped)
        with pytest.raises(InputError, match="stop"):
            make(sets, tmp_path, "customization", count=24, shard_records=20)
    again = pieces.Engine(resume=True)
    with pytest.raises(InputError, match="other arguments"):
        make(sets, tmp_path, "customization", again, count=24, shard_records=20, seed=4)
    make(sets, tmp_path, "customization", again, count=24, shard_records=20)
    assert content(tmp_path) == content(made / "customization")


def test_no_example_names_two_things_alike(sets, tmp_path):
    """'the thing' may be any of the others."""
    make(sets, tmp_path, "composition", count=40)
    for header, *_ in examples(tmp_path):
        text = header["instruction"]
        assert not ("the thing" in text and any(f"{x} thing" in text for x in COLOURED)), text
    folder = tmp_path / "same"
    with Writer(folder / "train.array_record") as writer:
        for colour in COLOURED:
            writer.add("text_to_image", "a thing", cutout(colour))
    more = {"input": str(folder), "validation": 0.0, "backgrounds": str(folder / "ground")}
    with Writer(folder / "ground/train.array_record") as writer:
        writer.add("text_to_image", "a wall", photograph(3))
    with pytest.raises(Failure, match="6 no other name"):
        make(sets, tmp_path / "none", "composition", **more)
    with Writer(folder / "ground/train.array_record") as writer:
        writer.add("text_to_image", "a thing on a wall", photograph(3))
    with pytest.raises(Failure, match="6 no other name"):  # the background has one already
        make(sets, tmp_path / "neither", "edit", **more)


class Pool:
    """Cut-outs and backgrounds without records."""

    def cutout(self, rng):
        colour = rng.choice(COLOURED)
        sides = rng.choice(((80, 80), (120, 66), (66, 120)))
        rgba = np.asarray(Image.fromarray(cutout(colour, "square")).resize(sides))
        return composites.Cutout(rgba, f"{colour} thing", colour, "")

    def ground(self, rng):
        sides = rng.choice(((128, 128), (160, 260), (260, 160)))
        return composites.Ground(photograph(1, *sides), "a wall", "wall", False)


def test_subjects_keep_to_the_limits_of_scale_and_overlap(monkeypatch):
    painted, real = [], composites._painted

    def spy(scene, found):
        pictures = real(scene, found)
        if pictures:
            painted.append((scene, found))
        return pictures

    monkeypatch.setattr(composites, "_painted", spy)
    pool, order = Pool(), Order("out", "composition", "cut", "ground", overlap=0.05)
    for seed in range(30):
        rng = random.Random(seed)
        composites.draft(order, rng, pool.cutout(rng), pool, "x")
    assert len(painted) == 30
    touching = 0
    for scene, found in painted:
        height, width = scene.size
        masks = []
        for item in found.after:
            left, top, right, bottom = item.box
            assert min(left, top) >= -1e-9 and max(right, bottom) <= 1 + 1e-9
            longer = max((right - left) * width, (bottom - top) * height) / min(scene.size)
            assert 0.2 - 1e-6 <= longer <= 0.7 + 1e-6
            black, white = (
                scenes.paint(
                    scenes.flat(scene.size, "white") * level, [Item(_white(item), item.box)]
                )
                for level in (0, 1)
            )
            assert white.min() > 250
            masks.append(black[..., 0] / 255.0)
        for n, one in enumerate(masks):
            for other in masks[:n] + masks[n + 1 :]:
                both = (one * other).sum() / one.sum()
                touching += both > 0
                assert both <= 0.055
    assert touching  # so that the limit was needed


def test_the_light_of_an_edit_stays(monkeypatch):
    lights, real = set(), shadows.shaded

    def spy(canvas, items, light):
        lights.add(light)
        return real(canvas, items, light)

    monkeypatch.setattr(shadows, "shaded", spy)
    pool, order = Pool(), Order("out", "edit", "cut", "ground")
    for seed in range(6):
        lights.clear()
        rng = random.Random(seed)
        composites.draft(order, rng, pool.cutout(rng), pool, "x")
        assert len(lights) == 1


def _white(item):
    rgba = item.rgba.copy()
    rgba[..., :3] = 255
    return rgba


def test_shadows_are_soft_and_fall_at_the_feet():
    canvas, light = scenes.flat((120, 120), "white"), shadows.Light(0.3, 0.2, 0.5, 0.04)
    item = Item(cutout("red", "square"), (0.3, 0.2, 0.7, 0.6))
    shade = canvas - shadows.shaded(canvas, [item], light)
    assert shade.min() >= 0 and 60 < shade.max() <= 0.5 * 255
    assert np.abs(np.diff(shade[..., 0], axis=0)).max() < 0.25 * shade.max()  # no edge in it
    weights = shade[..., 0] / shade[..., 0].sum()
    y, x = (float((weights * grid).sum()) for grid in np.mgrid[:120, :120])
    assert 60 < y < 76 and 60 < x < 75  # the square's feet are at 67; the light is from the left
    left = canvas - shadows.shaded(canvas, [item], light._replace(slant=-0.3))
    np.testing.assert_allclose(left, shade[:, ::-1], atol=12)


# ---- words ---------------------------------------------------------------------------------------


def test_every_kind_has_words_in_both_languages():
    gaps = {"a": "a small cat.", "b": "狗", "c": "cup", "x": "an owl", "scene": "a wall."}
    gaps |= {"where": "top left", "beside": "left", "colour": "red"}
    assert set(bilingual.ENGLISH) == set(bilingual.CHINESE)
    for kind, words in bilingual.ENGLISH.items():
        assert len(words) >= 3 and len(bilingual.CHINESE[kind]) >= 3
        for seed in range(12):
            texts = [
                bilingual.instruction(random.Random(seed), tongue, kind, gaps)
                for tongue in ("en", "zh")
            ]
            assert not any(x in texts[0] for x in ("{", "a a ", "the a ", "the an", "a an", ".."))
            assert bilingual.is_chinese(texts[1]) and "{" not in texts[1]
            assert "left" not in texts[1] and "red" not in texts[1]


def test_both_languages_are_those_of_the_captions():
    rng = random.Random(0)
    assert bilingual.language("both", rng, ["一只猫"]) == "zh"
    assert bilingual.language("both", rng, ["a cat"]) == "en"
    assert bilingual.language("zh", rng, ["a cat"]) == "zh"
    text = bilingual.instruction(rng, "zh", "placed", {"a": "猫", "where": "left", "scene": "海边"})
    assert "猫" in text and "海边" in text and "画面左边" in text


# ---- splits, and what is asked wrongly -----------------------------------------------------------


def test_a_share_divides_what_has_no_split_by_its_groups(tmp_path):
    with Writer(tmp_path / "in/train.array_record") as writer:
        for number in range(40):
            writer.add("text_to_image", f"n {number}", photograph(number, 32, 32), group=number % 8)
    order = {"kind": "reconstruction", "input": str(tmp_path / "in"), "validation": 0.4}
    manifest = from_records.run(Order(out=str(tmp_path / "out"), **order), pieces.Engine())
    groups = {
        split: {header["group"] for header, *_ in examples(tmp_path / "out", split)}
        for split in ("train", "validation")
    }
    assert sum(manifest["records"].values()) == 40 and all(groups.values())
    assert not groups["train"] & groups["validation"]
    assert len(groups["train"] | groups["validation"]) == 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"validation": 0.1}, "has a validation split already"),
        ({"kind": "edit", "backgrounds": ""}, "needs --backgrounds"),
        ({"kind": "reconstruction"}, "has no --backgrounds"),
        ({"kind": "silhouette"}, "is unknown; give one of reconstruction"),
        ({"language": "fr"}, "give en, zh or both"),
        ({"scale": (0.5, 0.2)}, "give LEAST and MOST"),
        ({"overlap": 1.0}, "no share"),
        ({"name": "ü"}, "beyond ASCII"),
        ({"count": -1}, "0 or more"),
        ({"commands": ("cp {jobs} x",)}, "needs {jobs} and {results}"),
        ({"commands": ("cp '{jobs} {results}",)}, "is no command line"),
        ({"commands": ("a {jobs} {results}",), "out": "gs://b/c"}, "local files"),
    ],
)
def test_a_wrong_order_is_named(sets, tmp_path, more, words):
    order = {"kind": "customization", "input": str(sets / "cut"), "out": str(tmp_path)}
    with pytest.raises(InputError, match=words):
        from_records.run(
            Order(**{**order, "backgrounds": str(sets / "ground"), **more}), pieces.Engine()
        )


def test_splits_that_do_not_fit_are_named(sets, tmp_path):
    with Writer(tmp_path / "one/train.array_record") as writer:
        writer.add("text_to_image", "a wall", photograph(3))
    more = {"backgrounds": str(tmp_path / "one")}
    with pytest.raises(InputError, match="one has none; give --validation"):
        make(sets, tmp_path / "out", "edit", **more)
    with pytest.raises(InputError, match="has no background for the split validation"):
        make(sets, tmp_path / "out", "edit", validation=1e-9, **more)


def test_the_command_line(sets, tmp_path, capsys):
    command.main([
        "synthesize", "--kind", "reconstruction", "--input", str(sets / "ground"), "--out",
        str(tmp_path), "--count", "4", "--workers", "1", "--language", "zh", "--name", "walls",
    ])  # fmt: skip
    assert "records: 2 train, 2 validation in 2 shards" in capsys.readouterr().out
    (header, *_), _ = examples(tmp_path)
    assert header["instruction"] in bilingual.CHINESE["copy"] and header["source"] == "walls"


# ---- by way of commands --------------------------------------------------------------------------

ANSWERS = """
import json, pathlib, shutil, sys
jobs, results = map(pathlib.Path, sys.argv[1:3])
lines = [json.loads(line) for line in (jobs / "jobs.jsonl").read_text().splitlines()]
assert all((jobs / one["path"]).is_file() for job in lines for one in job["pictures"])
out = []
for number, job in enumerate(lines):
    said = [
        {"keep": True, "score": 0.75}, {"keep": False, "reason": "another subject"},
        {"target": "new.png"}, {"target": "../" + jobs.name + "/" + job["target"]}, None,
        {"keep": "yes"}, {"target": "bad.png"},
    ][number % 7]
    out += [{"id": job["id"], **said}] if said else []
    if number == 2:
        shutil.copy(jobs / job["pictures"][0]["path"], results / "new.png")
        (results / "bad.png").write_bytes(b"bad")
(results / "results.jsonl").write_text("".join(json.dumps(x) + chr(10) for x in out))
"""


def test_a_command_keeps_paints_and_drops(sets, made, tmp_path):
    script = tmp_path / "answers.py"
    script.write_text(ANSWERS)
    line = f"{sys.executable} {script} {{jobs}} {{results}}"
    more = {"count": 24, "shard_records": 64, "commands": (line,)}
    manifest = make(sets, tmp_path / "out", "customization", **more)
    kinds = manifest["rejected"]
    plain = {header["key"]: blobs for header, _, blobs in examples(made / "customization")}
    assert {"not kept", "missing picture", "no result", "bad result", "undecodable"} <= set(kinds)
    found = list(examples(tmp_path / "out"))
    scored = [header for header, *_ in found if header.get("score") == 0.75]
    painted = [x for x in found if "score" not in x[0]]
    assert scored and painted and len(scored) + len(painted) == len(found)
    for header, _, blobs in found:
        own = plain[header["key"]]
        assert blobs["picture_1"] == own["picture_1"]
        assert blobs["target"] == own["target" if "score" in header else "picture_1"] or painted
    messages = [line["message"] for line in rejects(tmp_path / "out")]
    assert any("another subject" in x for x in messages)
    assert not (tmp_path / "out/.import").exists()


def test_a_command_that_fails_can_be_run_again(sets, tmp_path):
    script = tmp_path / "answers.py"
    line = f"{sys.executable} {script} {{jobs}} {{results}}"
    more = {"count": 3, "commands": (line,)}
    with pytest.raises(Failure, match="ended with status 2; its jobs are in"):
        make(sets, tmp_path / "out", "customization", **more)
    script.write_text("")
    with pytest.raises(Failure, match=r"wrote no .*results\.jsonl"):
        make(sets, tmp_path / "out", "customization", pieces.Engine(resume=True), **more)
    script.write_text(
        "import sys; open(sys.argv[2] + '/results.jsonl', 'w').write("
        "''.join(open(sys.argv[1] + '/jobs.jsonl'))"
        ".replace('\"target\"', '\"made\"'))"
    )
    manifest = make(sets, tmp_path / "out", "customization", pieces.Engine(resume=True), **more)
    assert sum(manifest["records"].values()) == 3


def test_a_mask_of_another_size_is_refused(tmp_path):
    with pytest.raises(BadRecord, match="the mask is"), Writer(tmp_path / "x") as writer:
        writer.add("text_to_image", "a", photograph(0), mask=photograph(0, 32, 32))


def test_a_mask_that_is_imported_makes_a_cutout(sets, tmp_path):
    """The picture has no transparency; what the mask leaves out is not seen again."""
    picture = np.full((90, 120, 3), (200, 60, 30), np.uint8)
    picture[10:80, 20:100] = COLOURS["blue"]
    mask = (picture[..., 2:] > 100).astype(np.uint8) * 255
    (tmp_path / "in").mkdir()
    rows = [{"file_name": "a.png", "text": "a blue box", "where": "m.png"}]
    rows.append({"file_name": "m.png", "text": "a small mask", "where": "b.png"})
    for name, pixels in (("a", picture), ("m", mask.repeat(3, -1)), ("b", mask[:50].repeat(3, -1))):
        Image.fromarray(pixels).save(tmp_path / f"in/{name}.png")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in/metadata.jsonl").write_text(lines)
    job = Job(str(tmp_path / "cut"), "folder", (str(tmp_path / "in"),), "text_to_image")
    job = dataclasses.replace(job, columns={"mask": "where"})
    assert importing.run(job, pieces.Engine())["rejected"] == {"bad mask": 1}
    ground = tmp_path / "ground"
    with Writer(ground / "train.array_record") as writer:
        writer.add("text_to_image", "a wall", photograph(1))
    more = {"input": str(tmp_path / "cut"), "backgrounds": str(ground), "count": 2}
    make(sets, tmp_path / "out", "customization", **more)
    for _, pixels, _ in examples(tmp_path / "out"):
        assert where(pixels["target"], "blue")[2] > 0.02
        red = pixels["target"].astype(int)
        assert not (red[..., 0] > red[..., 2] + 100).any()
        assert (pixels["picture_1"][0] == 255).all()
