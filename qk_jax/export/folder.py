"""A trained model -> a folder that `DiffusionPipeline.from_pretrained` paints with, without JAX."""

from __future__ import annotations

import itertools
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from qk_jax import painting
from qk_jax.base import buckets, files, hub
from qk_jax.base.errors import InputError
from qk_jax.base.files import GIGABYTE
from qk_jax.base.types import Tree
from qk_jax.checkpoints.run_folder import Loaded
from qk_jax.data import prompts, templates
from qk_jax.export import card
from qk_jax.models import vae
from qk_jax.painting import Painter
from qk_jax.pictures.grids import MERGE, PATCH, vision_size
from qk_jax.weights import leaves, safetensors, tables
from qk_jax.weights.read import shapes_of
from qk_jax.weights.write import export_lora, export_model, torch_tensors

HERE = files.Path(__file__).parent
INDEX = "model_index.json"


class Adapter(NamedTuple):
    """The transformer's adapter, apart from the weights that it adapts.

    Attributes:
      base: parameters of the transformer without it.
      weights: the tree of `lora.init`.
      scale: alpha / rank.
    """

    base: Tree
    weights: Tree
    scale: float


def separate(loaded: Loaded) -> Adapter:
    """The adapter of a checkpoint, to be exported apart from the weights.

    Raises:
      InputError: its stage has no adapter, or one that `load_lora_weights` of diffusers cannot
        read.
    """
    towers = loaded.params.get("lora", {})
    if "mmdit" in towers:
        weights, scale = towers["mmdit"], loaded.plan.model.config.lora_scale
        return Adapter(loaded.params["mmdit"], weights, scale)
    found = "trained no adapter"
    if towers:
        found = "trained its adapter on the text encoder, which load_lora_weights does not reach"
    raise InputError(f"stage {loaded.plan.stage.name} {found}; export it with lora merged")


def export_pipeline(
    loaded: Loaded,
    folder: files.PathLike,
    dtype: Any = None,
    *,
    max_shard_bytes: int = 5 * GIGABYTE,
    lora: Literal["merged", "separate"] = "merged",
) -> None:
    """Writes the whole model; `folder` appears when all of it is complete.

    Args:
      loaded: the trained model.
      folder: an earlier export there is replaced, anything else is left alone.
      dtype: of all weights; None for the dtype that the model computes in.
      max_shard_bytes: larger components are split.
      lora: 'merged' into the weights, or 'separate': `transformer/` without the adapter, and the
        adapter as pytorch_lora_weights.safetensors.

    Raises:
      InputError: the folder cannot be written, `dtype` is no type for parameters or a value beyond
        its range, or there is no adapter that can be separate.
    """
    painter = painting.of_loaded(loaded, batch=1)
    config, params = painter.config, painter.params
    dtype = jnp.dtype(leaves.float_dtype(dtype) or painter.programs.model.dtype)
    adapter = separate(loaded) if lora == "separate" else None
    transformer = params["mmdit"] if adapter is None else adapter.base
    original = _original_vae(loaded)
    with files.fresh_folder(folder, INDEX) as part:
        for name, tree, its_config, source in (
            ("text_encoder", params["vlm"], config.vlm, None),
            ("transformer", transformer, config.mmdit, None),
            ("vae", params["vae"], config.vae, original),
        ):
            export_model(tree, its_config, part / name, dtype, max_shard_bytes, source)
        if adapter is not None:
            export_lora(adapter.weights, adapter.scale, part, dtype)
        _export_kontext(painter, part / "kontext", dtype)
        _export_tokenizer(painter.prompts, part / "tokenizer")
        _export_processor(painter, part / "processor")
        files.write_json(part / "scheduler" / "scheduler_config.json", painter.schedule.to_hf())
        for name in ("pipeline.py", "paint.py"):
            (HERE / name).copy(part / name)
        (HERE / "kontext.py").copy(part / "kontext" / "kontext.py")
        text = card.card(painter, loaded, folder, dtype=dtype, lora=lora, original_vae=original)
        files.write_text(part / "README.md", text)
        files.write_json(part / INDEX, _index(painter))


def _original_vae(loaded: Loaded) -> files.Path | None:
    """The folder from which the training took a VAE of videos, where it can still be had."""
    config, name = loaded.plan.model.config.vae, loaded.plan.config.init.vae
    if not name or not isinstance(config, vae.QwenImageVAEConfig):
        return None
    try:
        folder = hub.component_folder(name, "vae")
        values = files.read_json(folder / "config.json")
    except InputError:
        return None
    return folder if values.get("_class_name") == vae.kind(config) else None


def _export_tokenizer(builder: prompts.PromptBuilder, folder: files.Path) -> None:
    """The tokenizer for transformers 4 and 5, with the training's prompts as its chat template."""
    with buckets.local_folder(folder) as here:
        builder.tokenizer.save_pretrained(str(here))
    file = folder / "tokenizer_config.json"
    values = files.read_json(file)
    # transformers 4 knows the list under its old name only, 5 under both.
    values["additional_special_tokens"] = values.pop("extra_special_tokens", [])
    for name in ("is_local", "local_files_only"):  # of the folder that it was read from
        values.pop(name, None)
    files.write_json(file, values)
    template = templates.chat_template(builder.template)
    files.write_text(folder / "chat_template.jinja", template)


def _export_processor(painter: Painter, folder: files.Path) -> None:
    """What Qwen2_5_VLProcessor reads: tokenizer, chat template, and how pictures are shown.

    The bounds of the area are those of the training's pictures: one that has a size of
    `mrope.vision_size` is left at it.
    """
    limits, pixels = painter.limits, painter.config.vlm_pixels
    multiple = painter.config.picture_multiple
    sizes = (*limits.sizes, *itertools.chain(*limits.reference_sizes))
    shown = [vision_size(*size, pixels, multiple) for size in sizes]
    areas = [height * width for height, width in shown]
    values = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": min(areas),
        "max_pixels": max(areas),
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [round(float(mean), 8) for mean in prompts.CLIP_MEAN],
        "image_std": [round(float(std), 8) for std in prompts.CLIP_STD],
    }
    _export_tokenizer(painter.prompts, folder)
    files.write_json(folder / "preprocessor_config.json", values)


def _export_kontext(painter: Painter, folder: files.Path, dtype: Any) -> None:
    """Queries and connector, which have no class in transformers or diffusers."""
    params = {name: painter.params[name] for name in ("queries", "connector")}
    tensors = torch_tensors(tables.glue(), params, shapes_of(params), dtype)
    safetensors.write_tensors(folder, "diffusion_pytorch_model", tensors)
    values = {
        "_class_name": "Kontext",
        "num_queries": painter.config.num_queries,
        "width": painter.config.vlm.text.hidden_size,
        "features": painter.config.mmdit.joint_attention_dim,
        "layers": list(painter.config.vlm_layers),
        "bidirectional": painter.config.bidirectional_queries,
    }
    files.write_json(folder / "config.json", values)


def _index(painter: Painter) -> dict[str, Any]:
    """The content of model_index.json."""
    return {
        "_class_name": ["pipeline", "QueryKontextPipeline"],
        "kontext": ["kontext", "Kontext"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", vae.kind(painter.config.vae)],
        **card.settings(painter),
    }
