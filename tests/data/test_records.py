"""The record file: what is written is read, and what is damaged is named."""

import pickle
import struct

import numpy as np
import pytest

from qk_jax.base.errors import InputError
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


def test_an_index_from_before_references_were_in_it_is_read(tmp_path):
    entry = records.Entry({}, {}, 10, 20, 2, "composition", ((3, 4), (5, 6)))
    path = tmp_path / "a.array_record"
    records.write_records(path, [entry])
    new = records.RecordFile(path).index
    assert new["references"].tolist() == [[[3, 4], [5, 6], [0, 0]]]
    np.save(
        records.index_path(path),
        new[["width", "height", "pictures", "bytes", "task"]].astype(
            np.dtype(records.INDEX_DTYPE.descr[:-1])
        ),
    )
    old = records.RecordFile(path)
    assert old.index.dtype == records.INDEX_DTYPE and not old.index["references"].any()
    assert old.index[["width", "height", "pictures", "bytes", "task"]].tolist() == [
        (10, 20, 2, int(new["bytes"][0]), b"composition")
    ]
    assert old[0] == records.Record({}, {})


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
