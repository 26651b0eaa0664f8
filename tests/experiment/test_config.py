"""Configs: overrides that name the nearest field, and a command that ends in one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from qk_jax import train
from qk_jax.base.errors import InputError
from qk_jax.data.example import TaskSettings
from qk_jax.experiment import config as config_lib

TINY = "configs/stage1.py:tiny"
ROOT = pathlib.Path(train.__file__).parent.parent


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("steps", "7", 7),
        ("optimizer.lr", "1", 1.0),
        ("optimizer.schedule", "constant", "constant"),
        ("model.condition_latents", "true", True),
        ("data.sizes", "64x64,80x48", ("64x64", "80x48")),
        ("data.sizes", "0x64", ("0x64",)),  # which Python would read as a number
        ("sharding.mmdit.params.embed", "fsdp,context", ("fsdp", "context")),
        ("sharding.mmdit.params.embed", "fsdp", ("fsdp",)),
        ("model.vae.shift_factor", "0.5", 0.5),
        ("model.mmdit.num_layers", "2", 2),
    ],
)
def test_override_keeps_the_type(name, text, value):
    config = config_lib.load(TINY, {name: text})
    assert dict(config_lib.fields(config))[name] == value


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("stepz", "1", "no field 'stepz'; did you mean 'steps'"),
        ("optimizer.lrr", "1", "did you mean 'optimizer.lr'"),
        ("warmup", "1", "did you mean 'optimizer.warmup'"),
        ("optimizer", "1", "no field 'optimizer'"),
        ("steps", "1.5", "'steps' is a int"),
        ("steps", "many", "'many'"),
        ("optimizer.lr", "fast", "'optimizer.lr' is a float"),
        ("model.condition_latents", "maybe", "is a bool"),
        ("data.text_tokens", "64", "is a tuple"),
        ("data.batch", "0", "'data.batch' is 0, expected a number above 0"),
        ("log.every", "0", "expected a number above 0"),
        ("validation.batch", "-8", "expected a number above 0"),
        ("checkpoint.every", "-1", "'checkpoint.every' is -1, expected a number 0 or more"),
        ("evals.loss.every", "-1", "expected a number 0 or more"),
        ("optimizer.lr", "-1e-4", "expected a number 0 or more"),
        ("data.dropout.text", "1.5", "expected a number from 0 to 1"),
    ],
)
def test_a_wrong_override_names_the_field(name, text, words):
    with pytest.raises(InputError, match=words):
        config_lib.load(TINY, {name: text})


@pytest.mark.parametrize(
    "spec, words",
    [
        ("configs/stage9.py:tiny", "stage9"),
        ("configs/stage1.py:huge", "'huge'.*tiny"),
        ("x", "'x'"),
    ],
)
def test_a_wrong_config_file_or_size(spec, words):
    with pytest.raises(InputError, match=words):
        config_lib.load(spec)


def test_model_config_survives_json():
    config = config_lib.load("configs/stage3.py:7b")
    again = config_lib.model_config(json.loads(config_lib.to_json(config)))
    assert again == config_lib.model_config(config)
    assert again.lora_scale == 1.0 and again.condition_latents and again.remat == "full"


def test_sizes_of_a_checkpoint_from_before_are_turned_around():
    """They were pairs of height and width."""
    old = config_lib.to_dict(config_lib.load(TINY))
    assert config_lib.from_dict(old).data.sizes == ("64x64", "80x48", "48x80")
    old["data"]["sizes"] = [[64, 64], [48, 80], [80, 48]]
    config = config_lib.from_dict(old)
    assert config.data.sizes == ("64x64", "80x48", "48x80")
    assert TaskSettings.from_config(config.data, 0).sizes == ((64, 64), (48, 80), (80, 48))


def test_differences_are_listed():
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}
    assert config_lib.differences(old, new) == ["a.c: 2 -> 3", "d: absent -> 4"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "arguments are required: --config, --workdir"),
        (["--config", TINY], "arguments are required: --workdir"),
        (["--config", TINY, "--workdir"], "--workdir: expected one argument"),
        (["--config", TINY, "--workdir", "w", "--confg=1"], "'--confg=1' is unknown"),
        (["--config", TINY, "--workdir", "w", "--config.seeed=1"], "did you mean 'seed'"),
        (["--config", TINY, "--workdir", "/dev/null/w"], "cannot be written"),
    ],
)
def test_command_errors_are_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_command_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "qk_jax.train", "--config", TINY, "--workdir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--config.optimizer.warmupp=3"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'optimizer.warmup'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [(0,), (4,), (1, 9), (1.5,), ("1",)])
def test_layers_that_the_vlm_lacks_are_refused(layers):
    config = config_lib.load("configs/stage1.py:tiny")
    with config.unlocked():
        config.model.vlm_layers = layers
    with pytest.raises(InputError, match="give numbers of layers from 1 to 3"):
        config_lib.model_config(config)


def test_a_checkpoint_from_before_a_field_of_the_model_is_of_its_default():
    now = config_lib.load("configs/stage1.py:tiny")
    old = config_lib.to_dict(now)
    for name in ("query_noise", "bidirectional_queries", "vlm_layers"):
        del old["model"][name]
    assert (
        config_lib.to_dict(config_lib.from_dict(old))["model"] == config_lib.to_dict(now)["model"]
    )


def test_a_file_may_lie_in_a_folder_with_a_colon_and_gives_a_config(tmp_path):
    file = tmp_path / "a:b" / "mine.py"
    file.parent.mkdir()
    text = "from ml_collections import ConfigDict\n\ndef get_config(size='plain'):\n    return {}\n"
    file.write_text(text.format("ConfigDict({'size': size})"))
    assert config_lib.load(f"{file}:nano").size == "nano"
    assert config_lib.load(str(file)).size == "plain"
    file.write_text(text.format("5"))
    with pytest.raises(InputError, match="returns a int; return a ConfigDict"):
        config_lib.load(str(file))


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("data.tasks", "{'editing': 1}", "which is a section; did you mean 'data.tasks.editing'"),
        ("data.tasks.editing", "-1", "expected a number 0 or more"),
        ("data.sources", "({})", r"a tuple of one ends in a comma: \(...,\)"),
    ],
)
def test_what_a_stranger_wrote_is_answered(field, text, words):
    with pytest.raises(InputError, match=words):
        config_lib.load("stage1:tiny", {field: text})


def test_a_position_law_that_is_none_is_named():
    with pytest.raises(InputError, match="config.model.law: index_base 2 is not 0 or 1"):
        config_lib.model_config(config_lib.load("stage1:tiny", {"model.law.index_base": "2"}))
