"""Every field has its words: what --help lists, and what a wrong name is answered with."""

import re

import pytest

from qk_jax import sharding, train
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import glossary

SPECS = [
    f"configs/{stage}.py:{size}"
    for stage in ("stage1", "stage2", "stage3", "highres")
    for size in ("tiny", "20b")
]


def names():
    return {name for spec in SPECS for name, _ in config_lib.fields(config_lib.load(spec))}


def test_every_field_has_a_line_and_every_line_a_field():
    fields = names()
    assert not [name for name in sorted(fields) if not glossary.meaning(name)]
    used = {glossary.meaning(name) for name in fields}
    assert not [field for field, text in glossary.MEANINGS.items() if text not in used]
    assert not [text for text in used if len(text) > 90 or text.endswith(".")]
    assert glossary.meaning("optimizer.lrr") == glossary.meaning("evals.loss") == ""


def test_synonyms_are_of_fields_and_no_field_has_such_a_name():
    fields = names()
    assert not glossary.SYNONYMS.keys() - fields
    words = " ".join(glossary.SYNONYMS.values()).split()
    assert len(words) == len(set(words))
    ends = {name.rsplit(".", 1)[-1] for name in fields if not name.startswith("sharding.")}
    assert not set(words) & (ends - {"scheduler"})


@pytest.mark.parametrize(
    "wrong, right",
    {
        "learning_rate": "optimizer.lr",
        "optimizer.learning_rate": "optimizer.lr",
        "learning-rate": "optimizer.lr",
        "learning_rte": "optimizer.lr",
        "batch_size": "data.batch",
        "data.batchsize": "data.batch",
        "lora_rank": "lora.rank",
        "max_steps": "steps",
        "num_steps": "steps",
        "grad_clip": "optimizer.clip",
        "max_grad_norm": "optimizer.clip",
        "ema_decay": "optimizer.ema",
        "warmup_steps": "optimizer.warmup",
        "gradient_accumulation_steps": "optimizer.accumulation",
        "save_steps": "checkpoint.every",
        "validation.every": "evals.loss.every",
        "samples.every": "evals.sheets.every",
        "dtype": "dtype.compute",
        "stepz": "steps",
        "optimizer.lrr": "optimizer.lr",
        "warmupp": "optimizer.warmup",
        "evals.loss.evry": "evals.loss.every",
    }.items(),
)
def test_a_wrong_name_is_answered_by_meaning_and_by_spelling(wrong, right):
    with pytest.raises(InputError, match=rf"did you mean '{re.escape(right)}'"):
        config_lib.load("configs/stage1.py:tiny", {wrong: "1"})


def test_a_name_is_only_answered_with_a_field_of_the_config():
    assert glossary.nearest("learning_rate", ["data.batch", "steps"]) in ("data.batch", "steps")


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        train.main([*argv, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("spec", [None, "configs/stage2.py:20b"])
def test_help_lists_every_field_with_its_value_and_its_line(spec, capsys):
    shown = help_of(capsys, *(("--config", spec) if spec else ()))
    config = config_lib.load(spec or "configs/stage1.py:tiny")
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    for name, value in config_lib.fields(config):
        if name.startswith("sharding."):
            _, tower, column, axis = name.split(".")
            assert f"sharding.{tower}" in lines and re.search(rf"COLUMN .*\b{column}\b", shown)
            assert re.search(rf"AXIS .*\b{axis}\b", shown)
            continue
        assert lines[name].endswith(glossary.meaning(name)), name
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert lines[name].split()[1] == str(value)
    assert "compilation_cache" in lines and " true " in lines["compilation_cache"]
    if spec:
        assert " Qwen/Qwen-Image " in lines["init.mmdit"] and " '' " in lines["init.lora"]
    assert all(f"sharding.{tower}" in lines for _, tower in sharding.TOWERS)


def test_help_tells_a_row_of_the_sharding_table_from_cells_of_ones_own():
    config = config_lib.load(
        "configs/stage1.py:tiny",
        {"sharding.mmdit": "zero2", "sharding.text.params.embed": "context"},
    )
    shown = {line.split()[0]: line.split()[1] for line in config_lib.listing(config)}
    assert shown["sharding.mmdit"] == "zero2" and shown["sharding.vae"] == "fsdp"
    assert shown["sharding.text"] == "its"  # own


def test_help_of_a_config_that_does_not_exist_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--config", "configs/stage9.py:tiny", "--help"])
    assert ended.value.code == 2 and "stage9" in capsys.readouterr().err
