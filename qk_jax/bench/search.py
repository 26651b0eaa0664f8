"""The cases of a command: every combination that fits a target, and the search for meshes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Sequence

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench import shardings
from qk_jax.bench.batches import examples_of
from qk_jax.bench.cases import NO_REMAT, Case, Target, layout_of, micro_batch, set_layout
from qk_jax.bench.schedule.topologies import GIB
from qk_jax.experiment import config as config_lib
from qk_jax.pictures.sizes import parse_size

MAX_MESHES = 24  # of a search per target


def cases(
    args: argparse.Namespace, given: Case, targets: Sequence[Target]
) -> list[tuple[Case, Target]]:
    """Every combination of target, layout, batch and remat; layouts are in full.

    A layout or a batch that does not fit one target may fit another, and is left out of the first
    with a line that says so.

    Args:
      args: the command.
      given: what all its cases have in common.
      targets: to compile for.

    Raises:
      InputError: something that is given fits nowhere, or a search finds no mesh for a target.
    """
    config = config_lib.load(given.config, given.overrides)
    remats = args.remat or [config.model.remat or NO_REMAT]
    size = parse_size(given.size, "the size of a case")
    micro = examples_of(config, size, given.pictures) / config.optimizer.accumulation
    found, refused, used = [], [], set()
    for target in targets:
        layouts = search(given, target) if args.search else args.layout or [""]
        batches = args.per_chip_batch or [micro / target.devices]
        for layout, batch in itertools.product(layouts, batches):
            names = {target.name, layout, batch}
            one = dataclasses.replace(given, slice=target.name, layout=layout, per_chip_batch=batch)
            try:
                text, _ = fitted(one, target)
                found.append((dataclasses.replace(one, layout=text), target))
                used |= names
            except InputError as error:
                refused.append((names, f"{target.name} {layout or 'as configured'}: {error}"))
    for names, reason in refused:
        if not names <= used:
            raise InputError(reason)
        print(f"left out: {reason}")
    every = [
        (dataclasses.replace(case, remat=remat), target) for case, target in found
        for remat in remats
    ]  # fmt: skip
    return [one for number, one in enumerate(every) if one not in every[:number]]


def fitted(case: Case, target: Target) -> tuple[str, int]:
    """A layout in full, and its bytes of parameters, gradients and state on each device.

    Raises:
      InputError: the devices, the parameters, or the examples of a micro-batch do not divide.
    """
    config = config_lib.load(case.config, case.overrides)
    set_layout(config, case.layout, target)
    sizes = {axis: size * config.slices.get(axis, 1) for axis, size in config.mesh.items()}
    if case.per_chip_batch:
        mesh, towers = sharding.abstract_mesh(sizes), sharding.tables(config.sharding)
        sharding.check_batch(micro_batch(target, case.per_chip_batch), mesh, towers)
    return layout_of(config), _held(config_lib.to_json(config), json.dumps(sizes))


@functools.lru_cache(maxsize=2 * MAX_MESHES)
def _held(config: str, mesh: str) -> int:
    """Bytes of parameters, gradients and state on each device; both arguments are JSON."""
    found = shardings.parameters(
        config_lib.from_dict(json.loads(config)), sharding.abstract_mesh(json.loads(mesh))
    )
    return sum(one.held + one.gathered + one.gradient for one in found)


def search(given: Case, target: Target) -> list[str]:
    """Meshes over fsdp, tensor and context whose state fits into HBM, the least sharded first.

    Raises:
      InputError: none is left.
    """
    found, left = [], []
    for tensor, context in sorted(meshes(given, target), key=lambda two: (math.prod(two), two)):
        rest = target.slice_devices // tensor // context
        text = sharding.format_mesh({"fsdp": rest, "context": context, "tensor": tensor})
        try:
            _, nbytes = fitted(dataclasses.replace(given, layout=text), target)
        except InputError as error:
            left.append(f"{text}: {error}")
            continue
        if target.hbm_bytes and nbytes > target.hbm_bytes:
            left.append(f"{text}: parameters, gradients and state are {nbytes / GIB:.1f} GiB")
        else:
            found.append(text)
    if not found:
        raise InputError(
            f"no mesh of {target.name} holds {given.config}: {left[0]}; take a larger one"
        )
    if len(found) > MAX_MESHES:
        left.append(f"{' '.join(found[MAX_MESHES:])}, more than {MAX_MESHES}")
    for line in left:
        print(f"left out: {target.name} {line}")
    print(f"search: {target.name} {' '.join(found[:MAX_MESHES])}")
    return found[:MAX_MESHES]


def meshes(given: Case, target: Target) -> list[tuple[int, int]]:
    """(tensor, context) sizes that divide the devices of a slice and the heads.

    'tensor' must divide the heads of every tower that it shards, 'tensor' x 'context' those of the
    generator.
    """
    config = config_lib.load(given.config, given.overrides)
    model, towers = config.model, sharding.tables(config.sharding)
    heads = {
        "vision": [model.vlm.vision.num_heads],
        "text": [model.vlm.text.num_attention_heads, model.vlm.text.num_key_value_heads],
        "mmdit": [model.mmdit.num_attention_heads],
    }
    sharded = [
        count
        for tower, counts in heads.items()
        for count in counts
        if "tensor" in towers[tower].activations.heads
    ]
    devices = target.slice_devices
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    return [
        (tensor, context)
        for tensor, context in itertools.product(sizes, sizes)
        if devices % (tensor * context) == 0
        and all(count % tensor == 0 for count in sharded)
        and model.mmdit.num_attention_heads % (tensor * context) == 0
    ]
