"""The settings file: what it says, and what is wrong with it."""

import pathlib

import pytest
from pods import settings
from pods.shell import CommandError, shown

from qk_jax.base.errors import InputError


@pytest.mark.parametrize(
    ("name", "accelerator", "topology", "hosts", "vms", "machine"),
    [
        ("v6e-64", "v6e-64", "8x8", 16, 16, "ct6e-standard-4t"),
        ("v6e-8", "v6e-8", "2x4", 2, 1, "ct6e-standard-4t"),
        ("v6e-1", "v6e-1", "1x1", 1, 1, "ct6e-standard-1t"),
        ("v5e-256", "v5litepod-256", "16x16", 64, 64, "ct5lp-hightpu-4t"),
        ("v5p-128", "v5p-128", "4x4x4", 16, 16, "ct5p-hightpu-4t"),
        ("v5p-8", "v5p-8", "2x2x1", 1, 1, "ct5p-hightpu-4t"),
        ("v4-32", "v4-32", "2x2x4", 4, 4, "ct4p-hightpu-4t"),
    ],
)
def test_what_google_calls_a_slice(name, accelerator, topology, hosts, vms, machine):
    common = {"name": "x", "project": "p", "zone": "us-east5-b", "slice": name}
    common |= {"workdir": "gs://b/w", "config": "stage1:tiny"}
    on_gke, on_vm = (settings.Settings(route=route, **common) for route in ("gke", "tpu_vm"))
    assert on_vm.accelerator == accelerator
    assert (on_gke.topology, on_gke.hosts, on_vm.hosts) == (topology, hosts, vms)
    assert on_gke.machine == machine
    assert on_gke.region == "us-east5"


def test_the_trainer_gets_what_the_file_says(cloud):
    text = 'optimizer.lr = 3e-4\n"data.sizes" = ["512x512"]\n"data.mixed_batches" = true'
    found = settings.read(pathlib.Path(cloud.settings("tpu_vm", text)))
    words = found.supervised()
    assert words[:6] == [
        "--checkpoints", "gs://my-bucket/query-kontext/stage1/checkpoints",
        "--starts", "gs://my-bucket/query-kontext/launch/starts-stage1.json",
        "--restarts", "3",
    ]  # fmt: skip
    assert words[6:13] == [
        "--", "-m", "qk_jax.train", "--config", "stage1:20b@v6e-64",
        "--workdir", "gs://my-bucket/query-kontext",
    ]  # fmt: skip
    assert set(words[13:]) == {
        "--config.checkpoint.every=500", "--config.optimizer.lr=0.0003",
        "--config.data.sizes=('512x512',)", "--config.data.mixed_batches=true",
        "--config.data.records=records",
    }  # fmt: skip


def test_records_are_copied_or_mounted(cloud):
    def of(route="tpu_vm", **changes):
        return settings.read(pathlib.Path(cloud.settings(route, **changes)))

    assert of().is_copied and of().local_records == "records"
    assert of(data="mount").local_records == "/bucket/records"
    assert of("gke").local_records == "/bucket/records"
    assert of("gke", records="gs://other/a/b").mounted == "other"
    assert not of(records="").is_copied and of(records="").mounted == "my-bucket"


def test_a_config_file_is_named_as_it_lies_beside_the_wheel(cloud):
    path = pathlib.Path(__file__).parents[2] / "configs" / "stage1.py"
    found = settings.read(pathlib.Path(cloud.settings(config=f"{path}:20b@v6e-64")))
    assert "stage1.py:20b@v6e-64" in found.supervised()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slize": "v6e-64"}, "there is no setting 'slize'; did you mean 'slice'"),
        ({"slices": "2"}, "slices must be of type int"),
        ({"name": "Stage_1"}, "name = 'Stage_1' must be lower-case letters"),
        ({"workdir": "/home/me"}, "must be a folder in a bucket, gs://BUCKET/FOLDER"),
        ({"workdir": "gs://bucket"}, "must be a folder in a bucket"),
        ({"zone": "us-east5"}, "must be a zone, such as us-east5-b"),
        ({"capacity": "cheap"}, "must be spot, on-demand or reserved"),
        ({"slice": "v6e-63"}, "there is no slice v6e-63"),
        ({"slice": "tpu7x-128"}, "tpu7x is not supported"),
        ({"slice": "v6e-16"}, "is 64 devices, there are 16"),
        ({"slices": 2}, 'give "slices.data" = 2 in [overrides]'),
        ({"config": "stage1:20b@v9-1"}, "there is no recipe 'v9-1'"),
        ({"runtime": "v2-alpha-tpuv5"}, "v2-alpha-tpuv5 is for v5p; leave it out for v2-alpha-t"),
        ({"cluster": "ours"}, 'cluster is for route = "gke"'),
        ({"restarts": -1}, "restarts at least 0"),
        ({"env": "A=1"}, "env must be of type dict"),
        (
            {"text": '"data.batch" = 500'},
            "a batch of 500 examples does not divide over data x fsdp",
        ),
    ],
)
def test_what_is_wrong_is_named(cloud, changes, words):
    status, _, err = cloud.pod("check", cloud.settings(**changes))
    assert status == 2 and err.count("\n") == 1
    assert words in err
    assert not cloud.state["log"]


def test_what_is_wrong_on_gke_is_named(cloud):
    assert "GKE mounts the bucket" in cloud.pod("check", cloud.settings("gke", data="copy"))[2]
    assert (
        "the name of the reservation"
        in cloud.pod("check", cloud.settings("gke", reservation=""))[2]
    )
    text = "[overrides]\nno.such = 1"
    assert "config has no field" in cloud.pod("check", cloud.settings("gke", text))[2]


def test_a_file_that_is_none(cloud, tmp_path):
    assert "cannot be read" in cloud.pod("check", str(tmp_path / "gone.toml"))[2]
    (tmp_path / "a.toml").write_text("name = ")
    assert "cannot be read as TOML" in cloud.pod("check", str(tmp_path / "a.toml"))[2]
    (tmp_path / "a.toml").write_text('name = "a"')
    assert "route, project, zone, slice, workdir, config is missing" in cloud.pod(
        "check", str(tmp_path / "a.toml")
    )[2]  # fmt: skip


def test_an_unknown_verb_is_one_line(cloud):
    status, _, err = cloud.pod("destroy", cloud.settings())
    assert status == 2 and "invalid choice" in err and err.count("\n") == 1


def test_programs_that_are_not_there(cloud, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "gcloud is not installed" in cloud.pod("check", cloud.settings())[2]


def test_the_line_that_says_why():
    text = "WARNING: old\nERROR: (gcloud.x.y) NOT_FOUND: it is gone\n- more"
    error = CommandError(("gcloud", "x", "y"), text)
    assert str(error) == "gcloud x y: NOT_FOUND: it is gone"
    assert str(CommandError(("kubectl",), "")) == "kubectl: no reason given"
    assert isinstance(error, InputError)


def test_long_commands_are_shown_an_option_a_line():
    assert shown(("a", "b c")) == "a 'b c'"
    long = shown(("gcloud", "create", "--command=x --y", "--" + "z" * 99))
    assert long.splitlines()[:2] == ["gcloud create \\", "    '--command=x --y' \\"]
