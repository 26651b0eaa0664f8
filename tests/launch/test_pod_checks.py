"""What the launcher finds wrong before it makes anything: one line each."""

import pytest


def wrong(cloud, route="tpu_vm", **changes):
    """The lines of what is wrong, after which nothing was made."""
    status, out, err = cloud.pod("check", cloud.settings(route, **changes))
    assert not cloud.ran("create")
    lines = [line.split(" ", 1)[1] for line in out.splitlines() if "WRONG" in line]
    assert (status, bool(err)) == ((2, True) if lines else (status, bool(err)))
    return lines or [err]


@pytest.mark.parametrize("route", ["tpu_vm", "gke"])
def test_all_is_well(cloud, route):
    status, out, err = cloud.pod("check", cloud.settings(route))
    assert (status, err) == (0, "") and out.count("\n") == 7
    assert not any(verb in line for line in cloud.state["log"] for verb in ("create", "submit"))
    assert not [path for path in cloud.state["objects"] if "probe" in path]


def test_project(cloud):
    (line,) = wrong(cloud, project="other-project")
    assert "there is no project other-project that you@example.com may see" in line
    cloud.set(login="")
    assert "gcloud auth login" in wrong(cloud)[0]


def test_apis(cloud):
    cloud.set(apis=[])
    (line,) = wrong(cloud, "gke")
    assert "gcloud services enable container.googleapis.com compute.googleapis.com" in line


@pytest.mark.parametrize(
    ("route", "name"), [("tpu_vm", "v6e-64"), ("gke", "ct5p-hightpu-4t")], ids=["tpu_vm", "gke"]
)
def test_a_zone_without_the_slice(cloud, route, name):
    lines = wrong(cloud, route, zone="us-west1-c")
    assert f"us-west1-c has no {name}, or is no zone" in lines[0]


def test_a_runtime_that_is_not_there(cloud):
    (line,) = wrong(cloud, runtime="runtime-of-yore")
    assert "has no runtime runtime-of-yore; leave it out for v2-alpha-tpuv6e" in line


def test_a_cluster_that_is_not_there(cloud):
    assert "there is no cluster ours in us-east5-a" in wrong(cloud, "gke", cluster="ours")[0]


def test_quota(cloud):
    cloud.set(quotas={"tpu.googleapis.com/tpu-v6e-preemptible": "32"})
    (line,) = wrong(cloud)
    assert "tpu-v6e-preemptible is 32 in us-east5-b and 64 are needed" in line
    cloud.set(quotas={"tpu.googleapis.com/tpu-v6e-preemptible": ""})  # Google leaves out a 0
    assert "is 0 in us-east5-b" in wrong(cloud)[0]


def test_quota_counts_tensorcores_where_the_name_does(cloud):
    cloud.set(quotas={"tpu.googleapis.com/tpu-v5p": "127"})
    changes = {"slice": "v5p-128", "config": "stage2:20b@v5p-128", "capacity": "on-demand"}
    assert "is 127 in us-east5-b and 128 are needed" in wrong(cloud, **changes)[0]


def test_a_quota_that_cannot_be_read_is_no_obstacle(cloud):
    cloud.fail("quotas info", "ERROR: (gcloud.beta.quotas.info.list) PERMISSION_DENIED: no", 9)
    status, out, _ = cloud.pod("check", cloud.settings())
    assert status == 0 and "quota: not known" in out


def test_bucket(cloud):
    lines = wrong(cloud, workdir="gs://gone/folder")
    assert "gcloud storage buckets create gs://gone --location=us-east5" in lines[0]
    cloud.fail(
        "storage cp", "ERROR: (gcloud.storage.cp) HTTPError 403: you@example.com does not have "
        "storage.objects.create access to the Google Cloud Storage object."
    )  # fmt: skip
    (line,) = wrong(cloud)
    assert "is not writable" in line and "roles/storage.objectUser" in line


def test_a_bucket_elsewhere_is_a_remark(cloud):
    cloud.set(location="ASIA-NORTHEAST1")
    status, out, _ = cloud.pod("check", cloud.settings())
    assert status == 0 and "far from us-east5-b is slow and costs" in out


def test_records(cloud):
    cloud.set(objects=["gs://my-bucket/records/train.array_record"])
    (line,) = wrong(cloud)
    assert "gs://my-bucket/records is no folder of records" in line


def test_all_that_is_wrong_is_said_at_once(cloud):
    cloud.set(apis=[], objects=[])
    assert len(wrong(cloud, zone="us-west1-c")) == 4
