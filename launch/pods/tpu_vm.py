"""TPU VMs, asked for as queued resources; `host.sh` does what is done on each host."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pods import staging
from pods.route import EVERY, SILENT, Failed, Route
from pods.settings import RESTARTS, Settings
from pods.shell import ABSENT, CommandError, Shell
from qk_jax.base.errors import InputError

GONE = ("FAILED", "SUSPENDING", "SUSPENDED")  # nothing of it can be used again
PATIENCE = 5  # looks that the other hosts have to end after the first one
HOST_LINE = re.compile(r"^(\[slice \d+ host \d+\]) (.*)$", re.MULTILINE)
CAPACITY = {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}


class TpuVm(Route):
    """A slice, or several, as one queued resource called `settings.name`."""

    def __init__(self, settings: Settings, shell: Shell):
        super().__init__(settings, shell)
        self.at = (f"--zone={settings.zone}", f"--project={settings.project}")
        self.total = settings.slices * settings.hosts
        self.staged = ""

    # ---- the slice -----------------------------------------------------------------------------

    def describe(self, assumed: str) -> tuple[str, str]:
        """(state, why) of the queued resource; ('', '') if there is none."""
        answer = {"state": {"state": assumed}} if assumed else None
        found = self.resource("describe", assumed=answer)
        if found is None:
            return "", ""
        data = found.get("state", {})
        failed = data.get("failedData", {}).get("error", {}).get("message", "")
        by = data.get("stateInitiator", "").replace("_", " ").lower()
        return data.get("state", "CREATING"), failed or by

    def resource(self, verb: str, *options: str, assumed: Any = None) -> Any:
        words = ("gcloud", "compute", "tpus", "queued-resources", verb, self.settings.name)
        return self.shell.json(*words, *self.at, *options, assumed=assumed)

    def create(self) -> bool:
        state, _ = self.describe("")
        if state in (*GONE, "DELETING"):
            self.delete()
        elif state:
            self.wait_until_active()
            return False
        self.stage()  # before the slice is paid for
        try:
            self.request()
            self.wait_until_active()
        except BaseException:  # also Ctrl-C: a request that is granted later would be paid for
            self.delete()
            raise
        return True

    def request(self) -> None:
        settings, count = self.settings, self.settings.slices
        many = [f"--node-count={count}", f"--node-prefix={settings.name}"]
        words = [
            "gcloud", "compute", "tpus", "queued-resources", "create", settings.name,
            *(many if count > 1 else [f"--node-id={settings.name}"]), *self.at,
            f"--accelerator-type={settings.accelerator}", f"--runtime-version={settings.image}",
            *CAPACITY[settings.capacity], f"--valid-until-duration={settings.wait}",
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            *settings.create_options, "--async", "--quiet",
        ]  # fmt: skip
        try:
            self.shell.run(*words)
        except CommandError:
            # A lost answer to a request that has arrived is no failure.
            if not self.describe("")[0]:
                raise

    def wait_until_active(self) -> None:
        """Raises InputError when the request fails or expires."""
        before = ""
        while True:
            state, why = self.patiently(lambda: self.describe("ACTIVE"))
            if state != before:
                self.shell.say(f"{self.settings.name} is {state or 'not there'}")
            if state == "ACTIVE":
                return
            if state in ("", *GONE):
                raise InputError(
                    f"no slice {self.settings.slice} in {self.settings.zone} ({why or state}); try "
                    "again later, or another zone or capacity"
                )
            before = state
            self.shell.wait(EVERY // 2)

    def delete(self) -> None:
        for _ in range(3 * SILENT):  # a slice that is being suspended refuses at first
            state, _ = self.describe("ACTIVE")
            if not state:
                self.shell.say(f"{self.settings.name} is deleted")
                return
            if state != "DELETING":
                try:
                    self.resource("delete", "--force", "--quiet")
                except CommandError as error:
                    if not ABSENT.search(error.text):
                        self.shell.say(str(error))
            if self.shell.dry:
                return
            self.shell.wait(EVERY // 2)
        raise InputError(
            f"{self.settings.name} is still {state} AND IS PAID FOR; delete it with gcloud compute "
            f"tpus queued-resources delete {self.settings.name} --force {' '.join(self.at)}"
        )

    # ---- its hosts -----------------------------------------------------------------------------

    def ssh(self, command: str) -> tuple[str, ...]:
        """A command for all hosts of all slices at once."""
        return (
            "gcloud", "compute", "tpus", "queued-resources", "ssh", self.settings.name, *self.at,
            "--node=all", "--worker=all", "--batch-size=all", "--quiet", *self.settings.ssh_options,
            f"--command={command}",
        )  # fmt: skip

    def hosts(self, *words: str, expect: str = "", assumed: str = "") -> dict[str, str]:
        """{'[slice 0 host 3]': last line} of a verb of `host.sh` on all hosts.

        Raises:
          InputError: a host does not end with the word `expect`; gcloud passes over hosts that it
            does not reach.
        """
        command = shlex.join(["bash", "qk/host.sh", *words])
        if words[0] == "install":  # the script itself comes first
            script = shlex.quote(f"{self.staged}/host.sh")
            command = f"mkdir -p qk && gcloud storage cp --quiet {script} qk/ && {command}"
        answers = [f"[slice 0 host {host}] {expect or assumed}\n" for host in range(self.total)]
        try:
            out = self.shell.run(*self.ssh(command), assumed="".join(answers))
        except CommandError as error:
            out = error.out
            if not HOST_LINE.search(out):
                raise
        found = dict(HOST_LINE.findall(out))
        bad = [f"{host} {line}" for host, line in found.items() if expect and line != expect]
        if bad or expect and len(found) < self.total:
            said = "; ".join(bad[:3]) or f"{len(found)} of {self.total} hosts answered"
            raise InputError(f"{words[0]} failed: {said}")
        return found

    def stage(self) -> None:
        """Puts the wheel and the scripts into the bucket, once for all hosts."""
        if not self.staged:
            folder, digest = staging.build(self.settings, self.shell)
            self.staged = f"{self.settings.workdir}/launch/{digest}"
            self.shell.run("gcloud", "storage", "cp", f"{folder}/*", f"{self.staged}/")

    def statuses(self) -> dict[str, str]:
        """{host: 'running', 'absent', 'stopped' or 'exited STATUS'}, of those that answer."""
        try:
            return self.hosts("status", assumed="exited 0")
        except InputError:
            return {}

    def is_running(self) -> bool:
        return "running" in self.statuses().values()

    def start(self) -> None:
        settings = self.settings
        state, _ = self.describe("ACTIVE")
        if state != "ACTIVE":
            raise InputError(f"{settings.name} is {state or 'not there'}; create makes it")
        self.stage()
        self.shell.say("installing on all hosts")
        self.hosts("install", self.staged, settings.workdir, expect="installed")
        if settings.is_copied:
            self.hosts("copy", settings.records, expect="copied")
        elif settings.data == "mount":
            self.hosts("mount", settings.mounted, expect="mounted")
        lines = self.environment()
        words = [str(len(lines)), *lines, *settings.supervised()]
        self.hosts("start", *words, expect="started")
        self.shell.say("training")

    def environment(self) -> list[str]:
        """The lines of systemd's EnvironmentFile."""
        escaped = str.maketrans({'"': r"\"", "\\": r"\\"})
        pairs = self.settings.environment.items()
        return [f'{name}="{value.translate(escaped)}"' for name, value in pairs]

    def watch(self) -> str:
        before: dict[str, str] = {}
        silent = ending = 0
        while True:
            state, _ = self.patiently(lambda: self.describe("ACTIVE"))
            if state in ("", "DELETING"):
                raise InputError(f"{self.settings.name} was deleted by somebody")
            if state != "ACTIVE" or silent >= SILENT:
                return "lost"
            found = self.statuses()
            silent = 0 if len(found) == self.total else silent + 1
            if found and found != before:
                counts = Counter(found.values())
                told = ", ".join(f"{number} x {what}" for what, number in counts.items())
                self.shell.say(f"{told}; {self.newest()}")
                before = found
            if any(line not in ("running", "exited 0") for line in found.values()):
                ending += 1  # the others follow when they have saved or missed their peer
            if silent == 0 and ("running" not in found.values() or ending > PATIENCE):
                return verdict(found)
            self.shell.wait(EVERY)

    def status(self) -> None:
        state, why = self.describe("ACTIVE")
        print(f"{self.settings.name}: {state or 'not there'} {why}".rstrip())
        if state == "ACTIVE":
            for host, line in sorted(self.statuses().items()):
                print(f"{host} {line}")
        print(self.newest())

    def logs(self) -> None:
        self.shell.follow(*self.ssh("bash qk/host.sh logs 100"))

    def tail(self, who: str) -> str:
        out = self.shell.run(*self.ssh("bash qk/host.sh tail 20"))
        return "\n".join(line for line in out.splitlines() if line.startswith(who))

    def stop(self) -> None:
        self.hosts("stop", expect="stopped")


def verdict(found: Mapping[str, str]) -> str:
    """'done' or 'restart', from how the trainer ended on each host; see `Route.watch`."""
    if "stopped" in found.values():
        raise InputError("it was stopped by somebody")
    ended = {host: line for host, line in found.items() if line.startswith("exited")}
    for host, line in ended.items():
        status = int(line.split()[1])
        if status not in (0, *RESTARTS):
            raise Failed(f"{host} ended with status {status}; see docs/pods.md", host)
    return "done" if set(found.values()) == {"exited 0"} else "restart"
