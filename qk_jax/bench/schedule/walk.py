"""The cost of one step of a compiled program on a slice, from its scheduled HLO alone.

The schedule that libtpu leaves is walked once, in order, on one device (all do the same):

- An op takes the compiler's own `estimated_cycles` at the generation's clock. For all but matrix
  products these follow the bytes and take narrow elements for wide ones (`Module.width`), which is
  corrected. Bodies of loops count as often as they run; of a conditional's branches the most
  expensive counts, always. What a fusion calls is part of the fusion.
- Pallas kernels have no such estimate; see `kernels`.
- A collective takes as long as the published bandwidths allow (`topologies.collective_seconds`).
  Between its start and its done it hides behind what is scheduled there; collectives over the same
  links take turns. What is left when the done is reached, and every synchronous one, is exposed.
- Copies between HBM and the vector memory, or to the host, hide in the same way behind what is
  scheduled between; a wait for them is compute time.

It is no measurement. The compiler's cycles assume full clock and no contention for HBM with copies
and collectives in flight, and see no vector arithmetic; stragglers, input, host and network jitter
are left out. Use it to compare layouts of one program, and expect a real step to be slower.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.bench.schedule import estimates, hlo_text, kernels, topologies
from qk_jax.bench.schedule.estimates import PALLAS, Collective, Estimate, Op
from qk_jax.bench.schedule.hlo_text import Instruction, Module

# Bytes/s between a chip and its host (scaling book, chapter 2: PCIe).
HOST_BANDWIDTH = 1.6e10


def estimate(text: str, mesh: jax.sharding.Mesh, where: topologies.Slice) -> Estimate:
    """Estimates one execution of a program.

    Args:
      text: `compiled.as_text()`.
      mesh: that it was compiled for, of `topologies.devices(where)`.
      where: the slice.

    Raises:
      InputError: the text is no scheduled TPU module, or one of another number of devices.
    """
    module = hlo_text.parse(text)
    if "estimated_cycles" not in text:
        raise InputError(
            "the HLO module carries no estimated_cycles; compile it for a TPU slice with libtpu"
        )
    walk = _Walk(module, _Network(module, mesh, where), where)
    run = walk.run(module.entry)
    return estimates.of(run.ops, run.collectives, walk.unpriced)


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """Something that can go on beside compute.

    Attributes:
      seconds: alone on its links.
      links: that it occupies meanwhile.
      report: the collective, without times; or the op that waits for a copy.
    """

    seconds: float
    links: frozenset[str]
    report: Collective | Op


@dataclasses.dataclass
class _Flight:
    """A transfer under way.

    Attributes:
      transfer: itself.
      started: when the program asked for it.
      begin: when its links were free.
      end: when it will have ended.
      exposed: seconds for which others waited for it.
    """

    transfer: _Transfer
    started: float
    begin: float
    end: float
    exposed: float = 0.0


class _Run:
    """One execution of one computation: a clock that ops, waits and loops advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ops: list[Op] = []
        self.collectives: list[Collective] = []
        self.busy: dict[str, float] = collections.defaultdict(float)  # seconds by link
        self._free: dict[str, float] = collections.defaultdict(float)  # from when, by link
        self._flights: dict[Any, _Flight] = {}

    def work(self, op: Op) -> None:
        """Executes an op."""
        self.now += op.seconds
        self.ops.append(op)

    def start(self, key: Any, transfer: _Transfer) -> None:
        """Starts a transfer, which begins when its links are free."""
        begin = max([self.now, *(self._free[link] for link in transfer.links)])
        end = begin + transfer.seconds
        for link in transfer.links:
            self._free[link] = end
            self.busy[link] += transfer.seconds
        self._flights[key] = _Flight(transfer, self.now, begin, end)

    def finish(self, key: Any) -> None:
        """Waits for a transfer; the time counts for whatever keeps it from its links."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        asynchronous = self.now > flight.started
        for other in sorted(self._flights.values(), key=lambda other: other.begin):
            if other.transfer.links & flight.transfer.links and other.end <= flight.begin:
                held = max(0.0, other.end - self.now)
                other.exposed += held
                self.now += held
        waited = max(0.0, flight.end - self.now)
        self.now += waited
        exposed = flight.exposed + waited
        report = flight.transfer.report
        if isinstance(report, Op):
            self.ops.append(dataclasses.replace(report, seconds=exposed))
        else:
            seconds = flight.transfer.seconds
            report = dataclasses.replace(report, seconds=seconds, exposed_seconds=exposed)
            self.collectives.append(dataclasses.replace(report, asynchronous=asynchronous))

    def under_way(self, key: Any) -> bool:
        """Whether a transfer was started and is not finished."""
        return key in self._flights

    def nested(self, inner: _Run, times: int = 1) -> None:
        """Runs another computation some times; what is under way pauses for its transfers."""
        for flight in self._flights.values():
            if flight.end > self.now:
                flight.end += times * max(inner.busy.get(x, 0) for x in flight.transfer.links)
                for link in flight.transfer.links:
                    self._free[link] = max(self._free[link], flight.end)
        self.now += times * inner.now
        for link, seconds in inner.busy.items():
            self.busy[link] += times * seconds
        self.ops += [estimates.repeated(op, times) for op in inner.ops]
        self.collectives += [estimates.repeated(one, times) for one in inner.collectives]

    def close(self) -> None:
        """Waits for the transfers that nothing waited for."""
        for key in list(self._flights):
            self.finish(key)


class _Network:
    """The devices, mesh axes and links that a module's replica groups mean."""

    def __init__(self, module: Module, mesh: jax.sharding.Mesh, where: topologies.Slice) -> None:
        self._module, self._mesh, self._where = module, mesh, where
        self._devices = list(mesh.devices.flat)
        by_slice = collections.defaultdict(list)
        for position, device in enumerate(self._devices):
            by_slice[topologies.slice_index(device)].append(position)
        # A module over several slices is written for one of them; DCN is sends and receives.
        self._slices = list(by_slice.values())
        sizes = {mesh.size: list(range(mesh.size)), len(self._slices[0]): self._slices[0]}
        if module.partitions not in sizes:
            raise InputError(
                f"the HLO module runs on {module.partitions} devices, the mesh has {mesh.size}; "
                "give the mesh it was compiled for"
            )
        self._positions = sizes[module.partitions]
        self._cache: dict[Any, _Transfer] = {}

    def collective(self, one: Instruction, kind: str, source: str) -> _Transfer | None:
        """The transfer of a collective of the module; None where groups are of one device."""
        groups = hlo_text.groups(one, self._module.partitions)
        size = len(groups[0])
        if kind == "collective-permute":
            groups = [group for group in groups if group[0] != group[1]]
        if not groups or size < 2:
            return None
        nbytes = self._module.operand_bytes(one) * (size if kind == "all-gather" else 1)
        key = kind, nbytes, tuple(map(tuple, groups))
        if key not in self._cache:
            groups = [[self._positions[i] for i in group] for group in groups]
            self._cache[key] = self._price(kind, nbytes, groups)
        return _named(self._cache[key], source)

    def across(self, kind: str, nbytes: int, source: str) -> _Transfer:
        """The transfer of a send and a receive between slices."""
        group = [positions[0] for positions in self._slices]
        group = group[:2] if kind == "collective-permute" else group
        return _named(self._price(kind, nbytes, [group]), source)

    def _price(self, kind: str, nbytes: int, groups: Sequence[Sequence[int]]) -> _Transfer:
        """The transfer of the slowest group, without a source."""
        # All groups of one collective have the same form, but a permute's pairs may not.
        tried = groups if kind == "collective-permute" else groups[:1]
        devices = [[self._devices[i] for i in group] for group in tried]
        times = [
            topologies.collective_seconds(kind, nbytes, group, self._where) for group in devices
        ]
        slowest = devices[times.index(max(times))]
        spanned = self._spanned(tried)
        axes = tuple(axis for axis in self._mesh.axis_names if axis in spanned)
        slices = set(map(topologies.slice_index, slowest))
        links = {"dcn"} if len(slices) > 1 else set()
        if len(slices) < len(slowest):
            # Links carry as much one way as the other; a permute around a ring uses one way.
            ways = "<>"
            if kind == "collective-permute":
                ways = ">" if sum(b > a for a, b in tried) * 2 > len(tried) else "<"
            links |= {f"{axis}{way}" for axis in axes for way in ways}
        report = Collective(kind, axes, len(slowest), nbytes, 1, False, 0.0, 0.0, "")
        return _Transfer(max(times), frozenset(links), report)

    def _spanned(self, groups: Sequence[Sequence[int]]) -> set[str]:
        """Mesh axes along which devices of one group differ."""
        found: set[str] = set()
        for group in groups:
            indices = np.stack(np.unravel_index(group, self._mesh.devices.shape))
            differs = (indices != indices[:, :1]).any(axis=1)
            found.update(name for name, d in zip(self._mesh.axis_names, differs, strict=True) if d)
        return found


def _named(transfer: _Transfer, source: str) -> _Transfer:
    """A transfer with its source line."""
    return dataclasses.replace(transfer, report=dataclasses.replace(transfer.report, source=source))


class _Walk:
    """Prices the computations of a module, each once."""

    def __init__(self, module: Module, network: _Network, where: topologies.Slice) -> None:
        self._module, self._network, self._where = module, network, where
        self._runs: dict[str, _Run] = {}
        self.unpriced: list[str] = []

    def run(self, computation: str) -> _Run:
        """One execution of a computation."""
        if computation not in self._runs:
            run = self._runs[computation] = _Run()
            for one in self._module.computations[computation].values():
                self._step(run, one)
            run.close()
        return self._runs[computation]

    def _step(self, run: _Run, one: Instruction) -> None:
        """Advances a run by one instruction."""
        opcode = one.opcode
        if opcode in hlo_text.FREE or (
            opcode == "custom-call" and one.target in hlo_text.FREE_TARGETS
        ):
            return
        if opcode == "while":  # its condition is scalar work, which is left out
            times = hlo_text.trip_count(self._module, one)
            if times is None:
                self.unpriced.append(f"{one.name} (runs an unknown number of times; counted once)")
            run.nested(self.run(one.body), 1 if times is None else times)
        elif opcode == "conditional":
            run.nested(max(map(self.run, one.called), key=lambda branch: branch.now))
        elif opcode == "call":
            run.nested(self.run(one.called[0]))
        elif opcode in ("send", "recv", "recv-done"):
            self._between_slices(run, one)
        elif opcode.endswith(("-start", "-update")):
            # A start without operands only readies another core; the update gives it the data.
            start = self._module.started(one)
            if (one is start) == bool(start.operands):
                run.start(start.name, self._transfer(start, one))
        elif opcode.endswith("-done"):
            run.finish(self._module.started(one).name)
        elif opcode in hlo_text.COLLECTIVES:
            self._collective(run, one, one)
        elif opcode == "fusion":
            self._fusion(run, one)
        else:
            run.work(self._op(one))

    def _collective(self, run: _Run, outer: Instruction, one: Instruction) -> None:
        """Runs a synchronous collective; `outer` is itself or a fusion of it.

        An all-reduce in a fusion that keeps a part of it is a reduce-scatter.
        """
        kind = one.opcode
        if kind == "all-reduce" and outer.opcode == "fusion" and outer.nbytes < one.nbytes:
            kind = "reduce-scatter"
        transfer = self._network.collective(one, kind, self._source(outer, one))
        if transfer:
            run.start(outer.name, transfer)
            run.finish(outer.name)

    def _fusion(self, run: _Run, one: Instruction) -> None:
        """Runs a fusion, which may start, carry on, finish or be a collective.

        An 'async collective fusion' has the collective in a fusion that starts it, again in those
        that compute beside it and in one that waits for it, all with one channel and chain.
        """
        (called,) = one.called
        collective = self._module.collective(called)
        if collective is None:
            run.work(self._op(one))
            return
        targets = {inside.target for inside in self._module.computations[called].values()}
        chain = re.search(r'chain_id="(\w+)"', collective.attributes)
        key = collective.attribute("channel_id"), chain and chain[1]
        if "AsyncCollectiveStart" in targets:
            source = self._source(one, collective)
            transfer = self._network.collective(collective, collective.opcode, source)
            if transfer:
                run.start(key, transfer)
        elif run.under_way(key) and one.cycles is None:
            run.finish(key)
        else:
            beside = run.under_way(key)
            if one.cycles is not None:
                run.work(self._op(one))
            if not beside:
                self._collective(run, one, collective)

    def _transfer(self, one: Instruction, begun: Instruction) -> _Transfer:
        """The transfer of an instruction '...-start', which itself or an update has begun."""
        kind, inner = one.opcode.removesuffix("-start"), one
        if kind in ("async", "call"):
            inner = self._module.collective(one.called[0]) or one
            kind = inner.opcode
        if kind in hlo_text.COLLECTIVES:
            found = self._network.collective(inner, kind, self._source(begun, inner))
            return found or self._copy(one, 0)
        if kind not in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            self.unpriced.append(one.name)
        moved = one  # the result of a slice or a copy, the part that an update writes
        if kind == "dynamic-update-slice":
            moved = self._module.operand(one, 1)
        shape = moved.shape.rpartition("), ")[2] if moved.shape.startswith("((") else moved.shape
        nbytes = max((array.nbytes for array in hlo_text.arrays(shape)), default=0)
        return self._copy(one, nbytes)

    def _copy(self, one: Instruction, nbytes: int) -> _Transfer:
        """A copy beside compute; memory space 5 is the host's."""
        host = "S(5)" in one.shape
        seconds = nbytes / (HOST_BANDWIDTH if host else self._where.spec.hbm_bandwidth)
        op = self._report(one, "async copy", 0.0)
        return _Transfer(seconds, frozenset({"host" if host else "hbm"}), op)

    def _between_slices(self, run: _Run, one: Instruction) -> None:
        """Runs a send or a receive over the data-centre network, one transfer together."""
        if one.opcode == "recv-done":
            run.finish(self._module.operand(one, 0).rendezvous)
            return
        key = one.rendezvous
        if run.under_way(key):
            return
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
        if not kind or kind[1] not in hlo_text.MEGASCALE:
            self.unpriced.append(one.name)
            return
        nbytes = max(
            hlo_text.arrays(other.shape)[0].nbytes
            for other in self._module.computations[one.computation].values()
            if other.opcode in ("send", "recv") and other.rendezvous == key
        )
        source = self._report(one, "", 0.0).source
        run.start(key, self._network.across(hlo_text.MEGASCALE[kind[1]], nbytes, source))

    def _op(self, one: Instruction) -> Op:
        """Prices an op that runs by itself."""
        spec, module = self._where.spec, self._module
        if one.opcode == "custom-call" and one.target == "tpu_custom_call":
            seconds = kernels.seconds(one, module.operands(one), self._where)
            if seconds is None:
                self.unpriced.append(one.name)
                seconds = (one.nbytes + module.operand_bytes(one)) / spec.hbm_bandwidth
            return self._report(one, PALLAS, seconds)
        kind = module.kind(one)
        if one.cycles is not None:
            width = 1.0 if "convolution" in kind else module.width(one)
            return self._report(one, kind, width * one.cycles / spec.clock_hz)
        if one.opcode not in hlo_text.MOVES | hlo_text.MAPS:
            self.unpriced.append(one.name)
        if one.opcode == "dynamic-update-slice":  # in place: only the part is read and written
            nbytes = 2 * module.operand(one, 1).nbytes
        elif one.opcode == "dynamic-slice":
            nbytes = 2 * one.nbytes
        else:
            nbytes = one.nbytes + module.operand_bytes(one)
        return self._report(one, kind, nbytes / spec.hbm_bandwidth)

    def _report(self, one: Instruction, kind: str, seconds: float) -> Op:
        """An op with the source line and scope that it comes from."""
        origin = self._module.origin(one)
        source = self._module.source(origin) or origin.short_scope or one.name
        return Op(one.name, kind, seconds, 1, source, origin.short_scope)

    def _source(self, outer: Instruction, inner: Instruction) -> str:
        """'file.py:123' of a collective `inner` in the fusion or call `outer`."""
        return self._module.source(inner) or self._report(outer, "", 0.0).source
