"""TPU VMs from request to deletion, on a cloud that refuses, preempts and loses answers."""

import pytest
from pods import tpu_vm
from pods.route import Failed

NO_QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-east5-b."
)
TOO_FAST = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) RESOURCE_EXHAUSTED: Quota exceeded for "
    "quota metric 'Read requests' and limit 'Read requests per minute' of service "
    "'tpu.googleapis.com' for consumer 'project_number:123456'."
)
LOST = "ERROR: gcloud crashed (ConnectionError): ('Connection aborted.', connection reset by peer)"
DENIED = (
    "ERROR: (gcloud.compute.tpus.queued-resources.delete) PERMISSION_DENIED: Permission "
    "'tpu.queuedresources.delete' denied on 'projects/my-project'"
)


def test_up_trains_and_leaves_nothing(cloud):
    status, out, err = cloud.pod("up", cloud.settings())
    assert (status, err) == (0, "")
    assert cloud.state["queued"] is None
    for words in ("is WAITING_FOR_RESOURCES", "is ACTIVE", "16 x running", "done: gs://my-bucket"):
        assert words in out
    (made,) = cloud.ran("queued-resources create")
    assert "--spot" in made and "--accelerator-type=v6e-64" in made
    order = [cloud.state["log"].index(cloud.ran(x)[0]) for x in ("/stage/*", "create", "install")]
    assert order == sorted(order), "the wheel is in the bucket before the slice is paid for"


def test_the_same_with_programs_on_the_path(cloud_on_path):
    assert cloud_on_path.pod("up", cloud_on_path.settings())[0] == 0
    assert cloud_on_path.state["queued"] is None


def test_up_keeps_the_slice_where_asked(cloud):
    assert cloud.pod("up", cloud.settings(), "--keep")[0] == 0
    assert cloud.state["queued"]


def test_failed_checks_make_nothing(cloud):
    cloud.set(apis=["compute.googleapis.com", "storage.googleapis.com"])
    status, out, err = cloud.pod("up", cloud.settings())
    assert status == 2 and "nothing was made" in err
    assert "gcloud services enable tpu.googleapis.com --project=my-project" in out
    assert not cloud.ran("create")


def test_no_quota_is_one_line_and_is_not_tried_again(cloud):
    cloud.fail("queued-resources create", NO_QUOTA, times=9)
    status, out, err = cloud.pod("up", cloud.settings())
    assert status == 2 and err.count("\n") == 1
    assert "Limit: 0 in zone us-east5-b" in err and "another slice" in err
    assert len(cloud.ran("queued-resources create")) == 1
    assert cloud.state["queued"] is None


def test_too_many_requests_are_tried_again(cloud):
    cloud.fail("queued-resources describe", TOO_FAST, times=3)
    assert cloud.pod("create", cloud.settings())[0] == 0
    assert cloud.state["queued"]["states"] == ["ACTIVE"]


def test_a_request_whose_answer_was_lost_is_not_made_twice(cloud):
    cloud.fail("queued-resources create", LOST, times=1, late=True)
    assert cloud.pod("create", cloud.settings())[0] == 0
    assert cloud.state["queued"]["states"] == ["ACTIVE"]


def test_a_request_that_fails_late_is_deleted(cloud):
    cloud.set(grants=[["WAITING_FOR_RESOURCES", "FAILED"]], why="no more capacity in the zone")
    status, _, err = cloud.pod("create", cloud.settings())
    assert status == 2 and "no more capacity in the zone" in err
    assert cloud.state["queued"] is None


def test_ctrl_c_while_waiting_withdraws_the_request(cloud, monkeypatch):
    def interrupt(self, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_vm.Shell, "wait", interrupt)
    assert cloud.pod("create", cloud.settings())[0] == 130
    assert cloud.state["queued"] is None


def test_ctrl_c_while_training_leaves_it(cloud, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(tpu_vm.TpuVm, "watch", interrupt)
    status, out, _ = cloud.pod("up", cloud.settings())
    assert status == 130 and "BE PAID FOR" in out
    assert cloud.state["queued"]["states"] == ["ACTIVE"]
    monkeypatch.undo()


def test_up_watches_what_trains_already(cloud):
    cloud.set(queued={"states": ["ACTIVE"], "why": ""}, statuses=["running", "running", "exited 0"])
    assert cloud.pod("up", cloud.settings())[0] == 0
    assert not cloud.ran("create") and not cloud.ran("install")
    assert cloud.state["queued"] is None


def test_a_preempted_slice_is_made_again(cloud):
    granted = ["ACTIVE"] * 3
    cloud.set(grants=[[*granted, "SUSPENDING", "SUSPENDED"], ["PROVISIONING", "ACTIVE"]])
    cloud.set(statuses=["absent", "running", "absent", "running", "exited 0"])
    status, out, _ = cloud.pod("up", cloud.settings())
    assert status == 0 and "lost: goes on, no checkpoint yet" in out
    assert len(cloud.ran("queued-resources create")) == 2
    assert len(cloud.ran("host.sh start")) == 2
    assert len(cloud.ran("starts-stage1.json")) == 3, "forgotten once, before the first start"
    assert cloud.state["queued"] is None


def test_a_saved_trainer_is_started_again_on_the_same_slice(cloud):
    ended = ["exited 42"] + ["exited 134"] * 15
    cloud.set(statuses=["absent", "running", ended, "absent", "running", "exited 0"])
    cloud.set(
        objects=[*cloud.state["objects"], "gs://my-bucket/query-kontext/stage1/checkpoints/700/"]
    )
    status, out, _ = cloud.pod("up", cloud.settings())
    assert status == 0 and "restart: goes on, checkpoint 700" in out
    assert len(cloud.ran("queued-resources create")) == 1
    assert len(cloud.ran("host.sh stop")) == 1


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_error_of_the_trainer_ends_it_all(cloud, code):
    ended = ["exited 134"] * 15 + [f"exited {code}"]
    cloud.set(statuses=["absent", "running", ended])
    status, out, err = cloud.pod("up", cloud.settings())
    assert status == 2 and f"[slice 0 host 15] ended with status {code}" in err
    # Of the log only the lines of the host that failed.
    assert out.count("Traceback: the last words") == 1
    assert "[slice 0 host 15] Traceback: the last words" in out
    assert cloud.state["queued"] is None


def test_the_first_host_to_end_is_not_judged_before_the_others(cloud):
    """A host that lost its peer says nothing of the one that failed, which may be a look behind."""
    early = ["exited 134"] + ["running"] * 15
    late = ["exited 134"] * 15 + ["exited 2"]
    cloud.set(statuses=["absent", "running", early, early, late])
    assert "status 2" in cloud.pod("up", cloud.settings())[2]


def test_a_host_that_never_ends_does_not_hold_up_the_others(cloud):
    cloud.set(statuses=["absent", *[["exited 42"] * 15 + ["running"]] * 7, "absent", "exited 0"])
    assert cloud.pod("up", cloud.settings())[0] == 0
    assert len(cloud.ran("host.sh start")) == 2


def test_what_somebody_stops_or_deletes_is_not_started_again(cloud):
    cloud.set(statuses=["absent", "running", "stopped"])
    status, out, err = cloud.pod("up", cloud.settings())
    assert status == 2 and "stopped by somebody" in err and "up watches it" in out
    assert len(cloud.ran("host.sh start")) == 1 and cloud.state["queued"]
    cloud.set(queued={"states": ["ACTIVE", "ACTIVE", "DELETING"], "why": ""}, statuses=["running"])
    status, _, err = cloud.pod("up", cloud.settings())
    assert status == 2 and "was deleted by somebody" in err
    assert not cloud.ran("queued-resources create")[1:]


def test_a_bucket_without_answers_does_not_end_the_watching(cloud):
    cloud.fail("storage ls gs://my-bucket/query-kontext", LOST, times=99)
    status, out, _ = cloud.pod("up", cloud.settings())
    assert status == 0 and "16 x running; the newest checkpoint is not known" in out


def test_a_cloud_without_answers_for_a_while_is_asked_again(cloud):
    cloud.pod("create", cloud.settings())
    cloud.set(statuses=["running", "exited 0"])
    cloud.fail("queued-resources describe", LOST, times=40)
    assert cloud.route().watch() == "done"


def test_a_failed_installation_leaves_nothing(cloud):
    cloud.fail("host.sh install", "##### Command execution on worker 3 failed with exit status 1")
    status, _, err = cloud.pod("up", cloud.settings())
    assert status == 2 and "exit status 1" in err
    assert cloud.state["queued"] is None


def test_a_host_that_gcloud_passes_over_is_missed(cloud):
    """gcloud goes on with the hosts that it reaches."""
    cloud.set(queued={"states": ["ACTIVE"], "why": ""}, hosts=15)
    status, _, err = cloud.pod("start", cloud.settings())
    assert status == 2 and "15 of 16 hosts answered" in err


def test_start_refuses_what_trains_and_what_is_not_there(cloud):
    assert "create makes it" in cloud.pod("start", cloud.settings())[2]
    cloud.set(queued={"states": ["ACTIVE"], "why": ""}, statuses=["running"])
    assert "trains already" in cloud.pod("start", cloud.settings())[2]


def test_a_slice_without_answers_is_lost(cloud):
    cloud.set(statuses=["absent", "running"])
    cloud.pod("create", cloud.settings())
    cloud.fail("host.sh status", "ERROR: [0] Could not SSH into the instance", times=40)
    assert cloud.route().watch() == "lost"


def test_a_cloud_without_answers_is_not_deleted(cloud):
    """The command line may be offline while the slice trains."""
    cloud.set(statuses=["absent", "running"])
    cloud.pod("create", cloud.settings())
    cloud.fail("queued-resources describe", LOST, times=99)
    with pytest.raises(tpu_vm.CommandError, match="reset by peer"):
        cloud.route().watch()
    assert cloud.state["queued"]


def test_what_cannot_be_deleted_is_said_loudly(cloud):
    cloud.set(queued={"states": ["ACTIVE"], "why": ""})
    cloud.fail("queued-resources delete", DENIED, times=99)
    status, out, err = cloud.pod("delete", cloud.settings())
    assert status == 2 and "AND IS PAID FOR" in err
    assert "queued-resources delete qk-stage1 --force --zone=us-east5-b" in err
    assert "PERMISSION_DENIED" in out


def test_delete_of_nothing_is_no_error(cloud):
    assert cloud.pod("delete", cloud.settings())[0] == 0


def test_several_slices_are_one_request(cloud):
    cloud.set(hosts=32)
    assert cloud.pod("up", cloud.settings(text='"slices.data" = 2', slices=2))[0] == 0
    (made,) = cloud.ran("queued-resources create")
    assert "--node-count=2 --node-prefix=qk-stage1" in made and "--node-id" not in made


def test_status_and_logs(cloud):
    cloud.set(queued={"states": ["ACTIVE"], "why": ""}, statuses=["running"])
    status, out, _ = cloud.pod("status", cloud.settings())
    assert status == 0 and "qk-stage1: ACTIVE" in out and "[slice 0 host 15] running" in out
    assert cloud.pod("logs", cloud.settings())[0] == 0
    assert cloud.ran("host.sh logs 100")


def test_verdicts():
    assert tpu_vm.verdict({"a": "exited 0", "b": "exited 0"}) == "done"
    assert tpu_vm.verdict({"a": "exited 0", "b": "absent"}) == "restart"
    for code in (42, 134, 137, 139, 143):
        assert tpu_vm.verdict({"a": f"exited {code}"}) == "restart"
    for code in (1, 2, 3, 130):
        with pytest.raises(Failed):
            tpu_vm.verdict({"a": "exited 0", "b": f"exited {code}"})
