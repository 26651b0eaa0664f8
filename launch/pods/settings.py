"""The settings file: what is trained, on which slice, by which route."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench.schedule import topologies
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import check_step

# Exit statuses after which the same command goes on where it stopped: 42 is SIGTERM with everything
# saved; 128 + signal is a process that lost its peers (6), its memory or its machine (9, 11, 15).
# All others come back: 1 and 2 are errors, 3 is `supervise`'s own: no progress.
RESTARTS = (42, 134, 137, 139, 143)


class Facts(NamedTuple):
    """What Google calls a generation.

    Attributes:
      accelerator: prefix of the TPU API's accelerator types.
      runtime: image of a TPU VM (cloud.google.com/tpu/docs/runtimes).
      label: cloud.google.com/gke-tpu-accelerator.
      machine: GKE's machine type of a host with four chips.
      quota: metric of tpu.googleapis.com, in the numbers of accelerator types; '-preemptible'
        follows for spot. '' where it is not known.
    """

    accelerator: str
    runtime: str
    label: str
    machine: str
    quota: str = ""


# TPU7x is not among them: it is had on GKE alone and needs a workload policy.
FACTS = {
    "v4": Facts("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    "v5e": Facts(
        "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t",
        "tpu-v5s-litepod",
    ),
    "v5p": Facts("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t", "tpu-v5p"),
    "v6e": Facts("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t", "tpu-v6e"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """A settings file.

    Attributes:
      name: of the slice, the JobSet and all else that is made; [a-z0-9-], at most 40 letters.
      route: 'tpu_vm' or 'gke'.
      project, zone: of Google Cloud.
      slice: Google's name, 'v6e-64'.
      workdir: the trainer's --workdir, in a bucket: 'gs://BUCKET/FOLDER'.
      config: the trainer's --config.
      slices: how many equal slices train together.
      capacity: 'spot', 'on-demand' or 'reserved'.
      reservation: its name; GKE needs it, the TPU API does not.
      overrides: fields of the config.
      records: folder of record files in a bucket; '' leaves config.data.records as it is.
      data: 'copy' the records to the disk of each host, or 'mount' their bucket at /bucket.
      env: environment of the trainer. It can be read by everyone who sees the slice: no secrets.
      wait: how long the request for a slice may queue, '24h'.
      restarts: how often training is started again without a new checkpoint.
      runtime: image of the TPU VMs; '' is that of the generation.
      create_options, ssh_options: more words for gcloud, where it makes the slice and where it
        logs in: a network, a service account, an IAP tunnel.
      cluster: a GKE cluster that is there; '' makes one of its own, called `name`.
      user: numeric user of the container; 0 is root.
    """

    name: str
    route: str
    project: str
    zone: str
    slice: str
    workdir: str
    config: str
    slices: int = 1
    capacity: str = "spot"
    reservation: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    records: str = ""
    data: str = ""
    env: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wait: str = "24h"
    restarts: int = 3
    runtime: str = ""
    create_options: Sequence[str] = ()
    ssh_options: Sequence[str] = ()
    cluster: str = ""
    user: int = 1000

    @property
    def where(self) -> topologies.Slice:
        """The slice, all of them together."""
        return topologies.parse(f"{self.slices}x {self.slice}")

    @property
    def facts(self) -> Facts:
        return FACTS[self.where.generation]

    @property
    def accelerator(self) -> str:
        """The TPU API's name of one slice: 'v5litepod-256'."""
        return f"{self.facts.accelerator}-{self.where.chips * self.where.spec.cores}"

    @property
    def topology(self) -> str:
        """Chips along each axis, as GKE writes it: '4x4x4'."""
        return "x".join(map(str, self.where.shape))

    @property
    def chips_per_host(self) -> int:
        """Four, but for the smallest slices; a TPU VM of a 2-D generation has up to eight."""
        flat_vm = self.route == "tpu_vm" and self.where.spec.dimensions == 2
        return min(8 if flat_vm and self.where.chips <= 8 else 4, self.where.chips)

    @property
    def hosts(self) -> int:
        """Of one slice."""
        return self.where.chips // self.chips_per_host

    @property
    def machine(self) -> str:
        """GKE's machine type."""
        return f"{self.facts.machine.removesuffix('4t')}{self.chips_per_host}t"

    @property
    def image(self) -> str:
        """Of the TPU VMs."""
        return self.runtime or self.facts.runtime

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def bucket(self) -> str:
        """'gs://BUCKET' of the work directory."""
        return bucket_of(self.workdir)

    @property
    def mounted(self) -> str:
        """Name of the bucket at /bucket: that of the records, else of the work directory."""
        return bucket_of(self.records or self.workdir).removeprefix("gs://")

    @property
    def is_copied(self) -> bool:
        """Whether each host has a copy of the records."""
        return bool(self.records) and self.data == "copy"

    @property
    def stage(self) -> str:
        """Name of the stage that the config trains."""
        return config_lib.load(self.config, self.fields).stage

    @property
    def checkpoints(self) -> str:
        """Where the trainer's checkpoints are."""
        return f"{self.workdir}/{self.stage}/checkpoints"

    @property
    def starts(self) -> str:
        """Where `supervise` counts the starts without a new checkpoint."""
        return f"{self.workdir}/launch/starts-{self.stage}.json"

    @property
    def fields(self) -> dict[str, str]:
        """The overrides as {field: text}."""
        return dict(flat(self.overrides))

    @property
    def environment(self) -> dict[str, str]:
        """Of the trainer. All stages of a work directory share what they compile."""
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{self.workdir}/compilation_cache"}
        return cache | {name: str(value) for name, value in self.env.items()}

    @property
    def local_records(self) -> str:
        """Where the hosts have the records, seen from the folder that the trainer runs in."""
        if self.is_copied:
            return "records"
        return self.records.replace(bucket_of(self.records), "/bucket", 1)

    def supervised(self) -> list[str]:
        """The arguments of `supervise`, and after them the trainer's."""
        config = self.config
        if ".py" in config:  # it lies beside the wheel
            path, _, size = config.partition(":")
            config = f"{pathlib.Path(path).name}:{size}"
        given = self.fields | ({"data.records": self.local_records} if self.records else {})
        return [
            "--checkpoints", self.checkpoints, "--starts", self.starts,
            "--restarts", str(self.restarts), "--",
            "-m", "qk_jax.train", "--config", config, "--workdir", self.workdir,
            *[f"--config.{name}={value}" for name, value in given.items()],
        ]  # fmt: skip


def bucket_of(path: str) -> str:
    """'gs://BUCKET' of 'gs://BUCKET/FOLDER'."""
    return "/".join(path.split("/")[:3])


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """('a.b', text) of every value of a TOML table, as --config.a.b takes it."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"{prefix}{name}", str(value).lower()
        elif isinstance(value, list):
            yield f"{prefix}{name}", repr(tuple(value))
        else:
            yield f"{prefix}{name}", str(value)


FORMS = {
    "name": (r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", "lower-case letters, digits and -, at most 40"),
    "route": (r"tpu_vm|gke", "tpu_vm or gke"),
    "project": (r"[a-z][a-z0-9:.-]{4,}[a-z0-9]", "the id of a project, such as my-project-123"),
    "zone": (r"[a-z]+-[a-z]+\d+-[a-z0-9]+", "a zone, such as us-east5-b"),
    "workdir": (r"gs://[a-z0-9][\w.-]+(/[\w.=-]+)+", "a folder in a bucket, gs://BUCKET/FOLDER"),
    "records": (r"(gs://[a-z0-9][\w.-]+(/[\w.=-]+)+)?", "a folder in a bucket, gs://BUCKET/FOLDER"),
    "capacity": (r"spot|on-demand|reserved", "spot, on-demand or reserved"),
    "data": (r"copy|mount", "copy or mount"),
    "wait": (r"\d+[smhd]", "a duration, such as 24h"),
}


def read(path: pathlib.Path) -> Settings:
    """The settings of a file, checked as far as that goes without asking the cloud.

    Raises:
      InputError: unreadable; an unknown, missing or malformed setting; no such slice or config;
        the config's mesh is not of the slice; a route that does not have it.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as TOML ({error})") from None
    known = {field.name: field for field in dataclasses.fields(Settings)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise InputError(f"{path}: there is no setting {name!r}; did you mean {near!r}?")
    missing = [name for name in list(known)[:7] if name not in given]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} is missing; docs/pods.md has them all")
    kinds = {"str": str, "int": int, "Sequence[str]": list}
    for name, value in given.items():
        kind = kinds.get(str(known[name].type), dict)
        if type(value) is not kind:
            raise InputError(f"{path}: {name} must be of type {kind.__name__}, not {value!r}")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise InputError(f"{path}: {name} must be a list of texts, not {value!r}")
    given["workdir"] = given["workdir"].rstrip("/")
    given.setdefault("data", "copy" if given["route"] == "tpu_vm" else "mount")
    for name, (form, what) in FORMS.items():
        if name in given and not re.fullmatch(form, given[name]):
            raise InputError(f"{path}: {name} = {given[name]!r} must be {what}")
    settings = Settings(**given)
    fit(settings)
    return settings


def fit(settings: Settings) -> None:
    """Raises InputError where slice, config and route do not belong together."""
    where = settings.where
    if where.generation not in FACTS:
        raise InputError(f"{where.generation} is not supported; known are {', '.join(FACTS)}")
    if settings.slices < 1 or settings.restarts < 0:
        raise InputError("slices must be at least 1, and restarts at least 0")
    config = config_lib.load(settings.config, settings.fields)
    sizes = sharding.filled(config.mesh.to_dict(), where.total_devices // where.count)
    spans = config.slices.data * config.slices.fsdp
    if spans != where.count:
        raise InputError(
            f"the config spans {spans} slices and slices is {where.count}; give "
            f'"slices.data" = {where.count} in [overrides]'
        )
    whole = sharding.abstract_mesh({x: n * config.slices.get(x, 1) for x, n in sizes.items()})
    check_step(config.data.batch, config, whole)
    owners = {facts.runtime: name for name, facts in FACTS.items()}
    if owners.get(settings.image, where.generation) != where.generation:
        raise InputError(
            f"runtime {settings.image} is for {owners[settings.image]}; leave it out for "
            f"{settings.facts.runtime}"
        )
    if settings.route == "tpu_vm" and settings.cluster:
        raise InputError('cluster is for route = "gke"; leave it out')
    if settings.route == "gke" and settings.is_copied:
        raise InputError('data = "copy" is for route = "tpu_vm"; GKE mounts the bucket')
    if settings.route == "gke" and settings.capacity == "reserved" and not settings.reservation:
        raise InputError('capacity = "reserved" needs the name of the reservation on GKE')
