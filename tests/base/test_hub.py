"""Folders stay off the network, and Hub ids come from the user's cache."""

import json
import types

import huggingface_hub
import pytest

from qk_jax.base import hub
from qk_jax.base.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, name, files, revision="main"):
    """A downloaded model as the Hub's library keeps it: links into blobs."""
    root = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    for number, (file, text) in enumerate(files.items()):
        blob = root / "blobs" / str(number)
        link = root / "snapshots" / commit / file
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / revision).write_text(commit)
    return root / "snapshots" / commit


def pipeline(parts=("text_encoder", "transformer", "vae")):
    return {"model_index.json": "{}"} | {f"{part}/config.json": "{}" for part in parts}


def test_folder_never_reaches_for_the_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert hub.model_folder(tmp_path) == tmp_path
    for name in pipeline():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert hub.component_folder(tmp_path, "vae") == tmp_path / "vae"
    assert hub.component_folder(tmp_path / "vae", "vae") == tmp_path / "vae"


def test_id_of_a_pipeline_gives_its_part(cache):
    folder = put(cache, "owner/painter", pipeline())
    assert hub.model_folder("owner/painter") == folder
    assert hub.component_folder("owner/painter", "mmdit") == folder / "transformer"
    assert hub.component_folder("owner/painter@main", "vlm") == folder / "text_encoder"
    with pytest.raises(InputError, match="has no tokenizer/"):
        hub.component_folder("owner/painter", "tokenizer")


def test_id_of_a_model_is_its_own_part(cache):
    folder = put(cache, "owner/reader", {"config.json": json.dumps({"a": 1})}, "v2")
    assert hub.component_folder("owner/reader@v2", "vlm") == folder
    assert hub.component_folder("owner/reader@v2", "tokenizer") == folder


@pytest.mark.parametrize("name", ["owner/absent", "owner/reader@other"])
def test_what_the_hub_does_not_give_is_one_line(cache, name):
    put(cache, "owner/reader", {"config.json": "{}"})
    with pytest.raises(InputError, match="the Hub does not give it") as error:
        hub.component_folder(name, "vlm")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "../up", "absent", "a b/c", ""])
def test_neither_folder_nor_id(cache, name):
    with pytest.raises(InputError):
        hub.model_folder(name or "nothing")


def test_check_asks_for_the_form_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    for good in ("owner/absent", "owner/reader@refs/pr/1", str(tmp_path)):
        hub.check(good)
    for wrong in ("absent", "a b/c", "../up", "no/such/folder"):
        with pytest.raises(InputError, match="does not exist and is no Hub id"):
            hub.check(wrong)


def test_a_download_is_told_with_its_size_and_the_cache_is_not(tmp_path, monkeypatch):
    wanted = []

    def snapshot(repo, *, dry_run=False, **kwargs):
        return wanted if dry_run else str(tmp_path)

    def no_index(*args, **kwargs):
        raise huggingface_hub.errors.EntryNotFoundError("no index")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_index)
    lines = []
    monkeypatch.setattr(hub.log, "info", lambda text, *args: lines.append(text % args))
    assert hub.component_folder("owner/reader@v2", "vlm") == tmp_path and not lines
    wanted += [
        types.SimpleNamespace(file_size=4_000_000_000, will_download=True),
        types.SimpleNamespace(file_size=1_250_000_000, will_download=True),
        types.SimpleNamespace(file_size=9_000_000_000, will_download=False),
    ]
    hub.component_folder("owner/reader@v2", "vlm")
    assert lines == ["downloading owner/reader@v2: 5.25 GB in 2 files, into the Hub's cache"]
