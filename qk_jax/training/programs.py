"""The programs of a stage, compiled in parallel before the first step.

The step has a program for each number of condition pictures, the encoder one for each size of a
picture (`padding`). The data plan names every shape that a run will see, so nothing is left to be
compiled when a step first meets it.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from qk_jax.base import trees
from qk_jax.base.types import PaddedBatch, Tree
from qk_jax.experiment.plan import Plan
from qk_jax.experiment.train_state import TrainState
from qk_jax.pictures.sizes import format_size
from qk_jax.training import ahead, flops
from qk_jax.training.step import Encoder, Metrics, make_train_step, step_batch

log = logging.getLogger(__name__)
HIT = "/jax/compilation_cache/cache_hits"  # JAX's event for a program that it need not compile


class Traced(NamedTuple):
    """A program before it is lowered.

    Attributes:
      name: in words.
      traced: of `jax.jit`.
    """

    name: str
    traced: jax.stages.Traced


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      name: in words.
      call: the program.
      seconds: that the compiler took, or the cache.
      loaded: whether it comes from the cache of compiled programs.
      digest: of its StableHLO, where somebody asked for it.
    """

    name: str
    call: jax.stages.Compiled
    seconds: float
    loaded: bool
    digest: str = ""


class Programs:
    """Encoder and train step, each compiled once for shapes that it has not met before."""

    def __init__(self, plan: Plan):
        """Compiles nothing yet; takes what config.programs.folder has for this run."""
        self._plan = plan
        self._encoder, self._step = Encoder(plan), make_train_step(plan)
        self._programs: dict[Any, Program] = {}
        self._work: dict[Any, int] = {}
        self._ahead = ahead.take(plan)

    def is_new(self, batch: PaddedBatch) -> bool:
        """Whether something has to be compiled for a batch."""
        return not self._programs.keys() >= {*self.encoder_keys(batch), self._step_key(batch)}

    def traced(self, batch: PaddedBatch) -> dict[Any, Traced]:
        """The programs of a batch by their shapes: the encoders in the order of the pictures, then
        the step. The batch may be abstract."""
        keys, pictures = self.encoder_keys(batch), self._encoder.pictures(batch)
        found: dict[Any, Traced] = {}
        for key, (picture, tokens) in zip(keys, pictures, strict=True):
            if key not in found:
                traced = self._encoder.program.trace(self._plan.frozen, picture, tokens)
                found[key] = Traced(f"encoder {format_size(picture.shape[1:3])}", traced)
        inputs = step_batch(batch, [found[key].traced.out_info for key in keys])
        count = len(batch["conditions"])
        found[self._step_key(batch)] = Traced(
            f"step with {count} condition picture{'' if count == 1 else 's'}",
            self._step.trace(self._plan.state, self._plan.frozen, inputs),
        )
        return found

    def compile(
        self,
        batches: Iterable[PaddedBatch],
        *,
        digests: bool = False,
        skip: Collection[str] = (),
    ) -> list[Program]:
        """Compiles what is new for these batches, config.programs.at_once programs at a time.

        Tracing and lowering are Python's, one after another; each program is compiled in a thread
        of its own as soon as it is lowered. Compiling talks to no other host, and all hosts do it
        in the same order.

        Args:
          batches: real or abstract.
          digests: also take the digest of each program.
          skip: digests of programs that need not be compiled.

        Returns:
          the new ones.
        """
        digests = digests or bool(self._ahead.programs)
        begun, waiting = time.monotonic(), dict[Any, Future[Program | None]]()
        with ThreadPoolExecutor(max(1, self._plan.config.programs.at_once)) as pool:
            for batch in batches:
                # The step first: it takes longest.
                for key, one in reversed(self.traced(batch).items()) if self.is_new(batch) else ():
                    if key not in self._programs and key not in waiting:
                        lowered = one.traced.lower()
                        waiting[key] = pool.submit(_compiled, one.name, lowered, digests, skip)
        found = {key: future.result() for key, future in waiting.items()}
        made = {key: program for key, program in found.items() if program is not None}
        self._programs |= made
        if made and jax.process_index() == 0:
            log.info("%s", described(list(made.values()), time.monotonic() - begun))
            for line in self._ahead.missed({x.digest: x.loaded for x in made.values()}):
                log.warning("%s", line)
        return list(made.values())

    def __call__(
        self, state: TrainState, frozen: Tree, batch: PaddedBatch
    ) -> tuple[TrainState, Metrics, int]:
        """(state, metrics, FLOPs of this step)."""
        if self.is_new(batch):
            self.compile([batch])
        pictures = self._encoder.pictures(batch)
        encoded = [
            self._programs[key].call(frozen, picture)
            for key, (picture, _) in zip(self.encoder_keys(batch), pictures, strict=True)
        ]
        step = self._programs[self._step_key(batch)].call
        state, values = step(state, frozen, step_batch(batch, encoded))
        return state, values, self._flops(batch)

    def encoder_keys(self, batch: PaddedBatch) -> list[Any]:
        """Of the program for each picture that is encoded, in their order, as in `traced`."""
        return [(x.shape, tokens) for x, tokens in self._encoder.pictures(batch)]

    def _step_key(self, batch: PaddedBatch) -> Any:
        tokens = [tokens for _, tokens in self._encoder.pictures(batch)]
        return _shapes(step_batch(batch, [((), ())])), *tokens

    def _flops(self, batch: PaddedBatch) -> int:
        key = _shapes(batch)
        if key not in self._work:
            self._work[key] = flops.of_step(self._plan, batch)
        return self._work[key]


def _shapes(tree: Any) -> tuple[Any, ...]:
    return tuple((name, x.shape) for name, x in trees.named(tree).items())


def described(made: Sequence[Program], seconds: float) -> str:
    """One line: how many programs, how many of them loaded, and the seconds of each."""
    loaded = sum(one.loaded for one in made)
    each = ", ".join(
        f"{one.name} {one.seconds:.1f}{' (loaded)' if one.loaded else ''}" for one in made
    )
    return f"{len(made)} programs in {seconds:.1f} s, {loaded} of them loaded: {each}"


class _Heard(threading.local):
    """What JAX has said in this thread."""

    hits = 0


_heard = _Heard()


@functools.cache
def _listen() -> None:
    def hear(event: str, **_: Any) -> None:
        _heard.hits += event == HIT

    jax.monitoring.register_event_listener(hear)


def _compiled(
    name: str, lowered: jax.stages.Lowered, digests: bool, skip: Collection[str]
) -> Program | None:
    """Compiles a program, or loads it; in a thread of the pool. None for one to skip."""
    _listen()
    digest = digest_of(lowered) if digests else ""
    if digest in skip:
        return None
    begun, before = time.monotonic(), _heard.hits
    call = lowered.compile()
    return Program(name, call, time.monotonic() - begun, _heard.hits > before, digest)


def digest_of(lowered: jax.stages.Lowered) -> str:
    """Of the StableHLO of a program, without the places in the source that it comes from."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()
