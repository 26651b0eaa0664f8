"""GKE: a cluster with a node pool for each slice, and a JobSet that starts itself again."""

from __future__ import annotations

import itertools
import json
import pathlib
import shlex
import string
from typing import Any

from pods import staging
from pods.route import EVERY, Failed, Route
from pods.settings import RESTARTS, Settings
from pods.shell import CommandError, Shell
from qk_jax.base.errors import InputError

JOBSET = "https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1/manifests.yaml"
TEMPLATE = pathlib.Path(__file__).resolve().parents[1] / "gke" / "jobset.yaml"


class Gke(Route):
    """A JobSet called `settings.name`."""

    def __init__(self, settings: Settings, shell: Shell):
        super().__init__(settings, shell)
        self.cluster = settings.cluster or settings.name
        self.project = f"--project={settings.project}"
        self.at = (f"--location={settings.zone}", self.project)
        self.pools = [f"{settings.name}-{index}" for index in range(settings.slices)]
        self.selector = f"--selector=jobset.sigs.k8s.io/jobset-name={settings.name}"
        self.image, self.is_connected = "", False

    def kubectl_words(self, *words: str) -> tuple[str, ...]:
        """A kubectl command for this cluster, whatever the current one is."""
        if not self.is_connected:
            self.gcloud("container", "clusters", "get-credentials", self.cluster, *self.at)
            self.is_connected = True
        context = f"gke_{self.settings.project}_{self.settings.zone}_{self.cluster}"
        return ("kubectl", *words, f"--context={context}")

    def kubectl(self, *words: str, **more: Any) -> str:
        return self.shell.run(*self.kubectl_words(*words), **more)

    def get(self, *words: str, assumed: Any) -> Any:
        """What kubectl says, from JSON; None if it is not there."""
        out = self.kubectl(
            "get", *words, "--ignore-not-found", "--output=json", assumed=json.dumps(assumed)
        )
        return json.loads(out.strip() or "null")

    def gcloud(self, *words: str, **more: Any) -> str:
        return self.shell.run("gcloud", *words, **more)

    # ---- cluster, image and node pools ---------------------------------------------------------

    def create(self) -> bool:
        made: list[tuple[str, ...]] = []
        try:
            self.make_cluster(made)
            if missing := [pool for pool in self.pools if not self.has_pool(pool)]:
                self.make_image()  # before the slices are paid for
            for pool in missing:
                made.append(self.pool_words("delete", pool))
                self.make_pool(pool)
        except BaseException:
            for words in reversed(made):
                self.remove(*words)
            raise
        return bool(made)

    def cluster_words(self, verb: str) -> tuple[str, ...]:
        return ("container", "clusters", verb, self.cluster, *self.at)

    def pool_words(self, verb: str, pool: str) -> tuple[str, ...]:
        return ("container", "node-pools", verb, pool, f"--cluster={self.cluster}", *self.at)

    def make_cluster(self, made: list[tuple[str, ...]]) -> None:
        """The cluster with JobSet, whose pods may use the buckets."""
        settings = self.settings
        if self.shell.json("gcloud", *self.cluster_words("describe")) is None:
            made.append(self.cluster_words("delete"))
            self.gcloud(
                *self.cluster_words("create"), "--release-channel=regular",
                "--machine-type=e2-standard-4", "--num-nodes=1", "--addons=GcsFuseCsiDriver",
                f"--workload-pool={settings.project}.svc.id.goog", "--quiet",
            )  # fmt: skip
        self.kubectl("apply", "--server-side", f"--filename={JOBSET}")
        self.kubectl(
            "wait", "deployment/jobset-controller-manager", "--namespace=jobset-system",
            "--for=condition=Available", "--timeout=300s",
        )  # fmt: skip
        number = self.gcloud(
            "projects", "describe", settings.project, "--format=value(projectNumber)",
            assumed="NUMBER",
        ).strip()  # fmt: skip
        pool = f"projects/{number}/locations/global/workloadIdentityPools"
        member = f"{pool}/{settings.project}.svc.id.goog/subject/ns/default/sa/default"
        buckets = sorted({settings.bucket, f"gs://{settings.mounted}"})
        for bucket, role in itertools.product(buckets, ("objectUser", "bucketViewer")):
            self.gcloud(
                "storage", "buckets", "add-iam-policy-binding", bucket,
                f"--role=roles/storage.{role}", f"--member=principal://iam.googleapis.com/{member}",
            )  # fmt: skip

    def make_image(self) -> None:
        """Builds the image in the cloud, unless this checkout's is there."""
        settings = self.settings
        folder, digest = staging.build(settings, self.shell)
        repository = f"{settings.region}-docker.pkg.dev/{settings.project}/qk-jax"
        self.image = f"{repository}/train:{digest}"
        at = (f"--location={settings.region}", self.project)
        words = ("gcloud", "artifacts", "repositories")
        if self.shell.json(*words, "describe", "qk-jax", *at) is None:
            self.shell.run(*words, "create", "qk-jax", "--repository-format=docker", *at)
        images = ("gcloud", "artifacts", "docker", "images")
        if self.shell.json(*images, "describe", self.image) is None:
            self.shell.say("building the image, which takes some minutes")
            tag = (f"--tag={self.image}", "--timeout=3600s", self.project)
            self.gcloud("builds", "submit", str(folder), *tag)

    def has_pool(self, pool: str) -> bool:
        """Whether the node pool of a slice is there; half of one is deleted first."""
        found = self.shell.json("gcloud", *self.pool_words("describe", pool))
        if found is not None and found.get("status") == "ERROR":
            self.remove(*self.pool_words("delete", pool))
            return False
        return found is not None

    def make_pool(self, pool: str) -> None:
        """The node pool of one slice."""
        settings = self.settings
        reservation = ["--reservation-affinity=specific", f"--reservation={settings.reservation}"]
        capacity = {"spot": ["--spot"], "on-demand": [], "reserved": reservation}[settings.capacity]
        compact = ["--placement-type=COMPACT", f"--tpu-topology={settings.topology}"]
        shape = compact if settings.hosts > 1 else []  # a single host is a slice anyway
        self.gcloud(
            *self.pool_words("create", pool), f"--node-locations={settings.zone}",
            f"--machine-type={settings.machine}", f"--num-nodes={settings.hosts}",
            *shape, *capacity, "--workload-metadata=GKE_METADATA", "--enable-gvnic",
            "--scopes=cloud-platform", "--disk-size=200", *settings.create_options, "--quiet",
        )  # fmt: skip

    def remove(self, *words: str) -> None:
        """Deletes a cluster or node pool. Says so loudly when it cannot."""
        try:
            self.gcloud(*words, "--quiet")
        except CommandError as error:
            if "not found" not in error.text.lower():
                command = " ".join(["gcloud", *words])
                self.shell.say(f"{error}: IT MAY STILL BE PAID FOR; {command}")

    def delete(self) -> None:
        verbs = ("describe", "delete")
        parts = [[self.cluster_words(verb) for verb in verbs]]
        if self.settings.cluster:
            try:
                self.stop()
            except CommandError as error:  # what costs is deleted all the same
                self.shell.say(str(error))
            parts = [[self.pool_words(verb, pool) for verb in verbs] for pool in self.pools]
        for describe, delete in parts:
            if self.shell.json("gcloud", *describe, assumed={}) is not None:
                self.remove(*delete)
            if self.shell.json("gcloud", *describe) is not None:
                command = " ".join(["gcloud", *delete])
                raise InputError(f"it is not deleted AND IS PAID FOR; {command}")
        self.shell.say(f"{self.settings.name} is deleted")

    # ---- the JobSet ----------------------------------------------------------------------------

    def manifest(self) -> str:
        """The JobSet as YAML; what is filled in is JSON, which is YAML, too."""
        settings = self.settings
        given = {"HF_HOME": "/cache/huggingface"} | settings.environment
        env = [{"name": name, "value": value} for name, value in given.items()]
        values = {
            "name": settings.name, "slices": settings.slices, "hosts": settings.hosts,
            "restarts": list(RESTARTS), "label": settings.facts.label,
            "topology": settings.topology, "user": settings.user, "image": self.image,
            "args": settings.supervised(), "env": env, "chips": settings.chips_per_host,
            "bucket": settings.mounted,
        }  # fmt: skip
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
        return string.Template(TEMPLATE.read_text()).substitute(texts)

    def jobset(self, assumed: Any = None) -> dict[str, Any] | None:
        return self.get("jobset", self.settings.name, assumed=assumed)

    def is_running(self) -> bool:
        found = self.jobset()
        return found is not None and not found.get("status", {}).get("terminalState")

    def start(self) -> None:
        if not self.image:
            self.make_image()
        self.stop()  # what is left of a finished one
        self.kubectl("apply", "--filename=-", stdin=self.manifest())
        if self.shell.dry:
            print(f"# the same on a cluster of xpk:\n# {self.xpk()}")
        self.shell.say("training")

    def pods(self) -> list[dict[str, Any]]:
        return (self.get("pods", self.selector, assumed={"items": []}) or {}).get("items", [])

    def watch(self) -> str:
        before, completed = "", {"status": {"terminalState": "Completed"}}
        while True:
            found = self.patiently(lambda: self.jobset(completed))
            if found is None:
                raise InputError(f"{self.settings.name} was stopped by somebody")
            state = found.get("status", {})
            if state.get("terminalState") == "Completed":
                return "done"
            pods = self.patiently(self.pods)
            if state.get("terminalState") == "Failed":
                raise self.failure(state, pods)
            phases = ", ".join(sorted({pod["status"]["phase"] for pod in pods}))
            told = f"{phases or 'no pods'}, {state.get('restarts', 0)} restarts"
            if told != before:
                self.shell.say(f"{told}; {self.newest()}")
            before = told
            self.shell.wait(EVERY)

    def failure(self, state: dict[str, Any], pods: list[dict[str, Any]]) -> Failed:
        """What the JobSet and its pods say about it."""
        for pod in pods:
            name = pod["metadata"]["name"]
            for container in pod["status"].get("containerStatuses", []):
                code = container.get("state", {}).get("terminated", {}).get("exitCode", 0)
                if container["name"] == "train" and code not in (0, *RESTARTS):
                    return Failed(f"{name} ended with status {code}; see docs/pods.md", name)
        said = [c["message"] for c in state.get("conditions", []) if c.get("type") == "Failed"]
        return Failed(f"{self.settings.name} failed: {'; '.join(said) or 'no reason given'}")

    def status(self) -> None:
        found = self.jobset({"status": {}})
        state = (found or {}).get("status", {})
        print(f"{self.settings.name}: {state.get('terminalState', 'running') if found else 'none'}")
        for pod in self.pods():
            print(f"{pod['metadata']['name']} {pod['status']['phase']}")
        print(f"{state.get('restarts', 0)} restarts, {self.newest()}")

    def logs(self) -> None:
        total = self.settings.slices * self.settings.hosts
        words = self.kubectl_words(
            "logs", self.selector, "--container=train", "--prefix", "--tail=100", "--follow",
            f"--max-log-requests={total}",
        )  # fmt: skip
        self.shell.follow(*words)

    def tail(self, who: str) -> str:
        return self.kubectl("logs", who or self.selector, "--container=train", "--tail=20")

    def stop(self) -> None:
        self.kubectl(
            "delete", "jobset", self.settings.name, "--ignore-not-found", "--cascade=foreground",
            "--timeout=900s",
        )  # fmt: skip

    def xpk(self) -> str:
        """The same start by xpk; its clusters have Kueue, and the bucket as a storage."""
        settings = self.settings
        command = shlex.join(["python", "supervise.py", *settings.supervised()])
        words = [
            "xpk", "workload", "create", f"--workload={settings.name}", f"--cluster={self.cluster}",
            self.project, f"--zone={settings.zone}", f"--tpu-type={settings.accelerator}",
            f"--num-slices={settings.slices}", f"--docker-image={self.image}",
            "--max-restarts=1000", "--termination-grace-period-seconds=600",
            *[f"--env={name}={value}" for name, value in settings.environment.items()],
            f"--command={command}",
        ]  # fmt: skip
        return shlex.join(words)
