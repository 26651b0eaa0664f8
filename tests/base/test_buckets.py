"""Paths in buckets, by the real clients against a bucket server on this machine."""

import http.server
import pathlib
import threading
import time
import types

import numpy as np
import pytest

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.data import records
from qk_jax.data.records import Entry, RecordFile
from qk_jax.weights.safetensors import TensorFolder, write_tensors
from tests import needs
from tests.base import storage
from tests.base.storage import BUCKET


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with storage.served(tmp_path_factory.mktemp("objects")) as running:
        yield running


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path, server):
    """The same laws hold on disk and in a bucket."""
    name = request.node.name.replace("[", "-").rstrip("]")
    return files.Path(tmp_path if request.param == "local" else BUCKET) / name


def names(folder: files.Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def test_a_file_is_whole_or_absent(folder):
    files.write_text(folder / "a.json", '{"a": 1}')
    with pytest.raises(RuntimeError), files.beside(folder / "b") as part:
        part.write_text("half")
        raise RuntimeError
    files.write_text(folder / "a.json", '{"a": 2}')
    assert files.read_json(folder / "a.json") == {"a": 2}
    assert names(folder) == ["a.json"]


def test_a_folder_is_replaced_as_a_whole(folder):
    for value in ("1", "2"):
        with files.fresh_folder(folder / "export", "marker") as part:
            files.write_text(part / "marker", value)
            files.write_text(part / "inner" / value, "")
    assert (folder / "export" / "marker").read_text() == "2"
    assert names(folder / "export" / "inner") == ["2"]
    assert names(folder) == ["export"]


def test_files_of_all_folders_are_found(folder):
    for name in ("a", "b/c", "b/d/e"):
        files.write_text(folder / name, name)
    found = {str(path): path.read_text() for path in files.below(folder)}
    assert found == {str(folder / name): name for name in ("a", "b/c", "b/d/e")}


def test_what_another_host_writes_is_seen(folder, server):
    files.write_text(folder / "first", "")
    assert names(folder) == ["first"]
    if buckets.is_remote(folder):
        server.put(f"{folder.name}/second", b"")
    else:
        (folder / "second").write_text("")
    assert names(folder) == ["first", "second"]


def test_records_are_read(folder):
    path = folder / "train.array_record"
    blobs = [bytes([n]) * 1000 for n in range(5)]
    entries = [Entry({"caption": str(n)}, {"target": b}, 8, 8) for n, b in enumerate(blobs)]
    assert records.write_records(path, entries) == 5
    read = RecordFile(path)
    assert [read[n].blobs["target"] for n in (3, 0)] == [blobs[3], blobs[0]]
    records.write_records(path, entries[1:])
    assert RecordFile(path)[0].header == {"caption": "1"}  # not the copy of the older object
    assert names(folder) == ["train.array_record", "train.array_record.index.npy"]


def test_any_part_of_weights_is_read(folder, monkeypatch):
    monkeypatch.setattr(buckets, "BLOCK", 1000)
    monkeypatch.setattr(buckets, "AT_ONCE", 2)
    arrays = {
        "a": np.arange(12_000, dtype=np.float32).reshape(60, 200),
        "b": np.float32(3).reshape(()),
        "c": np.arange(7, dtype=np.float32),
    }
    write_tensors(folder, "model", arrays, max_shard_bytes=20_000)
    read = TensorFolder(folder)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read.read(name), array)
    for index in ((slice(7, 31),), (slice(7, 31), slice(3, 150)), (slice(5, 5),)):
        np.testing.assert_array_equal(read.read("a", index), arrays["a"][index])


def test_no_more_than_a_window_is_in_memory(server, monkeypatch):
    path = f"{BUCKET}/window"
    files.write_bytes(path, bytes(range(250)) * 100)
    asked = []
    fs = buckets.file_system(path)
    ranges = fs.cat_ranges

    def cat_ranges(paths, starts, stops, **kwargs):
        asked.append(sum(stops) - sum(starts))
        return ranges(paths, starts, stops, **kwargs)

    monkeypatch.setattr(fs, "cat_ranges", cat_ranges)
    monkeypatch.setattr(buckets, "BLOCK", 1000)
    monkeypatch.setattr(buckets, "AT_ONCE", 4)
    found = bytearray(10_000)
    with buckets.open_range(path, 250, 9_000) as handle:
        assert handle.readinto(found) == 9_000
    assert found[:9_000] == bytes(range(250)) * 36
    assert asked == [4000, 4000, 1000]  # and nothing beyond what is asked for


def test_growing_files_are_uploaded(server):
    folder = files.Path(BUCKET) / "mirror"
    mirror = buckets.Mirror(folder)
    with (mirror.here / "metrics.jsonl").open("a") as file:
        for line in ("1\n", "2\n"):
            file.write(line)
            file.flush()
            mirror.changed()
    limit = time.monotonic() + 20
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < limit:
        time.sleep(0.05)
    assert (folder / "metrics.jsonl").is_file()  # while the run goes on
    (mirror.here / "last").write_text("3")
    mirror.close()
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    assert (folder / "last").read_text() == "3"
    assert not mirror.here.exists()


def test_a_mirror_of_a_local_folder_is_the_folder(tmp_path):
    mirror = buckets.Mirror(tmp_path)
    mirror.changed()
    mirror.close()
    assert mirror.here == files.Path(tmp_path) and tmp_path.is_dir()


def test_a_bucket_that_is_away_for_seconds_is_waited_for(server):
    server.stop()
    again = threading.Timer(5, server.start)
    again.start()
    try:
        files.write_text(f"{BUCKET}/patience", "there")
        assert files.Path(f"{BUCKET}/patience").read_text() == "there"
    finally:
        again.join()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gs://absent/run", "gs://absent does not exist"),
        ("gs:/bucket/run", "write gs://BUCKET/FOLDER"),
        ("gs:///run", "write gs://BUCKET/FOLDER"),
    ],
)
def test_a_wrong_bucket_is_one_line(server, path, words):
    with pytest.raises(InputError, match=words):
        buckets.check([path])


def test_other_texts_are_no_buckets():
    buckets.check(["runs/a", "tfds:mnist", "owner/name@main", "a gs:b", 3, None, ("gs://x",)])


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    find = buckets.importlib.util.find_spec
    monkeypatch.setattr(
        buckets.importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find(name)
    )
    with pytest.raises(InputError, match=r"needs gcsfs; pip install 'qk_jax\[gcs\]'"):
        buckets.check(["gs://not-asked-before/run"])


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "without credentials: gcloud auth"), (403, "roles/storage.objectUser")],
)
def test_rights_that_are_missing_are_named(status, words, tmp_path, monkeypatch):
    storage.need()

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = b'{"error": {"code": %d, "message": "no access to bucket"}}' % status
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        server = storage.Server(tmp_path)
        server.url = f"http://127.0.0.1:{refusing.server_port}"
        with storage.directed(server), pytest.raises(InputError, match=words):
            buckets.check(["gs://private/run"])
        refusing.shutdown()


def test_a_copy_that_does_not_fit_is_refused(server, monkeypatch):
    files.write_bytes(f"{BUCKET}/large", b"x" * 1000)
    full = types.SimpleNamespace(free=9)
    monkeypatch.setattr(buckets.shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to a larger disk"):
        buckets.staged(f"{BUCKET}/large")


def test_a_staged_folder_has_what_is_asked_for(server):
    for name in ("a.json", "inner/b.txt", "weights.safetensors"):
        files.write_text(f"{BUCKET}/model/{name}", name)
    with buckets.staged_folder(f"{BUCKET}/model", (".json", ".txt")) as here:
        found = [file for file in pathlib.Path(here).rglob("*") if file.is_file()]
        inside = sorted(file.relative_to(here).as_posix() for file in found)
        assert inside == ["a.json", "inner/b.txt"]
        assert (here / "inner/b.txt").read_text() == "inner/b.txt"
    assert not here.exists()


def test_a_bucket_that_fails_while_it_is_read_is_one_line(tmp_path, monkeypatch):
    """Errors of the clients, which are no OSErrors."""
    gone = needs.module("gcsfs.retry").HttpError({"code": 503, "message": "backend error"})
    assert not isinstance(gone, OSError)
    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path, "model", {"x": np.zeros(3, np.float32)})

    def fails(*args, **kwargs):
        raise gone

    monkeypatch.setattr(type(files.Path(tmp_path)), "read_bytes", fails)
    with pytest.raises(InputError, match="config.json cannot be read .backend error.*; try again"):
        files.read_json(tmp_path / "config.json")
    folder = TensorFolder(tmp_path / "model.safetensors")
    monkeypatch.setattr(buckets, "open_range", fails)
    with pytest.raises(InputError, match="model.safetensors cannot be read .backend error"):
        folder.read("x")
