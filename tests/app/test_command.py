"""The command of the app: what it refuses, and what it opens."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import painters
import pytest

from qk_jax.app import __main__ as main
from tests import needs


def refused(capsys, *words):
    """The one line that the command prints on stderr before it leaves with status 2."""
    with pytest.raises(SystemExit) as left:
        main.main([str(word) for word in words])
    assert left.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_wrong_arguments_are_one_line(capsys, tmp_path):
    needs.module("uvicorn")
    assert "holds no checkpoints" in refused(capsys, "--checkpoint", tmp_path, "--port", 0)
    assert "at least 8" in refused(capsys, "--token", "short")
    assert "--queue is 0" in refused(capsys, "--queue", 0)
    assert "cannot listen on 127.0.0.1 port 99999" in refused(capsys, "--port", 99999)
    assert "cannot listen on no.such.host" in refused(capsys, "--host", "no.such.host")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "another --port" in refused(capsys, "--port", port)


def test_what_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "uvicorn is not installed; pip install 'qk_jax[app]'" in refused(capsys)


def test_an_export_is_a_model_like_others(tmp_path):
    """It has one set of weights, whatever is asked for; few models are held in memory."""
    from qk_jax.app import models
    from qk_jax.export.folder import export_pipeline
    from tests.export import models as nano

    export_pipeline(nano.loaded(), tmp_path / "model")
    stage = painters.save(tmp_path / "run", average=True)
    known = models.Models([tmp_path / "model", stage, stage], keep=2)
    export, trained = known.all()
    assert export.name.endswith("/model") and trained.name == "run/stage3"
    assert (export.has_average, trained.has_average) == (False, True)
    whole = known.painter(export, True)
    assert known.painter(export, False) is whole
    last, mean = known.painter(trained, False), known.painter(trained, True)
    assert last is not mean and known.painter(trained, False) is last
    assert known.painter(export, False) is not whole  # which had to make room


def test_addresses():
    assert main.address("127.0.0.1", 7860, None) == "http://127.0.0.1:7860/"
    assert main.address("::1", 80, None) == "http://[::1]:80/"
    assert main.address("0.0.0.0", 1, "abc") == f"http://{socket.gethostname()}:1/?token=abc"


def test_the_command_serves_and_ends(tmp_path):
    """Beyond this machine only with a token, which it makes and prints."""
    needs.module("uvicorn")
    folder = painters.save(tmp_path)
    command = ["-m", "qk_jax.app", "--checkpoint", folder, "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        try:
            printed = process.stdout.readline().strip()
            head, _, token = printed.partition("/?token=")
            assert head.startswith("http://") and len(token) >= 20
            near = f"http://127.0.0.1:{head.rpartition(':')[2]}/api/models"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(near)
            asked = urllib.request.Request(near, headers={"Authorization": f"Bearer {token}"})
            assert urllib.request.urlopen(asked).status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
