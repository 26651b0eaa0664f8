"""The command that paints: files, text chunks, and one line for whatever is wrong."""

import json
import pathlib

import numpy as np
import painters
import pytest
from PIL import Image

from qk_jax import sample
from qk_jax.base.errors import InputError
from qk_jax.painting import orders
from tests.pictures import encoded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return painters.save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.fromarray(painters.picture(number)).save(folder / f"{number}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    return folder


def paint(checkpoint, *words):
    fast = ("--steps", "2", "--batch", "2", "--size", "32x32")
    return sample.main(["--checkpoint", str(checkpoint), *fast, *map(str, words)])


def refused(capsys, *words):
    """The one line that the command prints on stderr before it leaves with status 2."""
    with pytest.raises(SystemExit) as left:
        sample.main([str(word) for word in words])
    assert left.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def test_one_picture_of_several_is_the_same_picture(checkpoint, pictures, tmp_path, capsys):
    edit = ("--prompt", "make it blue", "--source", pictures / "0.png", "--seed", 3)
    paint(checkpoint, *edit, "--out", tmp_path / "one.png")
    paint(checkpoint, *edit, "--num", 3, "--out", tmp_path / "many.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["many-0.png", "many-1.png", "many-2.png", "one.png"]
    one, first, second = (
        np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "many-0.png", "many-1.png")
    )
    np.testing.assert_array_equal(one, first)
    assert one.shape == (32, 32, 3) and (one != second).any()
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "many-2.png")

    # What was painted can be painted again from what the file says.
    text = Image.open(tmp_path / "many-1.png").text
    settings = json.loads(text["settings"])
    assert (text["prompt"], text["seed"]) == ("make it blue", "3")
    assert settings["number"] == 1 and settings["steps"] == 2 and settings["solver"] == "euler"
    assert settings["model"] == "stage3-nano-4" and settings["size"] == "32x32"


def test_a_picture_without_a_name_is_named_after_its_prompt(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for more in ((), (), ("--num", 2)):
        paint(checkpoint, "--prompt", "Make it blue, ÉTÉ!", *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "make-it-blue-été-2.png", "make-it-blue-été-3-0.png", "make-it-blue-été-3-1.png",
        "make-it-blue-été.png",
    ]  # fmt: skip


def test_a_source_is_turned_upright_and_covers_at_any_size(checkpoint, pictures, tmp_path):
    """49 x 50 pixels: the box that covers 64 x 64 once began outside of the picture."""
    upright = painters.picture(5, 50, 49)
    Image.fromarray(upright).save(pictures / "upright.png")
    (pictures / "turned.png").write_bytes(encoded.turned(upright, 6, "PNG"))
    for name in ("upright", "turned"):
        edit = ("--prompt", "make it blue", "--source", pictures / f"{name}.png")
        paint(checkpoint, *edit, "--size", "64x64", "--out", tmp_path / f"{name}.png")
    one, other = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("upright", "turned"))
    np.testing.assert_array_equal(one, other)
    assert one.shape == (64, 64, 3)


def test_many_prompts(checkpoint, pictures, tmp_path):
    lines = [
        {"prompt": "Kä 猫"},
        {"prompt": "make it blue", "source": "0.png", "seed": 3, "out": "sub/blue.png"},
        {"prompt": "both", "references": ["1.png", "2.png"], "source": None},
    ]
    many = pictures / "many.jsonl"
    many.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    paint(checkpoint, "--prompts", many, "--out-dir", tmp_path)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert found == ["00001.png", "00005.png", "sub/blue.png"]
    assert Image.open(tmp_path / "00001.png").text["prompt"] == "Kä 猫"
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def given(checkpoint, pictures, tmp_path):
    """Command lines that are wrong, with words of the line that says so."""
    ok = ("--checkpoint", checkpoint, "--out", tmp_path / "x.png")
    prompt = ("--prompt", "a kite")
    references = sum((("--reference", pictures / f"{n}.png") for n in range(4)), ())
    return {
        "no prompt": (ok, "no prompt"),
        "blank prompt": ((*ok, "--prompt", "  "), "no prompt"),
        "a folder for one": ((*ok, *prompt, "--out-dir", "x"), "--out-dir goes with --prompts"),
        "a step of what is shipped": ((*prompt, "--step", "3"), "leave out --step"),
        "unknown flag": ((*ok, *prompt, "--colour", "red"), "--colour"),
        "no number": ((*ok, *prompt, "--steps", "many"), "--steps"),
        "no steps": ((*ok, *prompt, "--steps", "0"), "steps is 0"),
        "bad size": ((*ok, *prompt, "--size", "big"), "--size"),
        "odd size": ((*ok, *prompt, "--size", "33x32"), "32x32 is near"),
        "huge size": ((*ok, *prompt, "--size", "4096x4096"), "choose a smaller"),
        "missing": ((*ok, *prompt, "--source", pictures / "no.png"), "no.png cannot be read"),
        "cut": ((*ok, *prompt, "--source", pictures / "cut.png"), "cut.png"),
        "text": ((*ok, *prompt, "--reference", pictures / "text.png"), "text.png"),
        "references": ((*ok, *prompt, *references), "at most 3"),
        "long": ((*ok, "--prompt", "word " * 99), "tokens"),
        "seed": ((*ok, *prompt, "--seed", "-1"), "seed is -1"),
        "suffix": ((*ok[:2], *prompt, "--out", tmp_path / "x.jpg"), ".png"),
        "unwritable": ((*ok[:2], *prompt, "--out", tmp_path / "file/x.png"), "cannot be written"),
        "folder": (("--checkpoint", tmp_path, *prompt, *ok[2:]), "give the folder of a stage"),
        "no folder": (("--checkpoint", tmp_path / "no", *prompt, *ok[2:]), "no"),
        "mixed": ((*ok, "--prompts", "f.jsonl"), "--out does not go with --prompts"),
        "no out-dir": (("--checkpoint", checkpoint, "--prompts", "f.jsonl"), "--out-dir"),
    }


WRONG = list(given("", pathlib.Path("pictures"), pathlib.Path("out")))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words, expected = given(checkpoint, pictures, tmp_path)[case]
    assert expected in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing may be left behind"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2"),
        ("[1]", "no JSON object"),
        ('{"prompt": 5}', "no prompt"),
        ('{"promt": "a kite"}', "did you mean 'prompt'"),
        ('{"prompt": "a", "seed": "x"}', "seed is 'x'"),
        ('{"prompt": "a", "references": "x.png"}', "a list of paths"),
        ('{"prompt": "a", "out": "../x.png"}', "inside --out-dir"),
        ('{"prompt": "a", "source": "no.png"}', "no.png cannot be read"),
        ('{"prompt": "a", "out": "first.png"}', "first.png"),
        ('{"prompt": "%s"}' % ("word " * 99), "tokens"),
    ],
)
def test_wrong_lines(line, expected, checkpoint, tmp_path, capsys):
    many = tmp_path / "many.jsonl"
    many.write_text('{"prompt": "good", "out": "first.png"}\n' + line)
    said = refused(
        capsys, "--checkpoint", checkpoint, "--prompts", many, "--out-dir", tmp_path / "out"
    )
    assert expected in said
    assert "two pictures" in said or "line 2 of" in said
    assert not (tmp_path / "out").exists()


def test_a_file_without_prompts(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, words in (("empty", "no prompt"), ("binary", "UTF-8"), ("none", "cannot be read")):
        common = ("--checkpoint", tmp_path, "--out-dir", tmp_path)
        assert words in refused(capsys, *common, "--prompts", tmp_path / f"{name}.jsonl")


def test_programs_are_kept_and_the_bar_says_what_it_waits_for(
    checkpoint, tmp_path, monkeypatch, capsys
):
    kept = []
    monkeypatch.setattr(sample.runtime, "keep_programs", lambda: kept.append(True))
    one = ("--checkpoint", checkpoint, "--steps", 2, "--size", "32x32", "--prompt", "a 🪁")
    sample.main([str(word) for word in (*one, "--num", 2, "--out", tmp_path / "kite.png")])
    said = capsys.readouterr().err
    assert kept and said.index("compiling:") < said.index("painting:") < said.rindex("2/2")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("words", "ema"), [((), True), (("--no-ema",), False)])
def test_the_average_is_painted_with_unless_refused(words, ema, monkeypatch):
    asked = {}

    def load(folder, **settings):
        asked.update(settings)
        raise InputError("enough is known")

    monkeypatch.setattr(sample.painting, "load", load)
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", "c", "--prompt", "a kite", "--out", "kite.png", *words])
    assert asked["ema"] is ema


def test_a_picture_is_replaced_only_when_asked(tmp_path):
    path = orders.files.Path(tmp_path / "a.png")
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="a.png exists; give another name, or --overwrite"):
        orders.make_folders([path], overwrite=False)
    orders.make_folders([path], overwrite=True)
    assert path.read_bytes() == b"mine"


def test_a_size_is_width_and_height():
    assert orders.parse_size("64x48") == (48, 64) and orders.parse_size(None) is None
