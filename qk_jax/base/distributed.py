"""The processes of a run on several hosts: how they find each other, agree, and end together.

All of it goes through the coordination service of `jax.distributed`, which process 0 hosts. JAX
itself aborts every process when one is lost; here that is off (`jax_enable_recoverability`), and a
thread of each process waits for the first error of any other, so that all leave soon, with its
cause as their last line, instead of hanging in a collective.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import distributed as _service  # the client has no public name
from jax._src import xla_bridge
from jax.experimental import multihost_utils

from qk_jax.base import errors
from qk_jax.base.errors import InputError

log = logging.getLogger("qk_jax")

PORT, MEGASCALE_PORT = 8476, 8482  # that JAX and libtpu choose for the coordinator on TPU VMs
LOST = 42  # status when a process is gone: a restart can help
HEARTBEAT_S = 20  # a process that is silent for so long is lost
POLL_S = 2.0
LEAVE_S = 10.0  # that a failing process 0 waits at most for the others to hear of it
SETTLE_S = 0.5  # that it then leaves them to end by themselves
# How the text of an error of the runtime begins.
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
# How errors begin that JAX raises for reasons of this process alone.
OWN = (
    "RESOURCE_EXHAUSTED",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "UNIMPLEMENTED",
    "NOT_FOUND",
)
# Variables of a run on several TPU slices.
MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")


class DifferenceError(InputError):
    """Processes differ in what all need alike; every one of them raises it."""


class Given(NamedTuple):
    """What the command line says of the processes; nothing where JAX finds them itself.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process: number of this one.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Given:
        """As the options say, and where they are silent as the environment does.

        Raises:
          InputError: only some of the three are given, or they do not fit together.
        """
        number = {name: os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
        for name, text in number.items():
            if text is not None and not text.isdecimal():
                raise InputError(f"{name} is {text!r}, expected a number")
        count, index = (None if text is None else int(text) for text in number.values())
        given = cls(
            args.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
            count if args.processes is None else args.processes,
            index if args.process is None else args.process,
        )
        if given == cls():
            return given
        if None in given:
            raise InputError(
                "--coordinator, --processes and --process go together; give all three, or none "
                "where JAX finds the hosts itself (TPU VMs, GKE, SLURM, Open MPI)"
            )
        host, _, port = str(given.coordinator).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError(
                f"--coordinator is {given.coordinator!r}; give HOST:PORT, such as 10.0.0.1:{PORT}"
            )
        if not 0 <= (given.process or 0) < (given.processes or 0):
            raise InputError(f"--process is {given.process} of {given.processes}; count from 0")
        return given


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process."""
    group = parser.add_argument_group(
        "several hosts", "JAX finds them itself on TPU VMs, GKE, SLURM and Open MPI; elsewhere:"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")


class Peers:
    """The other processes, once JAX knows them.

    Attributes:
      me: number of this process.
      hosts: names of the hosts by process.
    """

    def __init__(self, client: Any, me: int, count: int):
        self.client, self.me = client, me
        client.key_value_set(f"qk_jax/host/{me}", socket.gethostname())
        client.wait_at_barrier("qk_jax/start", 600_000)
        self.hosts = [
            client.blocking_key_value_get(f"qk_jax/host/{i}", 60_000) for i in range(count)
        ]
        self.ending = threading.Event()
        for work in (self._listen, self._count):
            threading.Thread(target=work, daemon=True, name=f"qk_jax{work.__name__}").start()

    def name(self, process: int) -> str:
        """'process 3 (its host)'."""
        return f"process {process} ({self.hosts[process]})"

    def _listen(self) -> None:
        """Waits for the first error of any process, and ends this one with its cause."""
        try:
            found = json.loads(self.client.blocking_key_value_get("qk_jax/error", 10**9))
        except jax.errors.JaxRuntimeError:
            self._stop(LOST, 0, f"{self.name(0)}, the coordinator, is gone")
        process, cause = found["process"], found["cause"]
        if process != self.me:
            self._stop(found["status"], process, f"{self.name(process)} stopped: {cause}")

    def _count(self) -> None:
        """Ends this process when another is lost. All processes ask together, again and again."""
        everyone = list(range(len(self.hosts)))
        while not self.ending.wait(POLL_S):
            try:
                live = self.client.get_live_nodes(everyone)
            except jax.errors.JaxRuntimeError:
                self._stop(LOST, 0, f"{self.name(0)}, the coordinator, is gone")
            gone = sorted(set(everyone) - set(live))
            if gone:
                self._stop(LOST, gone[0], f"{self.name(gone[0])} is gone")

    def _stop(self, status: int, process: int, line: str) -> None:
        """Leaves because of another process, even out of a collective that never ends."""
        if self.ending.is_set():
            time.sleep(3600)  # a daemon: the process ends without it
        self.ending.set()
        if status == LOST:
            self._let_all_hear(gone=process)
            line += "; start again to go on from the last checkpoint"
        else:
            self._let_all_hear()
        _exit(status, f"error: {line}")

    def fail(self, status: int, cause: str) -> NoReturn:
        """Tells all of an error here, and leaves."""
        self.ending.set()
        found = {"process": self.me, "status": 1, "cause": cause}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            self.client.key_value_set("qk_jax/error", json.dumps(found))
        self._let_all_hear()
        _exit(status)

    def leave(self, status: int) -> NoReturn:
        """Ends together with all others, the coordinator last."""
        try:
            self.client.wait_at_barrier("qk_jax/leave", 600_000)
            self.ending.set()
            if self.me == 0:  # answered when all others have gone
                self.client.get_live_nodes(list(range(len(self.hosts))))
        except jax.errors.JaxRuntimeError as error:
            log.warning("the processes do not end together: %s", error)
        jax.distributed.shutdown()
        _exit(status)  # Python itself aborts when it ends while its threads are in a call of JAX

    def _let_all_hear(self, gone: int | None = None) -> None:
        """Says that this process knows why it ends. Process 0, with which the service ends, waits
        until all do but the one that is gone, at most LEAVE_S."""
        end = time.monotonic() + LEAVE_S
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"qk_jax/heard/{self.me}", "")
            for process in set(range(1, len(self.hosts))) - {gone} if self.me == 0 else ():
                left = max(1, int(1000 * (end - time.monotonic())))
                self.client.blocking_key_value_get(f"qk_jax/heard/{process}", left)
        if self.me == 0:
            time.sleep(SETTLE_S)


_peers: Peers | None = None
_looked = 0  # calls of `preempted`


def start(given: Given, *, timeout_s: int = 1800, slices: int = 1) -> None:
    """Makes this process one of several where there are several; call it before anything of JAX.

    Args:
      given: of the command line.
      timeout_s: how long the hosts may take to find each other.
      slices: TPU slices of the config.

    Raises:
      InputError: variables of another run on several slices are set, or the coordinator cannot be
        reached.
    """
    global _peers
    _check_slices(slices)
    if given == Given() and xla_bridge.backends_are_initialized():
        return  # called from a program that has used its devices: one process
    if given.process:
        _reach(str(given.coordinator), timeout_s)
    elif given.coordinator:
        _check_free(given.coordinator)
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            given.coordinator,
            given.processes,
            given.process,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError:
        return  # no cluster around: one process
    if _service.global_state.num_processes == 1:
        return
    # Programs of one process run in the order of their dispatch, as on a TPU: two that wait for
    # collectives at once would answer each other's. It is read when devices are first asked for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    count = jax.process_count()
    _peers = Peers(_service.global_state.client, jax.process_index(), count)
    errors.on_exit(_end)
    log.info("%s of %d: %s", _peers.name(_peers.me), count, devices())


def _check_free(coordinator: str) -> None:
    """Raises InputError where another program has the port on which process 0 is to listen."""
    port = int(coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise InputError(
                f"port {port} cannot be listened on ({error.strerror}); end what has it, or give "
                "another --coordinator"
            ) from None


def _reach(coordinator: str, timeout_s: int) -> None:
    """Waits for the coordinator, without which JAX would abort.

    Raises:
      InputError: nothing listens there within `timeout_s`.
    """
    host, _, port = coordinator.rpartition(":")
    end, reason = time.monotonic() + timeout_s, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise InputError(
        f"the coordinator {coordinator} cannot be reached within {timeout_s} s ({reason}); start "
        "the same command on every host, and let them reach each other on its port (JAX chooses "
        f"{PORT} on TPU VMs, Megascale {MEGASCALE_PORT}): a firewall rule for it may be missing"
    )


def _check_slices(slices: int) -> None:
    """Raises InputError for variables of a run on more slices than the config has."""
    stale = [name for name in MEGASCALE if name in os.environ]
    if stale and slices == 1:
        raise InputError(
            f"{stale[0]} is set, of a run on several slices, and config.slices has one; unset "
            f"{', '.join(stale)}, or give --config.slices.data=N"
        )


def devices() -> str:
    """What this process sees, in words."""
    local, slices = jax.local_devices(), {getattr(x, "slice_index", 0) for x in jax.devices()}
    where = f", slice {getattr(local[0], 'slice_index', 0)} of {len(slices)}"
    return (
        f"{len(local)} of {jax.device_count()} devices ({local[0].device_kind})"
        f"{where if len(slices) > 1 else ''}"
    )


def several() -> bool:
    """Whether there is more than one process."""
    return _peers is not None


def agree(what: str, facts: Mapping[str, str]) -> None:
    """Raises DifferenceError on all processes when a fact differs between two of them.

    Args:
      what: a name of its own for each call.
      facts: by name.
    """
    if _peers is None:
        return
    said = {i: json.loads(text) for i, text in all_said(what, json.dumps(dict(facts))).items()}
    if line := _difference(said, _peers.hosts):
        raise DifferenceError(line)


def all_said(what: str, text: str, timeout_s: float = 600.0) -> dict[int, str]:
    """What each process says, by its number; all wait for all.

    Args:
      what: a name of its own for each call.
      text: what this process says.
      timeout_s: how long the others may take.

    Raises:
      JaxRuntimeError: they take longer, or one is lost.
    """
    if _peers is None:
        return {0: text}
    client, folder, limit = _peers.client, f"qk_jax/{what}/", int(1000 * timeout_s)
    client.key_value_set(f"{folder}{_peers.me}", text)
    client.wait_at_barrier(f"qk_jax/{what}", limit)
    found = client.key_value_dir_get(folder)
    client.wait_at_barrier(f"qk_jax/{what}/read", limit)  # after which one may end
    return {int(key.rpartition("/")[2]): said for key, said in found}


def latest(what: str, value: float) -> dict[str, float]:
    """What each process said last, by the process in words; this one says `value`.

    Nobody waits for anybody, so that others may be of a while ago, or missing. {} for one process.
    """
    if _peers is None:
        return {}
    client, folder = _peers.client, f"qk_jax/latest/{what}/"
    client.key_value_set(f"{folder}{_peers.me}", repr(value), allow_overwrite=True)
    return {
        _peers.name(int(key.rpartition("/")[2])): float(text)
        for key, text in client.key_value_dir_get(folder)
    }


def told(what: str, text: str) -> str:
    """What process 0 says, on all processes; the others wait for it.

    Args:
      what: a name of its own for each call.
      text: what this process would say; only that of process 0 counts.
    """
    if _peers is None:
        return text
    key = f"qk_jax/told/{what}"
    if _peers.me == 0:
        _peers.client.key_value_set(key, text)
        return text
    return _peers.client.blocking_key_value_get(key, 600_000)


def preempted() -> bool:
    """Whether all processes are to leave now, because one got SIGTERM; the same on all of them.

    All call it once a step. The calls are counted from the start: JAX lets all leave at the call
    after the furthest that any had made, and one that it did not hear of counts as 0.
    """
    global _looked
    _looked += 1
    return multihost_utils.reached_preemption_sync_point(_looked)


def everyone() -> set[int]:
    """The numbers of all processes."""
    return {0} if _peers is None else set(range(len(_peers.hosts)))


def named(process: int) -> str:
    """A process in words."""
    return f"process {process}" if _peers is None else _peers.name(process)


def meet(where: str, timeout_s: float) -> None:
    """Waits until all processes are `where`, a name of its own for each call.

    Raises:
      JaxRuntimeError: they are not within `timeout_s`.
    """
    if _peers is not None:
        _peers.client.wait_at_barrier(f"qk_jax/{where}", int(1000 * timeout_s))


def arrive(where: str) -> None:
    """Says that this process is `where`, a name of its own; waits for nobody."""
    if _peers is not None:
        _peers.client.key_value_set(f"qk_jax/at/{where}/{_peers.me}", "")


def arrived(where: str) -> set[int]:
    """The processes that have been `where`."""
    if _peers is None:
        return {0}
    found = _peers.client.key_value_dir_get(f"qk_jax/at/{where}/")
    return {int(key.rpartition("/")[2]) for key, _ in found}


def forget(where: str) -> None:
    """Lets process 0 drop who was `where`, and wherever begins so."""
    if _peers is not None and _peers.me == 0:
        _peers.client.key_value_delete(f"qk_jax/at/{where}/")


def _difference(said: Mapping[int, Mapping[str, str]], hosts: Sequence[str]) -> str:
    """The first fact in which a process differs from process 0, in words; '' where all agree."""
    first, absent = said[0], "absent"
    for process, facts in sorted(said.items()):
        for name in sorted(first.keys() | facts.keys()):
            ours, theirs = first.get(name, absent), facts.get(name, absent)
            if ours != theirs:
                return (
                    f"{name} is {ours!r:.80} on process 0 ({hosts[0]}) and {theirs!r:.80} on "
                    f"process {process} ({hosts[process]}); all hosts need the same"
                )
    return ""


def stop(status: int, cause: str) -> NoReturn:
    """Ends this process now, from any of its threads, and tells all others why."""
    print(f"error: {cause}", file=sys.stderr)
    if _peers is not None:
        _peers.fail(status, cause)
    _exit(status)


def interrupted() -> NoReturn:
    """Ends this process now for Ctrl-C, from any of its threads, and tells all others."""
    print(f"\n{errors.STOPPED}", file=sys.stderr)
    if _peers is not None:
        _peers.fail(errors.INTERRUPTED, "Ctrl-C")
    _exit(errors.INTERRUPTED)


def _end(status: int, cause: str | None) -> None:
    """Called when the command ends: `cause` is None where all processes end alike."""
    if _peers is None:
        return
    if cause is None or isinstance(sys.exception(), DifferenceError):
        _peers.leave(status)
    if _may_be_of_others(sys.exception()):
        # The thread that counts ends this process when one is lost.
        time.sleep(HEARTBEAT_S + 3 * POLL_S)
    _peers.fail(status, cause)


def _may_be_of_others(error: BaseException | None) -> bool:
    """Whether an error is what a collective gives when another process has died in it.

    Of a program with one device for each process it is a ValueError that begins as the others do.
    """
    is_status = isinstance(error, ValueError) and _STATUS.match(str(error))
    is_error = isinstance(error, jax.errors.JaxRuntimeError) or is_status
    return bool(is_error) and not str(error).startswith(OWN)


def _exit(status: int, line: str = "") -> NoReturn:
    """Ends the process now, whatever its threads wait for."""
    for handler in log.handlers:
        handler.flush()
    if line:
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
