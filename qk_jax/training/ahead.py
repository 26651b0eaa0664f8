"""Programs that were compiled ahead of a run (`bench precompile`), checked before they are used.

Their folder is one of JAX's persistent compilation cache, with a manifest beside the programs of
each stage and kind of devices: `STAGE-SIZE-KIND.json`. JAX finds a program by a key that is made of
its StableHLO, the versions, the flags and the devices, so that a wrong one is never loaded; the
manifest says in words why one is not. Only files that are whole are copied to the cache of the run,
from which JAX reads.

Executables are loaded by JAX's cache and not by `jax.experimental.serialize_executable`, whose
files are pickles. A folder of programs is code: take it only from whom you would take code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from qk_jax.base import buckets, distributed, files, runtime
from qk_jax.base.errors import InputError, some
from qk_jax.experiment.plan import Plan

log = logging.getLogger(__name__)
# Flags of the environment that XLA reads, but for those that say nothing of a program.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
IRRELEVANT = ("--xla_force_host_platform_device_count", "--xla_dump")


class Ahead(NamedTuple):
    """What a folder has for a run.

    Attributes:
      folder: its name; '' without one.
      programs: {digest of the StableHLO: name} of the programs for these devices.
    """

    folder: str = ""
    programs: Mapping[str, str] = {}

    def missed(self, loaded: Mapping[str, bool]) -> Iterator[str]:
        """Lines about programs that had to be compiled.

        Args:
          loaded: by digest, whether JAX found it.
        """
        if not self.programs:
            return
        if count := sum(digest not in self.programs for digest in loaded):
            yield (
                f"{count} of {len(loaded)} programs are not in {self.folder}: they were compiled "
                "there for another config or revision, and are compiled here"
            )
        lost = [self.programs[x] for x, found in loaded.items() if not found and x in self.programs]
        if lost:
            yield f"{self.folder} has {some(lost)} but JAX could not use it; compiled here"


class Manifest(NamedTuple):
    """What a folder has for one stage and kind of devices.

    Attributes:
      facts: what has to be equal where they run.
      programs: {digest of the StableHLO: name}.
      digests: {name of a file: its digest}.
    """

    facts: Mapping[str, str]
    programs: Mapping[str, str]
    digests: Mapping[str, str]

    @classmethod
    def read(cls, path: files.Path) -> Manifest:
        """Raises ValueError or OSError when it is damaged."""
        found = files.json_object(path.read_bytes())
        parts: list[dict[str, str]] = []
        for name in cls._fields:
            part = found.get(name)
            if not isinstance(part, dict) or not all(isinstance(x, str) for x in part.values()):
                raise ValueError("it is no manifest of programs")
            parts.append(part)
        manifest = cls(*parts)
        if any(name != files.Path(name).name for name in manifest.digests):
            raise ValueError("it names files of other folders")
        return manifest


def check(config: ConfigDict) -> None:
    """Raises InputError when config.programs cannot be used; reads no program."""
    folder = config.programs.folder
    if not folder:
        return
    if not config.compilation_cache:
        raise InputError("config.programs.folder needs config.compilation_cache=true")
    if not is_made(folder):
        raise InputError(
            f"config.programs.folder {folder} holds no programs; make them with python -m "
            f"qk_jax.bench precompile --out {folder}"
        )


def is_made(folder: files.PathLike) -> bool:
    """Whether a folder has programs of `keep`, for whatever devices."""
    return any(_manifests(folder))


def take(plan: Plan) -> Ahead:
    """Copies the programs for this run from config.programs.folder to the cache of programs.

    What cannot be used costs a line of the log and is compiled as usual. On several hosts process 0
    is first, so that the others find the files where they share the cache.
    """
    folder = plan.config.programs.folder
    if not folder:
        return Ahead()
    if jax.process_index():
        distributed.told("programs", "")
    fitting, reasons = _fitting(folder, facts(plan))
    for manifest in fitting:
        for name, digest in manifest.digests.items():
            _copy(files.Path(folder) / name, digest)
    if not jax.process_index():
        distributed.told("programs", "copied")
        for reason in reasons if not fitting else ():
            log.warning("the programs of %s are not used: %s", folder, reason)
    found = {x: name for manifest in fitting for x, name in manifest.programs.items()}
    return Ahead(folder, found)


def kept(folder: files.Path, plan: Plan) -> Manifest:
    """What `keep` has written for such a plan, all of it whole; else nothing."""
    found = facts(plan)
    for manifest in _fitting(folder, found)[0]:
        paths = {folder / name: digest for name, digest in manifest.digests.items()}
        if all(path.exists() and _digest(path.read_bytes()) == x for path, x in paths.items()):
            return manifest
    return Manifest(found, {}, {})


def keep(folder: files.Path, plan: Plan, programs: Mapping[str, str], old: Manifest) -> files.Path:
    """Writes what JAX's cache holds into a folder, then the manifest; the manifest's path.

    Args:
      folder: to write to.
      plan: that all programs of the cache were compiled for.
      programs: {digest of the StableHLO: name}.
      old: of `kept`; its programs stay.
    """
    found, digests = facts(plan), dict(old.digests)
    kind = re.sub(r"\W+", "-", f"{found[DEVICES]} {found[KIND]}")
    path = folder / f"{plan.stage.name}-{plan.config.size}-{kind}.json"
    for source in sorted(_cache().glob(f"*{SUFFIX}")):
        data = source.read_bytes()
        digests[source.name] = _digest(data)
        files.write_bytes(folder / source.name, data)
    files.write_json(path, Manifest(found, {**old.programs, **programs}, digests)._asdict())
    return path


SUFFIX = "-cache"  # of a file of JAX's cache
KIND, DEVICES = "the kind of devices", "the number of devices"


def facts(plan: Plan) -> dict[str, str]:
    """What must be equal where programs are compiled and where they run, by name."""
    devices = list(plan.mesh.devices.flat)
    versions = runtime.versions()
    names = ["jax", "jaxlib", *(["libtpu"] if devices[0].platform == "tpu" else [])]
    flags = {name: os.environ.get(name, "").split() for name in VARIABLES}
    options = {
        f"config.compiler of {what}": " ".join(f"{k}={v}" for k, v in sorted(table.items()))
        for what, table in (
            ("the encoder", plan.compiler_options()),
            ("the step", plan.compiler_options(step=True)),
        )
    }
    return {
        **{f"the version of {x}": versions.get(f"the version of {x}", "none") for x in names},
        "the build of the compiler": devices[0].client.platform_version,
        "the compression of programs": _compression(),
        KIND: devices[0].device_kind,
        DEVICES: str(len(devices)),
        "the number of hosts": str(len({device.process_index for device in devices})),
        "the mesh": ",".join(f"{axis}={size}" for axis, size in plan.mesh.shape.items()),
        "the order of devices": " ".join(str(device.id) for device in devices),
        **{
            name: " ".join(sorted(x for x in words if not x.startswith(IRRELEVANT)))
            for name, words in flags.items()
        },
        **options,
    }


def _compression() -> str:
    """What JAX packs programs with, which is part of their key."""
    return "zstandard" if importlib.util.find_spec("zstandard") else "zlib"


def _manifests(folder: files.PathLike) -> Iterator[files.Path]:
    try:
        yield from sorted(files.Path(folder).glob("*.json"))
    except Exception as error:
        if not buckets.is_failure(error):
            raise
        raise InputError(f"config.programs.folder {folder} cannot be read: {error}") from None


def _fitting(folder: files.PathLike, ours: Mapping[str, str]) -> tuple[list[Manifest], list[str]]:
    """The manifests whose facts are ours, and why the others are not used."""
    found, reasons = [], []
    for path in _manifests(folder):
        try:
            manifest = Manifest.read(path)
        except (OSError, ValueError, RecursionError) as error:
            reasons.append(f"{path.name} is damaged ({error!s:.80})")
            continue
        theirs = manifest.facts
        differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if differ:
            there, here = (x.get(differ[0]) for x in (theirs, ours))
            reasons.append(f"{path.name} has {differ[0]} {there!r:.80}, here it is {here!r:.80}")
        else:
            found.append(manifest)
    return found, reasons


def _cache() -> files.Path:
    """JAX's own folder of compiled programs."""
    return files.Path(jax.config.values["jax_compilation_cache_dir"])


def _copy(source: files.Path, digest: str) -> None:
    """Copies a file of programs to JAX's cache when it is whole."""
    target = _cache() / source.name
    try:
        if target.exists() and _digest(target.read_bytes()) == digest:
            return
        data = source.read_bytes()
    except Exception as error:
        if not buckets.is_failure(error):
            raise
        log.warning("%s is not used: it cannot be read (%s)", source, error)
        return
    if _digest(data) != digest:
        log.warning("%s is not used: it is damaged", source)
        return
    files.write_bytes(target, data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
