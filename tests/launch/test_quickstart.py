"""The quickstart's own logic: resuming, refusing, the report; its parts are tested elsewhere."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import quickstart
import report

from qk_jax.base.errors import InputError

LAUNCH = pathlib.Path(quickstart.__file__).parent


def task_figures(scale, copy=True):
    figures = {
        "loss": 1.0 * scale, "loss_shuffled": 1.2 * scale, "margin": 0.2 * scale,
        "margin_standard_error": 0.01, "records": 8, "psnr": 15.0 * scale,
        "psnr_standard_error": 0.5,
    }  # fmt: skip
    if copy:
        figures |= {"psnr_copy": 14.0, "gain_over_copy": 1.0, "gain_standard_error": 0.2}
    return figures


def phase(scale, roles=False):
    spaces = {name: {"top1": 0.1, "top5": 0.4, "median_rank": 9.0} for name in ("pixels", "vision")}
    figures = {
        "tasks": {
            "text_to_image": task_figures(scale, copy=False),
            "editing": task_figures(scale),
        },
        "retrieval": {"captions": 16, "chance_top1": 1 / 16, "chance_top5": 5 / 16, **spaces},
    }
    if roles:
        row = {
            "source": 2.0, "reference": 1.0, "source_minus_reference": 1.0, "standard_error": 0.1,
        }  # fmt: skip
        names = ("identity_cosine", "identity_psnr", "layout_change", "displacement")
        figures["roles"] = {"records": 8, **{name: row for name in names}}
    return figures


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(a quickstart whose parts only note that they were done, the notes)."""
    done = []

    def measure(self, name):
        done.append(f"measure {name}")
        self.write(f"evaluation/{name}.json", phase(1.0, roles=name == "stage3"))

    def command(self, *words):
        done.append(" ".join(str(word) for word in words[:4]))

    def compare(self):
        done.append("compare")
        line = {"name": "painted picture, of 255", "difference": 1.0, "is_good": True}
        self.write("comparison.json", [line])

    monkeypatch.setattr(quickstart.Quickstart, "measure", measure)
    monkeypatch.setattr(quickstart.Quickstart, "command", command)
    monkeypatch.setattr(quickstart.Quickstart, "compare", compare)
    return quickstart.Quickstart(tmp_path / "out", "smoke"), done


def test_every_part_once_and_in_order(run, capsys):
    made, done = run
    made.open(fresh=False)
    made.run()
    trained = [line for line in done if "qk_jax.train" in line]
    assert [word.rsplit("/", 1)[1] for word in trained] == [
        "stage1.py:smoke", "stage2.py:smoke", "stage3.py:smoke",
    ]  # fmt: skip
    assert done[0] == "measure untrained" and done[-1] == "compare"
    shown = capsys.readouterr().out
    assert "1/255" in shown
    found = json.loads((made.out / "report.json").read_text())
    assert set(found["tasks"]["editing"]) == {"untrained", "stage1", "stage2", "stage3"}
    assert found["seconds"]["total"] >= 0 and found["peak_memory_mib"]["driver"] > 0
    assert "report.html  open it in a browser" in shown and made.out.name in (
        made.out / "report.html"
    ).read_text(encoding="utf-8")
    page = (made.out / "report.md").read_text()
    assert "editing" in page and "source and as reference" in page and "0.06" in page

    # A second run does nothing again, but says where things are.
    count = len(done)
    again = quickstart.Quickstart(made.out, "smoke")
    again.open(fresh=False)
    again.run()
    assert len(done) == count
    assert "already done" in capsys.readouterr().out


def test_a_stopped_run_goes_on_where_it_stopped(run, monkeypatch):
    made, done = run
    made.open(fresh=False)
    whole = quickstart.Quickstart.command

    def stopped(self, *words):
        if "stage2" in str(words):
            raise SystemExit(42)
        whole(self, *words)

    monkeypatch.setattr(quickstart.Quickstart, "command", stopped)
    with pytest.raises(SystemExit):
        made.run()
    monkeypatch.setattr(quickstart.Quickstart, "command", whole)
    first = list(done)
    again = quickstart.Quickstart(made.out, "smoke")
    again.open(fresh=False)
    again.run()
    assert done[len(first)].endswith("stage2.py:smoke")


def test_folders_that_hold_something_else(run, tmp_path):
    made, _ = run
    made.open(fresh=False)
    other = quickstart.Quickstart(made.out, "quick")
    with pytest.raises(InputError, match="mode 'smoke'"):
        other.open(fresh=False)
    other.open(fresh=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(InputError, match="not empty"):
            quickstart.Quickstart(foreign, "smoke").open(fresh)
    assert (foreign / "thesis.txt").read_text() == "mine"
    with pytest.raises(InputError, match="cannot be written"):
        quickstart.Quickstart(foreign / "thesis.txt" / "out", "smoke").open(False)


def test_a_difference_from_pytorch_fails(run, monkeypatch, capsys):
    made, _ = run

    def differs(self):
        line = {"name": "painted picture, of 255", "difference": 9.0, "is_good": False}
        self.write("comparison.json", [line])

    monkeypatch.setattr(quickstart.Quickstart, "compare", differs)
    made.open(fresh=False)
    with pytest.raises(SystemExit) as left:
        made.run()
    assert left.value.code == 1 and "differs" in capsys.readouterr().err


def test_no_suitable_python_is_one_line(tmp_path):
    """Without Python 3.11 or 3.12 the script says so and leaves with status 2."""
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    script = f"source {LAUNCH}/venv.sh; ensure_venv {tmp_path} core"
    got = subprocess.run(
        ["/bin/bash", "-c", script],
        env={"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
    )
    assert got.returncode == 2
    assert got.stderr.startswith("error: no Python 3.11 or 3.12") and got.stderr.count("\n") == 1


def test_tables_are_markdown():
    assert report.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


CHILD = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1.5)  # longer than subprocess.run waits before it kills
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("training", flush=True)
time.sleep(600)
"""


def test_ctrl_c_leaves_a_training_the_time_to_save(tmp_path):
    call = "quickstart.Quickstart.command(None, '-c', sys.argv[1], sys.argv[2])"
    # A job in the background of a script ignores Ctrl-C, and so would what it starts.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; import sys; sys.path.insert(0, {str(LAUNCH)!r}); import quickstart; {call}"
    saved = tmp_path / "saved"
    process = subprocess.Popen(
        [sys.executable, "-c", code, CHILD, str(saved)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert saved.read_text() == "saved"
    assert "KeyboardInterrupt" in told and process.returncode != 0
