"""Windows, the clock and the files."""

import io
import json
import struct
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tensorboardX.proto import event_pb2

from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.training import metrics

CONFIG = ConfigDict({"wandb": {"project": "", "name": ""}})


def step(loss, tasks, times):
    """Summaries of rows all of one loss."""
    tasks, times = np.array(tasks, float), np.array(times, float)
    return {
        "loss": np.float32(loss), "lr": np.float32(loss / 10), "task_sum": loss * tasks,
        "task_count": tasks, "t_sum": loss * times, "t_count": times,
    }  # fmt: skip


def test_window_means_are_weighed_by_rows():
    window = metrics.Window()
    window.add(step(1.0, [2, 0, 0, 0, 0, 0], [2, 0]))
    window.add(step(4.0, [1, 3, 0, 0, 0, 0], [0, 4]))
    got = window.take()
    assert got["loss"] == 2.5 and got["lr"] == pytest.approx(0.4)
    assert got["loss/text_to_image"] == pytest.approx(2.0)
    assert got["loss/reconstruction"] == 4.0
    assert got["loss/t0.00-0.50"] == 1.0 and got["loss/t0.50-1.00"] == 4.0
    assert "loss/editing" not in got
    assert window.steps == 0


def test_a_window_goes_on_from_its_state():
    steps = [step(1 / 3, [2, 0, 0, 0, 0, 0], [2, 0]), step(0.1, [1, 3, 0, 0, 0, 0], [0, 4])]
    whole, before = metrics.Window(), metrics.Window()
    whole.add(steps[0])
    before.add(steps[0])
    whole.skip()
    before.skip()
    after = metrics.Window(json.loads(json.dumps(before.state())))
    whole.add(steps[1])
    after.add(steps[1])
    assert after.take() == whole.take() and not metrics.Window(after.state()).take()


def test_clock_leaves_out_compilation_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def iterate(seconds, counts=True):
        clock.begin()
        now[0] += 0.25 * seconds
        clock.data_ready()
        now[0] += 0.75 * seconds
        clock.end(examples=32, flops=10**12, counts=counts)

    clock = metrics.Clock()
    iterate(100, counts=False)  # compiles
    iterate(5)  # waits for the step that was compiled: not a full step
    iterate(2)
    iterate(2)
    clock.pause()
    iterate(50)
    iterate(2)
    got = clock.take(peak=1e12, devices=2)
    assert got["pictures_per_second"] == pytest.approx(16)
    assert got["model_tflops_per_second_per_device"] == pytest.approx(0.25)
    assert got["mfu"] == pytest.approx(0.25) and got["data_wait"] == pytest.approx(0.25)
    assert clock.take(None, 1) == {}


def test_without_tensorboard_the_rest_is_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = metrics.Writers(tmp_path, 0, CONFIG)
    log.write(1, "train", {"loss": 0.5})
    log.picture(1, "sheet", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert caplog.text.count("tensorboardX is not installed") == 1


def test_writers_keep_one_line_per_step_over_a_resume(tmp_path):
    log = metrics.Writers(tmp_path, 0, CONFIG)
    for number in (1, 2, 3):
        log.write(number, "train", {"loss": number / 2, "grad_norm": float("nan")})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "ki')  # killed while writing
    log = metrics.Writers(tmp_path, 2, CONFIG)
    log.write(3, "train", {"loss": 9.0})
    log.picture(3, "sheet", np.zeros((4, 4, 3), np.uint8))
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"step": 1, "kind": "train", "loss": 0.5, "grad_norm": None}
    assert lines[2]["loss"] == 9.0
    assert list(tmp_path.glob("events*"))


def events(folder):
    """The values of all event files, by tag: TFRecords of protocol buffers."""
    found = {}
    for path in folder.glob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found |= {value.tag: value for value in event.summary.value}
            at += 16 + size
    return found


def test_tensorboard_gets_figures_pictures_and_texts(tmp_path):
    log = metrics.Writers(tmp_path, 0, CONFIG)
    log.write(1, "validation", {"loss": 0.5})
    log.picture(1, "samples/editing", np.full((4, 6, 3), 200, np.uint8))
    log.text(0, "config", config_lib.table(config_lib.load("stage1:tiny")))
    log.close()
    found = events(tmp_path)
    assert found["validation/loss"].simple_value == 0.5
    picture = found["samples/editing"].image
    assert (picture.height, picture.width) == (4, 6)
    shown = Image.open(io.BytesIO(picture.encoded_image_string))
    assert shown.getpixel((0, 0)) == (200, 200, 200)
    (text,) = found["config/text_summary"].tensor.string_val
    row = next(x for x in text.decode().splitlines() if x.startswith("| optimizer.lr |"))
    assert row == "| optimizer.lr | 0.001 | peak learning rate |"
    assert "\\|" in text.decode()  # a value with a bar, which would end its cell


def test_weights_and_biases_must_be_there_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is not installed"):
        metrics.Writers(tmp_path, 0, ConfigDict({"wandb": {"project": "p", "name": ""}}))


def test_a_run_goes_on_at_weights_and_biases_after_a_restart(tmp_path, monkeypatch):
    begun = []
    fake = types.SimpleNamespace(init=lambda **given: begun.append(given) or fake)
    fake.finish = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("stage1", "stage1", "stage2"):
        (tmp_path / folder).mkdir(exist_ok=True)
        config = ConfigDict({"wandb": {"project": "p", "name": ""}})
        metrics.Writers(tmp_path / folder, 0, config).close()
    first, again, other = (given["id"] for given in begun)
    assert first == again != other and {given["resume"] for given in begun} == {"allow"}


@pytest.mark.parametrize(
    ("waits", "slow"), [((0.02, 0.03), ""), ((0.3, 0.31, 0.33), ""), ((0.02, 0.4, 0.03), "host 1")]
)
def test_the_process_that_others_wait_for_is_named(waits, slow):
    line = metrics.straggler({f"host {i}": wait for i, wait in enumerate(waits)})
    assert line == (
        f"{slow} waits for data 40 % of the time, and all others for it" if slow else ""
    )
