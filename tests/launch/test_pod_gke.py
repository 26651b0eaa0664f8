"""GKE from an empty project to a deleted cluster, on a cloud that fails half-way."""

import pytest
import yaml
from pods import gke

NO_QUOTA = (
    "ERROR: (gcloud.container.node-pools.create) ResponseError: code=403, message=Insufficient "
    "quota to satisfy the request: Quota 'TPUS_PER_TPU_FAMILY' exceeded. Limit: 0.0 in region "
    "us-east5."
)
FAILED = {
    "terminalState": "Failed",
    "restarts": 2,
    "conditions": [{"type": "Failed", "message": "jobset failed due to one or more job failures"}],
}


def pods(*codes):
    return [
        {
            "metadata": {"name": f"qk-stage2-slice-0-{index}-abcde"},
            "status": {
                "phase": "Failed",
                "containerStatuses": [
                    {"name": "train", "state": {"terminated": {"exitCode": code}}},
                ],
            },
        }
        for index, code in enumerate(codes)
    ]


def test_up_trains_and_leaves_nothing(cloud):
    status, out, err = cloud.pod("up", cloud.settings("gke"))
    assert (status, err) == (0, "")
    assert "done: gs://my-bucket/query-kontext/stage2" in out
    assert (cloud.state["cluster"], cloud.state["pools"]) == (None, {})
    order = [
        cloud.state["log"].index(cloud.ran(x)[0])
        for x in ("clusters create", "builds submit", "node-pools create", "apply --filename=-")
    ]
    assert order == sorted(order), "the slice is paid for last"
    contexts = {line.split("--context=")[1].split()[0] for line in cloud.ran("--context=")}
    assert contexts == {"gke_my-project_us-east5-a_qk-stage2"}


def test_the_same_with_programs_on_the_path(cloud_on_path):
    assert cloud_on_path.pod("up", cloud_on_path.settings("gke"))[0] == 0
    assert cloud_on_path.state["cluster"] is None
    assert yaml.safe_load(cloud_on_path.state["manifest"])["kind"] == "JobSet"


def test_half_a_creation_is_taken_back(cloud):
    cloud.fail("node-pools create qk-stage2-1", NO_QUOTA, times=9, late=True)
    path = cloud.settings("gke", '[overrides]\n"slices.data" = 2', slices=2)
    status, _, err = cloud.pod("create", path)
    assert status == 2 and "Limit: 0.0 in region us-east5" in err and err.count("\n") == 1
    assert (cloud.state["cluster"], cloud.state["pools"]) == (None, {})


def test_a_cluster_that_was_there_stays(cloud):
    cloud.set(cluster="ours")
    path = cloud.settings("gke", cluster="ours")
    cloud.fail("node-pools create", NO_QUOTA, times=1, late=True)
    assert cloud.pod("create", path)[0] == 2
    assert (cloud.state["cluster"], cloud.state["pools"]) == ("ours", {})
    assert cloud.pod("up", path)[0] == 0
    assert (cloud.state["cluster"], cloud.state["pools"]) == ("ours", {})
    assert not cloud.ran("clusters create") and not cloud.ran("clusters delete")


def test_half_a_node_pool_is_made_anew(cloud):
    cloud.set(cluster="qk-stage2", pools={"qk-stage2-0": {"status": "ERROR"}})
    assert cloud.pod("create", cloud.settings("gke"))[0] == 0
    assert cloud.state["pools"] == {"qk-stage2-0": {"status": "RUNNING"}}
    assert len(cloud.ran("node-pools delete")) == 1


def test_an_image_that_is_there_is_not_built(cloud):
    cloud.set(image=True)
    assert cloud.pod("create", cloud.settings("gke"))[0] == 0
    assert not cloud.ran("builds submit")


def test_an_error_of_the_trainer_ends_it_all(cloud):
    cloud.set(jobsets=[{}, {}, FAILED], containers=pods(134, 2, 42))
    status, out, err = cloud.pod("up", cloud.settings("gke"))
    assert status == 2 and "qk-stage2-slice-0-1-abcde ended with status 2" in err
    assert "134" not in err and "Traceback: the last words" in out
    assert cloud.ran("logs qk-stage2-slice-0-1-abcde")
    assert cloud.state["cluster"] is None


def test_a_failure_that_no_pod_explains(cloud):
    cloud.set(jobsets=[{}, {}, FAILED])
    assert "jobset failed due to one or more" in cloud.pod("up", cloud.settings("gke"))[2]


def test_what_somebody_stops_is_not_started_again(cloud):
    cloud.set(cluster="qk-stage2", pools={"qk-stage2-0": {"status": "RUNNING"}})
    with pytest.raises(gke.InputError, match="stopped by somebody"):
        cloud.route("gke").watch()


def test_pools_are_deleted_though_the_cluster_does_not_answer(cloud):
    cloud.set(cluster="ours", pools={"qk-stage2-0": {"status": "RUNNING"}})
    cloud.fail("delete jobset", "Unable to connect to the server: dial tcp: i/o timeout", times=9)
    assert cloud.pod("delete", cloud.settings("gke", cluster="ours"))[0] == 0
    assert cloud.state["pools"] == {}


def test_up_watches_what_trains_already(cloud):
    cloud.set(cluster="qk-stage2", pools={"qk-stage2-0": {"status": "RUNNING"}}, jobset=True)
    assert cloud.pod("up", cloud.settings("gke"))[0] == 0
    assert not cloud.ran("--filename=-") and not cloud.ran("builds submit")
    assert cloud.state["cluster"] is None


def test_a_cloud_without_answers_is_not_deleted(cloud):
    cloud.set(cluster="qk-stage2", jobset=True, jobsets=[{}])
    cloud.fail("get jobset", "Unable to connect to the server: dial tcp: i/o timeout", times=99)
    with pytest.raises(gke.CommandError, match="i/o timeout"):
        cloud.route("gke").watch()
    assert cloud.state["cluster"]


def test_what_cannot_be_deleted_is_said_loudly(cloud):
    cloud.set(cluster="qk-stage2")
    cloud.fail("clusters delete", "ERROR: (gcloud.container.clusters.delete) code=403", times=99)
    status, _, err = cloud.pod("delete", cloud.settings("gke"))
    assert status == 2 and "AND IS PAID FOR; gcloud container clusters delete qk-stage2" in err


def test_delete_of_nothing_is_no_error(cloud):
    assert cloud.pod("delete", cloud.settings("gke"))[0] == 0


def test_stop_status_and_logs(cloud):
    cloud.set(cluster="qk-stage2", jobset=True, jobsets=[{"restarts": 3}], containers=pods(0))
    status, out, _ = cloud.pod("status", cloud.settings("gke"))
    assert status == 0 and "qk-stage2: running" in out and "3 restarts, no checkpoint yet" in out
    assert cloud.pod("logs", cloud.settings("gke"))[0] == 0
    assert "--max-log-requests=16" in cloud.ran("--follow")[0]
    assert cloud.pod("stop", cloud.settings("gke"))[0] == 0
    assert not cloud.state["jobset"] and cloud.state["cluster"]


def test_start_refuses_what_trains(cloud):
    cloud.set(cluster="qk-stage2", jobset=True)
    assert "trains already" in cloud.pod("start", cloud.settings("gke"))[2]
