"""How each stage runs on a TPU slice: a table of what was worked out, and its application.

    python -m qk_jax.train --config stage2:20b@v5p-128 --workdir W

takes the row ('stage2', '20b', 'v5p-128') below. A row sets fields that every config has, so that
each of them can still be given on the command line. The batch stays the stage's own: the row says
in how many micro-batches it is taken.
"""

import dataclasses
import math
from typing import NamedTuple

from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base.errors import InputError


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
      step_flags: config.compiler.tpu_step.
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
    step_flags: tuple[str, ...] = ()
    figures: Figures | None = None


KEEP_ALL = "qkv+joint+attention+out+mlp+lora"  # nothing is multiplied twice

# Collectives beside matrix products instead of between them. Only small reductions are bundled: a
# bundle is not asynchronous, and a small one alone costs its latency.
OVERLAP = (
    "xla_enable_async_all_gather=true",
    "xla_enable_async_all_reduce=true",
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true",
    "xla_jf_crs_combiner_threshold_in_bytes=4194304",
)
# On a 2-D torus products are not cut into steps of a ring, which costs small ones their speed.
RING = (*OVERLAP, "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000")

# More than the 16 MiB of VMEM that a v5p TensorCore lends to a kernel by default, or the 32 MiB of
# v6e: larger tiles, so that products read their operands less often.
VMEM = {
    "v5p": ("xla_tpu_scoped_vmem_limit_kib=32768",),
    "v6e": ("xla_tpu_scoped_vmem_limit_kib=65536",),
}

# The paper's: a tensor-parallel VLM beside a generator under ZeRO-2 in bfloat16.
PAPER = Recipe(
    "v5p-128",
    {"fsdp": 16, "tensor": 4},
    {"vision": "tensor", "text": "tensor", "connector": "zero2", "mmdit": "zero2_flat"},
    gradients="bfloat16",
)


def _fsdp(
    name: str, devices: int, per_chip_batch: int, flags: tuple[str, ...], *,
    remat: str = KEEP_ALL, figures: Figures | None = None,
) -> Recipe:  # fmt: skip
    """ZeRO-3 over the whole slice with gradients in bfloat16."""
    return Recipe(
        name, {"fsdp": devices}, per_chip_batch=per_chip_batch, remat=remat,
        gradients="bfloat16", flags=flags, step_flags=VMEM.get(name.partition("-")[0], ()),
        figures=figures,
    )  # fmt: skip


# By stage, size and slice, or the name of a recipe that is about more than its slice. Where HBM is
# short, what costs little to recompute is not kept: near the limit collectives become synchronous.
RECIPES = {
    ("stage1", "20b", "v5e-256"): _fsdp(
        "v5e-256", 256, 2, RING, figures=Figures(mfu=0.397, step_time_s=0.731, hbm_gib=7.80)
    ),
    ("stage1", "20b", "v6e-64"): _fsdp(
        "v6e-64", 64, 8, RING, figures=Figures(mfu=0.317, step_time_s=0.785, hbm_gib=27.45)
    ),
    ("stage2", "20b", "v5p-128"): _fsdp(
        "v5p-128", 64, 8, OVERLAP, figures=Figures(mfu=0.688, step_time_s=4.184, hbm_gib=71.60)
    ),
    ("stage2", "20b", "v6e-256"): _fsdp(
        "v6e-256", 256, 4, RING, remat="attention+out+mlp",
        figures=Figures(mfu=0.334, step_time_s=1.078, hbm_gib=23.79),
    ),
    ("stage2", "20b", "paper"): PAPER,
    ("stage3", "20b", "v5p-128"): _fsdp(
        "v5p-128", 64, 4, OVERLAP, figures=Figures(mfu=0.569, step_time_s=5.071, hbm_gib=71.75)
    ),
    ("stage3", "20b", "v6e-64"): _fsdp(
        "v6e-64", 64, 4, RING, remat="attention+lora",
        figures=Figures(mfu=0.260, step_time_s=5.554, hbm_gib=22.40),
    ),
    ("highres", "20b", "v5p-256"): _fsdp(
        "v5p-256", 128, 1, OVERLAP, figures=Figures(mfu=0.482, step_time_s=7.272, hbm_gib=62.46)
    ),
}  # fmt: skip


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
    config.compiler.tpu_step = recipe.step_flags
    return config
