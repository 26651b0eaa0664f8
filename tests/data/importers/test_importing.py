"""The laws of an import: same bytes by any engine, after any interruption; splits; duplicates."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from qk_jax.base.errors import InputError
from qk_jax.data import __main__ as command
from qk_jax.data import records
from qk_jax.data.importers import engines, importing, pieces, shards
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.importers.job import Job
from tests import needs
from tests.data.importers import published
from tests.data.importers.published import lines, picture, put

ROOT = pathlib.Path(__file__).resolve().parents[3]


def content(folder) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def many(folder, count=60):
    """Captions, some bad, each picture twice."""
    rows = []
    for n in range(count):
        put(folder, f"{n}.jpg", picture(n // 2, size=(200, 150)) if n % 7 else b"bad")
        rows.append({"file_name": f"{n}.jpg", "text": f"n {n}", "person": f"p{n % 9}"})
    put(folder, "metadata.jsonl", lines(rows))
    return {"format": "folder", "inputs": (str(folder),), "task": "text_to_image"}


ALONE = pieces.Engine()


def run(job: dict, out, engine=ALONE, **more):
    return importing.run(Job(**{"shard_records": 5, **job, **more, "out": str(out)}), engine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a job, the bytes of its import)."""
    folder = tmp_path_factory.mktemp("whole")
    job = {**many(folder / "in"), "validation": 0.2, "dedup": True}
    run(job, folder / "out")
    return job, content(folder / "out")


def test_processes_give_the_same_bytes(whole, tmp_path):
    job, expected = whole
    run(job, tmp_path, pieces.Engine(workers=2))
    assert content(tmp_path) == expected
    assert len(expected) == 2 * 2 * 12 + 2


CHILD = """
import json, sys
from qk_jax.data.importers import importing, pieces
from qk_jax.data.importers.job import Job
print("begun", flush=True)
importing.run(Job(**json.loads(sys.argv[1])), pieces.Engine(int(sys.argv[2]), resume=True))
"""


def begun(job, out, workers) -> subprocess.Popen:
    """An import in a process of its own, which has just begun."""
    text = json.dumps({"shard_records": 5, **job, "out": str(out)})
    command = [sys.executable, "-c", CHILD, text, str(workers)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begun\n"
    return child


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def test_a_killed_import_goes_on_to_the_same_bytes(whole, tmp_path):
    """At random moments, several times the same import, as a machine that is taken away again."""
    job, expected = whole
    start = time.monotonic()
    child = begun(job, tmp_path / "first", 1)
    start = time.monotonic()
    assert child.wait() == 0 and content(tmp_path / "first") == expected
    lasted, drawn = time.monotonic() - start, random.Random(3)
    killed = 0
    moments = int(os.environ.get("QK_KILLS", "6"))
    for number in range(moments):
        out = tmp_path / str(number)
        while True:
            child = begun(job, out, 1)
            time.sleep(drawn.uniform(0, lasted * 0.7))
            child.kill()
            killed += child.wait() == -signal.SIGKILL
            if drawn.random() < 0.7:
                break
        run(job, out, pieces.Engine(resume=True))
        assert content(out) == expected
        shutil.rmtree(out)
    assert killed >= moments / 2


def test_workers_end_with_the_command(whole, tmp_path):
    job, expected = whole
    child = begun(job, tmp_path, 2)
    deadline = time.monotonic() + 60
    while len(workers := children(child.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)  # two, and Python's tracker of resources
    child.kill()
    child.wait()
    while any(map(pathlib.Path.exists, (pathlib.Path(f"/proc/{pid}") for pid in workers))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run(job, tmp_path, pieces.Engine(resume=True))
    assert content(tmp_path) == expected


def test_an_import_is_not_mixed_with_another(whole, tmp_path):
    job, expected = whole
    run(job, tmp_path)
    with pytest.raises(InputError, match="has been begun already; add --resume"):
        run(job, tmp_path)
    with pytest.raises(InputError, match="other arguments or by another version"):
        run(job, tmp_path, pieces.Engine(resume=True), validation=0.3)
    run(job, tmp_path, pieces.Engine(resume=True))
    assert content(tmp_path) == expected
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(InputError, match="is not empty"):
        run(job, tmp_path)


def test_an_input_that_has_changed_is_named(tmp_path, monkeypatch):
    job = many(tmp_path / "in", 20)

    def stopped(*args):
        raise InputError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "import_piece", stopped)
        with pytest.raises(InputError, match="stop"):
            run(job, tmp_path / "out")
    put(tmp_path, "in/metadata.jsonl", lines([{"file_name": "1.jpg", "text": "other"}]))
    with pytest.raises(InputError, match="metadata.jsonl is not as it was"):
        run(job, tmp_path / "out", pieces.Engine(resume=True))


def test_pictures_that_came_before_are_left_out(tmp_path):
    job = many(tmp_path / "in", 30)
    manifest = run(job, tmp_path / "out", dedup=True)
    found = records.RecordSet(tmp_path / "out", "train").indices()
    index = np.concatenate([piece for _, piece in found])
    assert len(np.unique(index["digest"], axis=0)) == len(index)
    bad = len([n for n in range(30) if n % 7 == 0])
    assert manifest["records"] == {"train": 15}
    # All bad pictures have the same bytes, which is found before they are decoded.
    assert manifest["rejected"] == {"duplicate": 30 - 15 - 1, "undecodable": 1} and bad == 5
    assert run(job, tmp_path / "all")["rejected"] == {"undecodable": bad}


def test_groups_are_on_one_side_of_the_split(tmp_path):
    job = many(tmp_path / "in", 90)
    run(job, tmp_path / "out", validation=0.3, columns={"group": "person"})
    sides = {}
    for split in ("train", "validation"):
        found = records.RecordSet(tmp_path / "out", split)
        sides[split] = {found[n].header["group"] for n in range(len(found))}
    assert sides["train"] and sides["validation"] and not sides["train"] & sides["validation"]


def test_edits_of_one_source_are_on_one_side(tmp_path):
    rows = [
        {"text": f"{n}", "target_image": published.struct(picture(500 + n)),
         "source_image": published.struct(picture(n // 5))}
        for n in range(100)
    ]  # fmt: skip
    published.table(tmp_path / "in.parquet", rows)
    job = {"format": "parquet", "inputs": (str(tmp_path / "in.parquet"),), "task": "editing"}
    run(job, tmp_path / "out", validation=0.3)
    sides = []
    for split in ("train", "validation"):
        found = records.RecordSet(tmp_path / "out", split)
        sides.append({found[n].blobs["picture_1"] for n in range(len(found))})
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20


def test_pictures_are_written_anew_when_asked(tmp_path):
    put(tmp_path, "in/a.png", picture(1, "PNG"))
    put(tmp_path, "in/a.txt", "a")
    job = {"format": "folder", "inputs": (str(tmp_path / "in"),), "task": "text_to_image"}
    run(job, tmp_path / "out", limits=Limits(encode=("WEBP", 90)))
    data = records.RecordSet(tmp_path / "out", "train")[0].blobs["target"]
    assert data[8:12] == b"WEBP"


def test_width_and_height_are_those_of_the_picture_upright(tmp_path):
    image = Image.new("RGB", (60, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "a.jpg", exif=exif)
    put(tmp_path, "in/a.txt", "a")
    job = {"format": "folder", "inputs": (str(tmp_path / "in"),), "task": "text_to_image"}
    run(job, tmp_path / "out")
    ((_, index),) = records.RecordSet(tmp_path / "out", "train").indices()
    assert (index["width"][0], index["height"][0]) == (100, 60)


GOOD = "import --format folder --input {in} --task text_to_image --out {out}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--format floder", "--format floder is unknown; give one of folder, "),
        ("--task t2i", "--task t2i is unknown; give one of text_to_image, "),
        ("--input /nowhere", "--input /nowhere is no folder"),
        ("--format parquet", "has no table"),
        ("--format webdataset", "has no tar archive"),
        ("--format list --input /nowhere", "/nowhere does not exist"),
        ("--format musubi", "needs --control"),
        ("--format musubi --control /nowhere", "--control /nowhere is no folder"),
        ("--format tfds --input nowhere", "no split 'train' that can be read"),
        ("--columns text", "--columns is 'text'; give ROLE=COLUMN"),
        ("--columns words=text", "--columns has words; give"),
        ("--encode gif", "--encode is 'gif'"),
        ("--encode jpeg:0", "--encode is 'jpeg:0'"),
        ("--encode png:5", "--encode is 'png:5'"),
        ("--validation 1", "--validation 1 is no share"),
        ("--validation nan", "--validation nan is no share"),
        ("--shard-records 0", "--shard-records 0 is less than 1"),
        ("--min-side -1", "are 0 or more"),
        ("--name längst", "beyond ASCII"),
        ("--workers 2 --ray auto", "exclude each other"),
        ("--out {in}", "is not empty; choose another folder"),
        ("--out {in}/a.jpg/b", "cannot be written"),
        ("--input gs:/x/y", "names no bucket"),
        ("--more", "--help lists the arguments"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, change, words):
    put(tmp_path, "in/a.jpg", picture(1))
    text = f"{GOOD} {change}".replace("{in}", str(tmp_path / "in"))
    with pytest.raises(SystemExit) as ended:
        command.main(text.replace("{out}", str(tmp_path / "out")).split())
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert ended.value.code == 2 and words in line


def test_the_command_tells_what_it_did(tmp_path, capsys):
    many(tmp_path / "in", 20)
    text = f"{GOOD} --validation 0.2 --workers 1".replace("{in}", str(tmp_path / "in"))
    command.main(text.replace("{out}", str(tmp_path / "out")).split())
    out = capsys.readouterr().out
    assert "records: 14 train, 3 validation in 2 shards" in out and "  3 undecodable" in out


def test_a_cluster_that_is_not_there_is_named():
    needs.module("ray")
    with pytest.raises(InputError, match="--ray 127.0.0.1:1: no cluster answers"):
        list(engines.run(print, {1: 1}, 1, "127.0.0.1:1"))
