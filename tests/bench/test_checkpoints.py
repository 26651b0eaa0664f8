"""What saves and restores cost: measured here, and estimated on a slice that is not here."""

import os
import re
import subprocess
import sys

import pytest

from qk_jax.base.errors import InputError
from qk_jax.bench import __main__ as bench

command = bench.main.__wrapped__  # its errors are raised


def test_saves_and_restores_are_timed(tmp_path, capsys):
    command(["checkpoints", "--gigabytes", "0.07", "--repeat", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith("0.07 GB of float32 over 8 cpu")
    rows = (
        "save, until on disk",
        "of it, the run waits",
        "of that, digests",
        "plain read",
        "restore",
    )
    seconds = [float(re.search(rf"{row}.*?(\d+\.\d\d)", printed)[1]) for row in rows]
    save, waits, digests, _, restore = seconds
    assert save >= waits >= digests and restore > 0
    assert not list(tmp_path.rglob("*.zarray"))  # what was written is gone


def test_digests_are_estimated_on_a_slice(libtpu):
    options = ["--config", "stage3:tiny", "--config.mesh.fsdp=4", "--slice", "v5e-4"]
    done = subprocess.run(
        [sys.executable, "-m", "qk_jax.bench", "checkpoints", *options],
        env=os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"stage3:tiny on v5e-4: (\S+) s, (\S+) GB/s on each device", done.stdout)
    assert 0 < float(found[1]) < 0.1 and 1 < float(found[2]) < 819  # the bandwidth of its HBM


def test_a_slice_needs_a_config():
    with pytest.raises(InputError, match="--slice and --config go together"):
        command(["checkpoints", "--slice", "v5e-4"])
    with pytest.raises(InputError, match="checkpoints has no config"):
        command(["checkpoints", "--config.steps=1"])
