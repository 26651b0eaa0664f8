"""What all commands have in common: their version, and completion by the shell."""

import importlib
import pathlib
import re
import shutil
import subprocess

import pytest

import qk_jax
from qk_jax.base import cli
from tests import needs

SETUP = pathlib.Path(__file__).resolve().parents[2] / "setup.py"
# {console script: its module}
SCRIPTS = dict(re.findall(r'"(qk-\w+) = (qk_jax[\w.]+):run"', SETUP.read_text()))
MODULES = [*SCRIPTS.values(), "qk_jax.api.paint", "qk_jax.api.judge"]


def parser(module):
    return importlib.import_module(module).parser()


def test_every_main_has_a_script_of_its_name():
    assert {"qk-train", "qk-sample", "qk-convert", "qk-evaluate", "qk-data"} <= set(SCRIPTS)
    assert {name: parser(module).script for name, module in SCRIPTS.items()} == {
        name: name for name in SCRIPTS
    }


@pytest.mark.parametrize("module", MODULES)
def test_every_command_tells_its_version(module, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"qk_jax {qk_jax.__version__}\n"


def test_a_verb_has_no_version_of_its_own():
    found = cli.verbs(parser("qk_jax.convert"))
    assert set(found) == {"from-pytorch", "to-pytorch", "verify", "bench"}
    assert not [name for name, verb in found.items() if "--version" in verb.format_help()]


@pytest.mark.parametrize("shell", cli.SHELLS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_completed(script, shell, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(SCRIPTS[script]).main(["--print-completion", shell])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and script in text and "python -m" not in text
    if shutil.which(shell):  # bash always is
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def answers(script, *words):
    """What bash offers for the last of the words of a command line."""
    if not shutil.which("bash"):
        needs.missing("bash")
    text = cli.completion(parser(SCRIPTS[script]), "bash")
    line = " ".join(f"'{word}'" for word in (script, *words))
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_{script.replace('-', '_')}"
    done = subprocess.run(
        ["bash", "-c", f'{text}\n{ask}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_bash_offers_verbs_options_choices_and_files(tmp_path, monkeypatch):
    assert answers("qk-train", "--wo") == ["--workdir"]
    assert answers("qk-convert", "to") == ["to-pytorch"]
    assert answers("qk-convert", "to-pytorch", "--lo") == ["--lora"]
    assert answers("qk-convert", "to-pytorch", "--lora", "") == ["merged", "separate"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage3").mkdir()
    (tmp_path / "some.png").touch()
    assert answers("qk-sample", "--checkpoint", "s") == ["stage3"]  # a folder
    assert "some.png" in answers("qk-sample", "--source", "s")
