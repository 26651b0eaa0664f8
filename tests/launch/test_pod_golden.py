"""Every command that --dry-run prints, against the files in golden/.

    QK_WRITE_GOLDEN=1 python -m pytest tests/launch/test_pod_golden.py

writes them anew; read the difference. Where gcloud is installed, its own parser takes each of them.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess

import pod
import pytest

HERE = pathlib.Path(__file__).resolve().parent
LAUNCH = HERE.parents[1] / "launch"
GOLDEN = HERE / "golden"
SETTINGS = {
    "tpu_vm": LAUNCH / "tpu_vm/stage1.toml",
    "gke": LAUNCH / "gke/stage2.toml",
    "tpu_vm_slices": HERE / "golden/tpu_vm_slices.toml",
    "gke_slices": HERE / "golden/gke_slices.toml",
}
CASES = [(name, verb) for name in ("tpu_vm", "gke") for verb in pod.VERBS]
CASES += [(name, "up") for name in ("tpu_vm_slices", "gke_slices")]


def printed(name, verb, capsys):
    pod.main([verb, str(SETTINGS[name]), "--dry-run"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "verb"), CASES)
def test_commands(name, verb, capsys):
    found, file = printed(name, verb, capsys), GOLDEN / f"{name}_{verb}.txt"
    if os.environ.get("QK_WRITE_GOLDEN"):
        file.write_text(found)
    assert found == file.read_text()


def commands(program):
    """Every command of the golden files that begins with a program, without what it reads."""
    found = {}
    for file in sorted(GOLDEN.glob("*.txt")):
        text = re.sub(r" <<'EOF'\n.*?\nEOF$", "", file.read_text(), flags=re.M | re.S)
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith(f"{program} "):
                found[tuple(shlex.split(line))] = file.name
    return found


def test_gcloud_takes_its_commands(tmp_path, needs):
    """Its own parser knows every option, what it needs and what excludes what."""
    needs("gcloud")
    # This check knows no quotes.
    lines = {re.sub(r"--command=.*", "--command=words", " ".join(x)) for x in commands("gcloud")}
    assert len(lines) > 25
    asked = [{"command_string": line} for line in sorted(lines)]
    (tmp_path / "commands.json").write_text(json.dumps(asked))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path}/commands.json"],
        capture_output=True, text=True, env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)},
    )  # fmt: skip
    wrong = [x for x in json.loads(done.stdout) if not x["success"]]
    assert not [(x["command_string"], x["error_message"]) for x in wrong]


def test_kubectl_takes_its_options(needs):
    """Its help names every option of ours."""
    needs("kubectl")
    for words in commands("kubectl"):
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        asked = ["kubectl", words[1], "--help"]
        out = subprocess.run(asked, capture_output=True, text=True).stdout
        out += subprocess.run(["kubectl", "options"], capture_output=True, text=True).stdout
        assert options <= set(re.findall(r"--[a-z-]+", out)), words


def test_hosts_get_one_word_for_each_argument(capsys):
    """What was quoted for the shell of a host comes out as it was."""
    out = printed("tpu_vm", "start", capsys).replace("\\\n", " ")
    (line,) = [x for x in out.splitlines() if "host.sh start" in x]
    (command,) = [x for x in shlex.split(line) if x.startswith("--command=")]
    words = shlex.split(command.removeprefix("--command="))
    assert words[:4] == ["bash", "qk/host.sh", "start", "1"]
    assert words[4] == 'JAX_COMPILATION_CACHE_DIR="gs://my-bucket/query-kontext/compilation_cache"'
    assert words[-1] == "--config.data.records=records"
