"""Several sources of a task: their weights, captions, roles and splits; bad and missing files."""

import re
from collections import Counter

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import Writer, pipeline, records, settings
from qk_jax.data.example import TASKS
from qk_jax.data.importers import registry
from qk_jax.experiment import config as config_lib
from tests.data import stage3

NO_DROPOUT = {"text": 0.0, "pictures": 0.0, "both": 0.0}


def write(
    folder, count, name="train.array_record", shade=0, task="text_to_image", noisy=False, **fields
):
    """Records whose targets have one shade; returns their folder."""
    folder.mkdir(exist_ok=True)
    with Writer(folder / name) as writer:
        for number in range(count):
            target = np.full((64, 64, 3), shade, np.uint8)
            if noisy:
                target = np.random.default_rng(number).integers(0, 200, (64, 64, 3), np.uint8)
            pictures = {} if task == "text_to_image" else {"source": target}
            writer.add(task, f"short {number}", target, **pictures, **fields)
    return folder


def config(*entries, weights=None, batch=4, **data):
    sources = tuple({"tasks": "text_to_image", **entry} for entry in entries)
    weights = weights or {"text_to_image": 1.0}
    return stage3.config(weights, batch, 4, sources=sources, dropout=NO_DROPOUT, **data)


def listed(**changes):
    return {"path": "A", "tasks": ("editing",), **changes}


def test_sources_have_their_weights_in_every_window_and_no_epoch_repeats(builder, tmp_path):
    """Over one task with three sources, a made one among them."""
    dark, light = write(tmp_path / "dark", 10), write(tmp_path / "light", 23, shade=250)
    wanted = config(
        {"path": str(dark), "weight": 1},
        {"path": str(light), "weight": 4},
        {"path": "", "weight": 2},
    )
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    rows = [pipe.groups[i] for step in range(700) for i in pipe.plan[step][:, 0]]
    total = Counter(group.source for group in rows)
    assert total == pytest.approx({"dark": 400, "light": 1600, "made": 800}, abs=4)
    members = [(pipe.groups[i], m) for step in range(100) for i, m in pipe.plan[step]]
    light = [m for group, m in members if group.source == "light"]
    assert all(len(set(light[i : i + 23])) == 23 for i in range(0, len(light) - 22, 23))
    batch = pipe.batch(0)
    shades = batch["target"].reshape(4, -1).max(axis=1)
    sources = [pipe.groups[i].source for i in pipe.plan[0][:, 0]]
    assert [shade == 0 for shade in shades] == [source == "dark" for source in sources]


def test_captions_are_drawn_by_their_weights_and_alike_on_all_hosts(builder, tmp_path):
    write(tmp_path / "a", 30, caption_long="a longer text", empty="")
    captions = {"instruction": 1.0, "caption_long": 3.0, "empty": 9.0}
    wanted = config({"path": str(tmp_path / "a"), "captions": captions})
    pipes = [pipeline.Pipeline(wanted, "train", i, n, builder) for i, n in ((0, 1), (0, 2), (1, 2))]
    drawn = Counter()
    for step in range(60):
        whole, *halves = (pipe.batch(step) for pipe in pipes)
        text = np.concatenate([half["input_ids"] for half in halves])
        np.testing.assert_array_equal(whole["input_ids"], text)
        drawn.update(whole["text_mask"].sum(axis=1).tolist())
    (long, often), *short = drawn.most_common()
    assert short and 0.65 < often / drawn.total() < 0.85
    without = config({"path": str(tmp_path / "a"), "captions": {"empty": 1}}, max_bad_share=1.0)
    with pytest.raises(InputError, match="in a row are bad.*the caption is ''"):
        pipeline.Pipeline(without, "train", 0, 1, builder).batch(0)


def test_roles_and_splits_of_an_entry(tmp_path):
    write(tmp_path / "a", 8, "mine.array_record", 7, task="customization")
    wanted = config(
        {"path": str(tmp_path / "a"), "tasks": "customization", "roles": {"source": "reference"},
         "split": "mine", "validation": ""},
        weights={"customization": 1.0},
    )  # fmt: skip
    source = registry.make_sources(wanted, "train", 0, ["customization"])["customization"]
    assert source[3].roles == (1,) and source[3].record == 3
    with pytest.raises(InputError, match="no entry .* for the validation of customization"):
        registry.make_sources(wanted, "validation", 0, ["customization"])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (({"path": "A"},), "give entries such as"),
        ((listed(weights=1),), "with the fields path, tasks, name"),
        ((listed(tasks=("singing",)),), "A: tasks is .*'singing'"),
        ((listed(weight=0),), "A: weight is 0; give a number above 0"),
        ((listed(roles={"source": "target"}),), "A: roles is"),
        ((listed(captions={}),), "A: captions is"),
        ((listed(path="tfds:x/y", captions={"a": 1}),), "y: captions and roles are of record"),
        ((listed(), listed(path="B/A/")), "two entries named 'A'"),
        ((listed(tasks="composition"),), "no entry .* of the task editing; add one"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named(entries, words):
    wanted = stage3.config({"editing": 1.0}, 4, 4, sources=tuple(map(dict, entries)))
    with pytest.raises(InputError, match=words):
        settings.check(wanted)


def test_sources_are_a_field_of_the_command_line_and_of_checkpoints():
    text = "({'path': 'A', 'tasks': 'editing', 'weight': 2},)"
    tasks = {f"data.tasks.{task}": "0" for task in TASKS if task != "editing"}
    made = config_lib.load("stage3:tiny", {"data.sources": text, **tasks})
    again = config_lib.from_dict(config_lib.to_dict(made))
    assert settings.sources(again.data) == settings.sources(made.data)
    assert settings.sources(made.data)[0].weight == 2
    with pytest.raises(InputError, match=r"config.data.records is 'B' beside config.data.sources"):
        settings.check(config_lib.load("stage3:tiny", {"data.sources": text, "data.records": "B"}))


def test_a_small_set_is_repeated_and_told(builder, tmp_path, caplog):
    write(tmp_path / "a", 3)
    wanted = stage3.config({"text_to_image": 1.0}, 8, 4, records=str(tmp_path / "a"))
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    assert "text_to_image: its 3 records, in 1 shapes, are less than a batch of 8" in caplog.text
    seen = Counter(n for step in range(3) for n in pipe.batch(step)["record"].tolist())
    assert set(seen) == {0, 1, 2} and min(seen.values()) >= 6


# ---- bad and missing files ---------------------------------------------------------------------


def shards(folder, count=4, each=40):
    names = [records.shard_name("train", number, count) for number in range(count)]
    for name in names:
        write(folder, each, name, noisy=True)
    return [folder / name for name in names]


def test_a_damaged_file_and_one_that_vanished_are_replaced_alike_on_all_hosts(
    builder, tmp_path, caplog
):
    files = shards(tmp_path / "a")
    good = write(tmp_path / "good", 40, shade=250)
    data = bytearray(files[1].read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    files[1].write_bytes(data)
    files[2].unlink()
    wanted = config({"path": str(tmp_path / "a")}, {"path": str(good)}, batch=8, max_bad_share=1.0)
    pipes = [pipeline.Pipeline(wanted, "train", i, n, builder) for i, n in ((0, 1), (0, 2), (1, 2))]
    assert "train-00002-of-00004.array_record is missing: each of its 40 records" in caplog.text
    read = Counter()
    for step in range(40):
        whole, *halves = (pipe.batch(step) for pipe in pipes)
        numbers = whole["record"].tolist()
        assert numbers == [n for half in halves for n in half["record"].tolist()]
        read.update(
            n for n, target in zip(numbers, whole["target"], strict=True) if target.max() < 250
        )
    assert not set(range(80, 120)) & set(read)
    assert len(set(range(40, 80)) & set(read)) in range(20, 40)  # what is not damaged
    assert max(read.values()) <= 8  # what replaces them is spread
    ((source, kind),) = pipes[0].bad
    assert (source, kind) == ("text_to_image/a", "unreadable") and pipes[0].bad.total() >= 40
    assert pipes[0].bad == pipes[1].bad + pipes[2].bad
    assert pipes[0].bad_counts() == {f"bad/{source}/{kind}": pipes[0].bad.total()}


def test_above_the_share_the_worst_source_is_named(builder, tmp_path):
    files, good = shards(tmp_path / "a"), write(tmp_path / "good", 40)
    files[2].unlink()
    for share, steps in ((0.0, 8), (0.01, 30)):
        wanted = config(
            {"path": str(tmp_path / "a")}, {"path": str(good)}, batch=8, max_bad_share=share
        )
        pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
        with pytest.raises(InputError, match=r"the worst is text_to_image/a with \d+ of") as found:
            for step in range(steps):
                pipe.batch(step)
        total = int(re.match(r"\d+", str(found.value))[0])
        assert (total <= 8) if share == 0.0 else (total == 11)
    records.index_path(files[2]).unlink()
    with pytest.raises(InputError, match="train-00002-of-00004.array_record is missing"):
        pipeline.Pipeline(wanted, "train", 0, 1, builder)
