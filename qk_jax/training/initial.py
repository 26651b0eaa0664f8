"""Where a stage starts from: pretrained folders, the stage before, fresh parts; and loading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from flax.core import meta
from jax.sharding import Mesh, SingleDeviceSharding

from qk_jax import hub, sharding
from qk_jax.convert import leaves, safetensors_io, torch_import, torch_lora
from qk_jax.errors import InputError
from qk_jax.models import lora
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training import checkpoint, stages
from qk_jax.training import config as config_lib
from qk_jax.training import state as state_lib

log = logging.getLogger(__name__)
Tree = dict[str, Any]
CHECKPOINTS, FROZEN, TOKENIZER = "checkpoints", "frozen", "tokenizer"


class Loaded(NamedTuple):
    """A trained model: the module, its parameters (one tree), its config, step, git revision."""

    model: QueryKontext
    params: Tree
    config: dict[str, Any]
    step: int
    revision: str


def check_fits(found: checkpoint.Meta, config: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Raises InputError unless a checkpoint is of the config's stage and sizes."""
    if found["stage"] != config["stage"]:
        raise InputError(
            f"{folder} is a checkpoint of stage {found['stage']!r}, the config is of stage "
            f"{config['stage']!r}; use another --workdir or the matching config"
        )
    check_same_model(found, config, folder, ("model", "lora"))


def check_same_model(
    found: checkpoint.Meta,
    config: Mapping[str, Any],
    folder: pathlib.Path,
    sections: tuple[str, ...],
) -> None:
    """Raises InputError when the named config sections differ; names sizes and first field."""
    ours = _plain(config)
    for section in sections:
        changed = config_lib.differences(found["config"][section], ours[section])
        changed = [line for line in changed if not line.startswith("remat:")]
        if changed:
            raise InputError(
                f"{folder} is a checkpoint of size {found['config']['size']!r}, the config is of "
                f"size {config['size']!r}: {section}.{changed[0]}; use the matching config or "
                "another --workdir"
            )


def _plain(config: Any) -> dict[str, Any]:
    """A config as JSON would have it (lists for tuples)."""
    return json.loads(config_lib.to_json(config)) if hasattr(config, "to_dict") else dict(config)


def _read(folder: pathlib.Path, mesh: Mesh | None, ema: bool, step: int | None = None) -> Loaded:
    """All parameters of a stage folder; over `mesh` by the saved config's tables, or on one device.

    Raises:
      InputError: not a stage folder, damaged, or incomplete.
    """
    store = checkpoint.Store(folder / CHECKPOINTS, write=False)
    first = SingleDeviceSharding(jax.devices()[0])
    placed: dict[str, Any] = {}

    def place(name: str) -> Any:
        return placed.get(name, first)

    def targets(found: checkpoint.Meta) -> checkpoint.Trees:
        if mesh is not None:
            model = state_lib.build_model(found["config"])
            boxed = state_lib.abstract_params(model, found["config"])
            tree = state_lib.held(boxed, found["config"], mesh)
            placed.update(traverse_util.flatten_dict(tree, sep="/"))
        item = "ema" if ema and "ema" in found["leaves"] else "params"
        return {item: checkpoint.abstract(found, item, place)}

    got = store.restore(targets, step)
    store.close()
    (trained,) = got.items.values()
    frozen = read_frozen(folder, got.meta, lambda m: checkpoint.abstract(m, FROZEN, place))
    model = state_lib.build_model(got.meta["config"])
    params, config = stages.join(trained, frozen), got.meta["config"]
    if (folder / TOKENIZER).is_dir():  # the one that it was trained with, wherever that came from
        config["data"]["tokenizer"] = str(folder / TOKENIZER)
    return Loaded(model, params, config, got.step, got.meta["revision"])


def keep_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    """Writes the tokenizer into a stage folder, which so needs no other; once."""
    if jax.process_index() == 0 and not (folder / TOKENIZER).is_dir():
        with safetensors_io.fresh_folder(folder / TOKENIZER, "tokenizer.json") as part:
            tokenizer.save_pretrained(str(part))


def load(
    folder: str | pathlib.Path,
    *,
    step: int | None = None,
    ema: bool = True,
    mesh: Mesh | None = None,
) -> Loaded:
    """The model of a stage folder (W/stage3) for painting, evaluation or export.

    Args:
      folder: what the trainer wrote, `checkpoints/` and `frozen/` inside.
      step: default the newest that is whole.
      ema: take the moving average where the stage kept one.
      mesh: over which the parameters are laid by the config's tables; None for one device.

    Raises:
      InputError: no such folder, no whole step, or a part is missing.
    """
    folder = pathlib.Path(folder)
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder} holds no {CHECKPOINTS}/; give the folder of a stage, W/stage3")
    return _read(folder, mesh, ema, step)


def read_frozen(folder: pathlib.Path, found: checkpoint.Meta, target: Any) -> Tree:
    """The frozen tree beside a checkpoint, checked against the digest the checkpoint names.

    Raises:
      InputError: it is missing, damaged, or another than the checkpoint was trained with.
    """
    store = checkpoint.Store(folder / FROZEN, write=False)
    got = store.restore(lambda m: {FROZEN: target(m)})
    store.close()
    if fingerprint(got.meta) != found["frozen"]:
        raise InputError(
            f"{folder / FROZEN} holds other parameters than its checkpoints were trained with; "
            "restore it from a copy"
        )
    return got.items[FROZEN]


def metadata(config: Mapping[str, Any]) -> checkpoint.Meta:
    """What every checkpoint says of its run."""
    return {
        "stage": config["stage"],
        "size": config["size"],
        "config": _plain(config),
        "revision": checkpoint.revision(),
    }


def save_frozen(folder: pathlib.Path, frozen: Tree, config: Mapping[str, Any]) -> str:
    """Writes the frozen tree of a stage, once; waits for it and returns its fingerprint."""
    store = checkpoint.Store(folder / FROZEN)
    store.save(0, {FROZEN: frozen}, metadata(config))
    store.close()
    return fingerprint({"leaves": {FROZEN: checkpoint.describe(frozen)}})


def fingerprint(found: checkpoint.Meta) -> str:
    """One word for all leaves of a saved frozen tree."""
    text = json.dumps(found["leaves"][FROZEN], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pretrained(part: str, config: Mapping[str, Any], model: QueryKontext) -> Tree:
    """Parameters of public weights or of an import, still on disk: `_placed` reads the shares.

    Raises:
      InputError: the model is missing or its architecture is not the config's.
    """
    folder = config["init"][part]
    found = torch_import.open_part(part, hub.component_folder(folder, part))
    wanted = getattr(model.config, part)
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
    return traverse_util.unflatten_dict(found.flat, sep="/")


def _adapter(config: Mapping[str, Any], model: QueryKontext) -> Tree:
    """The adapter of the generator that `init.lora` names, as the config's rank and alpha have it.

    Raises:
      InputError: it is missing, of another generator, or of another rank.
    """
    path, rank = config["init"]["lora"], config["lora"]["rank"]
    shapes = torch_import.mmdit_shapes(model.config.mmdit)
    adapter, found = torch_lora.import_lora(hub.model_folder(path), shapes)
    if found != rank:
        raise InputError(f"{path} is of rank {found}; set config.lora.rank={found}")
    # The file's own alpha is folded into it; what the model multiplies by is taken out again.
    return lora.scaled(adapter, 1 / model.config.lora_scale)


def _carried(config: Mapping[str, Any], workdir: pathlib.Path, mesh: Mesh) -> Loaded:
    """The stage before, sharded over `mesh`.

    Raises:
      InputError: it is missing, of another stage, or of another VLM, VAE or context size.
    """
    stage = stages.get(config["stage"])
    folder = pathlib.Path(config["init"]["checkpoint"] or workdir / stage.previous)
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(
            f"stage {stage.name} starts from {stage.previous}, but {folder} holds no checkpoint; "
            f"train {stage.previous} first or set init.checkpoint"
        )
    got = _read(folder, mesh, config["init"]["ema"])
    if got.config["stage"] != stage.previous:
        raise InputError(
            f"{folder} is a checkpoint of stage {got.config['stage']!r}; stage {stage.name} "
            f"starts from {stage.previous}"
        )
    log.info("starting from %s step %d", folder, got.step)
    return got


def _same_tower(part: str, got: Loaded, model: QueryKontext) -> None:
    """Raises InputError when a part carried over has another architecture than the config's."""
    old, new = got.model.config, model.config
    pairs = {
        "vlm": (old.vlm, new.vlm),
        "vae": (old.vae, new.vae),
        "mmdit": (old.mmdit, new.mmdit),
        "queries": (old.num_queries, new.num_queries),
        "connector": (old.mmdit.joint_attention_dim, new.mmdit.joint_attention_dim),
    }
    if part in pairs and pairs[part][0] != pairs[part][1]:
        raise InputError(
            f"{part} of the stage before (size {got.config['size']!r}) is {pairs[part][0]!r:.200}, "
            f"the config's is {pairs[part][1]!r:.200}; the sizes must agree"
        )


def parameters(
    model: QueryKontext, config: Mapping[str, Any], layout: state_lib.Layout, workdir: pathlib.Path
) -> Tree:
    """All parameters at the start of the config's stage, in their dtypes and shardings.

    Raises:
      InputError: a folder or the stage before is missing or does not fit; a leaf would be missing.
    """
    parts = state_lib.stage_parts(config)
    rng = jax.random.fold_in(jax.random.key(config["seed"]), 2**31 - 1)
    got = None
    if any(origin in ("previous", "merged") for origin in parts.values()):
        got = _carried(config, workdir, layout.mesh)
    flat: dict[str, Any] = {}

    def take(prefix: str, tree: Tree) -> None:
        flat.update(traverse_util.flatten_dict({prefix: tree}, sep="/"))

    for part, origin in parts.items():
        if origin == "pretrained" and config["init"][part]:
            take(part, _pretrained(part, config, model))
        elif part == "lora/mmdit" and origin == "fresh" and config["init"]["lora"]:
            take(part, _adapter(config, model))
        elif origin == "previous":
            _same_tower(part, got, model)
            tree = got.params
            for key in part.split("/"):
                tree = tree[key]
            take(part, tree)
        elif origin == "merged":
            _same_tower(part, got, model)
            adapter = got.params["lora"][part]
            scale = got.model.config.lora_scale
            take(part, jax.jit(lora.merge, static_argnums=2)(got.params[part], adapter, scale))
    flat |= _fresh(model, config, layout, rng, set(flat))
    return _placed(flat, layout)


def untrained(config: Mapping[str, Any]) -> Loaded:
    """The model of a first stage before any step, on one device: what training is measured against.

    Raises:
      InputError: as `parameters`.
    """
    mesh = sharding.build_mesh({}, devices=jax.devices()[:1])
    model = state_lib.build_model(config)
    layout = state_lib.Layout(model, config, mesh)
    params = parameters(model, config, layout, pathlib.Path())
    return Loaded(model, params, _plain(config), 0, checkpoint.revision())


def _fresh(
    model: QueryKontext,
    config: Mapping[str, Any],
    layout: state_lib.Layout,
    rng: jax.Array,
    given: set[str],
) -> dict[str, Any]:
    """Fresh leaves of every part of which nothing is given, born in their shardings."""
    places = traverse_util.flatten_dict(layout.shardings, sep="/")
    absent = {name: place for name, place in places.items() if name not in given}
    heads = {name.split("/")[0] for name in given}
    parts = tuple(p for p in state_lib.stage_parts(config) if p not in heads and "/" not in p)
    towers = [p.removeprefix("lora/") for p in state_lib.stage_parts(config) if "/" in p]
    shapes = meta.unbox(layout.boxed)

    def make() -> dict[str, Any]:
        tree = state_lib.fresh(model, config, rng, parts)
        for tower in towers:
            adapter = state_lib.fresh_lora(config, rng, tower, shapes[tower])
            tree.setdefault("lora", {})[tower] = adapter
        flat = traverse_util.flatten_dict(tree, sep="/")
        return {name: flat[name] for name in absent if name in flat}

    born = jax.eval_shape(make)
    return jax.jit(make, out_shardings={name: absent[name] for name in born})()


def _placed(flat: dict[str, Any], layout: state_lib.Layout) -> Tree:
    """Casts and places every leaf as the layout has it.

    Raises:
      InputError: a leaf is missing, unknown or of another shape.
    """
    wanted = traverse_util.flatten_dict(stages.join(layout.params, layout.frozen), sep="/")
    missing, extra = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
    if missing or extra:
        word, names = ("lack", missing) if missing else ("have unknown", extra)
        raise InputError(f"the initial parameters {word} {names[0]} ({len(names)} in all)")
    out = {}
    for name, like in wanted.items():
        value = flat.pop(name)
        if tuple(value.shape) != tuple(like.shape):
            raise InputError(
                f"parameter {name} has shape {value.shape}, the config wants {like.shape}"
            )
        out[name] = leaves.place(value, like.sharding, like.dtype)
    return traverse_util.unflatten_dict(out, sep="/")
