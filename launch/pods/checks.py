"""What is found out before anything is made, so that nothing is paid for in vain."""

from __future__ import annotations

from typing import Any

from pods.settings import Settings
from pods.shell import CommandError, Shell
from qk_jax.base.errors import InputError

APIS = {
    "tpu_vm": ("tpu", "compute", "storage"),
    "gke": ("container", "compute", "storage", "artifactregistry", "cloudbuild"),
}
ZONES = "see cloud.google.com/tpu/docs/regions-zones"


def check(settings: Settings, shell: Shell) -> None:
    """Asks for everything that a slice needs, a line for each.

    Raises:
      InputError: something is missing; the lines before say what, and what to do.
    """
    checks, wrong = Checks(settings, shell), 0
    checks.project()  # without one there is nothing to ask
    for name in ("apis", "slice", "runtime", "cluster", "quota", "bucket", "records"):
        try:
            shell.say(f"{name}: {getattr(checks, name)() or 'ok'}")
        except InputError as error:
            wrong += 1
            shell.say(f"{name}: WRONG, {' '.join(str(error).split())}")
    if wrong:
        raise InputError(f"{wrong} of the checks failed, see above; nothing was made")


class Checks:
    """The questions. Each raises InputError with what to do, or returns a remark."""

    def __init__(self, settings: Settings, shell: Shell):
        self.settings, self.shell = settings, shell
        self.is_vm = settings.route == "tpu_vm"
        self.project_flag = f"--project={settings.project}"
        self.at = (f"--zone={settings.zone}", self.project_flag)

    def describe(self, *words: str, absent: str, assumed: Any) -> Any:
        """What gcloud describes. Raises InputError(absent) if it is not there or not ours, which
        Google does not tell apart."""
        try:
            found = self.shell.json("gcloud", *words, assumed=assumed)
        except CommandError as error:
            if not any(x in error.text for x in ("not exist", "not have permission")):
                raise
            found = None
        if found is None:
            raise InputError(absent)
        return found

    def project(self) -> None:
        name = self.settings.project
        login = self.shell.run(
            "gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)",
            assumed="you",
        ).strip()  # fmt: skip
        if not login:
            raise InputError("gcloud is not logged in; gcloud auth login")
        absent = f"there is no project {name} that {login} may see; check its id"
        self.describe("projects", "describe", name, absent=absent, assumed={})

    def apis(self) -> None:
        wanted = [f"{name}.googleapis.com" for name in APIS[self.settings.route]]
        on = self.shell.run(
            "gcloud", "services", "list", "--enabled", "--format=value(config.name)",
            self.project_flag, assumed="\n".join(wanted),
        ).split()  # fmt: skip
        if missing := [name for name in wanted if name not in on]:
            mend = f"gcloud services enable {' '.join(missing)} {self.project_flag}"
            raise InputError(f"they are off; {mend}")

    def slice(self) -> None:
        kind, name = ["machine-types"], self.settings.machine
        if self.is_vm:
            kind, name = ["tpus", "accelerator-types"], self.settings.accelerator
        absent = f"{self.settings.zone} has no {name}, or is no zone; {ZONES}"
        words = ("compute", *kind, "describe", name)
        self.describe(*words, *self.at, absent=absent, assumed={})

    def runtime(self) -> str | None:
        if not self.is_vm:
            return "that of the image"
        name, own = self.settings.image, self.settings.facts.runtime
        absent = f"{self.settings.zone} has no runtime {name}; leave it out for {own}"
        words = ("compute", "tpus", "tpu-vm", "versions", "describe", name)
        self.describe(*words, *self.at, absent=absent, assumed={})
        return None

    def cluster(self) -> str | None:
        name, place = self.settings.cluster, f"--location={self.settings.zone}"
        if not name:
            return "none needed" if self.is_vm else f"{self.settings.name}, made if it is not there"
        absent = (
            f"there is no cluster {name} in {self.settings.zone}; leave it out to have one made"
        )
        words = ("container", "clusters", "describe", name, place, self.project_flag)
        self.describe(*words, absent=absent, assumed={})
        return None

    def quota(self) -> str:
        """Of the TPU API, where its name is known; what is in use is not subtracted."""
        settings = self.settings
        if not self.is_vm or settings.capacity == "reserved" or not settings.facts.quota:
            return "not asked for, the request itself will tell"
        metric = f"tpu.googleapis.com/{settings.facts.quota}"
        metric += "-preemptible" if settings.capacity == "spot" else ""
        needed = settings.where.total_chips * settings.where.spec.cores
        try:
            found = self.shell.json(
                "gcloud", "beta", "quotas", "info", "list", "--service=tpu.googleapis.com",
                self.project_flag, f"--filter=metric={metric}", assumed=[],
            )  # fmt: skip
        except CommandError as error:
            return f"not known ({error}), the request itself will tell"
        limits = [limit for info in found or [] for limit in self.limits(info)]
        if not limits:
            return "not listed, the request itself will tell"
        if min(limits) < needed:
            raise InputError(
                f"{metric} is {min(limits)} in {settings.zone} and {needed} are needed; ask for "
                "more at console.cloud.google.com/iam-admin/quotas"
            )
        return f"{needed} of {min(limits)}"

    def limits(self, info: dict[str, Any]) -> list[int]:
        """Those of one quota in our zone or region; a place without a value has 0."""
        found = []
        for entry in info.get("dimensionsInfos", []):
            here = {*entry.get("dimensions", {}).values(), *entry.get("applicableLocations", [])}
            if here & {self.settings.zone, self.settings.region}:
                found.append(int(entry.get("details", {}).get("value", 0)))
        return found

    def bucket(self) -> str | None:
        settings, name = self.settings, self.settings.bucket
        make = f"gcloud storage buckets create {name} --location={settings.region}"
        absent = f"there is no bucket {name} that you may see; {make} {self.project_flag}"
        words = ("storage", "buckets", "describe", name, self.project_flag)
        place = self.describe(*words, absent=absent, assumed={"location": settings.region})
        probe = f"{settings.workdir}/launch/probe"
        try:
            self.shell.run("gcloud", "storage", "cp", "-", probe, stdin="probe")
            self.shell.run("gcloud", "storage", "rm", probe)
        except CommandError as error:
            mend = "ask for roles/storage.objectUser"
            raise InputError(f"{settings.workdir} is not writable ({error}); {mend}") from None
        if place["location"].lower() not in (settings.region, settings.region.split("-")[0]):
            return f"ok, but in {place['location']}: far from {settings.zone} is slow and costs"
        return None

    def records(self) -> str | None:
        folder = self.settings.records
        if not folder:
            return "those of the config"
        # SPLIT.array_record or its shards
        names = [f"{folder}/{split}*.array_record" for split in ("train", "validation")]
        names += [f"{name}.index.npy" for name in names]
        try:
            self.shell.run("gcloud", "storage", "ls", *names)
        except CommandError as error:
            raise InputError(f"{folder} is no folder of records ({error})") from None
        return None
