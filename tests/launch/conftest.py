"""The fixtures of the tests of launch/pod.py: a cloud on PATH, and settings."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import pod
import pytest
from pods import settings, shell, staging

from tests.launch import fake_cloud
from tests.needs import missing

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = {
    "tpu_vm": ROOT / "launch/tpu_vm/stage1.toml",
    "gke": ROOT / "launch/gke/stage2.toml",
}


# Programs that pip does not install, and where they come from.
PROGRAMS = {
    "gcloud": "the Google Cloud CLI, https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    "systemd-analyze": "the package systemd of a Linux distribution",
}


@pytest.fixture
def needs():
    """needs(program): skips the test without it and says where to get it; with CI set, fails."""

    def check(program):
        if not shutil.which(program):
            missing(f"{program}: {PROGRAMS[program]}")

    return check


class FakeCloud:
    """The cloud that the commands see, and the command line before it."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.file = folder / "cloud.json"
        self.set(**json.loads(json.dumps(fake_cloud.FRESH)))
        records = "gs://my-bucket/records"
        names = [f"{records}/{split}.array_record" for split in ("train", "validation")]
        self.set(objects=[*names, *(f"{name}.index.npy" for name in names)])

    @property
    def state(self):
        return json.loads(self.file.read_text())

    def set(self, **values):
        before = self.state if self.file.exists() else {}
        self.file.write_text(json.dumps(before | values))

    def fail(self, match, stderr, times=1, late=False):
        one = {"match": match, "stderr": stderr, "times": times, "late": late}
        self.set(fails=[*self.state["fails"], one])

    def ran(self, text):
        """The commands with this text in them."""
        return [line for line in self.state["log"] if text in line]

    def settings(self, route="tpu_vm", text="", **changes):
        """A settings file: the example of a route, with changes; `text` is added to the end."""
        lines = EXAMPLES[route].read_text().splitlines()
        for name, value in changes.items():
            lines = [line for line in lines if not line.startswith(f"{name} =")]
            lines.insert(0, f"{name} = {json.dumps(value)}")
        path = self.folder / "settings.toml"
        path.write_text("\n".join(lines) + f"\n{text}\n")
        return str(path)

    def route(self, name="tpu_vm", **changes):
        """The route of a settings file, without the command line."""
        path = pathlib.Path(self.settings(name, **changes))
        return pod.ROUTES[name](settings.read(path), shell.Shell())

    def pod(self, verb, settings, *options):
        """(exit status, stdout, stderr) of the command line."""
        status = 0
        try:
            pod.main([verb, settings, *options])
        except SystemExit as ended:
            status = ended.code
        out, err = self.capsys.readouterr()
        return status, out, err


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys):
    """A FakeCloud that answers without a process; nobody sleeps, nothing is built."""
    fake = FakeCloud(tmp_path, capsys)

    def run(words, input="", **_):
        status, out, err = fake_cloud.answer(fake.file, words[0], list(words[1:]), input)
        return subprocess.CompletedProcess(words, status, out, err)

    monkeypatch.setattr(shell.subprocess, "run", run)
    monkeypatch.setattr(shell.shutil, "which", lambda name: name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "stage").mkdir()
    monkeypatch.setattr(staging, "build", lambda *_: (tmp_path / "stage", "abc123"))
    return fake


@pytest.fixture
def cloud_on_path(tmp_path, monkeypatch, capsys):
    """The same as programs, gcloud and kubectl, that come first on PATH."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    source = pathlib.Path(fake_cloud.__file__).read_text()
    for name in ("gcloud", "kubectl"):
        (binaries / name).write_text(f"#!{sys.executable} -ISs\n{source}")
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_CLOUD", str(tmp_path / "cloud.json"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "stage").mkdir()
    monkeypatch.setattr(staging, "build", lambda *_: (tmp_path / "stage", "abc123"))
    return FakeCloud(tmp_path, capsys)
