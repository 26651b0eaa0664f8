from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench import shardings, slices
from qk_jax.bench.slices import Place, Row
from qk_jax.experiment import config as config_lib

MOST = 24  # layouts of a search per slice


def plan(
    args: argparse.Namespace, given: Row, batches: Mapping[Place, Sequence[float]]
) -> list[tuple[Place, str, float]]:
    """(place, layout in full, rows per device) of everything that is to be compiled.

    A layout or a batch that does not fit one place may fit another, and is left out of the first
    with a line that says so.

    Args:
      args, given: the command and its rows.
      batches: rows per device on each place.

    Raises:
      InputError: something that is given fits nowhere, or a search finds no mesh for a place.
    """
    found, refused, used = [], [], set()
    for at, sizes in batches.items():
        for layout in search(given, at) if args.search else args.layout or [""]:
            one = dataclasses.replace(given, layout=layout)
            for batch in sizes:
                try:
                    found.append((at, fitted(one, at, batch).text, batch))
                    used |= {at.name, layout, batch}
                except InputError as error:
                    refused.append(
                        (
                            {at.name, layout, batch},
                            f"{at.name} {layout or 'as the config lies'}: {error}",
                        )
                    )
    for names, reason in refused:
        if not names <= used:
            raise InputError(reason)
        print(f"left out: {reason}")
    return list(dict.fromkeys(found))


class Fitted(NamedTuple):
    """A layout on a place: itself in full (`row.describe`), and bytes of parameters, gradients and
    state on each device."""

    text: str
    nbytes: int


@functools.lru_cache(maxsize=2 * MOST)
def _parameters(config: str, devices: str) -> int:
    """Bytes of parameters, gradients and state on each device; both arguments are JSON."""
    mesh = sharding.abstract_mesh(json.loads(devices))
    return sum(
        r.held + r.gathered + r.gradient
        for r in shardings.rows(config_lib.from_dict(json.loads(config)), mesh)
    )


def fitted(given: Row, at: Place, batch: float | None = None) -> Fitted:
    """How the layout of a row fits.

    Raises:
      InputError: the devices, the parameters, or the rows of a micro-batch do not divide.
    """
    config = config_lib.load(given.config, given.overrides)
    slices.lay_out(config, given.layout, at)
    sizes = {axis: size * config.slices.get(axis, 1) for axis, size in config.mesh.items()}
    if batch is not None:
        mesh, towers = sharding.abstract_mesh(sizes), sharding.tables(config.sharding)
        sharding.check_batch(slices.micro_batch(at, batch), mesh, towers)
    nbytes = _parameters(config_lib.to_json(config), json.dumps(sizes))
    return Fitted(slices.describe(config), nbytes)


def search(given: Row, at: Place) -> list[str]:
    """Meshes over fsdp, tensor and context whose state fits into HBM, the least split first.

    'tensor' must divide the heads of every tower that it splits, 'tensor' x 'context' those of the
    generator; 'data' joins slices.

    Raises:
      InputError: none is left.
    """
    devices = at.devices // at.slices
    found, left = [], []
    for tensor, context in sorted(meshes(given, at), key=lambda pair: (math.prod(pair), pair)):
        shape = {"fsdp": devices // tensor // context, "context": context, "tensor": tensor}
        text = slices.mesh_text(shape)
        try:
            nbytes = fitted(dataclasses.replace(given, layout=text), at).nbytes
        except InputError as error:
            left.append(f"{text}: {error}")
            continue
        if at.hbm_bytes and nbytes > at.hbm_bytes:
            left.append(
                f"{text}: parameters, gradients and state are {nbytes / slices.GIB:.1f} GiB"
            )
        else:
            found.append(text)
    if not found:
        raise InputError(f"no mesh of {at.name} holds {given.config}: {left[0]}; take a larger one")
    for line in left:
        print(f"left out: {at.name} {line}")
    if len(found) > MOST:
        print(f"left out: {at.name} {' '.join(found[MOST:])}, more than {MOST}")
    print(f"search: {at.name} {' '.join(found[:MOST])}")
    return found[:MOST]


def meshes(given: Row, at: Place) -> list[tuple[int, int]]:
    """(tensor, context) sizes that divide the devices of a slice and the heads."""
    config = config_lib.load(given.config, given.overrides)
    model, towers = config.model, sharding.tables(config.sharding)
    heads = {
        "vision": [model.vlm.vision.num_heads],
        "text": [model.vlm.text.num_attention_heads, model.vlm.text.num_key_value_heads],
        "mmdit": [model.mmdit.num_attention_heads],
    }
    split = [
        count
        for tower, counts in heads.items()
        for count in counts
        if "tensor" in towers[tower].activations.heads
    ]
    devices = at.devices // at.slices
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    return [
        (tensor, context)
        for tensor, context in itertools.product(sizes, sizes)
        if devices % (tensor * context) == 0
        and all(count % tensor == 0 for count in split)
        and model.mmdit.num_attention_heads % (tensor * context) == 0
    ]
