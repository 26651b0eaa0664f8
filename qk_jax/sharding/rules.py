"""The sharding table: a row per tower, a column for weights, gradients, optimizer, activations.

A cell says over which mesh axes each logical axis is sharded. The rows that a config may name
(`ROWS`) are ZeRO-1, 2 and 3, tensor and context parallelism.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.sharding.mesh import BATCH_AXES, MESH_AXES

# Towers by the prefix of a parameter's name; the first that matches decides.
TOWERS = (
    ("vlm/visual/", "vision"),
    ("vlm/", "text"),
    ("queries/", "connector"),
    ("connector/", "connector"),
    ("alignment/", "connector"),
    ("mmdit/", "mmdit"),
    ("vae/", "vae"),
)


def _check_mesh_axes(row: Any) -> None:
    """Raises InputError where a field of `row` names a mesh axis that does not exist."""
    for field in dataclasses.fields(row):
        for axis in getattr(row, field.name):
            if axis not in MESH_AXES:
                raise InputError(
                    f"{field.name!r} is sharded over the mesh axis {axis!r}; "
                    f"the mesh axes are {', '.join(MESH_AXES)}"
                )


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis of one tower's parameters; () replicates.

    Weights are sharded over 'context' as over 'fsdp': its devices hold other tokens of the same
    examples, so that their gradients are partial sums too. `mlp_in` and `heads_in` are the same
    features where a product sums over them: what is gathered is sharded along the outer axis of
    every kernel, which TPUs gather without a transposing copy.
    """

    embed: tuple[str, ...] = ("fsdp", "context")
    mlp: tuple[str, ...] = ("tensor",)
    mlp_in: tuple[str, ...] = ("tensor", "fsdp", "context")
    heads: tuple[str, ...] = ("tensor",)
    heads_in: tuple[str, ...] = ("tensor", "fsdp", "context")
    kv_heads: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    modulation: tuple[str, ...] = ("tensor", "fsdp", "context")
    # LoRA factors without "embed"; not over "tensor" too: on data, fsdp and tensor the partitioner
    # of jax 0.10.2 then gives wrong gradients (tests/training/test_sharded_step.py).
    adapter: tuple[str, ...] = ("fsdp", "context")
    layers: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    conv_in: tuple[str, ...] = ()
    conv_out: tuple[str, ...] = ()
    patch: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_mesh_axes(self)


# Axes worth sharding; convolutions, patches and norms are too small or too oddly sized.
SHARDABLE = frozenset(field.name for field in dataclasses.fields(Rules) if field.default)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Mesh axes of each logical axis of one tower's activations; () replicates.

    Residual streams are sharded along `sequence`; attention gathers tokens and shards heads.
    `modulation` and `modulation_batch` are of what a timestep becomes in each block, one vector
    per picture. Its weights are a third of an MMDiT and their product is tiny, so the weights stay
    sharded: every device computes its features for the examples of all others, and the results
    are exchanged instead of the weights.
    """

    batch: tuple[str, ...] = BATCH_AXES
    sequence: tuple[str, ...] = ("context",)
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    modulation: tuple[str, ...] = ("tensor", "fsdp", "context")
    modulation_batch: tuple[str, ...] = ("data",)

    def __post_init__(self) -> None:
        _check_mesh_axes(self)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The table row of one tower: how everything of it is sharded.

    Attributes:
      params: the weights that a step computes with. Where they are sharded otherwise than the
        optimizer state, trained weights are gathered once per step, in the compute dtype; frozen
        ones are always sharded so.
      gradients: of the whole batch, and their sums over micro-batches.
      optimizer: float32 weights, moments and moving average, between steps.
      activations: of the forward pass.
    """

    params: Rules = Rules()
    gradients: Rules = Rules()
    optimizer: Rules = Rules()
    activations: Activations = Activations()


COLUMNS = ("params", "gradients", "optimizer")  # of arrays that are shaped like parameters
_TENSOR_ONLY = dict.fromkeys(("adapter", "modulation", "mlp_in", "heads_in"), ("tensor",))
_NO_FSDP = Rules(embed=(), **_TENSOR_ONLY)
_WHOLE_MODULATION = Activations(modulation=("tensor",), modulation_batch=BATCH_AXES)
_NO_TENSOR = dict.fromkeys(("mlp", "heads", "kv_heads", "vocab"), ())
_OVER_ALL = ("tensor", "fsdp", "context")
_FLAT = Rules(embed=_OVER_ALL, adapter=_OVER_ALL, **_NO_TENSOR)
_WHOLE = Rules(embed=(), **_NO_TENSOR, **dict.fromkeys(_TENSOR_ONLY, ()))
_FLAT_BATCH = (*BATCH_AXES, "tensor")
# The rows that a config may name. In all but the last, heads, MLP, vocabulary and modulation are
# sharded over 'tensor' (Megatron), and in all of them the tokens over 'context'; a mesh without
# these axes is plain ZeRO.
ROWS = {
    # ZeRO (arXiv 1910.02054): 1 shards the optimizer state over fsdp, 2 the gradients too
    "zero1": Columns(params=_NO_FSDP, gradients=_NO_FSDP, activations=_WHOLE_MODULATION),
    "zero2": Columns(params=_NO_FSDP, activations=_WHOLE_MODULATION),
    # ZeRO-3: the weights too, which are gathered block by block
    "fsdp": Columns(),
    # nothing is sharded over fsdp
    "tensor": Columns(_NO_FSDP, _NO_FSDP, _NO_FSDP, _WHOLE_MODULATION),
    # ZeRO-2 of a tower that takes 'tensor' for more examples, beside one that is sharded over it
    "zero2_flat": Columns(
        params=_WHOLE,
        gradients=_FLAT,
        optimizer=_FLAT,
        activations=Activations(
            batch=_FLAT_BATCH,
            heads=(),
            kv_heads=(),
            mlp=(),
            modulation=(),
            modulation_batch=_FLAT_BATCH,
        ),
    ),
}
Tables = dict[str, Columns]  # by tower


def row(name: str) -> Columns:
    """The row of ROWS called `name`.

    Raises:
      InputError: there is none.
    """
    if name not in ROWS:
        raise InputError(f"sharding row {name!r} is unknown; give one of {', '.join(ROWS)}")
    return ROWS[name]


OWN = "*"  # in texts, for a row whose cells are the config's own


def parse_rows(text: str, towers: Iterable[str]) -> dict[str, str]:
    """{tower: name in ROWS} of 'text=tensor,mmdit=zero2_flat', or of one name for all `towers`.

    Raises:
      InputError: a tower that does not exist.
    """
    towers = list(towers)
    if text and "=" not in text:
        return dict.fromkeys(towers, text)
    found = {}
    for part in filter(None, text.split(",")):
        tower, _, name = part.partition("=")
        if tower not in towers:
            raise InputError(f"the tower {tower!r} is not of {', '.join(towers)}")
        if name != OWN:
            found[tower] = name
    return found


def format_rows(config: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]) -> str:
    """The inverse of `parse_rows` for cells {tower: {column: {logical axis: mesh axes}}}.

    Rows that are 'fsdp' are left out.
    """
    known = {name: dataclasses.asdict(row) for name, row in ROWS.items()}
    rows = {}
    for tower, columns in config.items():
        cells = {column: dict(table) for column, table in columns.items()}
        rows[tower] = next((name for name, row in known.items() if row == cells), OWN)
    names = set(rows.values())
    if len(names) == 1 and not names & {OWN, "fsdp"}:
        return names.pop()
    return ",".join(f"{tower}={name}" for tower, name in rows.items() if name != "fsdp")


def tables(config: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]) -> Tables:
    """One row per tower from {tower: {column: {logical axis: mesh axes}}}.

    Raises:
      InputError: a tower, a column or an axis that does not exist, or a tower without a row.
    """
    known = sorted({tower for _, tower in TOWERS})
    if sorted(config) != known:
        raise InputError(f"sharding tables are given for {sorted(config)}; need exactly {known}")
    kinds = dict.fromkeys(COLUMNS, Rules) | {"activations": Activations}
    out = {}
    for tower, columns in config.items():
        _check_names(f"sharding.{tower}", "columns", columns, kinds)
        filled: dict[str, Any] = {}
        for column, table in columns.items():
            axes = [field.name for field in dataclasses.fields(kinds[column])]
            _check_names(f"sharding.{tower}.{column}", "logical axes", table, axes)
            try:
                filled[column] = kinds[column](**{axis: tuple(v) for axis, v in table.items()})
            except InputError as error:
                raise InputError(f"sharding.{tower}.{column}: {error}") from None
        out[tower] = Columns(**filled)
    return out


def _check_names(where: str, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises InputError when something given is not known."""
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"{where} has the unknown {what} {unknown}; known are {', '.join(sorted(known))}"
        )


def column(tables: Tables, name: str) -> dict[str, Rules]:
    """The column 'params', 'gradients' or 'optimizer' of every tower."""
    return {tower: getattr(columns, name) for tower, columns in tables.items()}


def tower(name: str) -> str:
    """The tower that a parameter belongs to; an adapter belongs to what it adapts.

    Raises:
      InputError: no prefix of TOWERS matches.
    """
    for prefix, found in TOWERS:
        if name.removeprefix("lora/").startswith(prefix):
            return found
    raise InputError(f"parameter {name} belongs to no tower; sharding.TOWERS lists their prefixes")
