"""What one step of a compiled program costs on a slice, from its scheduled HLO alone.

The schedule that libtpu leaves is walked once, in order, on one device (all do the same):

- An op lasts the compiler's own `estimated_cycles` at the generation's clock. Of all but matrix
  products these count bytes, of narrow elements too many (`Module.width`), which is put right.
  Bodies of loops count as often as they run; of a conditional's branches the dearest counts,
  always. What a fusion calls is part of the fusion.
- Pallas kernels have no such estimate. They last as long as their FLOPs at a stated efficiency
  or their bytes at the bandwidth of HBM, whichever is longer.
- A collective lasts as long as the published bandwidths allow (`topologies.collective_seconds`).
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
from qk_jax.bench.schedule import estimates, hlo_text, topologies
from qk_jax.bench.schedule.estimates import PALLAS, Collective, Estimate, Op
from qk_jax.bench.schedule.hlo_text import Instruction, Module

# Fractions of the bfloat16 peak that splash attention reaches, recomputed products included, where
# its heads fill the MXU. No table of the kernel alone is published; these follow from whole steps:
# 8B Llama at 64k tokens on v5p, whose attention is half of the FLOPs, runs at 53 % MFU (MaxText
# pull request 4687), which is 0.49 over forward and backward if the matmuls reach 0.75; here the
# two come to 0.48.
FORWARD_EFFICIENCY = 0.55
BACKWARD_EFFICIENCY = 0.45
# Side of the MXU, 128 where not listed (pages of v6e and tpu7x). A head of 128 fills half of 256:
# Wan 2.2 on TPU7x, two thirds attention, reports 384 of 1,153.5 TFLOP/s (MaxDiffusion pull request
# 487), 0.31 in the kernels if the rest reaches 0.7; here forward and backward come to 0.24.
MXU_SIDES = {"v6e": 256, "tpu7x": 256}
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
      links: what it needs for itself meanwhile.
      report: the collective, without times; or the op that waits for a copy.
    """

    seconds: float
    links: frozenset[str]
    report: Collective | Op


@dataclasses.dataclass
class _Flight:
    """A transfer under way.

    Attributes:
      transfer: what goes on.
      started: when it was asked for.
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
        """Does an op."""
        self.now += op.seconds
        self.ops.append(op)

    def start(self, key: Any, transfer: _Transfer) -> None:
        """Starts a transfer, which goes on when its links are free."""
        begin = max([self.now, *(self._free[link] for link in transfer.links)])
        end = begin + transfer.seconds
        for link in transfer.links:
            self._free[link] = end
            self.busy[link] += transfer.seconds
        self._flights[key] = _Flight(transfer, self.now, begin, end)

    def finish(self, key: Any) -> None:
        """Waits for a transfer; whatever keeps it from its links is what exposes the time."""
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
            self.collectives.append(
                dataclasses.replace(
                    report,
                    asynchronous=asynchronous,
                    seconds=flight.transfer.seconds,
                    exposed_seconds=exposed,
                )
            )

    def under_way(self, key: Any) -> bool:
        """Whether a transfer was started and is not finished."""
        return key in self._flights

    def nested(self, inner: _Run, times: int) -> None:
        """Runs another computation some times; what is under way stands still for its transfers."""
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
        """Waits for whatever nothing waited for."""
        for key in list(self._flights):
            self.finish(key)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What the price of a collective depends on; devices of a single slice lack the last."""

    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int


class _Network:
    """Which devices, mesh axes and links a module's replica groups mean."""

    def __init__(self, module: Module, mesh: jax.sharding.Mesh, where: topologies.Slice) -> None:
        self._module, self._mesh, self._where = module, mesh, where
        self._places = [
            _Place(tuple(d.coords), d.core_on_chip, getattr(d, "slice_index", 0))
            for d in mesh.devices.flat
        ]
        by_slice = collections.defaultdict(list)
        for position, place in enumerate(self._places):
            by_slice[place.slice_index].append(position)
        # A module over several slices is written for one of them; DCN is sends and receives.
        self._slices = list(by_slice.values())
        everyone = list(range(mesh.size))
        sizes = {mesh.size: everyone, len(self._slices[0]): self._slices[0]}
        if module.partitions not in sizes:
            raise InputError(
                f"the HLO module runs on {module.partitions} devices, the mesh has {mesh.size}; "
                "give the mesh it was compiled for"
            )
        self._positions = sizes[module.partitions]
        self._cache: dict[Any, _Transfer] = {}

    def collective(
        self, one: Instruction, kind: str, operand_bytes: int, source: str
    ) -> _Transfer | None:
        """The transfer of a collective inside of the module; None where groups are of one."""
        groups = hlo_text.groups(one, self._module.partitions)
        size = len(groups[0])
        if kind == "collective-permute":
            groups = [group for group in groups if group[0] != group[1]]
        if not groups or size < 2:
            return None
        nbytes = operand_bytes * (size if kind == "all-gather" else 1)
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
        times = []
        for group in tried:
            places = [self._places[i] for i in group]
            times.append(topologies.collective_seconds(kind, nbytes, places, self._where))
        seconds = max(times)
        worst = tried[times.index(seconds)]
        spanned = self._spanned(tried)
        axes = tuple(axis for axis in self._mesh.axis_names if axis in spanned)
        slices = {self._places[i].slice_index for i in worst}
        links = {"dcn"} if len(slices) > 1 else set()
        if len(slices) < len(worst):
            # Links carry as much one way as the other; a permute around a ring uses one way.
            ways = "<>"
            if kind == "collective-permute":
                ways = ">" if sum(b > a for a, b in tried) * 2 > len(tried) else "<"
            links |= {f"{axis}{way}" for axis in axes for way in ways}
        report = Collective(kind, axes, len(worst), nbytes, 1, False, 0.0, 0.0, "")
        return _Transfer(seconds, frozenset(links), report)

    def _spanned(self, groups: Sequence[Sequence[int]]) -> set[str]:
        """Mesh axes along which devices of one group differ."""
        found: set[str] = set()
        for group in groups:
            places = np.stack(np.unravel_index(group, self._mesh.devices.shape))
            differs = (places != places[:, :1]).any(axis=1)
            found.update(name for name, d in zip(self._mesh.axis_names, differs, strict=True) if d)
        return found


def _named(transfer: _Transfer, source: str) -> _Transfer:
    """A transfer with the source line that it comes from."""
    return dataclasses.replace(transfer, report=dataclasses.replace(transfer.report, source=source))


class _Walk:
    """Prices the computations of a module, each once."""

    def __init__(self, module: Module, network: _Network, where: topologies.Slice) -> None:
        self._module, self._network, self._spec = module, network, where.spec
        self._mxu = MXU_SIDES.get(where.generation, 128)
        self._runs: dict[str, _Run] = {}
        self.unpriced: list[str] = []

    def run(self, computation: str) -> _Run:
        """One execution of a computation."""
        if computation not in self._runs:
            run = self._runs[computation] = _Run()
            for one in self._module.computations[computation].values():
                self._step(run, computation, one)
            run.close()
        return self._runs[computation]

    def _step(self, run: _Run, computation: str, one: Instruction) -> None:
        """Advances a run by one instruction."""
        opcode = one.opcode
        if opcode in hlo_text.FREE or (
            opcode == "custom-call" and one.target in hlo_text.FREE_TARGETS
        ):
            return
        if opcode == "while":
            self._loop(run, computation, one)
        elif opcode == "conditional":
            run.nested(max((self.run(name) for name in one.called), key=lambda r: r.now), 1)
        elif opcode == "call":
            run.nested(self.run(one.called[0]), 1)
        elif opcode in ("send", "recv", "recv-done"):
            self._between_slices(run, computation, one)
        elif opcode.endswith("-start"):
            run.start(one.name, self._transfer(computation, one))
        elif opcode.endswith("-done"):
            run.finish(self._module.started(computation, one))
        elif opcode in hlo_text.COLLECTIVES:
            self._collective(run, computation, one, computation, one)
        elif opcode == "fusion":
            self._fusion(run, computation, one)
        else:
            run.work(self._op(computation, one))

    def _loop(self, run: _Run, computation: str, one: Instruction) -> None:
        """Runs a while loop; its condition is scalar work of no account."""
        times = hlo_text.trip_count(self._module, computation, one)
        if times is None:
            self.unpriced.append(f"{one.name} (runs an unknown number of times; counted once)")
        run.nested(self.run(one.attribute("body").lstrip("%")), 1 if times is None else times)

    def _collective(
        self, run: _Run, computation: str, outer: Instruction, where: str, one: Instruction
    ) -> None:
        """Runs a synchronous collective of computation `where`; `outer` may be a fusion of it."""
        nbytes = self._module.operand_bytes(where, one)
        source = self._source(computation, outer, one)
        transfer = self._network.collective(one, _kind(one, outer), nbytes, source)
        if transfer:
            run.start(outer.name, transfer)
            run.finish(outer.name)

    def _fusion(self, run: _Run, computation: str, one: Instruction) -> None:
        """Runs a fusion, which may start, carry on, finish or be a collective.

        An 'async collective fusion' has the collective in a fusion that starts it, again in those
        that compute beside it and in one that waits for it, all with one channel and chain.
        """
        (called,) = one.called
        collective = self._module.collective(called)
        if collective is None:
            run.work(self._op(computation, one))
            return
        targets = {i.target for i in self._module.computations[called].values()}
        chain = re.search(r'chain_id="(\w+)"', collective.attributes)
        key = collective.attribute("channel_id"), chain and chain[1]
        if "AsyncCollectiveStart" in targets:
            nbytes = self._module.operand_bytes(called, collective)
            source = self._source(computation, one, collective)
            transfer = self._network.collective(collective, collective.opcode, nbytes, source)
            if transfer:
                run.start(key, transfer)
        elif run.under_way(key) and one.cycles is None:
            run.finish(key)
        elif run.under_way(key):
            run.work(self._op(computation, one))
        else:
            if one.cycles is not None:
                run.work(self._op(computation, one))
            self._collective(run, computation, one, called, collective)

    def _transfer(self, computation: str, one: Instruction) -> _Transfer:
        """What an instruction '...-start' starts."""
        kind = one.opcode.removesuffix("-start")
        inner, where = one, computation
        if kind in ("async", "call"):
            where = one.called[0]
            inner = self._module.collective(where) or one
            kind = inner.opcode
        if kind in hlo_text.COLLECTIVES:
            nbytes = self._module.operand_bytes(where, inner)
            source = self._source(computation, one, inner)
            found = self._network.collective(inner, kind, nbytes, source)
            return found or self._copy(computation, one, 0)
        if kind not in ("copy", "slice", "dynamic-slice", "dynamic-update-slice"):
            self.unpriced.append(one.name)
        part = one  # what a slice or a copy brings, what an update writes
        if kind == "dynamic-update-slice":
            part = self._module.computations[computation][one.operands[1]]
        behind = part.shape.rpartition("), ")[2] if part.shape.startswith("((") else part.shape
        nbytes = max((array.nbytes for array in hlo_text.arrays(behind)), default=0)
        return self._copy(computation, one, nbytes)

    def _copy(self, computation: str, one: Instruction, nbytes: int) -> _Transfer:
        """A copy beside compute; memory space 5 is the host's."""
        host = "S(5)" in one.shape
        seconds = nbytes / (HOST_BANDWIDTH if host else self._spec.hbm_bandwidth)
        op = self._report(computation, one, "async copy", 0.0)
        return _Transfer(seconds, frozenset({"host" if host else "hbm"}), op)

    def _between_slices(self, run: _Run, computation: str, one: Instruction) -> None:
        """Runs a send or a receive over the data-centre network, one transfer together."""
        if one.opcode == "recv-done":
            one = self._module.computations[computation][one.operands[0]]
            run.finish(one.rendezvous)
            return
        key = one.rendezvous
        if run.under_way(key):
            return
        both = [
            i
            for i in self._module.computations[computation].values()
            if i.opcode in ("send", "recv") and i.rendezvous == key
        ]
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
        if not kind or kind[1] not in hlo_text.MEGASCALE:
            self.unpriced.append(one.name)
            return
        nbytes = max(hlo_text.arrays(i.shape)[0].nbytes for i in both)
        source = self._report(computation, one, "", 0.0).source
        run.start(key, self._network.across(hlo_text.MEGASCALE[kind[1]], nbytes, source))

    def _op(self, computation: str, one: Instruction) -> Op:
        """Prices an op that runs by itself."""
        if one.opcode == "custom-call" and one.target == "tpu_custom_call":
            return self._report(computation, one, PALLAS, self._pallas(computation, one))
        kind = self._module.kind(one)
        if one.cycles is not None:
            width = 1.0 if "convolution" in kind else self._module.width(computation, one)
            return self._report(computation, one, kind, width * one.cycles / self._spec.clock_hz)
        if one.opcode not in hlo_text.MOVES | hlo_text.MAPS:
            self.unpriced.append(one.name)
        nbytes = one.nbytes + self._module.operand_bytes(computation, one)
        if one.opcode in ("dynamic-update-slice", "dynamic-slice"):
            # In place: only the part is read and written.
            part = one.operands[1] if one.opcode == "dynamic-update-slice" else one.name
            nbytes = 2 * self._module.computations[computation][part].nbytes
        return self._report(computation, one, kind, nbytes / self._spec.hbm_bandwidth)

    def _report(self, computation: str, one: Instruction, kind: str, seconds: float) -> Op:
        """An op with the place in the source that it comes from."""
        where = self._module.origin(computation, one)
        scope = hlo_text.shortened(where.scope)
        source = self._module.source(where) or scope or one.name
        return Op(one.name, kind, seconds, 1, source, scope)

    def _source(self, computation: str, outer: Instruction, inner: Instruction) -> str:
        """'file.py:123' of a collective, in the fusion or call `outer` or itself that."""
        return self._module.source(inner) or self._report(computation, outer, "", 0.0).source

    def _pallas(self, computation: str, one: Instruction) -> float:
        """Seconds of a Pallas kernel."""
        here = self._module.computations[computation]
        operands = [a for name in one.operands for a in hlo_text.arrays(here[name].shape)]
        results = hlo_text.arrays(one.shape)
        nbytes = sum(array.nbytes for array in (*operands, *results))
        backward = bool(re.search(r"_d(q|kv)_", one.name))
        efficiency = BACKWARD_EFFICIENCY if backward else FORWARD_EFFICIENCY
        stated = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', one.attributes)
        if stated:
            flops = int(stated[1])
        elif "splash" in one.name:
            flops = hlo_text.splash_flops(one.name, operands, results, self._mxu)
        else:
            self.unpriced.append(one.name)
            flops = 0
        return max(flops / (efficiency * self._spec.peak_flops), nbytes / self._spec.hbm_bandwidth)


def _kind(one: Instruction, outer: Instruction) -> str:
    """Of a collective; an all-reduce in a fusion of which a part is kept is a reduce-scatter."""
    if one.opcode == "all-reduce" and outer.opcode == "fusion" and outer.nbytes < one.nbytes:
        return "reduce-scatter"
    return one.opcode
