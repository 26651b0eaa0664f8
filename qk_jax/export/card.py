"""The model card of an export, and what its pipeline has to know beyond its components."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qk_jax.base import files
from qk_jax.checkpoints.run_folder import Loaded
from qk_jax.data.settings import sources
from qk_jax.models import vae
from qk_jax.painting import Painter
from qk_jax.pictures.sizes import format_size
from qk_jax.weights.write import LORA

LORA_FILE = f"{LORA}.safetensors"
# The oldest versions that compute what a folder holds; `pipeline.py` refuses an older diffusers.
DIFFUSERS, TRANSFORMERS = "0.37.0", "4.57.0"
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
Needs torch, transformers>={transformers}, diffusers>={diffusers} and Pillow{extra}. An older
diffusers drops what it does not know of `transformer/config.json`; the pipeline refuses it then.
`pipeline.py`, `paint.py` and `kontext/kontext.py` are all the code that is run from this folder.
{adapter}

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


def _listed(sizes: Sequence[tuple[int, int]]) -> str:
    """(height, width) as '64x64 80x48', width x height."""
    return " ".join(map(format_size, sizes))


def settings(painter: Painter) -> dict[str, Any]:
    """What the pipeline has to know beyond its components: scalars of `model_index.json`."""
    config, limits = painter.config, painter.limits
    return {
        "max_text": config.max_text,
        "vlm_pixels": config.vlm_pixels,
        "prompt": dataclasses.asdict(painter.prompts.template),
        "sizes": _listed(limits.sizes),
        "reference_sizes": "; ".join(map(_listed, limits.reference_sizes)),
        "max_references": limits.max_references,
        "condition_latents": config.condition_latents,
        "law": config.law.kind,
        "source_mode": config.law.source_mode,
        "index_base": config.law.index_base,
    }


def card(
    painter: Painter,
    loaded: Loaded,
    folder: files.PathLike,
    *,
    dtype: Any,
    lora: str,
    original_vae: files.Path | None,
) -> str:
    """The text of the card.

    Args:
      painter, loaded: the model.
      folder: name of the export.
      dtype: of its weights.
      lora: 'merged' or 'separate'.
      original_vae: the folder from which a VAE of videos was completed.
    """
    config = loaded.plan.config
    limits, data = painter.limits, config.data
    tasks = {task: share for task, share in data.tasks.items() if share}
    listed = [f"{source.path or 'made'} ({source.weight:g})" for source in sources(data)]
    seen = "read by the text encoder"
    if painter.config.condition_latents:
        law = painter.config.law
        mode = f" ({law.source_mode})" if law.kind == "shifted" else ""
        seen += f" and seen as latents, positions by the law {law.kind}{mode}"
    is_separate = lora == "separate"
    return CARD.format(
        name=painter.name or "Query-Kontext",
        queries=painter.config.num_queries,
        folder=files.Path(folder).name,
        load=LOAD if is_separate else "",
        pictured=SOURCE + (REFERENCES if limits.max_references else ""),
        diffusers=DIFFUSERS,
        transformers=TRANSFORMERS,
        extra=", and peft for the adapter" if is_separate else "",
        adapter=ADAPTERS[lora if config.lora.rank else "none"],
        width=limits.sizes[0][1],
        height=limits.sizes[0][0],
        stage=loaded.plan.stage.name,
        step=loaded.step,
        tasks=", ".join(f"{task} ({share:g})" for task, share in tasks.items()),
        data=data.records or ", ".join(listed) or data.corpus or "the corpus that qk_jax carries",
        sizes=settings(painter)["sizes"],
        conditions=f"{seen}; at most {limits.max_references} references",
        dtype=dtype,
        revision=loaded.revision,
        frames=_frames(painter.config.vae, original_vae),
    )


def _frames(config: vae.VAEConfig, original: files.Path | None) -> str:
    """What the card says of a VAE of videos."""
    if not isinstance(config, vae.QwenImageVAEConfig):
        return ""
    if original is None:
        return "`vae/` is good for pictures only: what it needs for videos is zero.\n"
    return "`vae/` is whole, with what it needs for videos.\n"
