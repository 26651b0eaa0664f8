"""`Plan`: everything of a run that needs no array, resolved once from its config.

A plan goes where (model, config, shardings, optimizer) would go separately: functions take the plan
and arrays. Building one allocates nothing, so that the real sizes are planned on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen import LogicallyPartitioned
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base import runtime, trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.data import batch_sizes, prompts, settings
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import optimizer, stages, train_state
from qk_jax.experiment.train_state import TrainState
from qk_jax.models import lora
from qk_jax.models.query_kontext import QueryKontext

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A run without its arrays.

    Attributes:
      config: of the run, locked.
      stage: its stage; `stage.parts` and `stage.rules` with the alignment head where it is on.
      model: modules and configs of the towers.
      mesh: of the devices, which need not be here.
      boxed: abstract parameters of the whole stage with their logical axes.
      params: ShapeDtypeStructs of the trained leaves, float32, sharded as they are between steps.
      frozen: ShapeDtypeStructs of the frozen leaves, in dtype.frozen.
      weights: NamedShardings of the trained leaves where a step computes (column 'params').
      gradients: NamedShardings of their gradients.
    """

    config: ConfigDict
    stage: stages.Stage
    model: QueryKontext
    mesh: Mesh
    boxed: Tree
    params: Tree
    frozen: Tree
    weights: Tree
    gradients: Tree

    @classmethod
    def build(
        cls, config: ConfigDict, mesh: sharding.AnyMesh | None = None, *, check: bool = True
    ) -> Plan:
        """Resolves a config.

        Args:
          config: of `config.load`, or of a checkpoint (`config.from_dict`).
          mesh: None for the config's own, over all devices.
          check: False for a model that is only read: neither its batch nor how much of it is
            sharded matters then.

        Raises:
          InputError: stage, rules, sharding tables, optimizer or batch do not fit; names the
            field or the parameter.
        """
        if mesh is None:
            mesh = sharding.build_mesh(config.mesh, slices=config.slices)
        stage = stages.resolve(config)
        model = build_model(config)
        boxed = _abstract_params(model, config, stage)
        tables = sharding.tables(config.sharding)
        trained, frozen = trees.split(boxed, stage.rules)

        def column(tree: Tree, name: str) -> Tree:
            return sharding.shardings(tree, sharding.column(tables, name), mesh)

        plan = cls(
            config=config,
            stage=stage,
            model=model,
            mesh=cast(Mesh, mesh),  # an abstract one serves until something is compiled
            boxed=boxed,
            params=_sharded(trained, column(trained, "optimizer")),
            frozen=_sharded(frozen, column(frozen, "params")),
            weights=column(trained, "params"),
            gradients=column(trained, "gradients"),
        )
        if check:
            plan.check()
        return plan

    def check(self) -> None:
        """Raises InputError when the data section cannot be used, or when batch, optimizer or
        shardings do not fit the mesh."""
        settings.check(self.config)
        for batch in self.batch_sizes.all():
            check_step(batch, self.config, self.mesh)
        _ = self.replicated_share, self.state  # both check what they are made of

    def check_batch(self, examples: int) -> None:
        """Raises InputError when so many examples do not divide over the mesh."""
        sharding.check_batch(examples, self.mesh, sharding.tables(self.config.sharding))

    def fitting_batch(self, examples: int) -> int:
        """The least number of slots for so many examples that divides over the mesh."""
        return sharding.fitting_batch(examples, self.mesh, sharding.tables(self.config.sharding))

    @functools.cached_property
    def replicated_share(self) -> float:
        """Largest share, over the sharding columns, of shardable bytes that every device holds.

        Raises:
          InputError: it is above config.sharding_limit; names the largest parameter.
        """
        tables = sharding.tables(self.config.sharding)
        trained, frozen = trees.split(self.boxed, self.stage.rules)
        judged = [(trained, column) for column in sharding.COLUMNS] + [(frozen, "params")]
        return max(
            sharding.check_sharded(tree, tables, column, self.mesh, self.config.sharding_limit)
            for tree, column in judged
        )

    @functools.cached_property
    def optimizer(self) -> optimizer.Optimizer:
        """AdamW for the trained leaves, and its learning rate by step."""
        return optimizer.build(self.config.optimizer, self.params, self.config.steps)

    @functools.cached_property
    def state(self) -> TrainState:
        """The abstract state of the training, with shardings."""
        section = self.config.optimizer
        return train_state.abstract(
            self.params,
            self.optimizer.tx,
            ema=bool(section.ema),
            offload=section.offload,
            replicated=self.replicated,
        )

    @functools.cached_property
    def batch_sizes(self) -> batch_sizes.BatchSizes:
        """Examples of a training batch. Raises InputError where config.data.tokens is too small."""
        if not self.config.data.get("tokens", 0):
            return batch_sizes.BatchSizes(self.config.data.batch)
        return batch_sizes.batch_sizes(self.config, self.prompts)

    @functools.cached_property
    def prompts(self) -> prompts.PromptBuilder:
        """How instruction, pictures and queries become tokens.

        Raises:
          InputError: there is no tokenizer, or it is not the VLM's.
        """
        builder, model = prompts.PromptBuilder.from_config(self.config), self.config.model
        for name, found, wanted in (
            ("tail_tokens", builder.tail_tokens, model.tail_tokens),
            ("vlm.image_token_id", builder.image_token_id, model.vlm.image_token_id),
        ):
            if found != wanted:
                raise InputError(
                    f"the tokenizer gives {name} = {found}, config.model.{name} is {wanted}; "
                    "set data.tokenizer to the VLM's tokenizer, or the field"
                )
        return builder

    @property
    def everything(self) -> Tree:
        """ShapeDtypeStructs of all parameters in one tree."""
        return trees.join(self.params, self.frozen)

    @property
    def replicated(self) -> NamedSharding:
        """One copy on every device."""
        return sharding.replicated(self.mesh)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharded over (data, fsdp) along the first dimension."""
        return sharding.batch_sharding(self.mesh)

    def compiler_options(self, *, step: bool = False) -> dict[str, Any]:
        """Options of the compiler for the devices of the mesh (`runtime.compiler_options`)."""
        platform = sharding.platform(self.mesh)
        return runtime.compiler_options(self.config.compiler, platform, step=step)

    def describe(self) -> list[str]:
        """Lines that say what is trained and frozen, rule by rule, and over which mesh."""
        sizes = {name: math.prod(x.shape) for name, x in trees.flatten(self.everything).items()}
        return [
            *stages.report(sizes, self.stage.rules),
            f"mesh {dict(self.mesh.shape)}, {100 * self.replicated_share:.1f}% of shardable bytes "
            "replicated",
        ]


def build_model(config: ConfigDict) -> QueryKontext:
    """The modules of a config in its compute dtype."""
    tables = sharding.tables(config.sharding)
    activations = {tower: columns.activations for tower, columns in tables.items()}
    dtype = config_lib.dtype(config.dtype.compute)
    return QueryKontext(config_lib.model_config(config), dtype, activations)


def fresh(plan: Plan, rng: jax.Array, parts: tuple[str, ...]) -> Tree:
    """Fresh parameters of parts of the stage: towers, 'alignment', and adapters 'lora/<tower>'.

    Each part has a key of its own, so that it does not depend on which others are fresh.
    """
    adapters = tuple(part for part in parts if part.startswith("lora/"))
    tree = plan.model.init(rng, tuple(p for p in parts if p != "alignment" and p not in adapters))
    if "alignment" in parts:
        tree["alignment"] = _fresh_alignment(jax.random.fold_in(rng, 1000), plan.config)
    shapes = meta.unbox(plan.boxed)
    for part in adapters:
        tower = part.removeprefix("lora/")
        key = jax.random.fold_in(rng, 2000 + ("vlm", "mmdit").index(tower))
        tree.setdefault("lora", {})[tower] = _fresh_lora(key, plan.config, shapes[tower])
    return tree


def _fresh_lora(rng: jax.Array, config: ConfigDict, tower: Tree) -> Tree:
    """A fresh adapter of `tower` (arrays or shapes), as the section `lora` describes it."""
    return lora.init(rng, tower, config.lora.pattern, config.lora.rank)


def _fresh_alignment(rng: jax.Array, config: ConfigDict) -> Tree:
    """The projection of the alignment term kontext -> vision features: kernel [D, D_vision]."""
    text, vision = config.model.vlm.text, config.model.vlm.vision
    shape = (text.hidden_size, vision.out_hidden_size)
    kernel = jax.random.normal(rng, shape, jnp.float32) * shape[0] ** -0.5
    return {"proj": {"kernel": kernel}}


def check_step(batch: int, config: ConfigDict, mesh: sharding.AnyMesh) -> None:
    """Raises InputError when a step of so many examples does not divide into its micro-batches, or
    one of those over the mesh."""
    count = config.optimizer.accumulation
    if count < 1 or batch % count:
        raise InputError(f"optimizer.accumulation {count} must divide the batch, {batch}")
    sharding.check_batch(batch // count, mesh, sharding.tables(config.sharding))


def _abstract_params(model: QueryKontext, config: ConfigDict, stage: stages.Stage) -> Tree:
    """Boxed shapes of every parameter of the stage, in the dtypes they are held in."""
    towers = model.abstract()
    tree: Tree = {}
    for part in stage.parts:
        if part.startswith("lora/"):
            tower = part.removeprefix("lora/")
            tree.setdefault("lora", {})[tower] = _abstract_lora(config, towers[tower])
        elif part == "alignment":
            shape = jax.eval_shape(lambda: _fresh_alignment(jax.random.key(0), config))
            box = LogicallyPartitioned(shape["proj"]["kernel"], ("embed", None))
            tree["alignment"] = {"proj": {"kernel": box}}
        else:
            tree[part] = towers[part]
    flat = trees.flatten(tree)
    fate = trees.by_rule(flat, stage.rules, "rules")
    dtypes = {trees.TRAIN: jnp.float32, trees.FREEZE: config_lib.dtype(config.dtype.frozen)}
    return trees.unflatten({
        name: box.replace_boxed(jax.ShapeDtypeStruct(box.value.shape, dtypes[fate[name]]))
        for name, box in flat.items()
    })  # fmt: skip


def _abstract_lora(config: ConfigDict, tower: Tree) -> Tree:
    """The abstract adapter of a boxed tower, with logical axes."""
    shapes = jax.eval_shape(lambda p: _fresh_lora(jax.random.key(0), config, p), meta.unbox(tower))
    axes = trees.flatten(lora.logical_axes(tower, shapes))
    leaves = trees.flatten(shapes)
    return trees.unflatten({
        name: LogicallyPartitioned(leaf, axes[name]) for name, leaf in leaves.items()
    })  # fmt: skip


def _sharded(boxed: Tree, shardings: Tree) -> Tree:
    """ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        meta.unbox(boxed),
        shardings,
    )
