"""The comparison of cases over seeds: what is run, and what is made of the losses."""

import json
import pathlib
import subprocess
import types

import compare
import pytest

from qk_jax.base import files
from qk_jax.base.errors import InputError

NANO = "tests/training/nano.py:stage1"


@pytest.fixture
def trained(monkeypatch):
    """The command lines of the trainings; each leaves losses that depend on its case and seed."""

    def run(command, env):
        commands.append(command)
        fields = dict(word.removeprefix("--config.").split("=", 1) for word in command[7:])
        workdir, seed = pathlib.Path(command[6]), int(fields["seed"])
        loss = 1.0 + seed - 0.5 * (fields.get("optimizer.lr") == "0.1") * (1 + seed)
        (workdir / "stage1").mkdir(parents=True)
        lines = [{"step": 1, "kind": "train", "loss": 9.0}]
        lines += [
            {"step": step, "kind": "validation", "loss": loss / (1 + step), "loss/editing": loss}
            for step in (0, 1)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / "stage1/metrics.jsonl").write_text(text)
        return types.SimpleNamespace(returncode=3 if fields.get("steps") == "7" else 0)

    commands = []
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_cases_are_paired_by_seed(trained, tmp_path, capsys):
    compare.main.__wrapped__([
        "--config", NANO, "--out", str(tmp_path), "--seeds", "2", "--all", "steps=4",
        "init.checkpoint=W/{seed}/stage1", "--case", "plain", "--case", "fast", "optimizer.lr=0.1",
    ])  # fmt: skip
    assert len(trained) == 4 and trained[1][4].endswith("nano.py:stage1")
    assert trained[3][6] == str(tmp_path / "fast-1")
    assert "--config.init.checkpoint=W/1/stage1" in trained[3] and "--config.steps=4" in trained[3]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        "step 0, loss", "step 1, loss", "step 1, loss/editing"
    ]  # fmt: skip
    assert lines[1].split() == ["plain", "1.5000"]
    # the means 1.5 and 0.75; differences -0.5 and -1 of the two seeds
    assert lines[2].split() == ["fast", "0.7500", "-0.7500", "±", "0.2500"]
    assert lines[-1].split() == ["fast", "0.7500", "-0.7500", "±", "0.2500"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "a", "steps"], "'steps' is no FIELD=VALUE"),
        (["--case", "a", "--case", "a"], "two cases have the same name"),
        (["--case", "a", "stepz=3"], "config has no field 'stepz'"),
        (["--case", "a", "--seeds", "1"], "--seeds must be at least 2"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(words, message, trained, tmp_path):
    with pytest.raises(InputError, match=message):
        compare.main.__wrapped__(["--config", NANO, "--out", str(tmp_path), *words])
    assert not trained


def test_a_training_that_fails_ends_it(trained, tmp_path):
    case = compare.Case("a", {"steps": "7"})
    with pytest.raises(SystemExit, match="3"):
        compare.run(NANO, case, 0, files.Path(tmp_path))
