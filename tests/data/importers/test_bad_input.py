"""Whatever is wrong with a set is a counted reject with its reason; nothing leaves the folder."""

import ast
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from qk_jax.base.errors import BadRecord, Failure, InputError
from qk_jax.data import records
from qk_jax.data.importers import importing, inputs, pieces
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.importers.job import Job
from qk_jax.pictures.decoding import decode_picture
from tests.data.importers import published
from tests.data.importers.published import lines, picture, put, struct, tar

LIMITS = Limits(max_pixels=1 << 20, max_characters=10_000)


def imported(folder, **job):
    """(instructions, {reason: number}) of what becomes of a set, with a good example beside it."""
    given = {"task": "text_to_image", "limits": LIMITS, "out": str(folder / "out"), **job}
    manifest = importing.run(Job(**given), pieces.Engine())
    found = records.RecordSet(folder / "out", "train")
    told = [json.loads(x)["reason"] for x in (folder / "out" / "rejected.jsonl").open()]
    assert sorted(told) == sorted(k for k, n in manifest["rejected"].items() for _ in range(n))
    return [found[n].header["instruction"] for n in range(len(found))], manifest["rejected"]


def captioned(folder, more: str | bytes):
    """Metadata with one good row and another."""
    put(folder, "in/good.jpg", picture(1))
    good = lines([{"file_name": "good.jpg", "text": "good"}]).encode()
    put(folder, "in/metadata.jsonl", good + (more if isinstance(more, bytes) else more.encode()))
    return imported(folder, format="folder", inputs=(str(folder / "in"),))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"file_name": "../good.jpg", "text": "x"}', "unsafe name"),
        ('{"file_name": "/etc/hostname", "text": "x"}', "unsafe name"),
        ('{"file_name": "https://a.b/c.jpg", "text": "x"}', "unsafe name"),
        ('{"file_name": "a\\u0000b", "text": "x"}', "unsafe name"),
        ('{"file_name": "\\ud800", "text": "x"}', "unsafe name"),
        ('{"file_name": "gone.jpg", "text": "x"}', "missing picture"),
        ('{"file_name": "", "text": "x"}', "missing picture"),
        ('{"file_name": 7, "text": "x"}', "missing picture"),
        ('{"file_name": "' + "n" * 300 + '", "text": "x"}', "missing picture"),
        ('{"text": "x"}', "missing field"),
        ('{"file_name": "good.jpg"}', "missing field"),
        ('{"file_name": "good.jpg", "text": ""}', "no text"),
        ('{"file_name": "good.jpg", "text": null}', "no text"),
        ('{"file_name": "good.jpg", "text": 5}', "no text"),
        ('{"file_name": "good.jpg", "text": "\\ud800"}', "not unicode"),
        (b'{"file_name": "good.jpg", "text": "\xff"}', "not unicode"),
        ('{"file_name": "good.jpg", "text": NaN}', "bad row"),
        ('{"file_name": "good.jpg", "text": "x", "text": "y"}', "bad row"),
        ('{"file_name": "good.jpg", "text": "x"', "bad row"),
        ("[1, 2]", "bad row"),
        ("[" * 100_000, "bad row"),
        (json.dumps({"file_name": "good.jpg", "text": "word " * 10_000}), "long text"),
        ('{"file_name": "good.jpg", "text": "x", "source": "good.jpg"}', "roles"),
        ('{"file_name": "empty.jpg", "text": "x"}', "empty"),
        ('{"file_name": "words.jpg", "text": "x"}', "undecodable"),
        ('{"file_name": "bomb.png", "text": "x"}', "too large"),
    ],
)
def test_a_bad_row_is_counted(tmp_path, row, reason):
    put(tmp_path, "in/empty.jpg", b"")
    put(tmp_path, "in/words.jpg", "no picture")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    put(tmp_path, "in/bomb.png", bomb.getvalue())
    assert captioned(tmp_path, row) == (["good"], {reason: 1})


@pytest.mark.parametrize(("limits", "reason"), [(Limits(min_side=25), "too small")])
def test_a_limit_is_kept(tmp_path, limits, reason):
    put(tmp_path, "in/a.jpg", picture(1, size=(100, 24)))
    put(tmp_path, "in/b.jpg", picture(1, size=(100, 25)))
    rows = [{"file_name": f"{x}.jpg", "text": x} for x in "ab"]
    put(tmp_path, "in/metadata.jsonl", lines(rows))
    found = imported(tmp_path, format="folder", inputs=(str(tmp_path / "in"),), limits=limits)
    assert found == (["b"], {reason: 1})


def test_a_jpeg_that_is_cut_is_refused_or_right(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    whole, rows = buffer.getvalue(), []
    for part in range(16):
        put(tmp_path, f"in/{part}.jpg", whole[: len(whole) * part // 16])
        rows.append({"file_name": f"{part}.jpg", "text": str(part)})
    found, rejected = captioned(tmp_path, lines(rows))
    kept = records.RecordSet(tmp_path / "out", "train")
    for number in range(1, len(found)):
        pixels = decode_picture(kept[number].blobs["target"], "RGB", 0, "x")
        np.testing.assert_array_equal(pixels, decode_picture(whole, "RGB", 0, "x"))
    assert rejected["empty"] == 1
    assert len(found) - 1 + sum(rejected.values()) == 16 and rejected["undecodable"] >= 14


def sample(number: int) -> list[tuple[str, bytes]]:
    return [(f"{number:03d}.jpg", picture(number)), (f"{number:03d}.txt", f"n {number}".encode())]


def samples(folder, members, name="a.tar", packed=False):
    tar(folder / "in" / name, members, packed)
    return imported(folder, format="webdataset", inputs=(str(folder / "in"),))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95])
def test_a_truncated_tar_keeps_what_is_before_the_cut(tmp_path, share, packed):
    path = tar(tmp_path / "in" / "b.tar", [x for n in range(6) for x in sample(n)], packed)
    data = pathlib.Path(path).read_bytes()
    used = len(data) if packed else len(data.rstrip(b"\0"))
    pathlib.Path(path).write_bytes(data[: int(used * share)])
    tar(tmp_path / "in" / "c.tar", sample(9))  # which is good
    found, rejected = imported(tmp_path, format="webdataset", inputs=(str(tmp_path / "in"),))
    assert found == [*(f"n {n}" for n in range(len(found) - 1)), "n 9"]
    assert rejected == {"truncated": 1} and len(found) <= 6
    assert share < 0.5 or packed or len(found) >= 3


def test_a_damaged_header_in_a_tar_is_not_taken_for_the_end(tmp_path):
    path = pathlib.Path(tar(tmp_path / "in" / "b.tar", [x for n in range(4) for x in sample(n)]))
    data = bytearray(path.read_bytes())
    at = data.index(b"002.jpg")
    data[at + 100 : at + 160] = b"\x99" * 60
    path.write_bytes(data)
    found = imported(tmp_path, format="webdataset", inputs=(str(tmp_path / "in"),))
    # Nothing says that the sample before it is complete.
    assert found == (["n 0"], {"truncated": 1})


def test_members_of_a_tar_that_lead_elsewhere_are_refused(tmp_path):
    secret = put(tmp_path, "secret.jpg", picture(200))
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as out:
        for name, kind, target in (
            ("001.jpg", tarfile.SYMTYPE, secret),
            ("002.jpg", tarfile.LNKTYPE, "000.jpg"),
            ("../003.jpg", tarfile.REGTYPE, ""),
            ("/004.jpg", tarfile.REGTYPE, ""),
            ("005.jpg", tarfile.FIFOTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = len(picture(3)) if kind == tarfile.REGTYPE else 0
            out.addfile(info, io.BytesIO(picture(3)))
            text = tarfile.TarInfo(name.replace("jpg", "txt"))
            text.size = 2
            out.addfile(text, io.BytesIO(b"no"))
        for name, data in sample(7):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    before = {x for x in tmp_path.rglob("*")}
    found = imported(tmp_path, format="webdataset", inputs=(str(path),))
    assert found == (["n 7"], {"unsafe name": 5})
    new = {x for x in tmp_path.rglob("*")} - before
    assert all(x == tmp_path / "out" or tmp_path / "out" in x.parents for x in new)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.jpg", picture(1)), ("1.jpg", picture(2)), ("1.txt", b"x")], "same name"),
        ([("1.jpg", picture(1)), ("1.txt", b"\xff\xfe")], "not unicode"),
        ([("1.jpg", picture(1)), ("1.json", b'{"prompt": NaN}')], "bad row"),
        ([("1.jpg", picture(1)), ("1.json", b'{"prompt": "\\ud800"}')], "not unicode"),
        ([("1.jpg", picture(1)), ("1.json", b"[]")], "bad row"),
        ([("1.jpg", picture(1))], "missing field"),
        ([("1.txt", b"x")], "missing field"),
        ([("1.jpg", b""), ("1.txt", b"x")], "empty"),
        ([("\udcff1.jpg", picture(1)), ("\udcff1.txt", b"x")], "unsafe name"),
    ],
)
def test_a_bad_sample_is_counted(tmp_path, members, reason):
    assert samples(tmp_path, [*sample(0), *members, *sample(7)]) == (["n 0", "n 7"], {reason: 1})


def test_pictures_of_a_damaged_archive_are_counted(tmp_path):
    made = published.sharegpt4o_image(tmp_path / "in")
    path = pathlib.Path(made.job["images"][1])
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: len(data) // 2])
    found, rejected = imported(tmp_path, **(made.job | {"task": made.task}))
    assert rejected["truncated"] >= 1 and rejected["missing picture"] >= 1
    assert 0 < len(found) < 5
    assert found == [text for text, *_ in made.examples if text in found]


def test_a_packed_archive_of_pictures_is_refused(tmp_path):
    made = published.sharegpt4o_image(tmp_path / "in")
    packed = tar(tmp_path / "in" / "x.tar.gz", sample(1), packed=True)
    with pytest.raises(InputError, match="compressed.*unpack it"):
        imported(tmp_path, **(made.job | {"images": (packed,)}))


def rows_of(count, **changes):
    return [{"text": f"n {n}", "image": struct(picture(n)), **changes} for n in range(count)]


def test_tables_with_missing_columns_and_cut_tables_are_counted(tmp_path):
    published.table(tmp_path / "in" / "a.parquet", rows_of(2))
    published.table(tmp_path / "in" / "b.parquet", [{"image": struct(picture(5))}] * 3)
    cut = pathlib.Path(published.table(tmp_path / "in" / "c.parquet", rows_of(3)))
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "in" / "d.parquet").write_bytes(b"")
    published.table(tmp_path / "in" / "e.parquet", [{"text": "x", "image": None}, *rows_of(1)])
    found = imported(tmp_path, format="parquet", inputs=(str(tmp_path / "in"),))
    assert found == (
        ["n 0", "n 1", "n 0"],
        {"missing field": 3, "missing picture": 1, "truncated": 2},
    )


def test_a_damaged_page_of_a_table_is_counted(tmp_path):
    path = pathlib.Path(published.table(tmp_path / "in" / "a.parquet", rows_of(8), group=2))
    data = bytearray(path.read_bytes())
    data[4:90] = bytes(86)
    path.write_bytes(data)
    published.table(tmp_path / "in" / "b.parquet", rows_of(1))
    found, rejected = imported(tmp_path, format="parquet", inputs=(str(tmp_path / "in"),))
    assert found[-1] == "n 0" and sum(rejected.values()) >= 1


@pytest.mark.parametrize(
    ("name", "text", "rejected"),
    [
        ("a.json", '[{"text": "good", "image": "good.jpg"}, 5, "x", null, []]', {"bad row": 4}),
        ("a.json", '[{"text": "good", "image": "good.jpg"}, {"text": "b", "ima', {"truncated": 1}),
        ("a.json", '[{"text": "good", "image": "good.jpg"}', {"truncated": 1}),
        ("a.json", '[{"text": "good", "image": "good.jpg"}]\n[{"text": "lost"}]', {"bad row": 1}),
        (
            "a.json",
            '{"text": "good", "image": "good.jpg", "x": {"text": "b"}}\n{}\n',
            {"missing field": 1},
        ),
        (
            "a.json",
            '[{"text": "good", "image": "good.jpg"}, {"text": ["a", "b"], "image": "good.jpg"}]',
            {"bad row": 1},
        ),
        ("a.csv", "text,image\ngood,good.jpg\none\na,b,c\n", {"bad row": 2}),
        ("a.csv", 'text,image\ngood,good.jpg\n"x"y,good.jpg\n', {"bad row": 1}),
        ("a.csv", 'text,image\ngood,good.jpg\n"cut,good.jpg\n', {"bad row": 1}),
    ],
)
def test_lists_that_are_damaged(tmp_path, name, text, rejected):
    put(tmp_path, "in/good.jpg", picture(1))
    path = put(tmp_path, f"in/{name}", text)
    assert imported(tmp_path, format="list", inputs=(path,), shard_records=1) == (
        ["good"],
        rejected,
    )


def test_parts_of_archives_are_told_from_other_files(tmp_path):
    names = ["a.tar", "a.tar.idx", "a.tar.json", "b.tar.gz", "b.tar", "c.tgz", "d.txt"]
    names += ["e.tar.split.000", "e.tar.split.001", "f.tar.gz.part001", "f.tar.gz.part002"]
    names += ["g.tar.001", "g.tar.002", "h.tar.aa", "h.tar.ab", "i.tar.gz.part-aa"]
    for name in names:
        put(tmp_path, name, b"")
    found = [[pathlib.Path(x).name for x in parts] for parts in inputs.archives([str(tmp_path)])]
    assert found == [
        ["a.tar"], ["b.tar"], ["b.tar.gz"], ["c.tgz"], ["e.tar.split.000", "e.tar.split.001"],
        ["f.tar.gz.part001", "f.tar.gz.part002"], ["g.tar.001", "g.tar.002"],
        ["h.tar.aa", "h.tar.ab"], ["i.tar.gz.part-aa"],
    ]  # fmt: skip


@pytest.mark.parametrize("root", ["/", "IN", "."])
def test_names_from_the_root_of_the_disk_lie_below_a_folder(tmp_path, root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path, "..a/b.jpg", picture(1))
    store = inputs.Store([str(tmp_path) if root == "IN" else root])
    assert store.read(path, "x") == picture(1)
    if root != "/":
        assert store.read("..a/../..a/b.jpg", "x") == picture(1)
        with pytest.raises(BadRecord, match="leads out"):
            store.read("/etc/hostname", "x")


def test_a_picture_without_caption_is_counted(tmp_path):
    for n in range(2):
        put(tmp_path, f"in/{n}.jpg", picture(n))
    put(tmp_path, "in/1.txt", "one")
    found = imported(tmp_path, format="folder", inputs=(str(tmp_path / "in"),))
    assert found == (["one"], {"no text": 1})


def test_captions_beside_pictures_count_where_no_metadata_lies_above(tmp_path):
    put(tmp_path, "in/a/good.jpg", picture(1))
    put(tmp_path, "in/a/metadata.jsonl", lines([{"file_name": "good.jpg", "text": "good"}]))
    put(tmp_path, "in/b/one.jfif", picture(2))
    put(tmp_path, "in/b/one.txt", "\ufeffone")
    put(tmp_path, "in/two.jpg", picture(3))
    found = imported(tmp_path, format="folder", inputs=(str(tmp_path / "in"),))
    assert found == (["good", "one"], {"no text": 1})


def test_an_import_of_nothing_fails_and_says_why_and_can_be_mended(tmp_path):
    put(tmp_path, "in/1.jpg", picture(1))
    given = {"format": "folder", "inputs": (str(tmp_path / "in"),)}
    for _ in range(2):
        with pytest.raises(Failure, match="no record came of it: 1 no text"):
            imported(tmp_path, **given)
    put(tmp_path, "in/1.txt", "one")
    assert imported(tmp_path, **given)[0] == ["one"]


def test_an_arrow_file_that_is_none_is_counted(tmp_path):
    published.table(tmp_path / "in" / "a.parquet", rows_of(1))
    put(tmp_path, "in/b.arrow", b"no table")
    put(tmp_path, "in/c.arrow", b"")
    given = {"format": "parquet", "inputs": (str(tmp_path / "in"),), "columns": {"text": "text"}}
    assert imported(tmp_path, **given) == (["n 0"], {"truncated": 2})


def test_a_column_that_no_table_has_is_an_error(tmp_path):
    published.table(tmp_path / "in" / "a.parquet", rows_of(2))
    given = {"format": "parquet", "inputs": (str(tmp_path / "in"),)}
    with pytest.raises(InputError, match="group=typo: .*a.parquet has no column 'typo', only"):
        imported(tmp_path, **given, columns={"group": "typo"})


@pytest.mark.parametrize("form", ["list", "webdataset"])
def test_a_column_that_no_row_has_is_told(tmp_path, caplog, form):
    """Not all rows need it, so that it is no error where rows are read one by one."""
    if form == "list":
        rows = [{"text": f"n {n}", "image": f"{n}.jpg"} for n in range(3)]
        path = put(tmp_path, "in/a.json", json.dumps(rows))
        for n in range(3):
            put(tmp_path, f"in/{n}.jpg", picture(n))
        named = {"text": "text", "target": "image"}
    else:
        path = tar(tmp_path / "in" / "a.tar", [x for n in range(3) for x in sample(n)])
        named = {"target": "jpg"}
    found, rejected = imported(
        tmp_path, format=form, inputs=(path,), columns={**named, "group": "typo"}
    )
    assert len(found) == 3 and not rejected
    lines = [x for x in caplog.messages if x.startswith("--columns")]
    assert lines == [
        "--columns group=typo: none of the first 100 rows has that field; correct it if it is "
        "misspelt"
    ]


def test_a_warning_where_nothing_goes_to_validation_and_splits_are_joined(tmp_path, caplog):
    for split in ("train", "test"):
        published.table(tmp_path / "in" / f"{split}-0.parquet", rows_of(2))
    given = {"format": "parquet", "inputs": (str(tmp_path / "in"),)}
    imported(tmp_path, **given, validation=1e-9)
    assert "the input names the splits test, train, which are not kept" in caplog.text
    assert "no group of 4 records went to that split" in caplog.text


def test_reasons_are_in_the_documentation():
    root = pathlib.Path(importing.__file__).parents[3]
    text = (root / "docs" / "data.md").read_text().split("## Rejects")[1].split("\n## ")[0]
    told = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    files = [*(root / "qk_jax/data/importers").glob("*.py"), root / "qk_jax/data/example.py"]
    files.append(root / "qk_jax/pictures/decoding.py")
    found = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadRecord":
                found |= {x.value for x in ast.walk(node.args[0]) if isinstance(x, ast.Constant)}
    assert found <= told
