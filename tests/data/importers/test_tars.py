"""Tars that are read in place: the examples of an import, and nothing that has changed since."""

import io
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import tarfile

import numpy as np
import pytest

from qk_jax.base import files
from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import __main__ as command
from qk_jax.data import pipeline, records
from qk_jax.data.importers import importing, pieces, registry, shards, tars
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.importers.job import Job
from tests.base import storage
from tests.data import stage3
from tests.data.importers.published import picture, put, tar

SIZES = ((40, 24), (24, 40), (30, 30))


def captioned(number: int) -> list[tuple[str, bytes]]:
    """Members of a sample; some have names that take several headers, or members without use."""
    key = f"{'deep/' * 30 if number % 3 == 1 else ''}{'ü' if number % 3 else ''}{number:03d}"
    found = [(f"{key}.jpg", picture(number, size=SIZES[number % 3]))]
    if number % 2:
        found.append((f"{key}.npy", bytes(700)))
        return [*found, (f"{key}.json", json.dumps({"caption": f"n {number}"}).encode())]
    return [*found, (f"{key}.txt", f" n {number} ü\n".encode())]


def edited(number: int) -> list[tuple[str, bytes]]:
    named = (("before.jpg", "JPEG"), ("ref.png", "PNG"), ("after.webp", "WEBP"))
    pictures = [
        (f"{number}.{name}", picture(10 * number + k, form, SIZES[k]))
        for k, (name, form) in enumerate(named)
    ]
    return [*pictures, (f"{number}.json", json.dumps({"do": f"change {number}"}).encode())]


def written(folder, sample=captioned, count=24, shard=8):
    """Tars with these samples."""
    for first in range(0, count, shard):
        members = [x for n in range(first, first + shard) for x in sample(n)]
        tar(folder / f"{first // shard}.tar", members)
    return folder


def job(folder, out, **more):
    given = {"task": "text_to_image", "limits": Limits(max_pixels=1 << 20), **more}
    return Job(**{"format": "webdataset", "inputs": (str(folder),), "out": str(out), **given})


def both(folder, **more):
    """(the manifest of the index beside the tars, of the import); the latter is in `out`."""
    out = folder.parent / "out"
    index = importing.run(job(folder, folder, in_place=True, **more), pieces.Engine())
    return index, importing.run(job(folder, out, **more), pieces.Engine())


def assert_same_records(folder, split="train"):
    """Those of the tars and of the import."""
    in_place = tars.TarSet(folder, split)
    imported = records.RecordSet(folder.parent / "out", split)
    assert len(in_place) == len(imported)
    assert [in_place[n] for n in range(len(in_place))] == [
        imported[n] for n in range(len(imported))
    ]
    for (first, mine), (other, theirs) in zip(in_place.indices(), imported.indices(), strict=True):
        assert first == other
        for column in set(records.INDEX_DTYPE.names) - {"bytes"}:
            np.testing.assert_array_equal(mine[column], theirs[column])
    return len(in_place)


EDITS = {"text": "json.do", "target": "after.webp", "source": "before.jpg", "references": "ref.png"}


@pytest.mark.parametrize(
    ("sample", "more"),
    [
        (captioned, {"validation": 0.3, "name": "mine"}),
        (edited, {"task": "editing", "columns": EDITS}),
    ],
)
def test_records_are_those_of_an_import(tmp_path, sample, more):
    index, imported = both(written(tmp_path / "in", sample), **more)
    same = ("records", "sources", "rejected", "inputs")
    assert [index[name] for name in same] == [imported[name] for name in same]
    assert sum(assert_same_records(tmp_path / "in", split) for split in index["records"]) == 24


def configured(path, batch=4):
    return stage3.config({"text_to_image": 1.0}, batch, batch, records=str(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with tars and their index; beside it `out`, an import of them."""
    folder = written(tmp_path_factory.mktemp("tars") / "in")
    both(folder, validation=0.3)
    return folder


@pytest.mark.parametrize("hosts", [1, 2])
def test_batches_are_those_of_an_import(whole, builder, hosts):
    for host in range(hosts):
        found = [
            pipeline.Pipeline(configured(path), "train", host, hosts, builder)
            for path in (f"tar:{whole}", whole.parent / "out")
        ]
        assert found[0].digest() == found[1].digest()
        for step in range(8):
            stage3.assert_same(*(pipe.batch(step) for pipe in found))
        assert not found[0].bad_counts()


def test_tars_are_one_of_several_sources(whole, builder):
    """With roles and captions as of record files, and splits."""
    config = stage3.config({"text_to_image": 1.0}, 4, 4)
    with config.unlocked():
        config.data.sources = (
            {"path": f"tar:{whole}", "tasks": "text_to_image", "name": "a"},
            {"path": f"tar:{whole}", "tasks": "text_to_image", "name": "b", "weight": 3,
             "captions": {"instruction": 1, "other": 1}},
        )  # fmt: skip
    found = registry.make_sources(config, "train", 0, ["text_to_image"])["text_to_image"]
    assert len(found) == 2 * len(tars.TarSet(whole, "train"))
    assert {found[n].instruction[:2] for n in range(len(found))} == {"n "}


def test_few_files_are_open_and_sets_pickle(whole, monkeypatch):
    monkeypatch.setattr(records, "OPEN_AT_ONCE", 1)
    found = tars.TarSet(whole, "train")
    expected = [found[n] for n in range(len(found))]
    before = len(os.listdir("/proc/self/fd"))
    for number in (0, len(found) - 1, 0, len(found) // 2):
        assert found[number] == expected[number]
        assert sum(file.is_open for file in found.files) == 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert pickle.loads(pickle.dumps(found))[3] == expected[3]
    with pytest.raises(IndexError):
        found[len(found)]


def damaged(name, data):
    """A tar whose samples are bad in one way."""
    path = io.BytesIO()
    with tarfile.open(fileobj=path, mode="w") as out:

        def add(member, body=b"", kind=tarfile.REGTYPE, target=""):
            info = tarfile.TarInfo(member)
            info.type, info.linkname, info.size = kind, target, len(body)
            out.addfile(info, io.BytesIO(body))

        for member, body in captioned(0):
            add(member, body)
        if name == "link":
            add("1.jpg", kind=tarfile.SYMTYPE, target="000.jpg")
        else:
            add({"up": "../1.jpg", "root": "/1.jpg"}.get(name, "1.jpg"), data)
        if name == "twice":
            add("1.jpg", data)
        add({"up": "../1.txt", "root": "/1.txt"}.get(name, "1.txt"), b"bad")
        for member, body in captioned(3):
            add(member, body)
    return path.getvalue()


@pytest.mark.parametrize("name", ["link", "up", "root", "twice", "empty", "cut", "short", "header"])
def test_what_is_wrong_with_a_tar_is_counted_as_by_an_import(tmp_path, name):
    good = picture(5)
    data = damaged(name, {"empty": b"", "cut": good[: len(good) // 2]}.get(name, good))
    if name == "short":
        data = data[: data.index(b"003.jpg") + 700]
    if name == "header":
        at = data.index(b"003.jpg")
        data = data[: at + 120] + bytes([data[at + 120] ^ 1]) + data[at + 121 :]
    put(tmp_path, "in/a.tar", data)
    put(tmp_path, "in/b.tar", b"")
    tar(tmp_path / "in" / "c.tar", captioned(4))
    index, imported = both(tmp_path / "in")
    assert index["rejected"] == imported["rejected"] and sum(index["rejected"].values()) >= 2
    lines = [(tmp_path / x / "rejected.jsonl").read_bytes() for x in ("in", "out")]
    assert lines[0] == lines[1]
    assert assert_same_records(tmp_path / "in") >= 2


def read(folder):
    """What is read of a set, by number; None where it is a bad record."""
    found, out = tars.TarSet(folder, "train"), []
    for number in range(len(found)):
        try:
            out.append(found[number])
        except BadRecord as error:
            assert error.kind == "unreadable"
            out.append(None)
    return out


def test_flipped_bits_are_found_or_without_effect(tmp_path):
    """With the times of the files as before, so that nothing else tells."""
    folder = written(tmp_path / "in", count=6, shard=6)
    importing.run(job(folder, folder, in_place=True), pieces.Engine())
    expected, drawn = read(folder), random.Random(4)
    found = {"index": 0, "record": 0, "nothing": 0}
    for path in [folder / "0.tar", folder / "train-00000-of-00001.tar.index.npy"]:
        whole, times = path.read_bytes(), os.stat(path)
        for _ in range(100):
            place = drawn.randrange(8 * len(whole))
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            try:
                got = read(folder)
            except InputError as error:
                assert "is damaged" in str(error) and path.suffix == ".npy"
                found["index"] += 1
                continue
            assert path.suffix == ".tar"
            bad = [number for number, record in enumerate(got) if record is None]
            assert len(bad) <= 1
            assert [x for n, x in enumerate(got) if n not in bad] == [
                x for n, x in enumerate(expected) if n not in bad
            ]
            found["record" if bad else "nothing"] += 1
        path.write_bytes(whole)
    assert found["index"] == 100 and min(found.values()) > 10 and sum(found.values()) == 200


def copied(whole, folder):
    shutil.copytree(whole, folder, copy_function=shutil.copyfile)  # with times of their own
    return folder


def test_a_tar_that_has_changed_is_named(whole, tmp_path):
    folder = copied(whole, tmp_path / "in")
    expected = read(whole)
    assert read(folder) == expected  # a copy is the same tar
    path = folder / "1.tar"
    body = path.read_bytes()
    path.write_bytes(body + bytes(512))
    with pytest.raises(InputError, match="1.tar is not as it was when .* index it again"):
        read(folder)
    path.write_bytes(body.replace(b"n 8", b"n 9"))
    with pytest.raises(InputError, match="1.tar is not as it was when"):
        read(folder)
    path.write_bytes(body)
    found = tars.TarSet(folder, "train")  # and then it changes
    path.write_bytes(body[: len(body) // 3])
    got = []
    for number in range(len(found)):
        try:
            got.append(found[number])
        except BadRecord as error:
            assert "1.tar: its tar is truncated or damaged, or has changed" in str(error)
    assert all(x in expected for x in got) and len(expected) - 8 <= len(got) < len(expected)


def test_a_tar_that_is_gone_is_replaced_and_an_index_that_is_gone_is_named(
    whole, tmp_path, builder, caplog
):
    folder = copied(whole, tmp_path / "in")
    (folder / "2.tar").unlink()
    config = configured(f"tar:{folder}")
    with config.unlocked():
        config.data.max_bad_share = 1.0
    pipe = pipeline.Pipeline(config, "train", 0, 1, builder)
    for step in range(6):
        pipe.batch(step)
    assert "2.tar is missing: each of its" in caplog.text
    assert list(pipe.bad_counts()) == ["bad/text_to_image/unreadable"]
    (folder / "train-00001-of-00003.tar.index.npy").unlink()
    with pytest.raises(InputError, match="train-00001-of-00003.tar.index.npy is missing"):
        tars.TarSet(folder, "train")
    with pytest.raises(InputError, match="no index of tars for the split 'test'; python -m"):
        tars.TarSet(folder, "test")


def test_an_index_goes_on_where_it_was_stopped_and_leaves_other_files_alone(
    whole, tmp_path, monkeypatch
):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in whole.glob("*.tar"):
        shutil.copy2(path, folder)
    put(folder, ".other.part", b"of another program")
    given, real = job(folder, folder, in_place=True, validation=0.3), shards.import_piece

    def stopped(of, count, number, piece):
        if number == 2:
            raise InputError("stop")
        real(of, count, number, piece)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "import_piece", stopped)
        with pytest.raises(InputError, match="stop"):
            importing.run(given, pieces.Engine())
    importing.run(given, pieces.Engine(resume=True))
    for path in whole.glob("*.npy"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert (folder / ".other.part").exists()
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="has an index; remove what `index` wrote"):
        importing.run(given, pieces.Engine())


def test_a_tar_that_grows_while_it_is_read_is_named(tmp_path, monkeypatch):
    folder, real = written(tmp_path / "in", count=2, shard=2), shards.read

    def reading(of, piece):
        yield from real(of, piece)
        with open(piece.paths[0], "ab") as out:
            out.write(bytes(512))

    monkeypatch.setattr(shards, "read", reading)
    with pytest.raises(InputError, match="0.tar has changed while it was read"):
        importing.run(job(folder, folder, in_place=True), pieces.Engine())
    assert not list(folder.glob("*.npy"))


def test_the_command_writes_an_index_elsewhere_and_refuses_packed_tars(tmp_path, capsys):
    folder, out = written(tmp_path / "in", count=4, shard=4), tmp_path / "index"
    text = f"index --input {folder} --task text_to_image --out {out} --workers 1"
    command.main(text.split())
    assert "records: 4 train" in capsys.readouterr().out
    assert tars.TarSet(out, "train").files[0].path == files.Path(folder / "0.tar")
    tar(folder / "1.tar.gz", captioned(9), packed=True)
    with pytest.raises(SystemExit):
        command.main(text.replace(str(out), f"{out}2").split())
    assert "1.tar.gz is compressed or one of several parts" in capsys.readouterr().err


def test_tars_in_a_bucket_are_copied_to_the_host(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = written(tmp_path / "in", count=4, shard=2)
    (tmp_path / "objects").mkdir()
    with storage.served(tmp_path / "objects") as server:
        for path in folder.iterdir():
            server.put(f"tars/{path.name}", path.read_bytes())
        there = f"{storage.BUCKET}/tars"
        importing.run(job(there, there, in_place=True), pieces.Engine())
        importing.run(job(folder, tmp_path / "out"), pieces.Engine())
        found = tars.TarSet(there, "train")
        imported = records.RecordSet(tmp_path / "out", "train")
        assert [found[n] for n in range(4)] == [imported[n] for n in range(4)]
        assert pathlib.Path(found.files[0]._local).is_relative_to(tmp_path / "cache")


def test_tars_are_looked_at_as_the_import_of_them(whole, tmp_path):
    shown = []
    for path in (f"tar:{whole}", str(whole.parent / "out")):
        page = tmp_path / f"{len(shown)}.html"
        command.main(["look", path, "--out", str(page), "--n", "4"])
        shown.append(page.read_text().split("<main", 1)[1])
    pictures = [re.findall(r"data:image/[^\"]+", text) for text in shown]
    assert pictures[0] == pictures[1] and len(pictures[0]) >= 4
