"""Where a run begins: at its newest whole checkpoint, or as its stage starts.

A stage starts from pretrained folders, the stage before, and fresh parts, as its table of parts
says (`experiment.stages`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base import files, hub, trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.checkpoints import run_folder
from qk_jax.checkpoints.run_folder import Loaded
from qk_jax.checkpoints.store import Meta, Restored, Store, Trees
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import origins, stages, train_state
from qk_jax.experiment import plan as plan_lib
from qk_jax.experiment.plan import Plan
from qk_jax.experiment.train_state import TrainState
from qk_jax.models import lora
from qk_jax.weights import leaves, lora_files
from qk_jax.weights.read import open_part, shapes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """What a run goes on from.

    Attributes:
      state: everything that steps change.
      frozen: the frozen tree.
      fingerprint: of the frozen tree; every checkpoint names it.
      window: `metrics.Window.state` of steps that no line of the log has yet.
      spikes: what `spikes.Detector` goes on from.
    """

    state: TrainState
    frozen: Tree
    fingerprint: str
    window: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spikes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check(config: ConfigDict, workdir: files.PathLike) -> None:
    """Raises InputError when a stage that is still to start has a part without an origin.

    Nothing is built or read; a stage that goes on needs no origins.
    """
    if not run_folder.is_begun(files.Path(workdir) / config.stage):
        origins.places(stages.resolve(config), config)


def inherit(config: ConfigDict, workdir: files.PathLike) -> None:
    """What a config does not name and this stage, where it is begun, or the stage before knows: the
    tokenizer, and the published autoencoder, whose layers for videos an export takes from there."""
    own, previous = files.Path(workdir) / config.stage, stages.get(config.stage).previous
    known = [own] if run_folder.is_begun(own) else []  # needs the stage before no more
    if previous:
        known.append(files.Path(config.init.checkpoint or files.Path(workdir) / previous))
    for folder in known:
        tokenizer = folder / run_folder.TOKENIZER
        named = config.data.tokenizer or config.init.vlm not in ("", origins.FRESH)
        if not named and tokenizer.is_dir():
            config.data.tokenizer = str(tokenizer)
        if previous and not config.init.vae and (folder / run_folder.CONFIG).is_file():
            config.init.vae = files.read_json(folder / run_folder.CONFIG)["init"]["vae"]


def restore_or_start(plan: Plan, folder: files.Path, store: Store) -> Start:
    """Resumes from the newest whole checkpoint of `store`, or starts the stage where there is none.

    Raises:
      InputError: checkpoints exist but none is whole, or they are of another stage or size; or
        what the stage starts from is missing or does not fit.
    """
    if not store.is_new():
        return _restore(plan, folder, store)
    run_folder.drop_frozen(folder)
    trained, frozen = trees.split(parameters(plan, folder.parent), plan.stage.rules)
    fingerprint = run_folder.save_frozen(folder, frozen, plan)
    return Start(train_state.create(trained, plan.optimizer.tx, plan.state), frozen, fingerprint)


def _restore(plan: Plan, folder: files.Path, store: Store) -> Start:
    """What the newest whole checkpoint holds."""
    state, got = read_state(plan, store)
    ours = config_lib.to_dict(plan.config)
    for line in config_lib.differences(got.meta["config"], ours):
        log.warning("config differs from the checkpoint's: %s", line)
    for line in describe(plan, dict.fromkeys(plan.stage.parts, f"{folder.name} step {got.step}")):
        log.info("%s", line)
    frozen = _frozen_again(got.meta, plan, folder)
    log.info("resuming %s after step %d", folder, got.step)
    window, known = got.meta.get("window", {}), got.meta.get("spikes", {})
    return Start(state, frozen, got.meta["frozen"], window, known)


def read_state(plan: Plan, store: Store, step: int | None = None) -> tuple[TrainState, Restored]:
    """The state of a checkpoint, the newest whole one by default, in the plan's shardings.

    Raises:
      InputError: as `Store.restore`, or it is of another stage or size.
    """
    target = plan.state
    items = {"params": target.params, "optimizer": target.opt_state}
    if target.ema:
        items["ema"] = target.ema

    def wanted(found: Meta) -> Trees:
        run_folder.check_fits(found, plan, store.root)
        return items

    got = store.restore(wanted, step)
    state = TrainState(
        step=jax.device_put(np.int32(got.step), plan.replicated),
        params=got.items["params"],
        opt_state=got.items["optimizer"],
        ema=got.items.get("ema", {}),
    )
    return state, got


def _frozen_again(found: Meta, plan: Plan, folder: files.Path) -> Tree:
    """The frozen tree of a resumed run: from disk, or made again from where the stage started.

    Raises:
      InputError: it is lost on disk and what it was made from is gone or has changed.
    """
    try:
        return run_folder.read_frozen(folder, found, plan)
    except InputError as error:
        log.warning("%s; making it again", error)
    again = dataclasses.replace(plan, config=_as_begun(found, plan))
    frozen = trees.split(parameters(again, folder.parent), plan.stage.rules)[1]
    if run_folder.fingerprint_of(frozen) != found["frozen"]:
        raise InputError(
            f"{folder / run_folder.FROZEN} cannot be used, and config.init no longer gives the "
            "same parameters; restore the folder from a copy"
        )
    run_folder.drop_frozen(folder)  # only now that it can be written anew
    run_folder.save_frozen(folder, frozen, plan)
    return frozen


def _as_begun(found: Meta, plan: Plan) -> ConfigDict:
    """The plan's config with the choices of `init` that a checkpoint's run was started with.

    Folders are those of the plan, since they may have moved. Before there was the word `fresh`,
    an empty folder meant it, and no stage before was refused.
    """
    config, begun = plan.config.copy_and_resolve_references(), found["config"]["init"]
    config.init.update(ema=begun["ema"], unfinished=True)
    for part, origin in plan.stage.parts.items():
        if origin == "pretrained" and begun[part] in ("", origins.FRESH):
            config.init[part] = origins.FRESH
    return config


def parameters(plan: Plan, workdir: files.PathLike, only: Collection[str] | None = None) -> Tree:
    """All parameters at the start of the plan's stage, in their dtypes and shardings.

    Args:
      plan: of the stage.
      workdir: where the folder of the stage before is.
      only: these parts of them.

    Raises:
      InputError: a part has no origin; a folder or the stage before is missing or does not fit; a
        leaf would be missing.
    """
    parts = {k: x for k, x in plan.stage.parts.items() if only is None or k in only}
    places = {k: x for k, x in origins.places(plan.stage, plan.config).items() if k in parts}
    before = None
    if any(origin in ("previous", "merged") for origin in parts.values()):
        before = _stage_before(plan, files.Path(workdir))
    words = dict.fromkeys(parts, origins.FRESH) | places
    for part, origin in parts.items():
        if before is not None and origin in ("previous", "merged"):
            words[part] = _words(part, origin, before)
    for line in describe(plan, words):
        log.info("%s", line)
    flat: Tree = {}
    for part, origin in parts.items():
        if part in places:
            read = _adapter if part == "lora/mmdit" else _pretrained
            flat |= _under(part, read(part, places[part], plan))
        elif before is not None and origin in ("previous", "merged"):
            _check_same_architecture(part, before.plan, plan)
            flat |= _under(part, _inherited(part, origin, before))
    fresh = tuple(part for part, word in words.items() if word == origins.FRESH)
    flat |= _fresh(plan, fresh)
    target = plan.everything if only is None else {part: plan.everything[part] for part in parts}
    return _in_shardings(flat, target, words)


def describe(plan: Plan, words: Mapping[str, str]) -> Iterator[str]:
    """A line for each part: parameters, dtype, trained or frozen, and where it comes from.

    Args:
      plan: of the run.
      words: {part: its origin}.
    """
    trained, frozen = trees.flatten(plan.params), trees.flatten(plan.frozen)
    width = max(map(len, words))
    for part in words:
        mine = [
            {name: leaf for name, leaf in tree.items() if name.startswith(f"{part}/")}
            for tree in (trained, frozen)
        ]
        counts = [sum(math.prod(leaf.shape) for leaf in tree.values()) for tree in mine]
        dtypes = sorted({str(leaf.dtype) for tree in mine for leaf in tree.values()})
        fate = "trained" if not counts[1] else "frozen" if not counts[0] else "in part"
        yield (
            f"{part:<{width}} {sum(counts):>14,} parameters  {'+'.join(dtypes):<8}  {fate:<7}  "
            f"{words[part]}"
        )


def _words(part: str, origin: str, before: Loaded) -> str:
    """Where a part of the stage before comes from: 'stage1 step 250 (moving average)'."""
    names = (f"{part}/", f"lora/{part}/") if origin == "merged" else (f"{part}/",)
    moved = any(name.startswith(names) for name in trees.flatten(before.plan.params))
    return (
        f"{before.plan.stage.name} step {before.step}"
        + (f" ({before.average})" if moved and before.average else "")
        + (", its adapter merged in" if origin == "merged" else "")
    )


def untrained(config: ConfigDict) -> Loaded:
    """The model of a first stage before any step, on one device: what training is measured against.

    Raises:
      InputError: as `parameters`.
    """
    mesh = sharding.build_mesh({}, devices=jax.devices()[:1])
    plan = Plan.build(config, mesh, check=False)
    return Loaded(plan, parameters(plan, ""), 0, run_folder.metadata(plan)["revision"])


def _under(prefix: str, tree: Tree) -> Tree:
    """{'prefix/a/b/c': leaf}."""
    return trees.flatten({prefix: tree})


def _pretrained(part: str, folder: str, plan: Plan) -> Tree:
    """Parameters of public weights, still on disk: `_in_shardings` reads each device's share.

    Raises:
      InputError: the model is missing or its architecture is not the config's.
    """
    found = open_part(part, hub.component_folder(folder, part))
    wanted = getattr(plan.model.config, part)
    if type(found.config) is not type(wanted):
        name = type(found.config).__name__
        raise InputError(f"{folder} holds a {name}, config wants {wanted!r:.60}")
    for field in dataclasses.fields(wanted):
        a, b = getattr(found.config, field.name), getattr(wanted, field.name)
        if a != b:
            raise InputError(
                f"{folder} has {field.name} = {a}, the config's model.{part} has {b}; use weights "
                "of that size, or set the field"
            )
    return trees.unflatten(found.flat)


def _adapter(part: str, path: str, plan: Plan) -> Tree:
    """The adapter of the MMDiT in `path`, at the config's rank and alpha.

    Raises:
      InputError: it is missing, of another MMDiT, or of another rank.
    """
    del part  # there is one kind
    rank = plan.config.lora.rank
    wanted = shapes(plan.model.config.mmdit)
    adapter, found = lora_files.import_lora(hub.model_folder(path), wanted)
    if found != rank:
        raise InputError(f"{path} is of rank {found}; set config.lora.rank={found}")
    # The file's own alpha is folded into it; what the model multiplies by is taken out again.
    return lora.scaled(adapter, 1 / plan.model.config.lora_scale)


def _stage_before(plan: Plan, workdir: files.Path) -> Loaded:
    """The stage before, sharded over the plan's mesh.

    Raises:
      InputError: it is missing, of another stage, or has not taken its last step.
    """
    stage, init = plan.stage, plan.config.init
    folder = files.Path(init.checkpoint or workdir / stage.previous)
    if not (folder / run_folder.CHECKPOINTS).is_dir():
        raise InputError(
            f"stage {stage.name} starts from {stage.previous}, but {folder} holds no checkpoint; "
            f"train {stage.previous} first or set init.checkpoint"
        )

    def check(found: Meta) -> None:
        if found["stage"] != stage.previous:
            raise InputError(
                f"{folder} is a checkpoint of stage {found['stage']!r}; stage {stage.name} "
                f"starts from {stage.previous}"
            )
        step, steps = found["step"], found["config"]["steps"]
        if step < steps and not init.unfinished:
            raise InputError(
                f"{folder} stopped at step {step} of {steps}; finish {stage.previous} by the "
                f"command that began it, or start {stage.name} from step {step} with "
                "--config.init.unfinished=true"
            )

    return run_folder.load(folder, ema=init.ema, mesh=plan.mesh, check=check)


def _check_same_architecture(part: str, before: Plan, plan: Plan) -> None:
    """Raises InputError when a part of the stage before has another architecture."""
    old, new = before.model.config, plan.model.config
    pairs = {
        "vlm": (old.vlm, new.vlm),
        "vae": (old.vae, new.vae),
        "mmdit": (old.mmdit, new.mmdit),
        "queries": tuple(
            {
                "num_queries": x.num_queries,
                "query_noise": x.query_noise,
                "bidirectional_queries": x.bidirectional_queries,
            }
            for x in (old, new)
        ),
        "connector": tuple(
            {"joint_attention_dim": x.mmdit.joint_attention_dim, "vlm_layers": x.vlm_layers}
            for x in (old, new)
        ),
    }
    if part in pairs and pairs[part][0] != pairs[part][1]:
        raise InputError(
            f"{part} of the stage before (size {before.config.size!r}) is {pairs[part][0]!r:.200}, "
            f"the config's is {pairs[part][1]!r:.200}; the sizes must agree"
        )


def _inherited(part: str, origin: str, before: Loaded) -> Tree:
    """A part of the stage before, with its adapter merged in where the stage's table says so."""
    tree = before.params
    for key in part.split("/"):
        tree = tree[key]
    if origin == "previous":
        return tree
    scale = before.plan.model.config.lora_scale
    merge = jax.jit(lora.merge, static_argnums=2)
    return merge(tree, before.params["lora"][part], scale)


def _fresh(plan: Plan, parts: tuple[str, ...]) -> Tree:
    """Fresh leaves of whole parts, flat, born in their shardings."""
    rng = jax.random.fold_in(jax.random.key(plan.config.seed), 2**31 - 1)
    shardings = trees.flatten(trees.shardings(plan.everything))

    def make() -> Tree:
        return trees.flatten(plan_lib.fresh(plan, rng, parts))

    born = jax.eval_shape(make)
    return jax.jit(make, out_shardings={name: shardings[name] for name in born})()


def _in_shardings(flat: dict[str, Any], target: Tree, words: Mapping[str, str]) -> Tree:
    """Every leaf in the dtype and the sharding of `target`; consumes `flat`.

    Raises:
      InputError: a leaf is missing, unknown or of another shape; names it and, from `words`, where
        its part comes from.
    """
    wanted = trees.flatten(target)
    missing, extra = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
    if missing or extra:
        word, names = ("lacks", missing) if missing else ("has besides", extra)
        part = next(part for part in words if names[0].startswith(f"{part}/"))
        hint = "; set lora.pattern to what it adapts" if part.startswith("lora/") else ""
        raise InputError(
            f"{part} from {words[part]} {word} {names[0]} ({len(names)} in all), and nothing of "
            f"it is drawn at random{hint}"
        )
    out = {}
    for name, like in wanted.items():
        value = flat.pop(name)
        if tuple(value.shape) != tuple(like.shape):
            raise InputError(
                f"parameter {name} has shape {value.shape}, the config wants {like.shape}"
            )
        out[name] = leaves.shard(value, like.sharding, like.dtype)
    return trees.unflatten(out)
