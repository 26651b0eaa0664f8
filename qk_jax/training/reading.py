"""What a run will read, before it reads: sources, shapes, tokens, and whether the host keeps up."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from qk_jax.base.errors import InputError
from qk_jax.data.pipeline import Pipeline
from qk_jax.data.plan import Group
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.sizes import PACKED, format_size
from qk_jax.training.padding import Padding


class Shape(NamedTuple):
    """A shape of batches.

    Attributes:
      sizes: (H, W) of the target and of the condition pictures.
      share: of the examples of its phase.
      examples: that have it.
      tasks: whose examples have it.
      tokens: of the generator for its pictures.
      padded: as many with padding.
      sequence: tokens of the VLM.
    """

    sizes: tuple[Size, ...]
    share: float
    examples: int
    tasks: tuple[str, ...]
    tokens: int
    padded: int
    sequence: int


def told(pipeline: Pipeline, seconds: float, step_s: float) -> str:
    """The report.

    Args:
      pipeline: of the training split.
      seconds: for which batches are made, to measure the rate of this host; 0 for no measurement.
      step_s: seconds that a step of the run takes, by which the rate is judged; 0 for unknown.

    Raises:
      InputError: a batch cannot be made.
    """
    config = pipeline.config
    lines = [f"{config['steps']:,} steps of {_batches(pipeline)} examples"]
    for first, end in itertools.pairwise([*pipeline.shares, config["steps"]]):
        share, steps = pipeline.shares[first], max(min(end, config["steps"]) - first, 0)
        examples = steps * pipeline.examples[first]
        if len(pipeline.shares) > 1:
            lines += ["", f"From step {first:,}:"]
        lines += ["", *_sources(pipeline, share, examples), ""]
        lines += _shapes(pipeline, share, pipeline.examples[first])
    if seconds:
        lines += ["", _rate(pipeline, seconds, step_s)]
    return "\n".join(lines)


def _batches(pipeline: Pipeline) -> str:
    """The examples of a batch: of all alike, or by the number of condition pictures."""
    of = {n: pipeline.batch_sizes(n) for n in sorted({x.pictures for x in pipeline.groups})}
    if len({*of.values()}) == 1:
        return str(next(iter(of.values())))
    return ", ".join(f"{size} (with {n} pictures)" for n, size in of.items())


def _sources(pipeline: Pipeline, share: Mapping[int, Fraction], examples: float) -> Iterator[str]:
    """A table: what is read of each source in so many examples."""
    yield "| source | records | left out | part of the examples | read | epochs |"
    yield "| --- | --- | --- | --- | --- | --- |"
    own: dict[str, list[int]] = {}
    for index in share:
        own.setdefault(pipeline.groups[index].label, []).append(index)
    for label, indices in own.items():
        used = sum(len(pipeline.groups[index].numbers) for index in indices)
        part = float(sum(share[index] for index in indices))
        left = _length(pipeline, indices[0]) - used
        read = part * examples
        yield f"| {label} | {used:,} | {left:,} | {part:.1%} | {read:,.0f} | {read / used:,.2f} |"


def _length(pipeline: Pipeline, index: int) -> int:
    """Records of the source of a group."""
    source, group = pipeline.loader.sources[index], pipeline.groups[index]
    parts = {part.name: part.source for part in getattr(source, "parts", ())}
    return len(parts.get(group.source, source))


def shapes(pipeline: Pipeline, share: Mapping[int, Fraction]) -> list[Shape]:
    """The shapes of a phase, the most frequent first."""
    config = pipeline.config
    pad, model = Padding.from_config(config), config_lib.model_config(config)
    of_shape: dict[tuple[Size, ...], list[int]] = {}
    for index in share:
        of_shape.setdefault(pipeline.groups[index].shape, []).append(index)
    abstract = dict(zip(dict.fromkeys(x.shape for x in pipeline.groups), pipeline.abstract(),
                        strict=True))  # fmt: skip
    found = []
    for sizes, indices in of_shape.items():
        groups: Sequence[Group] = [pipeline.groups[index] for index in indices]
        batch = abstract[sizes]
        generated = len(sizes) if model.condition_latents else 1
        found.append(Shape(
            sizes, float(sum(share[index] for index in indices)),
            sum(len(group.numbers) for group in groups),
            tuple(dict.fromkeys(group.task for group in groups)),
            sum(math.prod(size) // PACKED**2 for size in sizes[:generated]),
            sum(pad.tokens(batch)[:generated]), pad.abstract(batch)["input_ids"].shape[1],
        ))  # fmt: skip
    return sorted(found, key=lambda shape: -shape.share)


def _shapes(pipeline: Pipeline, share: Mapping[int, Fraction], examples: float) -> Iterator[str]:
    """A table of the shapes, and what they come to in a step of so many examples."""
    found = shapes(pipeline, share)
    yield "| target | condition pictures | tasks | examples | part | tokens | padded | VLM |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for one in found:
        target, *conditions = map(format_size, one.sizes)
        pictures = ", ".join(conditions) or "none"
        yield (
            f"| {target} | {pictures} | {', '.join(one.tasks)} | {one.examples:,} | "
            f"{one.share:.1%} | {one.tokens:,} | {one.padded:,} | {one.sequence:,} |"
        )
    mean = {name: sum(x.share * getattr(x, name) for x in found) for name in Shape._fields[4:]}
    programs = len({(one.padded, one.sequence, len(one.sizes)) for one in found})
    yield ""
    yield (
        f"{len(found)} shapes, {programs} programs of the step; a step has "
        f"{examples * mean['padded']:,.0f} tokens of the generator, of which "
        f"{1 - mean['tokens'] / mean['padded']:.1%} are padding, and "
        f"{examples * mean['sequence']:,.0f} of the VLM"
    )


def _rate(pipeline: Pipeline, seconds: float, step_s: float) -> str:
    """How many pictures this host makes in a second, and how many a run needs of it."""
    config, read = pipeline.config, Counter[str]()
    batches = pipeline.batches()
    try:
        next(batches)  # starts threads and workers
        begun = time.monotonic()
        for batch in batches:
            read["examples"] += len(batch["record"])
            read["pictures"] += len(batch["record"]) * (1 + len(batch["conditions"]))
            spent = time.monotonic() - begun
            if spent >= seconds:
                break
    finally:
        pipeline.close()
    per_second = read["examples"] / spent
    said = (
        f"This host makes {per_second:.1f} examples ({read['pictures'] / spent:.1f} pictures) a "
        f"second with data.workers={config['data']['workers']} and "
        f"data.threads={config['data']['threads']}"
    )
    if not step_s:
        return said + "; --step-s says how long a step takes, for which it should be enough"
    slots = max(pipeline.examples.values()) / pipeline.loader.host[1]
    need = slots / step_s
    verdict = "enough" if per_second >= need else "too slow: add hosts, workers or processors"
    return f"{said}; its {slots:g} slots of a step in {step_s:g} s need {need:.1f}: {verdict}"


def check(seconds: float, step_s: float, hosts: int) -> None:
    """Raises InputError for numbers that are none."""
    if seconds < 0 or step_s < 0 or hosts < 1:
        raise InputError(
            f"--seconds is {seconds}, --step-s {step_s} and --hosts {hosts}; give 0 or more of the "
            "first two, and at least one host"
        )
