"""The painter of a folder that `convert to-pytorch` wrote."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base import files, runtime, trees
from qk_jax.base.errors import InputError
from qk_jax.base.types import Tree
from qk_jax.data import prompts
from qk_jax.data.templates import PromptTemplate
from qk_jax.diffusion import sampler
from qk_jax.models import lora, rotary
from qk_jax.models.query_kontext import ModelConfig, QueryKontext
from qk_jax.painting.painter import Painter
from qk_jax.painting.request import Limits
from qk_jax.pictures.decoding import MAX_PIXELS
from qk_jax.pictures.sizes import parse_sizes
from qk_jax.weights import leaves, lora_files, read, tables
from qk_jax.weights.safetensors import TensorFolder

INDEX, ADAPTER = "model_index.json", "pytorch_lora_weights.safetensors"
TOWERS = {"vlm": "text_encoder", "mmdit": "transformer", "vae": "vae"}
# Adapters beside weights. That of the text encoder has only the model that the package carries,
# which shares what it adapts with the quickstart.
ADAPTERS = {"mmdit": ADAPTER, "vlm": f"text_encoder/{ADAPTER}"}


def is_exported(folder: files.Path) -> bool:
    """Whether a folder is a pipeline of diffusers, ours or another."""
    return (folder / INDEX).is_file()


def load(
    folder: files.Path,
    *,
    batch: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    shared: Mapping[str, files.Path] | None = None,
) -> Painter:
    """The painter of an export. It computes in bfloat16 where the transformer is stored in it,
    else in float32; an adapter beside the weights is merged into them.

    Args:
      folder: of `export.folder.export_pipeline`.
      batch: slots of every program, see `Painter`.
      mesh: to shard the three towers over, by the default tables; None for one device.
      shared: {'vae': folder, ...} of parts that lie elsewhere.

    Raises:
      InputError: it is another pipeline, or a part is missing or damaged.
    """
    index = _index(folder)
    where = {part: folder / part for part in (*TOWERS.values(), "tokenizer")} | dict(shared or {})
    configs, params, dtype = _towers(where, mesh)
    for tower, name in ADAPTERS.items():
        if (folder / name).is_file():
            shapes = read.shapes_of(params[tower])
            adapter, _ = lora_files.import_lora(folder / name, shapes, np.float32, tower)
            params[tower] = jax.jit(lora.merge)(params[tower], adapter, 1.0)
    with _told(folder):
        kontext = files.read_json(folder / "kontext" / "config.json")
        tokenizer = prompts.load_tokenizer(where["tokenizer"])
        builder = _prompts(index, kontext, tokenizer)
        config, limits = _config(index, kontext, builder, configs), _limits(index)
        schedule = _schedule(files.read_json(folder / "scheduler" / "scheduler_config.json"))
    params |= _kontext(folder / "kontext", QueryKontext(config, dtype))
    options = runtime.compiler_options({"cpu": runtime.CPU_OPTIONS}, jax.default_backend())
    return Painter(
        config, params if mesh is not None else jax.device_put(params), builder,
        limits=limits, batch=batch, dtype=dtype, options=tuple(sorted(options.items())),
        name=folder.name, schedule=schedule,
    )  # fmt: skip


def limits_of(folder: files.Path) -> Limits:
    """Sizes and counts of the training of an export; errors as `load`."""
    with _told(folder):
        return _limits(_index(folder))


def _index(folder: files.Path) -> dict[str, Any]:
    """What an export says of itself."""
    index = files.read_json(folder / INDEX)
    if index.get("_class_name") != ["pipeline", "QueryKontextPipeline"]:
        raise InputError(
            f"{folder} is a {index.get('_class_name')}, not what convert to-pytorch writes; give "
            "such a folder, or that of a trained stage"
        )
    return index


def _towers(where: Mapping[str, files.Path], mesh: jax.sharding.Mesh | None) -> Any:
    """({tower: config}, {tower: parameters}, compute dtype)."""
    stored = set(TensorFolder(where["transformer"]).dtypes.values())
    dtype = jnp.bfloat16 if stored == {jnp.dtype(jnp.bfloat16)} else jnp.float32
    configs, params = {}, {}
    for tower, part in TOWERS.items():
        configs[tower], params[tower] = read.import_model(tower, where[part], dtype, mesh=mesh)
    return configs, params, dtype


@contextlib.contextmanager
def _told(folder: files.Path) -> Iterator[None]:
    """What the small files lack, or say wrong, is an error of the folder."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"model_index.json or kontext/config.json of {folder} cannot be used "
            f"({type(error).__name__}: {error}); export the model again"
        ) from None


def _prompts(
    index: Mapping[str, Any], kontext: Mapping[str, Any], tokenizer: Any
) -> prompts.PromptBuilder:
    """What the VLM reads, as `export.card.settings` says it."""
    template = PromptTemplate(**index["prompt"])
    queries = kontext["num_queries"]
    return prompts.PromptBuilder(
        tokenizer, index["max_text"], queries, index["vlm_pixels"], template
    )


def _config(
    index: Mapping[str, Any],
    kontext: Mapping[str, Any],
    builder: prompts.PromptBuilder,
    towers: Mapping[str, Any],
) -> ModelConfig:
    """The config of the whole model."""
    return ModelConfig(
        **towers,
        num_queries=builder.queries,
        max_text=builder.max_text,
        tail_tokens=builder.tail_tokens,
        keep_tail=builder.template.keep_tail,
        picture_multiple=builder.template.picture_multiple,
        vlm_pixels=builder.vlm_pixels,
        law=rotary.PositionLaw(index["law"], index["source_mode"], index["index_base"]),
        condition_latents=index["condition_latents"],
        bidirectional_queries=kontext["bidirectional"],
        vlm_layers=tuple(kontext["layers"]),
    )


def _limits(index: Mapping[str, Any]) -> Limits:
    """Sizes and counts of the training."""
    tables_of_sizes = index["reference_sizes"].split(";")
    return Limits(
        sizes=parse_sizes(index["sizes"].split(), "sizes"),
        reference_sizes=tuple(parse_sizes(x.split(), "reference_sizes") for x in tables_of_sizes),
        max_references=index["max_references"],
        max_pixels=MAX_PIXELS,
    )


def _schedule(values: Mapping[str, Any]) -> sampler.ScheduleConfig:
    """The noise levels, as `sampler.ScheduleConfig.to_hf` says them."""
    known = [field.name for field in dataclasses.fields(sampler.ScheduleConfig)]
    return sampler.ScheduleConfig(**{name: values[name] for name in known})


def _kontext(folder: files.Path, model: QueryKontext) -> Tree:
    """Queries and connector, float32."""
    shapes = read.shapes_of(model.abstract(("queries", "connector")))
    flat = leaves.plan(tables.glue(), TensorFolder(folder), shapes, jnp.float32)
    return trees.unflatten({path: np.asarray(leaf) for path, leaf in flat.items()})
