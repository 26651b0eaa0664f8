"""The batch plan: a pure function of the step, for any number of hosts and workers."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from configs import stage3
from qk_jax.base.errors import InputError
from qk_jax.data import pipeline, prompts, records
from qk_jax.data.example import TASKS, TaskSettings
from qk_jax.data.importers import record_files
from qk_jax.data.synthesis import corpus, tasks
from qk_jax.pictures.fitting import contain, cover

TOKENIZER = corpus.EMBEDDED.parent / "tiny" / "tokenizer"
SMALL = {"text_to_image": 0.5, "editing": 0.3, "composition": 0.2}


def config(weights=None, batch=8, **data):
    out = stage3.get_config("tiny")
    with out.unlocked():
        out.data.tokenizer = str(TOKENIZER)
        out.data.batch = batch
        out.data.tasks = {name: (weights or SMALL).get(name, 0.0) for name in TASKS}
        out.validation.batch = 4
        out.validation.batches = 4
        out.data.update(data)
    return out


@pytest.fixture(scope="module")
def layout():
    return prompts.make_layout(config())


@pytest.fixture(scope="module")
def pipe(layout):
    return pipeline.Pipeline(config(), "train", 0, 1, layout)


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
        rows, (height, width) = 8, batch["target"].shape[1:3]
        pictures = batch["roles"].shape[1]
        length = batch["input_ids"].shape[1]
        assert batch["target"].shape == (rows, height, width, 3)
        assert batch["input_ids"].dtype == np.int32
        assert batch["attention_mask"].shape == (rows, length)
        assert batch["position_ids"].shape == (rows, 3, length)
        assert batch["text_mask"].shape == (rows, (24, 32, 40)[min(pictures, 2)])
        assert batch["pixel_values"].dtype == np.float32 and batch["pixel_values"].shape[2] == 1176
        assert (batch["pixel_values"].shape[1] == 0) == (pictures == 0)
        assert len(batch["conditions"]) == pictures
        assert all(c.shape[0] == rows and c.dtype == np.uint8 for c in batch["conditions"])
        assert batch["roles"].dtype == np.int32 and batch["record"].dtype == np.int64
        assert len(set(batch["task"])) == 1 and batch["condition_mask"].dtype == bool
        assert "target_pixel_values" not in batch
        seen.add((height, width, pictures))
    assert len(seen) > 4


@pytest.mark.parametrize("task", TASKS)
def test_no_instruction_of_the_corpus_is_cut(task, layout):
    for example in tasks.examples("train", task, 120, seed=1):
        words = layout.encode_text(example.instruction, strict=True)
        assert len(words) <= prompts.text_tokens(config(), len(example.pictures))


def test_a_row_cannot_have_more_text_than_the_model_reads(layout):
    with pytest.raises(InputError, match=r"text_tokens has 64 .*max_text = 48"):
        pipeline.Pipeline(config(text_tokens=(64,)), "train", 0, 1, layout)


def test_the_same_step_gives_the_same_batch_and_resuming_is_another_first_step(pipe, layout):
    again = pipeline.Pipeline(config(), "train", 0, 1, layout)
    for step, batch in zip(range(5, 11), again.batches(5), strict=False):
        same(batch, pipe.batch(step))
    again.close()
    other = config()
    other.seed = 1
    changed = pipeline.Pipeline(other, "train", 0, 1, layout)
    keys = [pipe.batch(i)["record"].tolist() != changed.batch(i)["record"].tolist() for i in (0, 1)]
    assert all(keys)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_have_the_global_batch(pipe, layout, hosts):
    parts = [pipeline.Pipeline(config(), "train", i, hosts, layout) for i in range(hosts)]
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
        pipeline.Pipeline(config(), "train", 0, 3, layout)


def test_worker_processes_change_nothing(pipe, layout):
    with_workers = pipeline.Pipeline(config(workers=2), "train", 0, 1, layout)
    for step, batch in zip(range(7, 12), with_workers.batches(7), strict=False):
        same(batch, pipe.batch(step))
    with_workers.close()


def test_an_epoch_has_no_record_twice_and_the_next_has_another_order(layout, tmp_path):
    write_records(tmp_path, 60)
    pipe = pipeline.Pipeline(
        config({"text_to_image": 1}, records=str(tmp_path)), "train", 0, 1, layout
    )
    per_epoch = sum(shape.batches for shape in pipe.shapes())
    epochs = [
        [n for step in range(per_epoch) for n in pipe.batch(e * per_epoch + step)["record"]]
        for e in range(3)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) >= 60 - 8 * len(pipe.shapes())
    assert epochs[0] != epochs[1] != epochs[2]


def test_tasks_come_by_their_weights(pipe):
    names = [pipe.groups[pipe.plan[step][0]].task for step in range(400)]
    shares = {name: count / 400 for name, count in Counter(names).items()}
    assert shares == pytest.approx(SMALL, abs=0.02)
    # and not in long runs of one task
    assert max(len(list(run)) for _, run in itertools.groupby(names)) <= 3


def test_shapes_are_few_and_listed(pipe, layout):
    shapes = pipe.shapes()
    assert {shape.task for shape in shapes} == set(SMALL)
    assert {shape.size for shape in shapes} == {(64, 64), (48, 80), (80, 48)}
    assert {shape.pictures for shape in shapes} == {0, 1, 2, 3}
    few = pipeline.Pipeline(config(max_groups=2), "train", 0, 1, layout)
    counts = Counter(shape.task for shape in few.shapes())
    assert counts == {"text_to_image": 2, "editing": 2, "composition": 2}
    assert sum(shape.records for shape in few.shapes()) == sum(s.records for s in shapes)
    for step in range(6):
        size = few.batch(step)["target"].shape[1:3]
        assert size in {shape.size for shape in few.shapes()}


def test_what_is_dropped_is_drawn_by_place(layout):
    drop = {"text": 0.2, "pictures": 0.3, "both": 0.1}
    pipe = pipeline.Pipeline(config({"editing": 1}, batch=16, dropout=drop), "train", 0, 1, layout)
    kinds = Counter()
    for step in range(40):
        batch = pipe.batch(step)
        text = batch["text_mask"].any(1)
        kinds.update(zip(text.tolist(), batch["condition_mask"].tolist(), strict=True))
        shown = (batch["input_ids"] == layout.image_token_id).any(1)
        np.testing.assert_array_equal(shown, batch["condition_mask"])
    share = {kind: count / 640 for kind, count in kinds.items()}
    known = {(True, True): 0.4, (False, True): 0.2, (True, False): 0.3, (False, False): 0.1}
    assert share == pytest.approx(known, abs=0.06)


def test_validation_is_fixed_whole_and_of_every_task(layout):
    held_out = pipeline.Pipeline(config(), "validation", 0, 1, layout)
    first, second = list(held_out.fixed()), list(held_out.fixed())
    assert len(first) == 4
    for a, b in zip(first, second, strict=True):
        same(a, b)
        assert a["condition_mask"].all() and a["text_mask"].any(1).all()
    assert {TASKS[batch["task"][0]] for batch in first} == set(SMALL)


def test_targets_are_shown_when_alignment_is_on(layout):
    wanted = config({"text_to_image": 1})
    wanted.alignment.weight = 0.1
    batch = pipeline.Pipeline(wanted, "train", 0, 1, layout).batch(0)
    assert batch["target_pixel_values"].shape[0] == 8
    assert batch["target_pixel_values"].shape[1] > 0


# ---- bad input ---------------------------------------------------------------------------------


def picture(width=40, height=40, shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 100, 100)).save(buffer, "PNG")
    return buffer.getvalue()


def write_records(folder, count, broken=(), split="train"):
    """Text-to-image records; number i of `broken` gets the header and blobs given for it."""
    broken = dict(broken)

    def rows():
        for i in range(count):
            header = {"instruction": f"picture {i}", "roles": []}
            blobs = {"target": picture(40 + 30 * (i % 2), 40, i % 256)}
            bad_header, bad_blobs = broken.get(i, ({}, {}))
            yield {
                "header": header | bad_header,
                "blobs": blobs | bad_blobs,
                "width": 40 + 30 * (i % 2),
                "height": 40,
                "task": "text_to_image",
            }

    records.write_records(folder / f"{split}.array_record", rows())


BROKEN = {
    3: ({}, {"target": b"no picture"}),
    4: ({"instruction": 5}, {}),
    11: ({}, {"target": picture(300, 300)}),
    12: ({"roles": ["source"]}, {}),
}


def test_bad_records_are_counted_and_replaced_alike_everywhere(layout, tmp_path, caplog):
    write_records(tmp_path, 64, BROKEN)
    wanted = config({"text_to_image": 1}, records=str(tmp_path), max_pixels=5000)
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, layout)
    again = pipeline.Pipeline(wanted, "train", 0, 1, layout)
    steps = sum(shape.batches for shape in pipe.shapes())
    read = []
    for step in range(steps):
        batch = pipe.batch(step)
        same(batch, again.batch(step))
        read += batch["record"].tolist()
    assert not set(read) & set(BROKEN)
    kinds = ("undecodable", "no text", "too large", "roles")
    assert pipe.bad_records == {("text_to_image", kind): 1 for kind in kinds}
    assert "record 11 of" in caplog.text and "5,000 pixels" in caplog.text


def test_too_many_bad_records_stop_the_run_and_are_named(layout, tmp_path):
    write_records(tmp_path, 64, {i: BROKEN[3] for i in range(0, 64, 4)})
    wanted = config({"text_to_image": 1}, records=str(tmp_path), max_bad_share=0.001)
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, layout)
    with pytest.raises(InputError, match="records are bad.*undecodable.*max_bad_share.*record"):
        for step in range(8):
            pipe.batch(step)
    write_records(tmp_path, 64, {i: BROKEN[3] for i in range(64)})
    pipe = pipeline.Pipeline(wanted, "train", 0, 1, layout)
    with pytest.raises(InputError, match="in a row are bad"):
        pipe.batch(0)


def test_data_that_does_not_fit_the_config_is_named(layout, tmp_path):
    write_records(tmp_path, 20)
    cases = {
        "there is no record file": config(records=str(tmp_path / "none")),
        "no record of task editing": config({"editing": 1}, records=str(tmp_path)),
        "less than one batch": config({"text_to_image": 1}, 32, records=str(tmp_path)),
        "no task has a weight": config({"editing": 0.0}),
    }
    for message, wanted in cases.items():
        with pytest.raises(InputError, match=message):
            pipeline.Pipeline(wanted, "train", 0, 1, layout)
    homeless = config(tokenizer="")
    homeless.init.vlm = ""
    with pytest.raises(InputError, match="no tokenizer"):
        pipeline.Pipeline(homeless, "train", 0, 1)


# ---- examples made elsewhere -------------------------------------------------------------------


def test_written_examples_are_read_back(layout, tmp_path):
    given = [
        example
        for task in ("text_to_image", "editing", "composition")
        for example in tasks.validation_examples(task, 12)
    ]
    path = tmp_path / "train.array_record"
    assert record_files.write_examples(path, given) == 36
    file = records.RecordFile(path)
    for task in ("editing", "composition"):
        source = record_files.RecordSource(file, task, TaskSettings(), 0)
        expected = [example for example in given if example.task == task]
        for number, example in enumerate(expected):
            got = source[number]
            assert (got.instruction, got.roles) == (example.instruction, example.roles)
            np.testing.assert_array_equal(got.target, example.target)
            for a, b in zip(got.pictures, example.pictures, strict=True):
                np.testing.assert_array_equal(a, b)
    pipe = pipeline.Pipeline(config(batch=2, records=str(tmp_path)), "train", 0, 1, layout)
    assert pipe.batch(0)["target"].shape[0] == 2
    with pytest.raises(InputError, match="1 pictures"):
        record_files.write_examples(tmp_path / "b", [given[12]._replace(roles=())])
    assert not (tmp_path / "b").exists()


def test_other_sizes_are_covered_and_references_fitted():
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200
    covered = cover(wide, (64, 64))
    assert covered.shape == (64, 64, 3) and (covered[:, 4:-4] == 200).all()
    fitted = contain(wide, 60)
    assert (fitted[:20] == 255).all() and (fitted[30, 5] == 0).all()


def test_a_tfds_data_set_is_read(layout, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Shades(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "text": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(20):
                yield i, {"image": io.BytesIO(picture(50, 30, i)), "text": f"shade {i}"}

    builder = Shades(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setattr(
        tfds, "builder", lambda name: tfds.builder_from_directory(builder.data_path)
    )
    wanted = config({"text_to_image": 1}, batch=4, records="tfds:shades")
    batch = pipeline.Pipeline(wanted, "train", 0, 1, layout).batch(0)
    assert batch["target"].shape == (4, 64, 64, 3)
    assert batch["target"][0, 0, 0, 0] == batch["record"][0] or len(set(batch["record"])) == 4
    with pytest.raises(InputError, match="no split"):
        pipeline.Pipeline(wanted, "validation", 0, 1, layout)
    with pytest.raises(InputError, match="text_to_image only"):
        pipeline.Pipeline(config(records="tfds:shades"), "train", 0, 1, layout)
    monkeypatch.undo()
    with pytest.raises(InputError, match="tfds:shades"):
        pipeline.Pipeline(wanted, "train", 0, 1, layout)
