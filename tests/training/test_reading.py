"""What a run will read, told before it reads."""

import re

import numpy as np
import pytest

from qk_jax import data
from qk_jax.base.errors import InputError
from qk_jax.data import __main__ as command
from qk_jax.data.pipeline import Pipeline
from qk_jax.training import reading
from qk_jax.training.padding import Padding
from tests.data import stage3

WEIGHTS = {"text_to_image": 1.0, "editing": 3.0}


def table(text, title):
    """The cells of the table whose first column has this title."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {title}"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_tokens_are_those_of_the_padded_batch():
    config = stage3.config(WEIGHTS, 4, 4)
    pipeline = Pipeline(config, "train", 0, 1)
    pad, batches = Padding.from_config(config), {}
    for step in range(40):
        batch = pipeline.batch(step)
        sizes = tuple(x.shape[1:3] for x in (batch["target"], *batch["conditions"]))
        batches.setdefault(sizes, pad(batch))
    shapes = {x.sizes: x for x in reading.shapes(pipeline, pipeline.shares[0])}
    assert sum(x.share for x in shapes.values()) == pytest.approx(1)
    assert batches.keys() <= shapes.keys() and len(batches) >= 4
    for sizes, batch in batches.items():
        assert shapes[sizes].sequence == batch["input_ids"].shape[1]
        assert shapes[sizes].padded == sum(pad.tokens(batch)) >= shapes[sizes].tokens
        assert shapes[sizes].tokens == sum(h * w // 256 for h, w in sizes)


def test_what_is_read_of_each_source(tmp_path):
    """What the table says is what the steps of the run name."""
    for name, count in (("a", 30), ("b", 11)):
        (tmp_path / name).mkdir()
        with data.Writer(tmp_path / name / "train.array_record") as writer:
            for number in range(count):
                writer.add("text_to_image", f"{number}", np.zeros((64, 64, 3), np.uint8))
    sources = tuple(
        {"path": str(tmp_path / name), "tasks": "text_to_image", "weight": weight}
        for name, weight in (("a", 3), ("b", 1))
    )
    config = stage3.config({"text_to_image": 1.0, "editing": 1.0}, 4, 4, sources=(
        *sources, {"path": "", "tasks": "editing"},
    ))  # fmt: skip
    config.steps = 100
    pipeline = Pipeline(config, "train", 0, 1)
    rows = {row[0]: row[1:] for row in table(reading.told(pipeline, 0, 0), "source")}
    named = [line.split() for step in range(100) for line in pipeline.records(step)]
    read = [int(number) for task, number in named if task == "text_to_image"]
    first = sum(number < 30 for number in read)
    assert rows["text_to_image/a"][:3] == ["30", "0", "37.5%"]
    assert rows["text_to_image/b"][:3] == ["11", "0", "12.5%"]
    assert int(rows["text_to_image/a"][3]) == pytest.approx(first, abs=4)
    assert float(rows["text_to_image/b"][4]) == pytest.approx((len(read) - first) / 11, abs=0.4)
    assert rows["editing/made"][2] == "50.0%"


def test_the_command_judges_the_rate(capsys):
    given = ["plan", "--config", "stage3:tiny", "--seconds", "0.3", "--hosts", "4"]
    command.main([*given, "--step-s", "1000"])
    said = capsys.readouterr().out
    assert re.search(r"its 4 slots of a step in 1000 s need 0.0: enough", said)
    assert "750 steps of 16 examples" in said and len(table(said, "target")) == 8
    command.main([*given, "--step-s", "0.0001"])
    assert "too slow: add hosts" in capsys.readouterr().out
    with pytest.raises(InputError, match="--hosts 0; give"):
        command.main.__wrapped__([*given[:3], "--hosts", "0"])
