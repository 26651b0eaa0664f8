"""How each stage runs on a TPU slice: a table of what was worked out, and its application.

    python -m qk_jax.train --config configs/stage2.py:20b@v5p-128 --workdir W

takes the row ('stage2', '20b', 'v5p-128') below. A row sets fields that every config has, so that
each of them can still be given on the command line. The batch stays the stage's own: the row says
in how many micro-batches it is taken.
"""

import dataclasses
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.errors import InputError


class Figures(NamedTuple):
    """What `qk_jax.bench layouts` says of a row when it compiles it for the slice.

    Attributes:
      mfu: model FLOPs of a step over peak and estimated time, 0 to 1.
      step_time_s: estimated.
      hbm_gib: peak per device.
    """

    mfu: float
    step_time_s: float
    hbm_gib: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row.

    Attributes:
      slice: Google's name of the TPU slice.
      mesh: devices along each axis; their product is the slice's number of JAX devices.
      rows: `sharding.ROWS` of a tower, 'fsdp' for those that are not named.
      per_chip_batch: rows of a micro-batch per device of the mesh.
      slices: how many slices each axis spans.
      remat: config.model.remat.
      gradients: config.dtype.gradients.
      flags: config.compiler.tpu.
      figures: compile-time estimates; None for a row that has not been compiled.
    """

    slice: str
    mesh: dict[str, int]
    rows: dict[str, str] = dataclasses.field(default_factory=dict)
    per_chip_batch: int = 1
    slices: dict[str, int] = dataclasses.field(default_factory=dict)
    remat: str = "full"
    gradients: str = "float32"
    flags: tuple[str, ...] = ()
    figures: Figures | None = None


# The paper's: a tensor-parallel VLM beside a generator under ZeRO-2 in bfloat16.
PAPER = Recipe(
    "v5p-128",
    {"fsdp": 16, "tensor": 4},
    {"vision": "tensor", "text": "tensor", "connector": "zero2", "mmdit": "zero2_flat"},
    per_chip_batch=1,
    gradients="bfloat16",
)

# By stage, size and slice, or the name of a recipe that is about more than its slice.
RECIPES = {
    ("stage1", "20b", "v5e-256"): Recipe("v5e-256", {"fsdp": 256}, per_chip_batch=2),
    ("stage1", "20b", "v6e-64"): Recipe("v6e-64", {"fsdp": 64}, per_chip_batch=4),
    ("stage2", "20b", "v5p-128"): Recipe("v5p-128", {"fsdp": 64}, per_chip_batch=4),
    ("stage2", "20b", "v6e-256"): Recipe("v6e-256", {"fsdp": 256}, per_chip_batch=4),
    ("stage2", "20b", "paper"): PAPER,
    ("stage3", "20b", "v5p-128"): Recipe("v5p-128", {"fsdp": 64}, per_chip_batch=4),
    ("stage3", "20b", "v6e-64"): Recipe("v6e-64", {"fsdp": 64}, per_chip_batch=2),
    ("highres", "20b", "v5p-256"): Recipe("v5p-256", {"fsdp": 128}, per_chip_batch=1),
}


def split(size: str) -> tuple[str, str]:
    """'20b@v5p-128' -> ('20b', 'v5p-128'); without @ the recipe is ''."""
    size, _, name = size.partition("@")
    return size, name


def apply(config: ConfigDict, name: str) -> ConfigDict:
    """The config with the recipe `name` of its stage and size written into it; '' changes nothing.

    Raises:
      InputError: there is none of that name.
    """
    if not name:
        return config
    key = (config.stage, config.size, name)
    if key not in RECIPES:
        known = [recipe for *where, recipe in RECIPES if where == [config.stage, config.size]]
        raise InputError(
            f"there is no recipe {name!r} for {config.stage} at size {config.size!r}; it has "
            f"{', '.join(known) or 'none'}"
        )
    recipe = RECIPES[key]
    axes = dict.fromkeys(sharding.MESH_AXES, 1) | recipe.mesh
    config.mesh.update(axes)
    config.slices.update(recipe.slices)
    for tower in config.sharding:
        row = sharding.row(recipe.rows.get(tower, "fsdp"))
        config.sharding[tower] = dataclasses.asdict(row)
    devices = math.prod([*axes.values(), *recipe.slices.values()])
    config.optimizer.accumulation = config.data.batch // (devices * recipe.per_chip_batch)
    config.validation.batch = devices * -(-config.validation.batch // devices)
    config.model.remat = recipe.remat
    config.dtype.gradients = recipe.gradients
    config.compiler.tpu = recipe.flags
    return config
