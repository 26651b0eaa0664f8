"""docs/pods.md says what there is: settings, verbs, commands, messages and costs."""

import dataclasses
import pathlib
import re
import shlex

import pod
import pytest
from pods import settings

from configs import recipes
from qk_jax.experiment import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/pods.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_setting_has_a_row_with_its_default():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section("Settings"), re.M)
    told = {
        name.strip("[]"): default
        for names, default in rows
        for name in re.findall(r"`(.*?)`", names)
    }
    fields = {field.name: field for field in dataclasses.fields(settings.Settings)}
    assert told.keys() == fields.keys()
    for name, field in fields.items():
        if field.default is dataclasses.MISSING or name in ("data", "runtime"):
            continue
        default = "[]" if field.default == () else str(field.default or "''")
        assert told[name].strip("`") == default, name


def test_every_verb_has_a_row():
    assert set(re.findall(r"^\| `(\w+)` \|", section("Verbs"), re.M)) == set(pod.VERBS)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"bash (launch/pod\.sh [^#\n`]*)", PAGE))))
def test_commands_exist(line):
    script, verb, file, *options = shlex.split(line)
    assert (ROOT / script).exists() and verb in pod.VERBS
    assert set(options) <= {"--dry-run", "--keep"}
    assert file == "mine.toml" or settings.read(ROOT / file)


def test_restarts_are_those_of_the_code():
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (.*?) \|$", section("Restarts and resuming"), re.M)
    again = [int(x) for codes, what in rows if what == "started again" for x in codes.split(",")]
    assert tuple(again) == settings.RESTARTS


@pytest.mark.parametrize(
    "row", re.findall(r"^\| (\w+ ?\d?) on (\S+).*? \| (.*) \|$", PAGE, re.M), ids=lambda row: row[1]
)
def test_costs_follow_from_the_recipes(row):
    stage, where, figures = row
    steps, step, hours, chip_hours = figures.split(" | ")
    stage = stage.replace(" ", "")
    recipe = recipes.RECIPES[stage, "20b", where]
    config = config_lib.load(f"{stage}:20b@{where}")
    slice_ = settings.topologies.parse(where)
    assert f"{config.steps:,}" == steps
    assert f"{recipe.figures.step_time_s:.2f} s" == step
    time = config.steps * recipe.figures.step_time_s / 3600
    assert f"{time:.0f}" == hours
    assert f"{time * slice_.chips:,.0f}" == chip_hours


def test_messages_that_are_explained_exist():
    folders = (ROOT / "launch/pods", ROOT / "launch/tpu_vm")
    code = "".join(path.read_text() for folder in folders for path in folder.glob("*.*"))
    for text in ("no slice ", "cannot be written from here", "hosts answered", "AND IS PAID FOR"):
        assert text in section("When something goes wrong") and text in code


def test_the_examples_are_what_the_page_says():
    for name in ("tpu_vm/stage1.toml", "gke/stage2.toml"):
        found = settings.read(ROOT / "launch" / name)
        assert found.hosts == 16 and found.workdir == "gs://my-bucket/query-kontext"
