"""The two commands for a synthesis: the painter's targets, and the judge's first token."""

import json
import pathlib
import shlex
import subprocess
import types

import numpy as np
import painters
import pytest
from PIL import Image

import qk_jax
from qk_jax.api import judge as judge_lib
from qk_jax.api import paint as paint_lib
from qk_jax.base.errors import InputError
from qk_jax.data import Writer, records
from qk_jax.data.importers import pieces
from qk_jax.data.prompts import load_tokenizer, patches
from qk_jax.data.synthesis import commands, from_records, scenes
from qk_jax.data.synthesis.order import Order
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.fitting import contain

TINY = pathlib.Path(qk_jax.__file__).parent / "assets/tiny"
# Short, as the other questions, so that all are one program.
ASKED = "Alike, {instruction}?"
VLM = f"--model {TINY}/vlm --tokenizer {TINY}/tokenizer --side 56 --dtype float32"


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Cut-outs and backgrounds."""
    folder = tmp_path_factory.mktemp("sets")
    with Writer(folder / "cut/train.array_record") as writer:
        for colour in ("red", "green", "blue", "yellow"):
            square = Image.fromarray(scenes.shape("circle", colour)).resize((80, 80))
            writer.add("text_to_image", f"a {colour} circle", square)
    with Writer(folder / "ground/train.array_record") as writer:
        writer.add("text_to_image", "a wall", painters.picture(0, 128, 128))
    return folder


@pytest.fixture
def here(monkeypatch):
    """Commands of ours run in this process."""
    ran = []

    def run(words, check):
        mains = {"qk_jax.api.paint": paint_lib.main, "qk_jax.api.judge": judge_lib.main}
        ran.append(words[2])
        mains[words[2]](words[3:])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(commands, "subprocess", types.SimpleNamespace(run=run))
    monkeypatch.setattr("qk_jax.base.runtime.keep_programs", lambda: None)
    return ran


def made(sets, out, *lines):
    order = Order(
        str(out), "customization", str(sets / "cut"), str(sets / "ground"), commands=lines
    )
    return from_records.run(order, pieces.Engine())


def found(out):
    return [(header, blobs) for header, blobs in records.RecordSet(out, "train")]


def test_the_painter_gives_targets_and_the_judge_scores_them(sets, tmp_path, here):
    checkpoint = painters.save(tmp_path)
    paint = (
        f"python -m qk_jax.api.paint {{jobs}} {{results}} --checkpoint {checkpoint} "
        "--steps 2 --guidance 1 --image-guidance 1 --batch 2"
    )
    judge = f"python -m qk_jax.api.judge {{jobs}} {{results}} {VLM} --least 0 --batch 2"
    judge += f" --question '{ASKED}'"
    made(sets, tmp_path / "plain")
    manifest = made(sets, tmp_path / "out", paint, judge)
    assert here == ["qk_jax.api.paint", "qk_jax.api.judge"]
    assert manifest["records"] == {"train": 4}
    painter = painters.painter()
    plain = {header["key"]: blobs for header, blobs in found(tmp_path / "plain")}
    for header, blobs in found(tmp_path / "out"):
        assert 0 < header["score"] < 1
        assert blobs["picture_1"] == plain[header["key"]]["picture_1"]
        assert blobs["target"] != plain[header["key"]]["target"]
        target = decode_picture(blobs["target"], "RGB", 0, "x")
        assert target.shape[:2] in painter.limits.sizes
    header, blobs = found(tmp_path / "out")[0]
    shown = decode_picture(blobs["picture_1"], "RGB", 0, "x")
    request = painter.fit(header["instruction"], None, [shown], target.shape[:2])
    settings = paint_lib.painting.Settings(2, 1.0, 1.0)
    number = paint_lib.hashed(header["key"]) // 2
    request = paint_lib.dataclasses.replace(request, number=number)
    (again,) = painter.paint([request], settings)
    first = decode_picture(blobs["target"], "RGB", 0, "x").astype(int)
    assert np.abs(first - again).max() <= 1


def test_a_job_that_the_model_cannot_follow_is_not_kept(tmp_path):
    Image.fromarray(painters.picture(1)).save(tmp_path / "t.png")
    (tmp_path / "b.png").write_bytes(b"bad")
    target = tmp_path / "t.png"
    pictures = ((("reference", tmp_path / "b.png"),), (("reference", target),) * 9)
    jobs = [
        commands.Job(str(n), "customization", "placed", "a cup", shown, target)
        for n, shown in enumerate(pictures)
    ]
    results = paint_lib.paint(painters.painter(), jobs, tmp_path, paint_lib.painting.Settings())
    assert [line["keep"] for line in results] == [False, False]
    assert "cannot be decoded" in results[0]["reason"] and "9 references" in results[1]["reason"]


@pytest.fixture(scope="module")
def judge():
    words = str(TINY / "tokenizer")
    return judge_lib.load(str(TINY / "vlm"), words, dtype="float32", side=56, batch=2)


def by_states(vlm, text, pictures):
    """Probability of Yes from the last hidden state of `qk_jax.load_vlm`, written once more."""
    tokenizer = load_tokenizer(TINY / "tokenizer")
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    shown = "".join(f"Picture {n + 1}: {image}" for n in range(len(pictures)))
    chat = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{shown}{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = np.array([tokenizer.encode(chat)])
    pixels = np.concatenate([patches(contain(x, (56, 56)), (56, 56)) for x in pictures])
    states = vlm(ids, None, pixels, np.array([(1, 4, 4)] * len(pictures)))
    table = np.asarray(vlm.params["language_model"]["embed_tokens"]["embedding"])
    yes, no = (tokenizer.encode(word)[0] for word in ("Yes", "No"))
    gap = np.asarray(states)[0, -1] @ (table[yes] - table[no])
    return 1 / (1 + np.exp(-gap))


def test_a_probability_is_that_of_the_first_token(judge):
    vlm = qk_jax.load_vlm(TINY / "vlm", dtype="float32")
    questions = [
        judge_lib.Question("Are they alike? Yes or No.", tuple(map(painters.picture, seeds)))
        for seeds in ((1, 2), (3, 4), (5, 6))
    ]
    scores = judge.probabilities(questions)
    expected = [by_states(vlm, *question) for question in questions]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(scores) > 1e-3  # they see the pictures


def test_the_decision_follows_the_logits(judge, tmp_path):
    """With the rows of Yes and No exchanged, what was kept is dropped."""
    jobs = []
    for seed in range(3):
        paths = [tmp_path / f"{seed}-{n}.png" for n in range(2)]
        for n, path in enumerate(paths):
            Image.fromarray(painters.picture(9 * seed + n)).save(path)
        job = commands.Job(
            str(seed), "editing", "move", "move it", (("source", paths[0]),), paths[1]
        )
        jobs.append(job)
    (tmp_path / "bad.png").write_bytes(b"bad")
    jobs.append(jobs[0]._replace(id="bad", target=tmp_path / "bad.png"))
    jobs.append(jobs[0]._replace(id="long", instruction="word " * 3000))
    lines = judge_lib.judged(judge, jobs, 0.0, text=ASKED)
    scores = [line["score"] for line in lines[:3]]
    assert [line["keep"] for line in lines] == [True] * 3 + [False] * 2
    assert "cannot be decoded" in lines[3]["reason"] and "tokens" in lines[4]["reason"]
    middle = sorted(scores)[1]
    kept = [line["keep"] for line in judge_lib.judged(judge, jobs[:3], middle - 1e-6, text=ASKED)]
    assert kept == [score >= middle - 1e-6 for score in scores] and sum(kept) == 2
    table = np.array(judge.params["language_model"]["embed_tokens"]["embedding"])
    yes, no = judge.answers
    exchanged = table.copy()
    exchanged[[yes, no]] = table[[no, yes]]
    language = {**judge.params["language_model"], "embed_tokens": {"embedding": exchanged}}
    turned = type(judge)(
        judge.module, {**judge.params, "language_model": language}, judge.tokenizer, 56, 2
    )
    others = [line["score"] for line in judge_lib.judged(turned, jobs[:3], 0.0, text=ASKED)]
    own = [line["score"] for line in judge_lib.judged(judge, jobs[:3], 0.0, text=ASKED)]
    np.testing.assert_allclose(np.add(own, others), 1, atol=1e-5)


def test_questions_are_by_task_and_have_the_instruction(tmp_path):
    Image.fromarray(painters.picture(1)).save(tmp_path / "t.png")
    path = tmp_path / "t.png"
    job = commands.Job(
        "1", "composition", "row of 2", "a {b} cup", (("reference", path),) * 2, path
    )
    assert "same subjects" in judge_lib.question_of(job, "", "").text
    assert "a {b} cup" in judge_lib.question_of(job, "instruction", "").text
    own = judge_lib.question_of(job, "", "Is it {instruction}?")
    assert own.text == "Is it a {b} cup?" and len(own.pictures) == 3


def test_what_is_wrong_is_said(tmp_path, capsys):
    for line, words in (
        (f"{tmp_path} x {VLM}", "has no jobs.jsonl"),
        (f"{tmp_path} x {VLM} --least 2", "is no probability"),
    ):
        with pytest.raises(SystemExit) as left:
            judge_lib.main(shlex.split(line))
        assert left.value.code == 2 and words in capsys.readouterr().err
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"id": 1}))
    with pytest.raises(InputError, match="a line that is no job"):
        commands.read_jobs(tmp_path)
    with pytest.raises(InputError, match="multiple of 28"):
        judge_lib.load(str(TINY / "vlm"), side=50)
