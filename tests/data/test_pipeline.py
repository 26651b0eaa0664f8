"""The batch plan: a pure function of the step, for any number of hosts and workers."""

import io
import itertools
import multiprocessing
import os
import signal
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from qk_jax.base.errors import InputError
from qk_jax.data import pipeline, prompts, records, settings
from qk_jax.data.example import TASKS, Example
from qk_jax.data.synthesis import tasks
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.roles import REFERENCE
from tests.data import stage3, written

SMALL = {"text_to_image": 0.5, "editing": 0.3, "composition": 0.2}


def config(weights=None, batch=8, **data):
    return stage3.config(weights or SMALL, batch, 4, **data)


@pytest.fixture(scope="module")
def pipe(builder):
    return pipeline.Pipeline(config(), "train", 0, 1, builder)


def batches(pipe):
    """Batches of an epoch."""
    return sum(len(group.numbers) // 8 for group in pipe.groups)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        for x, y in zip(
            *([z] if isinstance(z, np.ndarray) else z for z in (a[name], b[name])), strict=True
        ):
            np.testing.assert_array_equal(x, y)


def test_a_batch_has_the_stated_arrays(pipe):
    seen = set()
    for step in range(12):
        batch = pipe.batch(step)
        slots, (height, width) = 8, batch["target"].shape[1:3]
        pictures = batch["roles"].shape[1]
        length = batch["input_ids"].shape[1]
        assert batch["target"].shape == (slots, height, width, 3)
        assert batch["input_ids"].dtype == np.int32
        assert batch["attention_mask"].shape == (slots, length)
        assert batch["position_ids"].shape == (slots, 3, length)
        assert batch["text_mask"].shape == (slots, (24, 32, 40)[min(pictures, 2)])
        assert batch["pixel_values"].dtype == np.float32 and batch["pixel_values"].shape[2] == 1176
        assert (batch["pixel_values"].shape[1] == 0) == (pictures == 0)
        assert len(batch["conditions"]) == pictures
        assert all(c.shape[0] == slots and c.dtype == np.uint8 for c in batch["conditions"])
        assert batch["roles"].dtype == np.int32 and batch["record"].dtype == np.int64
        assert len(set(batch["task"])) == 1 and batch["condition_mask"].dtype == bool
        assert "target_pixel_values" not in batch
        seen.add((height, width, pictures))
    assert len(seen) > 4


@pytest.mark.parametrize("task", TASKS)
def test_no_instruction_of_the_corpus_is_cut(task, builder):
    for example in tasks.examples("train", task, 120, seed=1):
        words = builder.encode_text(example.instruction, strict=True)
        assert len(words) <= prompts.text_tokens(config(), len(example.pictures))


def test_a_prompt_cannot_have_more_text_than_the_model_reads(builder):
    with pytest.raises(InputError, match=r"text_tokens has 64 .*max_text = 48"):
        pipeline.Pipeline(config(text_tokens=(64,)), "train", 0, 1, builder)


def test_the_same_step_gives_the_same_batch_and_resuming_is_another_first_step(pipe, builder):
    again = pipeline.Pipeline(config(), "train", 0, 1, builder)
    for step, batch in zip(range(5, 11), again.batches(5), strict=False):
        same(batch, pipe.batch(step))
    again.close()
    other = config()
    other.seed = 1
    changed = pipeline.Pipeline(other, "train", 0, 1, builder)
    keys = [pipe.batch(i)["record"].tolist() != changed.batch(i)["record"].tolist() for i in (0, 1)]
    assert all(keys)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_have_the_global_batch(pipe, builder, hosts):
    parts = [pipeline.Pipeline(config(), "train", i, hosts, builder) for i in range(hosts)]
    for step in (0, 3, 1001):
        whole = pipe.batch(step)
        pieces = [part.batch(step) for part in parts]
        for name, value in whole.items():
            if name == "conditions":
                joined = tuple(
                    np.concatenate(x) for x in zip(*(p[name] for p in pieces), strict=True)
                )
                same({"c": joined}, {"c": value})
            else:
                np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), value)
    with pytest.raises(InputError, match="3 hosts"):
        pipeline.Pipeline(config(), "train", 0, 3, builder)


def test_worker_processes_change_nothing(pipe, builder):
    with_workers = pipeline.Pipeline(config(workers=2), "train", 0, 1, builder)
    for step, batch in zip(range(7, 12), with_workers.batches(7), strict=False):
        if step == 7:  # a terminal sends Ctrl-C to them as well, though the run still takes a step
            workers = multiprocessing.active_children()
            assert len(workers) >= 2
            for worker in workers:
                os.kill(worker.pid, signal.SIGINT)
        same(batch, pipe.batch(step))
    with_workers.close()


def test_an_epoch_has_no_record_twice_and_the_next_has_another_order(builder, tmp_path):
    write_records(tmp_path, 60)
    pipe = pipeline.Pipeline(
        config({"text_to_image": 1}, records=str(tmp_path)), "train", 0, 1, builder
    )
    per_epoch = batches(pipe)
    epochs = [
        [n for step in range(per_epoch) for n in pipe.batch(e * per_epoch + step)["record"]]
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) >= 60 - 8 * len(pipe.groups)
    assert epochs[0] != epochs[1] != epochs[2]


def test_tasks_come_by_their_weights(pipe):
    names = [pipe.groups[pipe.plan[step][0, 0]].task for step in range(400)]
    shares = {name: count / 400 for name, count in Counter(names).items()}
    assert shares == pytest.approx(SMALL, abs=0.02)
    # and not in long runs of one task
    assert max(len(list(run)) for _, run in itertools.groupby(names)) <= 3


def test_shapes_are_few_and_listed(pipe, builder):
    assert {group.task for group in pipe.groups} == set(SMALL)
    assert {group.size for group in pipe.groups} == {(64, 64), (48, 80), (80, 48)}
    assert {group.pictures for group in pipe.groups} == {0, 1, 2, 3}
    few = pipeline.Pipeline(config(max_groups=2), "train", 0, 1, builder)
    counts = Counter(group.task for group in few.groups)
    assert counts == {"text_to_image": 2, "editing": 2, "composition": 2}
    total = sum(len(group.numbers) for group in pipe.groups)
    assert sum(len(group.numbers) for group in few.groups) == total
    for step in range(6):
        size = few.batch(step)["target"].shape[1:3]
        assert size in {group.size for group in few.groups}


def test_references_keep_their_aspect_ratio(builder, tmp_path):
    """A batch has the shapes of its group; what is merged is shown whole, with white around it."""
    shapes = [(64, 64), (80, 48), (48, 80), (128, 128), (160, 96)]
    examples = []
    for number in range(150):
        dark = [np.zeros((*shapes[i % 5], 3), np.uint8) for i in (number, number // 5)]
        target = np.full((64, 64, 3), 200, np.uint8)
        examples.append(Example("both", target, tuple(dark), (REFERENCE,) * 2, "composition", 0))
    written.write(tmp_path / "train.array_record", examples)
    ratios = {"records": str(tmp_path), "reference_ratios": ((1, 1), (2, 3))}
    drop = {"text": 0.0, "pictures": 0.0, "both": 0.0}
    for limit, count in ((100, 9), (2, 2)):
        wanted = config({"composition": 1}, 4, max_groups=limit, dropout=drop, **ratios)
        pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
        assert len(pipe.groups) == count
        whites = []
        for step in range(20):
            group, batch = pipe.groups[pipe.plan[step][0, 0]], pipe.batch(step)
            assert tuple(x.shape[1:3] for x in batch["conditions"]) == group.references
            whites += [float((x > 127).mean()) for x in batch["conditions"]]
            patches = sum(h * w for h, w in builder.grids(group.references))
            assert batch["pixel_values"].shape[1] == patches
        assert (max(whites) == 0) == (limit == 100)
        assert max(whites) < 0.7


def test_what_is_dropped_is_drawn_by_slot(builder):
    drop = {"text": 0.2, "pictures": 0.3, "both": 0.1}
    pipe = pipeline.Pipeline(config({"editing": 1}, batch=16, dropout=drop), "train", 0, 1, builder)
    kinds = Counter()
    for step in range(40):
        batch = pipe.batch(step)
        text = batch["text_mask"].any(1)
        kinds.update(zip(text.tolist(), batch["condition_mask"].tolist(), strict=True))
        shown = (batch["input_ids"] == builder.image_token_id).any(1)
        np.testing.assert_array_equal(shown, batch["condition_mask"])
    share = {kind: count / 640 for kind, count in kinds.items()}
    known = {(True, True): 0.4, (False, True): 0.2, (True, False): 0.3, (False, False): 0.1}
    assert share == pytest.approx(known, abs=0.06)


def test_a_task_may_have_a_dropout_of_its_own(builder, pipe):
    """The others keep the common one, and their very draws."""
    own = dict.fromkeys(TASKS, ()) | {"editing": (0.0, 0.9, 0.1)}
    drop = {"text": 0.5, "pictures": 0.0, "both": 0.0}
    kinds = {task: Counter() for task in SMALL}
    made = pipeline.Pipeline(config(dropout=drop, task_dropout=own), "train", 0, 1, builder)
    common = pipeline.Pipeline(config(dropout=drop), "train", 0, 1, builder)
    for step in range(40):
        batch = made.batch(step)
        task = TASKS[batch["task"][0]]
        shown = batch["condition_mask"].tolist()
        kinds[task].update(zip(batch["text_mask"].any(1).tolist(), shown, strict=True))
        if task != "editing":
            same(batch, common.batch(step))
    assert set(kinds["editing"]) == {(True, False), (False, False)}
    assert kinds["editing"][True, False] > 3 * kinds["editing"][False, False]
    assert set(kinds["composition"]) == {(True, True), (False, True)}
    held_out = pipeline.Pipeline(config(task_dropout=own), "validation", 0, 1, builder)
    assert all(batch["condition_mask"].all() for batch in held_out.fixed())


@pytest.mark.parametrize("values", [(0.1, 0.1), (0.5, 0.5, 0.1), (0.1, -0.1, 0.1), ("a", 0, 0)])
def test_a_dropout_that_is_none_is_named(values):
    own = dict.fromkeys(TASKS, ()) | {"editing": values}
    with pytest.raises(InputError, match=r"config.data.task_dropout.editing is \(.*at most 1"):
        settings.check(config(task_dropout=own))
    if len(values) == 3 and not isinstance(values[0], str):  # which the config refuses itself
        common = dict(zip(("text", "pictures", "both"), values, strict=True))
        with pytest.raises(InputError, match=r"config.data.dropout is \("):
            settings.check(config(dropout=common))


def test_a_config_from_before_tasks_had_their_own_dropout(builder, pipe):
    old = config_lib.to_dict(config())
    del old["data"]["task_dropout"]
    again = config_lib.from_dict(old)
    settings.check(again)
    same(pipeline.Pipeline(again, "train", 0, 1, builder).batch(2), pipe.batch(2))


def test_validation_is_fixed_whole_and_of_every_task(builder):
    held_out = pipeline.Pipeline(config(), "validation", 0, 1, builder)
    first, second = list(held_out.fixed()), list(held_out.fixed())
    assert len(first) == 4
    for a, b in zip(first, second, strict=True):
        same(a, b)
        assert a["condition_mask"].all() and a["text_mask"].any(1).all()
    assert {TASKS[batch["task"][0]] for batch in first} == set(SMALL)


def test_targets_are_shown_when_alignment_is_on(builder):
    wanted = config({"text_to_image": 1})
    wanted.alignment.weight = 0.1
    batch = pipeline.Pipeline(wanted, "train", 0, 1, builder).batch(0)
    assert batch["target_pixel_values"].shape[0] == 8
    assert batch["target_pixel_values"].shape[1] > 0
    assert batch["whole"].shape == (8,) and batch["whole"].dtype == bool


def test_examples_with_a_dropped_condition_are_not_whole(builder):
    example = next(iter(tasks.examples("validation", "editing", 1)))
    alone = next(iter(tasks.examples("validation", "text_to_image", 1)))
    hidden = [(False, False), (True, False), (False, True), (True, True)]
    whole = pipeline.collate([example] * 4, hidden, builder, targets=True)["whole"]
    assert whole.tolist() == [True, False, False, False]
    whole = pipeline.collate([alone] * 4, hidden, builder, targets=True)["whole"]
    assert whole.tolist() == [True, False, True, False]  # it has no pictures to drop


# ---- bad input ---------------------------------------------------------------------------------


def picture(width=40, height=40, shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 100, 100)).save(buffer, "PNG")
    return buffer.getvalue()


def write_records(folder, count, broken=()):
    """Text-to-image records; number i of `broken` gets the header and blobs given for it."""
    entries = []
    for i in range(count):
        header, blobs = dict(broken).get(i, ({}, {}))
        width = 40 + 30 * (i % 2)
        header = {"instruction": f"picture {i}", "roles": []} | header
        blobs = {"target": picture(width, 40, i % 256)} | blobs
        entries.append(records.Entry(header, blobs, width, 40, task="text_to_image"))
    records.write_records(folder / "train.array_record", entries)


BROKEN = {
    3: ({}, {"target": b"no picture"}),
    4: ({"instruction": 5}, {}),
    11: ({}, {"target": picture(300, 300)}),
    12: ({"roles": ["source"]}, {}),
}


def test_bad_records_are_counted_and_replaced_alike_everywhere(builder, tmp_path, caplog):
    write_records(tmp_path, 64, BROKEN)
    wanted = config({"text_to_image": 1}, records=str(tmp_path), max_pixels=5000)
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    again = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    read = []
    for step in range(batches(pipe)):
        batch = pipe.batch(step)
        same(batch, again.batch(step))
        read += batch["record"].tolist()
    assert not set(read) & set(BROKEN)
    kinds = ("undecodable", "no text", "too large", "roles")
    assert pipe.bad == {("text_to_image", kind): 1 for kind in kinds}
    assert "record 11 of" in caplog.text and "5,000 pixels" in caplog.text


def test_too_many_bad_records_stop_the_run_and_are_named(builder, tmp_path):
    write_records(tmp_path, 64, {i: BROKEN[3] for i in range(0, 64, 4)})
    wanted = config({"text_to_image": 1}, records=str(tmp_path), max_bad_share=0.001)
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    with pytest.raises(InputError, match="records are bad.*undecodable.*max_bad_share.*record"):
        for step in range(8):
            pipe.batch(step)
    write_records(tmp_path, 64, {i: BROKEN[3] for i in range(64)})
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, builder)
    with pytest.raises(InputError, match="in a row are bad"):
        pipe.batch(0)


def test_data_that_does_not_fit_the_config_is_named(builder, tmp_path):
    write_records(tmp_path, 20)
    cases = {
        "there is no record file": config(records=str(tmp_path / "none")),
        "no record of task editing": config({"editing": 1}, records=str(tmp_path)),
        "no task has a weight": config({"editing": 0.0}),
    }
    for message, wanted in cases.items():
        with pytest.raises(InputError, match=message):
            pipeline.Pipeline(wanted, "train", 0, 1, builder)
    homeless = config(tokenizer="")
    homeless.init.vlm = ""
    with pytest.raises(InputError, match="no tokenizer"):
        pipeline.Pipeline(homeless, "train", 0, 1)
