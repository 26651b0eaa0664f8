"""The training state: abstract trees of a stage, what is trained, where everything lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from flax.core import meta
from flax.linen import LogicallyPartitioned
from jax.sharding import Mesh

from qk_jax import sharding
from qk_jax.models import lora
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training import config as config_lib
from qk_jax.training import optimizer, stages

Tree = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes; the frozen tree is not part of it.

    Attributes:
      step: int32 [], finished updates.
      params: trained leaves, float32.
      opt_state: optax state of `params`.
      ema: moving average of `params`, float32, or {} when it is off.
    """

    step: jax.Array
    params: Tree
    opt_state: Any
    ema: Tree


def build_model(config: Mapping[str, Any], *, remat: bool = True) -> QueryKontext:
    """The model of a config (or of its JSON) in its compute dtype."""
    section = config_lib.model_config(config)
    if not remat:
        section = section.__class__(**(section.__dict__ | {"remat": None}))
    rows = sharding.tables(config["sharding"])
    places = {tower: columns.activations for tower, columns in rows.items()}
    return QueryKontext(section, config_lib.dtype(config["dtype"]["compute"]), places)


def _lora_tower(rng: jax.Array, config: Mapping[str, Any], tower: Tree) -> Tree:
    """A fresh adapter for `tower` by the section `lora`."""
    return lora.init(rng, tower, config["lora"]["pattern"], config["lora"]["rank"])


def _boxed_lora(config: Mapping[str, Any], tower: Tree) -> Tree:
    """Abstract adapter of a boxed tower, with logical axes."""
    shapes = jax.eval_shape(lambda p: _lora_tower(jax.random.key(0), config, p), meta.unbox(tower))
    axes = traverse_util.flatten_dict(lora.logical_axes(tower, shapes), sep="/")
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    boxed = {name: LogicallyPartitioned(leaf, axes[name]) for name, leaf in leaves.items()}
    return traverse_util.unflatten_dict(boxed, sep="/")


def fresh_alignment(rng: jax.Array, config: Mapping[str, Any]) -> Tree:
    """The projection of the alignment term kontext -> vision features: kernel [D, D_vision]."""
    text, vision = config["model"]["vlm"]["text"], config["model"]["vlm"]["vision"]
    shape = (text["hidden_size"], vision["out_hidden_size"])
    kernel = jax.random.normal(rng, shape, jnp.float32) * shape[0] ** -0.5
    return {"proj": {"kernel": kernel}}


def fresh(
    model: QueryKontext, config: Mapping[str, Any], rng: jax.Array, parts: tuple[str, ...]
) -> Tree:
    """Fresh parameters of towers and of 'alignment' (adapters need their tower: `fresh_lora`)."""
    towers = tuple(part for part in parts if part != "alignment")
    tree = model.init(rng, towers)
    if "alignment" in parts:
        tree["alignment"] = fresh_alignment(jax.random.fold_in(rng, 1000), config)
    return tree


def fresh_lora(config: Mapping[str, Any], rng: jax.Array, name: str, tower: Tree) -> Tree:
    """A fresh adapter of the tower `name`, whose parameters (or shapes) are `tower`."""
    index = ("vlm", "mmdit").index(name)
    return _lora_tower(jax.random.fold_in(rng, 2000 + index), config, tower)


def stage_parts(config: Mapping[str, Any]) -> dict[str, str]:
    """{part: origin} of the config's stage, with the alignment head where it is switched on."""
    parts = dict(stages.get(config["stage"]).parts)
    if config["alignment"]["weight"]:
        parts["alignment"] = "fresh"
    return parts


def stage_rules(config: Mapping[str, Any]) -> tuple[stages.Rule, ...]:
    """The config's rules, with one for the alignment head where it is switched on."""
    rules = tuple((pattern, word) for pattern, word in config["rules"])
    if config["alignment"]["weight"]:
        rules += ((r"alignment/.*", stages.TRAIN),)
    return rules


def abstract_params(model: QueryKontext, config: Mapping[str, Any]) -> Tree:
    """Boxed shapes of every parameter of the config's stage, in the dtypes they are held in."""
    towers = model.abstract()
    tree: Tree = {}
    for part in stage_parts(config):
        if part.startswith("lora/"):
            tower = part.removeprefix("lora/")
            tree.setdefault("lora", {})[tower] = _boxed_lora(config, towers[tower])
        elif part == "alignment":
            shape = jax.eval_shape(lambda: fresh_alignment(jax.random.key(0), config))
            box = LogicallyPartitioned(shape["proj"]["kernel"], ("embed", None))
            tree["alignment"] = {"proj": {"kernel": box}}
        else:
            tree[part] = towers[part]
    return _with_dtypes(tree, config)


def _with_dtypes(tree: Tree, config: Mapping[str, Any]) -> Tree:
    """Frozen leaves in dtype.frozen, trained ones in float32."""
    frozen_dtype = config_lib.dtype(config["dtype"]["frozen"])
    flat = traverse_util.flatten_dict(tree, sep="/")
    fate = stages.by_rule(list(flat), stage_rules(config), "rules")
    held = {}
    for name, box in flat.items():
        kind = jnp.float32 if fate[name] == stages.TRAIN else frozen_dtype
        held[name] = box.replace_boxed(jax.ShapeDtypeStruct(box.value.shape, kind))
    return traverse_util.unflatten_dict(held, sep="/")


def held(boxed: Tree, config: Mapping[str, Any], mesh: Mesh) -> Tree:
    """NamedShardings of all parameters between steps: trained ones lie by the column 'optimizer',
    frozen ones by 'params'."""
    rows, rules = sharding.tables(config["sharding"]), stage_rules(config)
    trained, frozen = stages.split(boxed, rules)
    return stages.join(
        sharding.shardings(trained, sharding.column(rows, "optimizer"), mesh),
        sharding.shardings(frozen, sharding.column(rows, "params"), mesh),
    )


class Layout:
    """Shapes and shardings of all trees of one run; computed before anything is allocated.

    Attributes:
      boxed: all parameters, with logical axes.
      params, frozen: ShapeDtypeStructs with shardings, of the trained leaves as they lie between
        steps and of the frozen ones.
      shardings: NamedShardings of all parameters between steps (one tree).
      weights: NamedShardings of the trained leaves where a step computes (column 'params').
      gradients: NamedShardings of their gradients.
      unsharded: largest share, over the columns, of shardable bytes that are whole everywhere.
    """

    def __init__(self, model: QueryKontext, config: Mapping[str, Any], mesh: Mesh):
        """Raises InputError when rules or shardings do not fit (`stages`, `sharding`)."""
        rows, rules = sharding.tables(config["sharding"]), stage_rules(config)
        self.mesh = mesh
        self.boxed = abstract_params(model, config)
        self.shardings = held(self.boxed, config, mesh)
        trained, frozen = stages.split(self.boxed, rules)
        self.weights, self.gradients = (
            sharding.shardings(trained, sharding.column(rows, name), mesh)
            for name in ("params", "gradients")
        )
        judged = [(trained, name) for name in sharding.COLUMNS]
        self.unsharded = max(
            sharding.check_sharded(tree, rows, name, mesh, config["sharding_limit"])
            for tree, name in [*judged, (frozen, "params")]
        )
        placed = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            meta.unbox(self.boxed),
            self.shardings,
        )
        self.params, self.frozen = stages.split(placed, rules)

    def state(self, config: Mapping[str, Any], tx: optax.GradientTransformation) -> TrainState:
        """The abstract TrainState; moments and averages lie where their parameters lie, with
        optimizer.offload in the memory of the host that these devices belong to."""
        kind = "pinned_host" if config["optimizer"]["offload"] else None

        def beside(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            place = like.sharding.with_memory_kind(kind) if kind else like.sharding
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        one = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(self.mesh))
        shapes = jax.eval_shape(tx.init, self.params)
        opt_state = optax.tree_utils.tree_map_params(
            tx,
            beside,
            shapes,
            self.params,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding.replicated(self.mesh)
            ),
        )
        ema = jax.tree.map(beside, self.params, self.params) if config["optimizer"]["ema"] else {}
        return TrainState(step=one, params=self.params, opt_state=opt_state, ema=ema)


def create(params: Tree, tx: optax.GradientTransformation, target: TrainState) -> TrainState:
    """The state before the first step, in the shardings of `target`; consumes `params`."""

    def make(params: Tree) -> TrainState:
        ema = jax.tree.map(jnp.copy, params) if target.ema else {}
        return TrainState(jnp.int32(0), params, tx.init(params), ema)

    out = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(make, donate_argnums=0, out_shardings=out)(params)


def build_optimizer(config: Mapping[str, Any], layout: Layout) -> optimizer.Optimizer:
    """AdamW for the trained leaves of `layout`."""
    return optimizer.build(config["optimizer"], layout.params, config["steps"])
