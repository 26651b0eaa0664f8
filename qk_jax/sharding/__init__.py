"""Mesh, checked sharding rules, and the shardings of parameters and batches.

Parameters carry logical axes. A row of the sharding table per tower says over which mesh axes each
of them is sharded, in a column of its own for the weights of the step, the gradients, the optimizer
state and the activations, so that ZeRO-1, 2 and 3, tensor and context parallelism are rows of a
table (`ROWS`). Linen replicates whatever it does not understand without a word; here a misspelt
axis, two dimensions on one mesh axis, a dimension that does not divide and too many replicated
bytes are errors that name the parameter.
"""

from qk_jax.sharding.mesh import (
    BATCH_AXES,
    MESH_AXES,
    AnyMesh,
    abstract_mesh,
    batch_sharding,
    build_mesh,
    filled,
    fitting,
    format_mesh,
    nearest,
    parse,
    platform,
    replicated,
    single,
    size,
    target,
)
from qk_jax.sharding.rules import (
    COLUMNS,
    OWN,
    ROWS,
    SHARDABLE,
    TOWERS,
    Activations,
    Columns,
    Rules,
    Tables,
    column,
    format_rows,
    parse_rows,
    row,
    tables,
    tower,
)
from qk_jax.sharding.specs import (
    check_batch,
    check_sharded,
    constrain,
    fitting_batch,
    leaves,
    shardings,
    spec,
)

__all__ = [
    "BATCH_AXES", "COLUMNS", "MESH_AXES", "OWN", "ROWS", "SHARDABLE", "TOWERS", "Activations",
    "AnyMesh", "Columns", "Rules", "Tables", "abstract_mesh", "batch_sharding", "build_mesh",
    "check_batch", "check_sharded", "column", "constrain", "filled", "fitting", "fitting_batch",
    "format_mesh", "format_rows", "leaves", "nearest", "parse", "parse_rows", "platform",
    "replicated", "row", "shardings", "single", "size", "spec", "tables", "target", "tower",
]  # fmt: skip
