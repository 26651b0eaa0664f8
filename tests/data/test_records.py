"""The record file: what is written is read, and what is damaged is named."""

import pickle
import struct
from collections import Counter

import numpy as np
import pytest

from qk_jax.base.errors import BadRecord, InputError
from qk_jax.data import records


def write(path, count=40):
    entries = (
        records.Entry(
            header={"caption": f"thing {i} ü"},
            blobs={"a": bytes([i]) * i * 50, "b": b"x"},
            width=10 + i,
            height=20,
            pictures=i % 3,
            task="editing",
        )
        for i in range(count)
    )
    assert records.write_records(path, entries) == count
    return path


@pytest.mark.parametrize("columns", [5, 6])
def test_an_index_from_before_some_columns_is_read(tmp_path, columns):
    entry = records.Entry({}, {}, 10, 20, 2, "composition", ((3, 4), (5, 6)), "emoji")
    path = tmp_path / "a.array_record"
    records.write_records(path, [entry])
    new = records.RecordFile(path).index.copy()
    assert new["references"].tolist() == [[[3, 4], [5, 6], [0, 0]]]
    assert new["source"].tolist() == [b"emoji"] and new["digest"].any()
    kept = records.INDEX_DTYPE.descr[:columns]
    np.save(records.index_path(path), new[[name for name, *_ in kept]].astype(np.dtype(kept)))
    old = records.RecordFile(path)
    assert old.index.dtype == records.INDEX_DTYPE and not old.index["digest"].any()
    assert old.index["references"].any() == (columns == 6)
    assert old.index[["width", "height", "pictures", "bytes", "task"]].tolist() == [
        (10, 20, 2, int(new["bytes"][0]), b"composition")
    ]
    assert old[0] == records.Record({}, {})


def test_shards_are_one_set_in_their_order(tmp_path):
    for shard, count in enumerate((3, 0, 2)):
        entries = [records.Entry({"n": (shard, n)}, {"a": b"x"}, 1 + n, 9) for n in range(count)]
        records.write_records(tmp_path / records.shard_name("train", shard, 3), entries)
    found = records.RecordSet(tmp_path, "train")
    assert [found[n].header["n"] for n in range(len(found))] == [
        [0, 0],
        [0, 1],
        [0, 2],
        [2, 0],
        [2, 1],
    ]
    rows = [(first, index["width"].tolist()) for first, index in found.indices()]
    assert rows == [(0, [1, 2, 3]), (3, [1, 2])]
    assert found.name(3) == f"record 0 of {tmp_path}/train-00002-of-00003.array_record"
    assert pickle.loads(pickle.dumps(found))[4] == found[4]
    with pytest.raises(IndexError):
        found[5]


def test_many_shards_do_not_keep_many_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "OPEN_AT_ONCE", 3)
    for shard in range(8):
        entry = records.Entry({"n": shard}, {"a": b"x"}, 1, 9)
        records.write_records(tmp_path / records.shard_name("train", shard, 8), [entry])
    found = records.RecordSet(tmp_path, "train")
    for number in [*range(8), 7, 0, 3, 0]:
        assert found[number].header == {"n": number}
        assert sum(file.is_open for file in found.files) <= 3


def test_a_set_that_is_not_whole_is_named(tmp_path):
    for shard in (0, 2):
        records.write_records(tmp_path / records.shard_name("train", shard, 3), [])
    with pytest.raises(InputError, match="train-00001-of-00003.array_record is missing"):
        records.RecordSet(tmp_path, "train")
    records.write_records(tmp_path / records.shard_name("train", 1, 2), [])
    with pytest.raises(InputError, match="from several writings"):
        records.RecordSet(tmp_path, "train")
    with pytest.raises(InputError, match="no record file .*validation.array_record"):
        records.RecordSet(tmp_path, "validation")


def test_written_is_read_in_any_order(tmp_path):
    file = records.RecordFile(write(tmp_path / "deep" / "a.array_record"))
    assert len(file) == 40
    for number in (39, 0, 7, 7):
        record = file[number]
        assert record.header == {"caption": f"thing {number} ü"}
        assert record.blobs == {"a": bytes([number]) * number * 50, "b": b"x"}
    assert file.index["width"].tolist() == list(range(10, 50))
    assert file.index["pictures"][:4].tolist() == [0, 1, 2, 0]
    assert set(file.index["task"]) == {b"editing"}
    with pytest.raises(IndexError):
        file[40]


def test_an_open_file_pickles(tmp_path):
    file = records.RecordFile(write(tmp_path / "a.array_record"))
    before = file[3]
    assert pickle.loads(pickle.dumps(file))[3] == before


def test_a_missing_file_and_a_missing_index_are_named(tmp_path):
    with pytest.raises(InputError, match="no record file .*nothing.array_record"):
        records.RecordFile(tmp_path / "nothing.array_record")
    path = write(tmp_path / "a.array_record")
    records.index_path(path).unlink()
    with pytest.raises(InputError, match="side index .* is missing"):
        records.RecordFile(path)
    records.index_path(path).write_bytes(b"no array")
    with pytest.raises(InputError, match="side index .* is damaged"):
        records.RecordFile(path)
    np.save(records.index_path(path), np.zeros(3))
    with pytest.raises(InputError, match="another version"):
        records.RecordFile(path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9999])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = write(tmp_path / "a.array_record")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match="a.array_record"):
        records.RecordFile(path)[0]


def test_a_bad_header_is_named():
    good = records.encode({"k": 1}, {"a": b"abc"})
    bad = {
        "less than a header": b"ab",
        "says that its header": struct.pack("<I", 1 << 20) + b"{}",
        "bad header": struct.pack("<I", 3) + b"{x}",
        "should end": good + b"more",
    }
    for message, data in bad.items():
        with pytest.raises(InputError, match=message):
            records.decode(data, "record 5 of f")
    with pytest.raises(InputError, match="bad header"):
        records.decode(struct.pack("<I", 2) + b"[]")
    assert records.decode(good) == ({"k": 1}, {"a": b"abc"})


def test_a_failed_writer_leaves_nothing(tmp_path):
    def entries():
        yield records.Entry({}, {}, 1, 1)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        records.write_records(tmp_path / "a.array_record", entries())
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        records.write_records(tmp_path / "file" / "a.array_record", [])


def test_a_flipped_bit_is_found_or_without_effect(tmp_path):
    """200 of them, anywhere in a record file and its side index: a record is as it was, or cannot
    be read, or the file is named at once."""
    folder = tmp_path / "set"
    path = write(folder / "train.array_record")
    files = [path, records.index_path(path)]
    good = [
        (record.header, dict(record.blobs))
        for record in map(records.RecordFile(path).__getitem__, range(40))
    ]
    rows = records.RecordFile(path).index.tobytes()
    kept, draw = [file.read_bytes() for file in files], np.random.default_rng(0)
    total, outcomes = sum(map(len, kept)), Counter()
    for place in draw.choice(8 * total, 200, replace=False).tolist():
        byte, bit = divmod(place, 8)
        which, at = (0, byte) if byte < len(kept[0]) else (1, byte - len(kept[0]))
        data = bytearray(kept[which])
        data[at] ^= 1 << bit
        files[which].write_bytes(data)
        try:
            found = records.RecordSet(folder, "train")
            ((_, index),) = found.indices()
            assert index.tobytes() == rows
            for number, wanted in enumerate(good):
                try:
                    record = found[number]
                    assert (record.header, dict(record.blobs)) == wanted
                    outcomes["right"] += 1
                except BadRecord:
                    outcomes["unreadable"] += 1
        except BadRecord:
            raise
        except InputError as error:
            assert "train.array_record" in str(error)
            outcomes["named"] += 1
        files[which].write_bytes(kept[which])
    print(outcomes)
    assert min(outcomes.values()) > 5 and len(outcomes) == 3
