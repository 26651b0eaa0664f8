"""The image for CPUs and GPUs: its instructions are read, and its steps followed without Docker."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "docker"


def stages():
    """[[(instruction, words), ...] of each stage] of the Dockerfile."""
    found = []
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            name, words = line.split(maxsplit=1)
            if name == "FROM":
                found.append([])
            found[-1].append((name, words))
    return found


def runs(stage):
    return [words for name, words in stages()[stage] if name == "RUN"]


def copied():
    """(source in the checkout, target) of everything that is copied."""
    for name, words in stages()[0]:
        if name == "COPY":
            *sources, target = words.split()
            for source in sources:
                yield source, target if target != "./" else pathlib.Path(source).name


def test_it_is_pinned_and_not_roots():
    bases = {dict(stage)["FROM"].split()[0] for stage in stages()}
    assert len(bases) == 1 and re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", bases.pop())
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {name for stage in stages() for name, _ in stage} == known
    last = stages()[-1]
    names = [name for name, _ in last]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert dict(last)["USER"] == "1000" and f"--uid {dict(last)['USER']}" in runs(1)[0]
    assert yaml.safe_load(dict(last)["CMD"])[0].startswith("qk-")
    installs = [words for stage in (0, 1) for words in runs(stage) if "pip install" in words]
    assert len(installs) == 2 and all("--constraint" in words for words in installs)
    assert all("--no-cache-dir" in words for words in installs)


def test_docker_gets_what_is_copied_and_nothing_else():
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {name for name, _ in copied()}
    assert all((ROOT / name).exists() for name, _ in copied())


def test_the_wheel_is_built_from_what_is_copied(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    for name, target in copied():
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.array_record", "*.safetensors")
            shutil.copytree(ROOT / name, source / target, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / target)
    (step,) = [x for x in runs(0)[0].split("&&") if "pip wheel" in x]
    words = [str(tmp_path / "wheel") if word == "/wheel" else word for word in shlex.split(step)]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=source, capture_output=True, text=True,
        env=os.environ | {"PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as packed:
        assert {"qk_jax/py.typed", "qk_jax/configs/stage1.py"} <= set(packed.namelist())


@pytest.mark.parametrize(
    ("extra", "asked"), [("", ""), ("cuda", "[cuda]"), ("cuda,torch", "[cuda,torch]")]
)
def test_the_build_argument_chooses_the_extras(tmp_path, extra, asked):
    """What a shell makes of the step of installation, with a pip that tells its arguments."""
    (tmp_path / "build" / "wheel").mkdir(parents=True)
    wheel = tmp_path / "build" / "wheel" / "qk_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    step = re.sub(r"--mount=\S+", "", runs(1)[1]).replace("/build", str(tmp_path / "build"))
    done = subprocess.run(
        ["sh", "-c", f'pip() {{ printf "%s\\n" "$@"; }}\n{step}'],
        env=os.environ | {"EXTRA": extra}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == f"{wheel}{asked}"
    assert f"{tmp_path}/build/src/constraints.txt" in done.stdout.splitlines()
