"""A trained model -> a folder that `DiffusionPipeline.from_pretrained` paints with, without JAX."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from qk_jax import hub, painting
from qk_jax.convert import imported, safetensors_io, tables, torch_export
from qk_jax.convert.safetensors_io import GIGABYTE, Path
from qk_jax.convert.torch_import import shapes_of
from qk_jax.data import prompts
from qk_jax.errors import InputError
from qk_jax.models import mrope, vae
from qk_jax.training import initial

HERE = pathlib.Path(__file__).parent
INDEX = "model_index.json"
LORA_FILE = f"{torch_export.LORA}.safetensors"
CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
---

# {name}

A Query-Kontext model (arXiv 2509.26641), trained with qk_jax and exported in {dtype}: a
vision-language model reads words and pictures and, through {queries} learnable queries, tells a
diffusion transformer what to paint.

```python
from diffusers import DiffusionPipeline
from PIL import Image

folder = "{folder}"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
{load}pipe("a red kite", width={width}, height={height}).images[0].save("kite.png")
{pictured}```

or `python {folder}/pipeline.py --prompt "a red kite" --out kite.png` (`--help` lists the rest).
Needs torch, transformers, diffusers and Pillow{extra}. `pipeline.py` and `kontext/kontext.py` are
all the code that is run from this folder. {adapter}

| | |
| --- | --- |
| stage | {stage}, after {step} steps |
| tasks (share) | {tasks} |
| data | {data} |
| trained sizes (width x height) | {sizes} |
| condition pictures | {conditions} |
| program | qk_jax, git revision {revision} |

`text_encoder/`, `transformer/` and `vae/` are folders of transformers and diffusers as they are.
{frames}`processor/` is for transformers' `Qwen2_5_VLProcessor`, which needs torchvision; the
pipeline does without it. Its chat template is the layout of the training. It shows pictures at
about the area of the training, and exactly as the training when they have a size of
`pipeline.vision_size`.
"""
LOAD = "pipe.load_lora_weights(folder)  # without it the pictures are not the trained ones\n"
SOURCE = 'pipe("make it blue", source=Image.open("kite.png")).images[0].save("blue.png")\n'
REFERENCES = 'pipe("two of it", references=[Image.open("kite.png")]).images[0].save("two.png")\n'
ADAPTERS = {
    "merged": "Adapters are merged into the weights.",
    "separate": f"""

`transformer/` holds the weights from which the last stage started, and `{LORA_FILE}` the adapter
that it trained, alpha folded in: without `load_lora_weights` the pictures are not the trained
ones. `pipe.fuse_lora()` merges it for good.""",
    "none": "This stage trained no adapter.",
}


class Adapter(NamedTuple):
    """The transformer's adapter beside the weights that it adapts.

    Attributes:
      base: parameters of the transformer without it.
      weights: the tree of `lora.init`.
      scale: alpha / rank.
    """

    base: torch_export.Params
    weights: torch_export.Params
    scale: float


def separate(loaded: initial.Loaded | None) -> Adapter:
    """The adapter of a checkpoint, for an export beside the weights.

    Raises:
      InputError: no checkpoint is given, its stage has no adapter, or one that
        `load_lora_weights` of diffusers cannot read.
    """
    if loaded is None:
        raise InputError("a separate adapter is not in the painter; give the checkpoint as loaded")
    towers = loaded.params.get("lora", {})
    if "mmdit" in towers:
        weights, scale = towers["mmdit"], loaded.model.config.lora_scale
        return Adapter(loaded.params["mmdit"], weights, scale)
    found = "trained no adapter"
    if towers:
        found = "trained its adapter on the text encoder, which load_lora_weights does not reach"
    raise InputError(f"stage {loaded.config['stage']} {found}; export it with lora merged")


def settings(painter: painting.Painter) -> dict[str, Any]:
    """What the pipeline has to know beyond its components: scalars of `model_index.json`."""
    config, limits = painter.config, painter.limits
    return {
        "max_text": config.max_text,
        "vlm_pixels": config.vlm_pixels,
        "system": painter.layout.system,
        "sizes": " ".join(f"{width}x{height}" for height, width in limits.sizes),
        "reference_size": limits.reference_size,
        "max_references": limits.max_references,
        "condition_latents": config.condition_latents,
        "law": config.law.kind,
        "source_mode": config.law.source_mode,
        "index_base": config.law.index_base,
    }


def export_pipeline(
    painter: painting.Painter,
    folder: Path,
    run: Mapping[str, Any],
    step: int,
    dtype: Any = None,
    max_shard_bytes: int = 5 * GIGABYTE,
    *,
    lora: Literal["merged", "separate"] = "merged",
    loaded: initial.Loaded | None = None,
    revision: str = "unknown",
) -> None:
    """Writes the whole model; `folder` appears when all of it is complete.

    Args:
      painter: the model as it paints, adapters merged.
      folder: an earlier export there is replaced, anything else is left alone.
      run: the training config: for the model card, and for the folder of the VAE it started from.
      step: the step of the checkpoint, for the card.
      dtype: of all weights; None for the dtype that the painter computes in.
      max_shard_bytes: larger components are split.
      lora: 'merged' into the weights, or 'separate': `transformer/` without the adapter, and the
        adapter as pytorch_lora_weights.safetensors.
      loaded: the checkpoint behind the painter; needed for 'separate'.
      revision: of the program that trained, for the card.

    Raises:
      InputError: the folder cannot be written, a value is beyond the range of `dtype`, or there is
        no adapter that can be separate.
    """
    config, params = painter.config, painter.params
    dtype = jnp.dtype(dtype or painter.programs.model.dtype)
    adapter = separate(loaded) if lora == "separate" else None
    generator = params["mmdit"] if adapter is None else adapter.base
    original = _original_vae(config.vae, run)
    with safetensors_io.fresh_folder(folder, INDEX) as part:
        shards = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
        torch_export.export_vlm(params["vlm"], config.vlm, part / "text_encoder", **shards)
        torch_export.export_mmdit(generator, config.mmdit, part / "transformer", **shards)
        torch_export.export_vae(
            params["vae"], config.vae, part / "vae", original=original, **shards
        )
        if adapter is not None:
            torch_export.export_lora(adapter.weights, adapter.scale, tables.mmdit(), part, dtype)
        _export_kontext(painter, part / "kontext", dtype)
        _export_tokenizer(painter.layout, part / "tokenizer")
        _export_processor(painter, part / "processor")
        safetensors_io.write_json(
            part / "scheduler" / "scheduler_config.json", painter.schedule.to_hf()
        )
        shutil.copyfile(HERE / "torch_pipeline.py", part / "pipeline.py")
        shutil.copyfile(HERE / "torch_kontext.py", part / "kontext" / "kontext.py")
        card = _card(painter, folder, run, lora) | {
            "step": step, "dtype": dtype, "revision": revision,
            "frames": _frames(config.vae, original),
        }  # fmt: skip
        safetensors_io.write_text(part / "README.md", CARD.format(**card))
        safetensors_io.write_json(part / INDEX, _index(painter))


def _original_vae(config: vae.VAEConfig, run: Mapping[str, Any]) -> pathlib.Path | None:
    """The folder from which the training took a VAE of videos, where it can still be had."""
    name = run["init"]["vae"]
    if not name or not isinstance(config, vae.QwenImageVAEConfig):
        return None
    kept = pathlib.Path(name, imported.ORIGINAL)  # in a folder of from-pytorch
    try:
        folder = kept if kept.is_dir() else hub.component_folder(name, "vae")
        values = safetensors_io.read_json(folder / "config.json")
    except InputError:
        return None
    return folder if values.get("_class_name") == config.to_hf()["_class_name"] else None


def _export_tokenizer(layout: prompts.PromptLayout, folder: pathlib.Path) -> None:
    """The tokenizer for transformers 4 and 5, with the training's layout as its chat template."""
    layout.tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    values = safetensors_io.read_json(file)
    # transformers 4 knows the list under its old name only, 5 under both.
    values["additional_special_tokens"] = values.pop("extra_special_tokens", [])
    for name in ("is_local", "local_files_only"):  # of the folder that it was read from
        values.pop(name, None)
    safetensors_io.write_json(file, values)
    template = prompts.chat_template(layout.system)
    safetensors_io.write_text(folder / "chat_template.jinja", template)


def _export_processor(painter: painting.Painter, folder: pathlib.Path) -> None:
    """What Qwen2_5_VLProcessor reads: tokenizer, chat template, and how pictures are shown.

    The bounds of the area are those of the training's pictures: one that has a size of
    `mrope.vision_size` is left at it.
    """
    limits, side = painter.limits, painter.limits.reference_size
    pixels = painter.config.vlm_pixels
    shown = [mrope.vision_size(*size, pixels) for size in (*limits.sizes, (side, side))]
    areas = [height * width for height, width in shown]
    values = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": min(areas),
        "max_pixels": max(areas),
        "patch_size": mrope.PATCH,
        "temporal_patch_size": 2,
        "merge_size": mrope.MERGE,
        "image_mean": [round(float(mean), 8) for mean in prompts.CLIP_MEAN],
        "image_std": [round(float(std), 8) for std in prompts.CLIP_STD],
    }
    _export_tokenizer(painter.layout, folder)
    safetensors_io.write_json(folder / "preprocessor_config.json", values)


def _export_kontext(painter: painting.Painter, folder: pathlib.Path, dtype: Any) -> None:
    """Queries and connector, which have no class in transformers or diffusers."""
    params = {name: painter.params[name] for name in ("queries", "connector")}
    tensors = torch_export.spill(tables.glue(), params, shapes_of(params), dtype)
    safetensors_io.write_tensors(folder, "diffusion_pytorch_model", tensors)
    values = {
        "_class_name": "Kontext",
        "num_queries": painter.config.num_queries,
        "width": painter.config.vlm.text.hidden_size,
        "features": painter.config.mmdit.joint_attention_dim,
    }
    safetensors_io.write_json(folder / "config.json", values)


def _index(painter: painting.Painter) -> dict[str, Any]:
    """The content of model_index.json."""
    is_video = isinstance(painter.config.vae, vae.QwenImageVAEConfig)
    return {
        "_class_name": ["pipeline", "QueryKontextPipeline"],
        "kontext": ["kontext", "Kontext"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage" if is_video else "AutoencoderKL"],
        **settings(painter),
    }


def _frames(config: vae.VAEConfig, original: pathlib.Path | None) -> str:
    """What the card says of a VAE of videos."""
    if not isinstance(config, vae.QwenImageVAEConfig):
        return ""
    if original is None:
        return "`vae/` is good for pictures only: what it needs for videos is zero.\n"
    return "`vae/` is whole, with what it needs for videos.\n"


def _card(
    painter: painting.Painter, folder: Path, run: Mapping[str, Any], lora: str
) -> dict[str, Any]:
    """What the model card says of the model and its training."""
    limits, data = painter.limits, run["data"]
    tasks = {task: share for task, share in data["tasks"].items() if share}
    seen = "read by the text encoder"
    if painter.config.condition_latents:
        law = painter.config.law
        seen += f" and seen as latents, positions by the law {law.kind} ({law.source_mode})"
    is_separate = lora == "separate"
    return {
        "name": painter.name or "Query-Kontext",
        "queries": painter.config.num_queries,
        "folder": pathlib.Path(folder).name,
        "load": LOAD if is_separate else "",
        "pictured": SOURCE + (REFERENCES if limits.max_references else ""),
        "extra": ", and peft for the adapter" if is_separate else "",
        "adapter": ADAPTERS[lora if run["lora"]["rank"] else "none"],
        "width": limits.sizes[0][1],
        "height": limits.sizes[0][0],
        "stage": run["stage"],
        "tasks": ", ".join(f"{task} ({share:g})" for task, share in tasks.items()),
        "data": data["records"] or data["corpus"] or "the corpus that qk_jax carries",
        "sizes": settings(painter)["sizes"],
        "conditions": f"{seen}; at most {limits.max_references} references",
    }
