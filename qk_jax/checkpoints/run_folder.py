"""The folder of a stage, <workdir>/<stage>: what is in it, and the trained model read back.

checkpoints/   steps of the trained leaves (`store`)
frozen/        the frozen leaves, once
tokenizer/     the one that the stage was trained with
config.json, metrics.jsonl, events.*, samples/
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from qk_jax import sharding
from qk_jax.base import buckets, files, runtime, trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.checkpoints.digest import describe
from qk_jax.checkpoints.store import Meta, Store, Trees
from qk_jax.data.prompts import PromptBuilder
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan

CHECKPOINTS, FROZEN, TOKENIZER, CONFIG = "checkpoints", "frozen", "tokenizer", "config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A trained model.

    Attributes:
      plan: of its config, over the mesh that it was loaded to.
      params: all parameters in one tree; the moving average where it was asked for.
      step: finished updates.
      revision: git revision of the program that trained it.
      average: of which steps the trained parameters are one, in words; '' for the last alone.
    """

    plan: Plan
    params: Tree
    step: int
    revision: str
    average: str = ""

    @property
    def name(self) -> str:
        """'stage3-tiny-800': stage, size and step."""
        return f"{self.plan.stage.name}-{self.plan.config.size}-{self.step}"


def create(workdir: files.PathLike, stage: str) -> files.Path:
    """Makes <workdir>/<stage>. Raises InputError when it cannot be written."""
    return files.writable_folder(files.Path(workdir) / stage, "the work directory")


def is_begun(folder: files.Path) -> bool:
    """Whether a stage folder has checkpoints, be they damaged."""
    found = (folder / CHECKPOINTS).glob("*")
    return any(step.name.isdigit() or step.name.startswith("damaged-") for step in found)


def load(
    folder: files.PathLike,
    *,
    step: int | None = None,
    ema: bool = True,
    mesh: Mesh | None = None,
    check: Callable[[Meta], None] = lambda meta: None,
) -> Loaded:
    """The model of a stage folder (W/stage3) for painting, evaluation, export or the next stage.

    Args:
      folder: what the trainer wrote, with `checkpoints/` and `frozen/` inside.
      step: default the newest that is whole.
      ema: take the moving average where the stage kept one.
      mesh: to shard the parameters over, by the config's own tables; None for one device.
      check: raises InputError for a step, given what it says of itself, that is not wanted; it is
        asked before any array is read.

    Raises:
      InputError: no such folder, no whole step, or a part is missing; or as `check`.
    """
    folder = files.Path(folder)
    buckets.check([str(folder)])
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder} holds no {CHECKPOINTS}/; give the folder of a stage, W/stage3")
    store = Store(folder / CHECKPOINTS, write=False)
    plans: list[Plan] = []

    def targets(found: Meta) -> Trees:
        check(found)
        plan = _plan(found, folder, mesh)
        plans[:] = [plan]
        item = "ema" if ema and "ema" in found["leaves"] else "params"
        return {item: plan.params}

    with contextlib.closing(store):
        got = store.restore(targets, step)
    (plan,), (trained,) = plans, got.items.values()
    frozen = read_frozen(folder, got.meta, plan)
    average = "moving average" if "ema" in got.items else ""
    if steps := got.meta.get("averaged"):  # by `checkpoints average`
        average = f"mean of steps {', '.join(map(str, steps))}"
    params = trees.join(trained, frozen)
    return Loaded(plan, params, got.step, got.meta["revision"], average)


def _plan(found: Meta, folder: files.Path, mesh: Mesh | None) -> Plan:
    """The plan of a checkpoint's config, with the tokenizer of the same folder."""
    config = config_lib.from_dict(found["config"])
    if (folder / TOKENIZER).is_dir():  # the one that it was trained with, wherever that came from
        config.data.tokenizer = str(folder / TOKENIZER)
    if mesh is None:
        mesh = sharding.build_mesh({}, devices=jax.devices()[:1])
    return Plan.build(config, mesh, check=False)


def read_frozen(folder: files.Path, found: Meta, plan: Plan) -> Tree:
    """The frozen tree of a stage, checked against the digest that a checkpoint names.

    Raises:
      InputError: it is missing, damaged, or not the one that the checkpoint was trained with.
    """
    with contextlib.closing(Store(folder / FROZEN, write=False)) as store:
        got = store.restore(lambda meta: {FROZEN: plan.frozen})
    if fingerprint(got.meta["leaves"][FROZEN]) != found["frozen"]:
        raise InputError(
            f"{folder / FROZEN} holds other parameters than its checkpoints were trained with; "
            "restore it from a copy"
        )
    return got.items[FROZEN]


def save_frozen(folder: files.Path, frozen: Tree, plan: Plan) -> str:
    """Writes the frozen tree of a stage, once; waits for it and returns its fingerprint."""
    store = Store(folder / FROZEN)
    store.save(0, {FROZEN: frozen}, metadata(plan))
    store.close()
    return fingerprint_of(frozen)


def fingerprint_of(frozen: Tree) -> str:
    """The `fingerprint` of arrays."""
    return fingerprint(describe(frozen))


def drop_frozen(folder: files.Path) -> None:
    """Removes a frozen tree that was left by a run without a checkpoint, or is damaged."""
    if jax.process_index() == 0:
        files.remove_folder(folder / FROZEN)
    multihost_utils.sync_global_devices("frozen/ is removed")  # before another writes it anew


def fingerprint(leaves: Meta) -> str:
    """One word for the shapes, types and digests of a tree."""
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:16]


def metadata(plan: Plan) -> Meta:
    """What every checkpoint says of its run."""
    return {
        "stage": plan.stage.name,
        "size": plan.config.size,
        "config": config_lib.to_dict(plan.config),
        "revision": runtime.revision(),
    }


def keep_tokenizer(folder: files.Path, prompts: PromptBuilder) -> None:
    """Writes the tokenizer into a stage folder, which then needs no other; once."""
    if jax.process_index() == 0 and not (folder / TOKENIZER).is_dir():
        with files.fresh_folder(folder / TOKENIZER, "tokenizer.json") as part:
            with buckets.local_folder(part) as here:
                prompts.tokenizer.save_pretrained(str(here))


def check_fits(found: Meta, plan: Plan, folder: files.Path) -> None:
    """Raises InputError unless a checkpoint is of the plan's stage and sizes."""
    if found["stage"] != plan.stage.name:
        raise InputError(
            f"{folder} is a checkpoint of stage {found['stage']!r}, the config is of stage "
            f"{plan.stage.name!r}; use another --workdir or the matching config"
        )
    ours = config_lib.to_dict(plan.config)
    theirs = config_lib.to_dict(config_lib.from_dict(found["config"]))
    for section in ("model", "lora", "prompt"):
        changed = config_lib.differences(theirs[section], ours[section])
        changed = [line for line in changed if not line.startswith("remat:")]
        if changed:
            size, own = found["config"]["size"], plan.config.size
            what = "is a checkpoint of another config"
            if size != own:
                what = f"is a checkpoint of size {size!r}, the config is of size {own!r}"
            raise InputError(
                f"{folder} {what}: {section}.{changed[0]}; use the matching config or another "
                "--workdir"
            )
    if theirs["dtype"]["frozen"] != ours["dtype"]["frozen"]:
        raise InputError(
            f"{folder} is a checkpoint with dtype.frozen {theirs['dtype']['frozen']!r}, the config "
            f"has {ours['dtype']['frozen']!r}; give the same, or another --workdir"
        )
