"""The estimate of a step that `walk` makes: its time, its ops and its collectives."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

PALLAS = "custom-call (pallas)"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the step, or several that are alike.

    Attributes:
      kind: one of `hlo_text.COLLECTIVES`.
      axes: mesh axes of more than one device that its groups span.
      group_size: devices of a group; 2, source and target, of a permute.
      nbytes: of one device's array (`topologies.collective_seconds`).
      count: executions per step.
      asynchronous: whether work is scheduled between its start and its done.
      seconds: of all executions, at published bandwidths.
      exposed_seconds: of those, the part that the schedule does not hide.
      source: 'file.py:123', or JAX's name stack where there is none.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    nbytes: int
    count: int
    asynchronous: bool
    seconds: float
    exposed_seconds: float
    source: str


@dataclasses.dataclass(frozen=True)
class Op:
    """One op of the step, or several of the same kind and source line.

    Attributes:
      name: the compiler's, of the most expensive.
      kind: 'convolution fusion' (a matrix product and what is fused to it), 'copy fusion' (moves
        only), 'fusion', `PALLAS`, 'async copy' (the wait for one), or the opcode.
      seconds: of all executions in the step.
      count: executions per step.
      source: 'file.py:123'.
      scope: JAX's name stack, shortened.
    """

    name: str
    kind: str
    seconds: float
    count: int
    source: str
    scope: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one device; the others do the same at the same time.

    Attributes:
      compute_s: every scheduled op but attention kernels and collectives.
      attention_s: Pallas calls.
      comm_s: all collectives, hidden or not.
      exposed_comm_s: the part of them that is not hidden.
      step_time_s: compute_s + attention_s + exposed_comm_s.
      collectives: the most expensive first.
      ops: the most expensive first.
      unpriced: names of ops without an estimate that no rule prices; they count with their bytes
        at the bandwidth of HBM, which may be far too little.
    """

    compute_s: float
    attention_s: float
    comm_s: float
    exposed_comm_s: float
    step_time_s: float
    collectives: tuple[Collective, ...]
    ops: tuple[Op, ...]
    unpriced: tuple[str, ...]


_Item = TypeVar("_Item", Collective, Op)


def of(ops: Iterable[Op], collectives: Iterable[Collective], unpriced: Iterable[str]) -> Estimate:
    """The estimate of a program that executes these."""
    ops, collectives = _merged(ops, _op_key), _merged(collectives, _collective_key)
    attention = sum(op.seconds for op in ops if op.kind == PALLAS)
    compute = sum(op.seconds for op in ops if op.kind != PALLAS)
    exposed = sum(one.exposed_seconds for one in collectives)
    return Estimate(
        compute_s=compute,
        attention_s=attention,
        comm_s=sum(one.seconds for one in collectives),
        exposed_comm_s=exposed,
        step_time_s=compute + attention + exposed,
        collectives=collectives,
        ops=ops,
        unpriced=tuple(dict.fromkeys(unpriced)),
    )


def together(parts: Sequence[Estimate]) -> Estimate:
    """Programs that run one after the other, as one."""
    return of(
        [op for part in parts for op in part.ops],
        [one for part in parts for one in part.collectives],
        [name for part in parts for name in part.unpriced],
    )


def _merged(found: Iterable[_Item], key: Callable[[_Item], Any]) -> tuple[_Item, ...]:
    """Those of equal key as one, named after the most expensive; the most expensive first."""
    groups = collections.defaultdict(list)
    for one in found:
        groups[key(one)].append(one)
    merged = []
    for same in groups.values():
        first = max(same, key=lambda one: one.seconds)
        sums = {name: sum(getattr(one, name) for one in same) for name in _sums(first)}
        merged.append(dataclasses.replace(first, **sums))
    return tuple(sorted(merged, key=lambda one: -one.seconds))


def _sums(one: Collective | Op) -> tuple[str, ...]:
    """The fields that add up over executions."""
    exposed = ("exposed_seconds",) if isinstance(one, Collective) else ()
    return ("count", "seconds", *exposed)


def repeated(one: _Item, times: int) -> _Item:
    """`times` executions as one."""
    return dataclasses.replace(one, **{name: times * getattr(one, name) for name in _sums(one)})


def _op_key(op: Op) -> tuple[str, ...]:
    """Kind and source line; for Pallas calls the kernel too."""
    kernel = re.sub(r"[.\d]+$", "", op.name) if op.kind == PALLAS else ""
    return op.kind, op.source, kernel


def _collective_key(one: Collective) -> tuple[Any, ...]:
    """Everything but times and count."""
    return one.kind, one.axes, one.group_size, one.nbytes, one.asynchronous, one.source
