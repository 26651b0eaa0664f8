"""The wheel: what is in it, and what an index would say of it."""

import configparser
import email
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import qk_jax
from tests.base import test_cli

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a clean copy of what it is built from."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("qk_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as packed:
        yield packed


def info(wheel, name):
    (path,) = [x for x in wheel.namelist() if x.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_it_has_every_file_of_the_package_and_its_types(wheel):
    files = [x for x in (ROOT / "qk_jax").rglob("*") if x.is_file() and x.suffix != ".pyc"]
    assert not {str(x.relative_to(ROOT)) for x in files} - set(wheel.namelist())
    assert "qk_jax/py.typed" in wheel.namelist()
    assert "qk_jax/assets/tiny/vlm/model.safetensors" in wheel.namelist()
    assert info(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_it_says_what_it_is(wheel):
    told = email.message_from_string(info(wheel, "METADATA"))
    assert told["Name"] == "qk_jax" and told["Version"] == qk_jax.__version__
    assert told["Author"] == "The qk_jax authors"
    assert told["Project-URL"] == "Paper, https://arxiv.org/abs/2509.26641"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "Typing :: Typed" in told.get_all("Classifier")
    assert {"cuda", "tpu", "gcs", "docs", "torch"} <= set(told.get_all("Provides-Extra"))
    cuda = [x for x in told.get_all("Requires-Dist") if 'extra == "cuda"' in x]
    assert len(cuda) == 1 and cuda[0].startswith("jax[cuda12]") and "linux" in cuda[0]


def test_its_scripts_are_those_that_are_completed(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(info(wheel, "entry_points.txt"))
    found = {name: f"{module}:run" for name, module in test_cli.SCRIPTS.items()}
    assert dict(scripts["console_scripts"]) == found
