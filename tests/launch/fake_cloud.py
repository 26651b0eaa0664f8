"""What answers as `gcloud` and `kubectl` in the tests of launch/pod.py.

The cloud is a JSON file, for the programs the one that $FAKE_CLOUD names:

  fails     [{match, stderr, times, late}]: the next `times` commands with `match` in them fail;
            where `late`, after they have done their work, as when an answer is lost
  grants    for each request of a slice the states that it is seen in, one a look; the last stays
  statuses  what all hosts answer to `host.sh status`, one a look; a list has one for each host
  jobsets   the status of the JobSet, one a look
  hosts     of the slice
  apis, quotas, zones, objects, location

and the commands that were run are in `log`. Texts of errors are those of Google's own, with other
names.
"""

import fnmatch
import json
import os
import pathlib
import re
import sys

PROJECT, ZONE = "my-project", "us-east5-b"
FRESH = {
    "fails": [],
    "grants": [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]],
    "statuses": ["absent", "running", "exited 0"],
    "jobsets": [{}, {"terminalState": "Completed"}],
    "hosts": 16,
    "apis": [
        f"{name}.googleapis.com"
        for name in (
            "tpu", "compute", "storage", "container", "artifactregistry", "cloudbuild",
        )
    ],
    "quotas": {"tpu.googleapis.com/tpu-v6e-preemptible": "256"},
    "zones": [ZONE, "us-east5-a"],
    "objects": [],
    "location": "US-EAST5",
    "queued": None,
    "cluster": None,
    "pools": {},
    "jobset": False,
    "image": False,
    "repository": False,
    "log": [],
}  # fmt: skip


class Cloud:
    """One command against the state of the file."""

    def __init__(self, state, words, stdin):
        self.state, self.words, self.stdin = state, words, stdin
        self.line = " ".join(words)
        self.verbs = [word for word in words if not word.startswith("-")]

    def has(self, *words):
        return all(word in self.words for word in words)

    def next(self, key):
        """The next of a list; its last one stays."""
        found = self.state[key]
        return found.pop(0) if len(found) > 1 else found[0]

    def absent(self, what):
        name = ".".join(self.verbs[: 1 + self.verbs.index("describe")])
        code = "ResponseError: code=404, message=Not found" if "container" in name else "NOT_FOUND"
        end(1, f"ERROR: (gcloud.{name}) {code}: Resource '{what}' was not found.")

    def gcloud(self):
        if self.has("queued-resources"):
            return self.queued_resources()
        if self.has("container") or self.has("builds") or self.has("artifacts"):
            return self.container()
        if self.has("storage"):
            return self.storage()
        if self.has("auth", "list"):
            return self.state.get("login", "you@example.com")
        if self.has("services", "list"):
            return "\n".join(self.state["apis"])
        if self.has("quotas"):
            metric = self.line.split("--filter=metric=")[1].split()[0]
            value = self.state["quotas"].get(metric)
            here = {"dimensions": {"zone": ZONE}, "details": {"value": value} if value else {}}
            there = {"dimensions": {"zone": "us-south1-a"}, "details": {"value": "4"}}
            infos = [] if value is None else [{"metric": metric, "dimensionsInfos": [here, there]}]
            return json.dumps(infos)
        if self.has("projects", "describe"):
            if self.has(PROJECT):
                return "123456" if "projectNumber" in self.line else '{"lifecycleState": "ACTIVE"}'
            end(
                1,
                "ERROR: (gcloud.projects.describe) [you@example.com] does not have permission to "
                "access projects instance [other] (or it may not exist): The caller does not have "
                "permission.",
            )
        if self.has("describe"):  # accelerator types, machine types, runtimes
            zone = self.line.split("--zone=")[1].split()[0]
            if zone not in self.state["zones"] or "runtime-of-yore" in self.line:
                self.absent(self.verbs[-1])
            return "{}"
        raise AssertionError(self.line)

    def queued_resources(self):
        state, verb = self.state, self.verbs[3]
        if verb == "create":
            if state["queued"]:
                end(1, "ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: it is")
            state["queued"] = {"states": list(self.next("grants")), "why": state.get("why", "")}
            return ""
        if verb == "delete":
            if state["queued"] is None:
                end(1, "ERROR: (gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: it is not")
            state["queued"] = None
            return ""
        if state["queued"] is None:
            if verb == "describe":
                self.absent("queuedResources/qk-stage1")
            end(1, "ERROR: (gcloud.compute.tpus.queued-resources.ssh) NOT_FOUND: it is not")
        states = state["queued"]["states"]
        if verb == "describe":
            now = states.pop(0) if len(states) > 1 else states[0]
            found = {"state": now, "stateInitiator": "SERVICE"}
            if state["queued"]["why"] and now == "FAILED":
                found["failedData"] = {"error": {"code": 8, "message": state["queued"]["why"]}}
            return json.dumps({"name": "projects/my-project/...", "state": found})
        return self.ssh()

    def ssh(self):
        command = self.line.split("--command=")[1]
        verb = re.search(r"qk/host\.sh (\w+)", command)[1]
        said = {
            "install": "installed", "copy": "copied", "mount": "mounted", "start": "started",
            "stop": "stopped", "tail": "Traceback: the last words", "logs": "a line",
        }  # fmt: skip
        answer = self.next("statuses") if verb == "status" else said[verb]
        answers = answer if isinstance(answer, list) else [answer] * self.state["hosts"]
        return "\n".join(f"[slice 0 host {host}] {text}" for host, text in enumerate(answers))

    def container(self):
        state = self.state
        if self.has("clusters"):
            if self.has("create"):
                state["cluster"] = self.verbs[3]
            elif state["cluster"] is None and not self.has("create"):
                self.verbs.append("describe")
                self.absent("clusters/qk-stage2")
            elif self.has("delete"):
                state["cluster"], state["pools"], state["jobset"] = None, {}, False
            return "{}"
        if self.has("node-pools"):
            name = self.verbs[3]
            if self.has("create"):
                state["pools"][name] = {"status": "RUNNING"}
            elif name not in state["pools"]:
                self.verbs.append("describe")
                self.absent(name)
            elif self.has("delete"):
                del state["pools"][name]
            return json.dumps(state["pools"].get(name, {}))
        key = "repository" if self.has("repositories") else "image"
        if self.has("create") or self.has("submit"):
            state[key] = True
        elif not state[key]:
            self.absent(key)
        return "{}"

    def storage(self):
        objects = self.state["objects"]
        if self.has("buckets", "describe"):
            if "gs://gone" in self.line:
                self.absent("gs://gone")
            return json.dumps({"location": self.state["location"]})
        if self.has("buckets"):
            return ""
        if self.has("cp"):
            objects.append(self.verbs[-1])
            return ""
        asked = self.verbs[2:]
        of_word = [fnmatch.filter(objects, f"{word}*") for word in asked]
        found = [path for path in objects if any(path in paths for paths in of_word)]
        if not all(of_word):
            end(1, f"ERROR: (gcloud.storage.{self.verbs[1]}) One or more URLs matched no objects.")
        if self.has("rm"):
            self.state["objects"] = [path for path in objects if path not in found]
            return ""
        return "\n".join(found)

    def kubectl(self):
        state = self.state
        if self.has("delete"):
            state["jobset"] = False
        elif self.has("apply", "--filename=-"):
            state["jobset"], state["manifest"] = True, self.stdin
        elif self.has("get", "jobset"):
            return json.dumps({"status": self.next("jobsets")}) if state["jobset"] else ""
        elif self.has("get", "pods"):
            return json.dumps({"items": state.get("containers", [])})
        elif self.has("logs"):
            return "Traceback: the last words"
        return ""


class Ended(Exception):
    """The command failed; what it did stays done."""


def end(code, stderr):
    raise Ended(code, stderr)


def answer(file, program, words, stdin):
    """(exit status, stdout, stderr) of a command against the cloud of a file."""
    state = json.loads(file.read_text())
    line, out = " ".join(words), ""
    state["log"].append(line)
    failure = next((f for f in state["fails"] if f["times"] and f["match"] in line), None)
    try:
        if failure:
            failure["times"] -= 1
        if failure and not failure.get("late"):
            end(1, failure["stderr"])
        cloud = Cloud(state, words, stdin)
        out = (cloud.gcloud() if program == "gcloud" else cloud.kubectl()) + "\n"
        if failure:
            end(1, failure["stderr"])
    except Ended as ended:
        return ended.args[0], out, ended.args[1] + "\n"
    finally:
        file.write_text(json.dumps(state))
    return 0, out, ""


if __name__ == "__main__":
    given = sys.stdin.read()
    path, name = pathlib.Path(os.environ["FAKE_CLOUD"]), pathlib.Path(sys.argv[0]).name
    status, text, error = answer(path, name, sys.argv[1:], given)
    sys.stdout.write(text)
    sys.stderr.write(error)
    sys.exit(status)
