"""Config files by name and by path, from a checkout and from an installed wheel."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from qk_jax import train
from qk_jax.base.errors import InputError
from qk_jax.bench import __main__ as bench
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import config_files

ROOT = pathlib.Path(train.__file__).parent.parent


def test_a_name_is_the_shipped_file_wherever_one_is(tmp_path, monkeypatch):
    named = config_lib.load(f"{ROOT}/configs/stage2.py:20b@v5p-128").to_dict()
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("stage2:20b@v5p-128").to_dict() == named
    assert config_lib.load("stage1").size == "tiny"
    assert config_lib.load("highres:7b", {"steps": "7"}).steps == 7


def test_names_are_those_of_the_files_that_have_a_config():
    found = config_files.names()
    assert {"stage1", "stage2", "stage3", "highres"} <= set(found)
    assert not {"common", "recipes"} & set(found)
    assert all(config_lib.load(name).stage for name in found)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("stage4:tiny", "config 'stage4' does not exist; give .*stage1, stage2, stage3"),
        ("common", "config 'common' does not exist; give .*stage1"),
        ("configs/stage1:tiny", "config 'configs/stage1' does not exist"),
        ("../stage1", "config '../stage1' does not exist"),
        ("configs/stage4.py:tiny", "config file 'configs/stage4.py' does not exist; give .*stage1"),
    ],
)
def test_a_wrong_name_lists_the_names_there_are(spec, words):
    with pytest.raises(InputError, match=words):
        config_lib.load(spec)


def test_every_command_takes_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        train.main(["--config", "stage1:tiny", "--help"])
    assert left.value.code == 0 and "fields of stage1:tiny" in capsys.readouterr().out
    bench.main(["cost", "--config", "stage3:tiny", "--pictures", "0"])
    assert "stage3:tiny" in capsys.readouterr().out


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""A config."""\n{text}')
    return path


def test_a_file_of_ones_own_builds_on_the_shipped_ones_and_on_its_neighbours(tmp_path):
    """Two folders called configs in one process do not see each other's files."""
    mine = (
        "from configs import shared, stage1\n\n"
        "def get_config(size):\n"
        "    from beside import law\n"
        "    config = stage1.get_config(size)\n"
        "    config.steps, config.seed = shared.STEPS, law.SEED\n"
        "    return config\n"
    )
    specs = []
    for number in (3, 4):
        folder = tmp_path / str(number)
        write(folder / "configs/shared.py", f"STEPS = {number}\n")
        write(folder / f"beside{number}/law.py", f"SEED = {number}\n")
        text = mine.replace("beside", f"beside{number}")
        specs.append(f"{write(folder / 'configs/mine.py', text)}:smoke")
    before = list(sys.path)
    assert [config_lib.load(spec).steps for spec in specs] == [3, 4]
    assert [config_lib.load(spec).seed for spec in specs] == [3, 4]
    assert sys.path == before and "configs.shared" not in sys.modules


def test_a_file_without_get_config(tmp_path):
    with pytest.raises(InputError, match="has no function get_config"):
        config_lib.load(str(write(tmp_path / "configs/empty.py", "")))


CHECK = """
import sys
import qk_jax
before = list(sys.path)
from qk_jax.experiment import config
assert qk_jax.__file__.startswith(sys.argv[1]), qk_jax.__file__
for spec in ("stage1:tiny", "stage2:20b@v5p-128", f"{sys.argv[1]}/qk_jax/configs/highres.py:7b"):
    print(config.load(spec).stage)
assert sys.path == before
rooms = {"configs", "data", "models", "training", "experiment"}
assert not rooms & {name.split(".")[0] for name in sys.modules}
"""


def test_an_installed_wheel_has_the_configs_inside(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    skipped = shutil.ignore_patterns("__pycache__", "*.array_record", "*.safetensors")
    for name in ("qk_jax", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skipped)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    tops = {path.name for path in (tmp_path / "site").iterdir() if "dist-info" not in path.name}
    assert tops == {"qk_jax"}
    (tmp_path / "elsewhere").mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path / "site")],
        cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["stage1", "stage2", "highres"]
