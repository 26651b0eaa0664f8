"""All formats that can be imported, a line each; other people's names are on the left."""

from __future__ import annotations

from qk_jax.data.importers import sets
from qk_jax.data.importers.archives import WEBDATASET
from qk_jax.data.importers.columns import Format
from qk_jax.data.importers.folders import CONTROLLED, FOLDER
from qk_jax.data.importers.lists import LISTS
from qk_jax.data.importers.tables import TABLES
from qk_jax.data.importers.tfds import DATA_SOURCE

_TEXT = ("text", "caption", "prompt", "instruction")
_COMMON = {
    "text": _TEXT,
    "target": ("image", "file_name", "target", "target_image", "output_image"),
    "source": ("source_image",),
    "references": ("references",),
    "pictures": ("input_images",),
}
_MEMBERS = {
    "text": ("txt", "json.prompt", "json.caption", "json.text"),
    "target": ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"),
}
_FOLDER = {
    "text": _TEXT,
    "target": ("file_name", "image_path", "image"),
    "source": ("source",),
    "references": ("references",),
    "pictures": (
        "pictures", "control_path", "control_path_0+control_path_1+control_path_2",
        "control_path_0+control_path_1", "control_path_0",
    ),
}  # fmt: skip
_SCORES = tuple(
    f"quality_assessment.{name}"
    for name in ("compositeStructure", "objectConsistency", "imageQuality")
)
FORMATS: dict[str, Format] = {
    "folder": Format(FOLDER, "metadata.jsonl or .csv, or captions in .txt", _FOLDER),
    "list": Format(LISTS, "a JSON list, JSON lines or CSV", _COMMON),
    "parquet": Format(TABLES, "Parquet, or a folder saved by datasets", _COMMON),
    "webdataset": Format(WEBDATASET, "tars: BLIP3o, CC12M, text-to-image-2M", _MEMBERS),
    "tfds": Format(DATA_SOURCE, "a TensorFlow data set, its name or its folder", _COMMON),
    "llava": Format(LISTS, "lists with image and conversations", {}, sets.llava),
    "musubi": Format(CONTROLLED, "musubi-tuner: captions in .txt, --control", _FOLDER),
    "ai_toolkit": Format(CONTROLLED, "ai-toolkit: captions in .txt, --control", _FOLDER),
    "sharegpt4o_image": Format(
        LISTS, "ShareGPT-4o-Image",
        {"text": ("input_prompt",), "target": ("output_image",), "pictures": ("input_image",)},
    ),
    "gpt_image_edit": Format(LISTS, "GPT-Image-Edit-1.5M", {}, sets.llava),
    "imgedit": Format(
        TABLES, "ImgEdit, one turn or several",
        {"text": ("prompt",), "target": ("output_images",), "pictures": ("input_images",)},
        sets.imgedit, fields=("data",),
    ),
    "seed_edit": Format(
        LISTS, "SEED-Data-Edit",
        {"text": ("instruction",), "target": ("target_image",), "source": ("source_image",)},
        sets.seed, licence="CC-BY-NC-4.0",
    ),
    "nhr_edit": Format(
        TABLES, "NHR-Edit, in Parquet",
        {"text": ("edit_instruction",), "target": ("edited_image",), "source": ("source_image",)},
        licence="Apache-2.0",
    ),
    "x2i": Format(
        LISTS, "OmniGen's X2I and OmniGen2's X2I2",
        {"text": ("instruction",), "target": ("output_image", "output_images"),
         "pictures": ("input_images",)},
        words=sets.image_slots,
    ),
    "metaquery_instruct": Format(
        TABLES, "MetaQuery-Instruct-2.4M",
        {"text": ("prompt",), "target": ("target_image",), "pictures": ("source_images",)},
        licence="CC-BY-NC-4.0",
    ),
    "uno": Format(
        LISTS, "UNO-1M",
        {"text": ("caption.img_path2",), "target": ("img_path2",), "references": ("img_path1",),
         "score": ("vlm_filter_cot.score_final",)},
        min_score=3.5,
    ),
    "subjects200k": Format(
        TABLES, "Subjects200K: both halves of each picture", {"score": ("+".join(_SCORES),)},
        sets.subjects200k, ("image", "description"), licence="Apache-2.0", min_score=5,
    ),
    "omniedit": Format(
        TABLES, "OmniEdit-Filtered-1.2M",
        {"text": ("edited_prompt_list",), "target": ("edited_img",), "source": ("src_img",),
         "key": ("omni_edit_id",)},
        takes_last_text=True,
        licence="MIT",
    ),
    "ultraedit": Format(
        TABLES, "UltraEdit",
        {"text": ("edit_prompt",), "target": ("edited_image",), "source": ("source_image",)},
        licence="CC-BY-4.0",
    ),
}  # fmt: skip
