"""Where painters come from: the folder of a trained stage, an export, the model that is shipped."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qk_jax.base import buckets, files, runtime, types
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import run_folder, steps
from qk_jax.data.example import MAX_REFERENCES, reference_sizes
from qk_jax.diffusion import sampler
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import origins
from qk_jax.experiment.plan import Plan
from qk_jax.models import connector, lora
from qk_jax.models.query_kontext import ModelConfig
from qk_jax.painting import exported
from qk_jax.painting.painter import Painter
from qk_jax.painting.request import Limits
from qk_jax.pictures.sizes import parse_sizes

SHIPPED = files.Path(origins.EMBEDDED) / "stage3"


def load(
    folder: files.PathLike | None = None,
    *,
    ema: bool = True,
    step: int | None = None,
    batch: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Painter:
    """The painter of a model on disk.

    Args:
      folder: of a stage that the trainer wrote (W/stage3), or an export of `convert to-pytorch`;
        None for the tiny model that the package carries.
      ema: take the moving average of the weights where there is one.
      step: default the newest that is whole.
      batch: slots of every program, see `Painter`.
      mesh: to shard the parameters over; None for one device.

    Raises:
      InputError: no such folder or step, or it is damaged; or a choice of weights is asked of an
        export, which has one set.
    """
    if folder is not None:
        folder = files.Path(folder)
        buckets.check([str(folder)])
        if not exported.is_exported(folder):
            loaded = run_folder.load(folder, step=step, ema=ema, mesh=mesh)
            return of_loaded(loaded, batch=batch)
    if step is not None or not ema:
        raise InputError(
            f"{folder or 'the tiny model'} is an export, which has one step and one set of "
            "weights; leave out --step and --no-ema"
        )
    if folder is None:
        return load_shipped(batch=batch, mesh=mesh)
    return exported.load(folder, batch=batch, mesh=mesh)


def load_shipped(
    folder: files.Path = SHIPPED,
    *,
    batch: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Painter:
    """The painter of the tiny model that the package carries: an export without autoencoder,
    tokenizer and what its text encoder adapts, which lie beside it. Arguments as in `load`."""
    tiny = files.Path(origins.EMBEDDED)
    shared = {"vae": tiny / "vae", "tokenizer": tiny / "tokenizer", "text_encoder": tiny / "vlm"}
    return exported.load(folder, batch=batch, mesh=mesh, shared=shared)


def described(folder: files.PathLike | None = None) -> tuple[Limits, bool]:
    """(limits, whether `ema` is a choice) of a model on disk; no array is read.

    Args:
      folder: as in `load`.

    Raises:
      InputError: no such folder, or it is damaged.
    """
    path = SHIPPED if folder is None else files.Path(folder)
    buckets.check([str(path)])
    if folder is None or exported.is_exported(path):
        return exported.limits_of(path), False
    step = steps.chosen(steps.store_folder(path))
    try:
        meta = step.meta()
    except steps.Damage as damage:
        raise InputError(f"{path}: step {step.number} is damaged: {damage}") from None
    return _limits(config_lib.from_dict(meta["config"])), "ema" in meta["leaves"]


def of_loaded(loaded: run_folder.Loaded, *, batch: int | None = None) -> Painter:
    """The painter of a model that was read from its folder; `batch` as in `load`."""
    return of_params(loaded.plan, loaded.params, batch=batch, name=loaded.name)


def of_params(
    plan: Plan, params: types.Tree, *, batch: int | None = None, name: str = ""
) -> Painter:
    """The painter of parameters in memory.

    Args:
      plan: of their run.
      params: all of them; adapters are merged here, which changes no picture but saves time.
      batch: slots of every program, see `Painter`.
      name: what PNGs call the model.
    """
    config, params = plan.model.config, dict(params)
    for tower, adapter in params.pop("lora", {}).items():
        params[tower] = jax.jit(lora.merge, static_argnums=2)(
            params[tower], adapter, config.lora_scale
        )
    if config.query_noise:
        learned = jnp.asarray(params["queries"]["embedding"])
        params["queries"] = {"embedding": connector.noisy(learned, config.query_noise)}
    options = runtime.compiler_options(plan.config.compiler, jax.default_backend())
    # Adapters are merged, noise is added, nothing is drawn or differentiated: all stages and
    # exports share programs.
    config = dataclasses.replace(
        config, lora_scale=1.0, remat=None, query_noise=0.0, query_std=ModelConfig.query_std
    )
    return Painter(
        config, params, plan.prompts,
        limits=_limits(plan.config), batch=batch, dtype=plan.model.dtype,
        options=tuple(sorted(options.items())),
        name=name, schedule=sampler.ScheduleConfig.of(config_lib.time_law(plan.config)),
    )  # fmt: skip


def _limits(config: Any) -> Limits:
    """Sizes and counts of the training of a config."""
    data = config.data
    return Limits(
        sizes=parse_sizes(data.sizes, "config.data.sizes"),
        reference_sizes=reference_sizes(data),
        max_references=max(MAX_REFERENCES.get(task, 0) for task, x in data.tasks.items() if x),
        max_pixels=data.max_pixels,
    )
