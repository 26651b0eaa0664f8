"""A trained model -> a folder that `DiffusionPipeline.from_pretrained` paints with, without JAX."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from qk_jax import painting
from qk_jax.convert import safetensors_io, tables, torch_export
from qk_jax.convert.safetensors_io import GIGABYTE, Path
from qk_jax.convert.torch_import import shapes_of
from qk_jax.models import vae

HERE = pathlib.Path(__file__).parent
INDEX = "model_index.json"
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
pipe("a red kite", width={width}, height={height}).images[0].save("kite.png")
pipe("make it blue", source=Image.open("kite.png")).images[0].save("blue.png")
pipe("two of it", references=[Image.open("kite.png")]).images[0].save("two.png")
```

Needs torch, transformers, diffusers and Pillow. `pipeline.py` and `kontext/kontext.py` are all the
code that is run from this folder; adapters are merged into the weights.

| | |
| --- | --- |
| stage | {stage}, after {step} steps |
| tasks (share) | {tasks} |
| pictures | {corpus} |
| trained sizes (width x height) | {sizes} |
| condition pictures | {conditions} |
"""


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
) -> None:
    """Writes the whole model; `folder` appears when all of it is complete.

    Args:
      painter: the model as it paints, adapters merged.
      folder: an earlier export there is replaced, anything else is left alone.
      run: the training config, for the model card.
      step: the step of the checkpoint, for the card.
      dtype: of all weights; None for the dtype that the painter computes in.
      max_shard_bytes: larger components are split.

    Raises:
      InputError: the folder cannot be written, or a value is beyond the range of `dtype`.
    """
    config, params = painter.config, painter.params
    dtype = jnp.dtype(dtype or painter.programs.model.dtype)
    with safetensors_io.fresh_folder(folder, INDEX) as part:
        shards = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
        torch_export.export_vlm(params["vlm"], config.vlm, part / "text_encoder", **shards)
        torch_export.export_mmdit(params["mmdit"], config.mmdit, part / "transformer", **shards)
        torch_export.export_vae(params["vae"], config.vae, part / "vae", **shards)
        _export_kontext(painter, part / "kontext", dtype)
        painter.layout.tokenizer.save_pretrained(str(part / "tokenizer"))
        safetensors_io.write_json(
            part / "scheduler" / "scheduler_config.json", painter.schedule.to_hf()
        )
        shutil.copyfile(HERE / "torch_pipeline.py", part / "pipeline.py")
        shutil.copyfile(HERE / "torch_kontext.py", part / "kontext" / "kontext.py")
        safetensors_io.write_text(part / "README.md", _card(painter, folder, run, step, dtype))
        safetensors_io.write_json(part / INDEX, _index(painter))


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


def _card(
    painter: painting.Painter, folder: Path, run: Mapping[str, Any], step: int, dtype: Any
) -> str:
    """The model card."""
    limits = painter.limits
    tasks = {task: share for task, share in run["data"]["tasks"].items() if share}
    seen = "read by the text encoder"
    if painter.config.condition_latents:
        seen += f" and seen as latents, positions by the law {json.dumps(settings(painter)['law'])}"
    return CARD.format(
        name=painter.name or "Query-Kontext",
        dtype=dtype,
        queries=painter.config.num_queries,
        folder=pathlib.Path(folder).name,
        width=limits.sizes[0][1],
        height=limits.sizes[0][0],
        stage=run["stage"],
        step=step,
        tasks=", ".join(f"{task} ({share:g})" for task, share in tasks.items()),
        corpus=run["data"]["corpus"] or "the corpus that qk_jax carries",
        sizes=settings(painter)["sizes"],
        conditions=f"{seen}; at most {limits.max_references} references",
    )
