"""host.sh on a machine that looks like a TPU VM, and its unit of systemd."""

import os
import pathlib
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
FAKES = {
    "curl": """
case "$*" in
  *agent-worker-number*) echo 3 ;;
  *tpu-env*) printf "ZONE: 'us-east5-b'\\nMEGASCALE_SLICE_ID: '1'\\nWORKER_ID: '3'\\n" ;;
  *) exit 22 ;;
esac""",
    "gcloud": """
echo "gcloud $*" >>"$HOME/log"
case "$*" in
  *" cp "*" - "*) cat >/dev/null; test ! -e "$HOME/readonly" || exit 1 ;;
  *" cp "*) cp "$STAGE"/* "$HOME/qk/" ;;
  *" du "*) echo "${RECORDS:-1048576}  gs://b/records" ;;
esac""",
    "python3": 'echo "python3 $*" >>"$HOME/log"; test ! -e "$HOME/offline" || { echo no; exit 1; }',
    "sudo": 'case "$1" in tee) shift; cat >"$HOME/etc/${1##*/}" ;; *) exec "$@" ;; esac',
    "systemctl": """
echo "systemctl $*" >>"$HOME/log"
case "$1" in show) cat "$HOME/shown" ;; esac""",
}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A function that runs a verb of host.sh: (exit status, lines of stdout)."""
    for name in ("bin", "etc", "qk", "stage"):
        (tmp_path / name).mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("host.sh", "qk-train.service"):
        shutil.copy(LAUNCH / "tpu_vm" / name, tmp_path / "stage")
    (tmp_path / "stage" / "qk_jax-0.1.0-py3-none-any.whl").touch()

    def run(*words, **env):
        done = subprocess.run(
            ["bash", str(LAUNCH / "tpu_vm/host.sh"), *words], capture_output=True, text=True,
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path),
                 "USER": "me", "STAGE": str(tmp_path / "stage"), **env},
        )  # fmt: skip
        assert all(line.startswith("[slice 1 host 3] ") for line in done.stdout.splitlines())
        return done.returncode, done.stdout.replace("[slice 1 host 3] ", "").strip()

    return run


def test_install_is_pinned_and_done_once(host, tmp_path):
    assert host("install", "gs://b/w/launch/abc", "gs://b/w") == (0, "installed")
    log = (tmp_path / "log").read_text()
    assert "gcloud storage cp --quiet - gs://b/w/launch/hosts/1-3" in log
    assert "uv venv --quiet --clear --python 3.11" in log
    assert f"--constraint {tmp_path}/qk/constraints.txt" in log
    assert f"{tmp_path}/qk/qk_jax-0.1.0-py3-none-any.whl[tpu]" in log
    assert host("install", "gs://b/w/launch/abc", "gs://b/w") == (0, "installed")
    assert (tmp_path / "log").read_text().count("uv venv") == 1
    assert host("install", "gs://b/w/launch/def", "gs://b/w") == (0, "installed")
    assert (tmp_path / "log").read_text().count("uv venv") == 2


def test_a_bucket_that_the_host_may_not_write_is_found_at_once(host, tmp_path):
    (tmp_path / "readonly").touch()
    status, out = host("install", "gs://b/w/launch/abc", "gs://b/w")
    assert status == 1 and "roles/storage.objectUser on the bucket" in out
    assert "uv" not in (tmp_path / "log").read_text()


def test_an_installation_that_fails_says_why_and_is_repeated(host, tmp_path):
    (tmp_path / "offline").touch()
    status, out = host("install", "gs://b/w/launch/abc", "gs://b/w")
    assert status == 1 and out.startswith("error: python3 -m pip install")
    (tmp_path / "offline").unlink()
    assert host("install", "gs://b/w/launch/abc", "gs://b/w") == (0, "installed")


def test_records_that_do_not_fit_are_not_copied(host, tmp_path):
    assert host("copy", "gs://b/records") == (0, "copied")
    assert "rsync --quiet --recursive gs://b/records" in (tmp_path / "log").read_text()
    status, out = host("copy", "gs://b/records", RECORDS=str(2**60))
    assert status == 1 and 'give data = "mount"' in out


def test_start_writes_a_unit_that_runs_the_words_as_they_are(host, tmp_path):
    host("install", "gs://b/w/launch/abc", "gs://b/w")
    environment = ['A="1"', 'LIBTPU_INIT_ARGS="--x=1 --y=2"']
    given = ["--", "-m", "qk_jax.train", "--config.data.sizes=('64x64',)", "a b"]
    assert host("start", "2", *environment, *given) == (0, "started")
    lines = (tmp_path / "qk/run.env").read_text().splitlines()
    assert lines == [*environment, "QK_SLICE=1", "QK_HOST=3"]
    python = tmp_path / "qk/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "<%s>" "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / "qk/run.sh")], capture_output=True, text=True)
    assert done.stdout == "".join(f"<{word}>" for word in (f"{tmp_path}/qk/supervise.py", *given))
    unit = (tmp_path / "etc/qk-train.service").read_text()
    assert f"ExecStart=/bin/bash {tmp_path}/qk/run.sh" in unit and "User=me" in unit
    assert "systemctl restart qk-train" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("active", "sub", "code", "status", "said"),
    [
        ("inactive", "dead", 0, 0, "absent"),
        ("active", "running", 0, 0, "running"),
        ("deactivating", "stop-sigterm", 0, 0, "running"),
        ("active", "exited", 1, 0, "exited 0"),
        ("failed", "failed", 1, 42, "exited 42"),
        ("failed", "failed", 2, 9, "exited 137"),
        ("failed", "failed", 3, 6, "exited 134"),
    ],
)
def test_status(host, tmp_path, active, sub, code, status, said):
    text = f"ExecMainCode={code}\nExecMainStatus={status}\nActiveState={active}\nSubState={sub}\n"
    (tmp_path / "shown").write_text(text)
    assert host("status") == (0, said)


def test_a_host_that_was_stopped_says_so_until_it_starts(host, tmp_path):
    host("install", "gs://b/w/launch/abc", "gs://b/w")
    shown = "ActiveState={}\nSubState={}\nExecMainCode=1\nExecMainStatus=42\n"
    (tmp_path / "shown").write_text(shown.format("failed", "failed"))
    assert host("status") == (0, "exited 42")
    host("stop")
    assert host("status") == (0, "stopped")
    (tmp_path / "shown").write_text(shown.format("deactivating", "stop-sigterm"))
    assert host("status") == (0, "running")
    host("start", "0", "-m", "qk_jax.train")
    (tmp_path / "shown").write_text(shown.format("failed", "failed"))
    assert host("status") == (0, "exited 42")


def test_logs_and_stop(host, tmp_path):
    (tmp_path / "qk/train.log").write_text("".join(f"line {n}\n" for n in range(9)))
    assert host("tail", "2") == (0, "line 7\nline 8")
    assert host("stop") == (0, "stopped")
    assert "systemctl stop qk-train" in (tmp_path / "log").read_text()


def test_systemd_takes_the_unit(tmp_path, needs):
    needs("systemd-analyze")
    text = (LAUNCH / "tpu_vm/qk-train.service").read_text()
    unit = tmp_path / "qk-train.service"
    unit.write_text(text.replace("@USER@", "root").replace("@HOME@", "/root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.replace("Failed to", "")) == (0, "")
    for name in ("User", "ExecStart", "KillMode", "TimeoutStopSec", "RemainAfterExit"):
        assert f"\n{name}=" in text
