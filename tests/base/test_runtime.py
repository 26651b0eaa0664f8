"""The process: what is kept of its programs, and where; what its compiler takes."""

import os
import pathlib
import subprocess
import sys

import pytest

from qk_jax.base import runtime

CODE = """
import sys, jax
from qk_jax.base import runtime
read = []
jax.monitoring.register_event_listener(lambda name, **_: read.append(name.endswith("cache_hits")))
runtime.keep_programs(*sys.argv[1:])
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(jax.config.jax_compilation_cache_dir, sum(read))
"""


def run(*arguments, **env):
    """(folder of the cache, programs that were read from it) of a fresh process."""
    kept = {name: text for name, text in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        env=kept | {name: str(text) for name, text in env.items()}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    folder, read = done.stdout.split()
    return folder, int(read)


def test_small_programs_are_kept_in_the_users_cache_folder(tmp_path):
    home = tmp_path / "home"
    expected = str(home / ".cache/qk_jax/compilation_cache")
    assert run(HOME=home) == (expected, 0)
    written = len(list(pathlib.Path(expected).iterdir()))
    assert written
    assert run(HOME=home) == (expected, written)
    elsewhere = tmp_path / "xdg"
    assert run(HOME=home, XDG_CACHE_HOME=elsewhere)[0] == f"{elsewhere}/qk_jax/compilation_cache"
    assert run(HOME=home, XDG_CACHE_HOME="relative")[0] == expected  # not allowed, so not there
    assert run(tmp_path / "own", HOME=home) == (str(tmp_path / "own"), 0)


def test_a_folder_that_jax_was_given_stays(tmp_path):
    given = tmp_path / "given"
    folder, _ = run(HOME=tmp_path, JAX_COMPILATION_CACHE_DIR=given)
    assert folder == str(given) and not (tmp_path / ".cache").exists()
    assert not given.exists() or not list(given.iterdir())  # small programs are its owner's choice


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(HOME=tmp_path / "file") == ("None", 0)


@pytest.mark.parametrize(("ours", "level"), [((), "WARNING"), (("no_such=true",), "INFO")])
def test_an_option_that_is_not_known_is_left_out(monkeypatch, caplog, ours, level):
    """Our own, of which a user can mend nothing, without a warning."""
    monkeypatch.setattr(runtime, "CPU_OPTIONS", ours)
    runtime._is_known.cache_clear()
    table = {"cpu": ("no_such=true", "xla_backend_optimization_level=1")}
    with caplog.at_level("INFO", "qk_jax"):
        found = runtime.compiler_options(table, "cpu")
    assert found == {"xla_backend_optimization_level": 1}
    (line,) = [x for x in caplog.records if "no_such" in x.message]
    assert line.levelname == level and "is left out: " in line.message
