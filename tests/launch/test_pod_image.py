"""The container and the JobSet: what Docker, Kubernetes and JobSet would say of them, offline.

No Docker daemon and no cluster is needed: instructions are read, and manifests are held to a table
of the fields that the published schemas have, Jobs to the whole schemas of Kubernetes.
"""

import dataclasses
import functools
import pathlib
import re
import zipfile

import kubernetes_validate
import pytest
import yaml
from pods import gke, settings, shell, staging

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
FILES = {"one slice": ROOT / "launch/gke/stage2.toml", "two slices": GOLDEN / "gke_slices.toml"}
text, number, flag, texts, numbers = str, int, bool, [str], [int]
MANY = object()  # any key, text as the value
# jobset.x-k8s.io_jobsets.yaml of JobSet v0.10 above the Job; Kubernetes 1.31 to 1.37 below it. A
# field that is not here is a mistake, or has to be looked up and added.
CONTAINER = {
    "name": text, "image": text, "args": texts, "command": texts,
    "env": [{"name": text, "value": text}],
    "ports": [{"containerPort": number}],
    "resources": {"limits": {"google.com/tpu": number}},
    "volumeMounts": [{"name": text, "mountPath": text, "readOnly": flag}],
}  # fmt: skip
POD = {
    "restartPolicy": ("Never", "OnFailure"),
    "terminationGracePeriodSeconds": number,
    "serviceAccountName": text,
    "nodeSelector": {MANY: text},
    "securityContext": {"runAsUser": number, "runAsGroup": number},
    "containers": [CONTAINER],
    "volumes": [{
        "name": text,
        "emptyDir": {"medium": ("", "Memory")},
        "csi": {"driver": text, "readOnly": flag, "volumeAttributes": {MANY: text}},
    }],
}  # fmt: skip
JOB = {
    "parallelism": number, "completions": number, "backoffLimit": number,
    "completionMode": ("Indexed", "NonIndexed"),
    "podFailurePolicy": {"rules": [{
        "action": ("FailJob", "Ignore", "Count", "FailIndex"),
        "onExitCodes": {"containerName": text, "operator": ("In", "NotIn"), "values": numbers},
    }]},
    "template": {"metadata": {"annotations": {MANY: text}}, "spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": text, "annotations": {MANY: text}},
    "spec": {
        "failurePolicy": {
            "maxRestarts": number,
            "restartStrategy": ("Recreate", "BlockingRecreate"),
            "rules": [{
                "name": text, "onJobFailureReasons": [("BackoffLimitExceeded", "PodFailurePolicy")],
                "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
            }],
        },
        "replicatedJobs": [{"name": text, "replicas": number, "template": {"spec": JOB}}],
    },
}  # fmt: skip


def misfits(value, schema, where="JobSet"):
    """Where a manifest is not as the table says."""
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, inner in value.items():
            if key in schema or MANY in schema:
                yield from misfits(inner, schema.get(key, schema.get(MANY)), f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(schema, list) and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from misfits(inner, schema[0], f"{where}[{index}]")
    elif isinstance(schema, tuple):
        if value not in schema:
            yield f"{where}: {value!r}"
    elif type(value) is not schema:
        yield f"{where}: {value!r}"


@functools.cache
def manifest(name):
    route = gke.Gke(settings.read(FILES[name]), shell.Shell(dry=True))
    route.image = "us-docker.pkg.dev/p/qk-jax/train:abc"
    return yaml.safe_load(route.manifest())


@pytest.mark.parametrize("name", FILES)
def test_the_manifest_has_only_what_the_schemas_have(name):
    assert not list(misfits(manifest(name), JOBSET))


def test_the_table_finds_misfits():
    spec = {"failurePolicy": {"maxRestarts": "3", "restartStrategy": "Never"}, "replicatedJob": []}
    assert list(misfits({"kind": "Jobset", "spec": spec}, JOBSET)) == [
        "JobSet.kind: 'Jobset'", "JobSet.spec.failurePolicy.maxRestarts: '3'",
        "JobSet.spec.failurePolicy.restartStrategy: 'Never'", "JobSet.spec.replicatedJob",
    ]  # fmt: skip


@pytest.mark.parametrize("version", ["1.31", "1.35"])
@pytest.mark.parametrize("name", FILES)
def test_kubernetes_takes_the_job(name, version):
    for job in manifest(name)["spec"]["replicatedJobs"]:
        one = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
        kubernetes_validate.validate(one | job["template"], version, strict=True)


@pytest.mark.parametrize(("name", "slices", "chips"), [("one slice", 1, 64), ("two slices", 2, 64)])
def test_the_job_is_as_large_as_the_slice(name, slices, chips):
    (job,) = manifest(name)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == slices
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == chips // 4
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert len(f"{manifest(name)['metadata']['name']}-slice-9-999-abcde") <= 63


def test_it_starts_again_only_where_that_helps():
    spec = manifest("one slice")["spec"]
    (job,) = spec["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    codes = set(rule["onExitCodes"]["values"])
    assert {42, 134, 137, 143} <= codes and not codes & {0, 1, 2, 3, 130}
    # A Job that the rule above has failed fails the JobSet; any other reason starts it again.
    (policy,) = spec["failurePolicy"]["rules"]
    assert policy["action"] == "FailJobSet"
    assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["template"]["spec"]["backoffLimit"] == 0


def test_values_with_quotes_reach_the_trainer_as_they_are(tmp_path):
    example = FILES["one slice"].read_text()
    awkward = '[overrides]\n"prompt.system" = "say: \\"hi\\", $name {x} # no\\n"'
    (tmp_path / "a.toml").write_text(f"{example}\n{awkward}\n")
    route = gke.Gke(settings.read(tmp_path / "a.toml"), shell.Shell(dry=True))
    (job,) = yaml.safe_load(route.manifest())["spec"]["replicatedJobs"]
    args = job["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert '--config.prompt.system=say: "hi", $name {x} # no\n' in args


# ---- the image -----------------------------------------------------------------------------------


def instructions():
    """(instruction, words) of the Dockerfile."""
    lines = (ROOT / "launch/gke/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_pinned_small_and_not_roots():
    found = dict(instructions())
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", found["FROM"])
    assert found["USER"] == "1000" == str(settings.Settings.user)
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}
    assert {name for name, _ in instructions()} == known
    assert "--constraint constraints.txt" in found["RUN"] and "--no-cache-dir" in found["RUN"]
    # Without brackets a shell would be process 1, and keep SIGTERM for itself.
    assert yaml.safe_load(found["ENTRYPOINT"]) == ["python", "supervise.py"]


def test_the_folder_that_it_is_built_from_has_all_that_it_copies(monkeypatch):
    """Built as staging does, but for pip, which would ask an index for setuptools."""

    def wheel(self, *words, **_):
        folder = words[-2].partition("=")[2]
        source = pathlib.Path(words[-1])
        assert {path.name for path in source.iterdir()} == set(staging.SOURCES)
        with zipfile.ZipFile(f"{folder}/qk_jax-0.1.0-py3-none-any.whl", "w"):
            pass
        return ""

    monkeypatch.setattr(shell.Shell, "run", wheel)
    found = dataclasses.replace(settings.read(FILES["one slice"]), name="qk-test-of-staging")
    folder, digest = staging.build(found, shell.Shell())
    try:
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "Dockerfile", "constraints.txt", "supervise.py", "qk_jax-0.1.0-py3-none-any.whl"
        }  # fmt: skip
        assert staging.build(found, shell.Shell())[1] == digest
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
