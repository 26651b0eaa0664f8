"""Where each part of a stage comes from: the stage table and the config's `init` together.

A part that the table calls pretrained needs a folder, a Hub id, or the word `fresh`; anything else
is an error before anything is built, so that nothing is random in silence. Nothing is read here,
and the Hub is not asked.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import qk_jax
from qk_jax.base import hub
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.stages import Stage
from qk_jax.models import mmdit, qwen_vl, vae

FRESH = "fresh"  # the word for random parameters
EMBEDDED = pathlib.Path(qk_jax.__file__).parent / "assets/tiny"
_QWEN_IMAGE = mmdit.PRESETS["20b"]
# Public weights by the architecture that they have.
PUBLIC: dict[Any, str] = {
    qwen_vl.PRESETS["tiny"]: str(EMBEDDED / "vlm"),
    qwen_vl.PRESETS["3b"]: "Qwen/Qwen2.5-VL-3B-Instruct",
    qwen_vl.PRESETS["7b"]: "Qwen/Qwen2.5-VL-7B-Instruct",
    qwen_vl.PRESETS["32b"]: "Qwen/Qwen2.5-VL-32B-Instruct",
    qwen_vl.PRESETS["72b"]: "Qwen/Qwen2.5-VL-72B-Instruct",
    mmdit.PRESETS["tiny"]: str(EMBEDDED / "mmdit"),
    vae.PRESETS["tiny"]: str(EMBEDDED / "vae"),  # besides the scale of its latents
    _QWEN_IMAGE: "Qwen/Qwen-Image",
    dataclasses.replace(_QWEN_IMAGE, zero_cond_t=True): "Qwen/Qwen-Image-Edit-2511",
    vae.PRESETS["qwen_image"]: "Qwen/Qwen-Image",
}


def places(stage: Stage, config: Mapping[str, Any]) -> dict[str, str]:
    """{part: folder or Hub id} of every part that is read from published weights.

    A part that is to be drawn at random is not among them, nor one of the stage before.

    Raises:
      InputError: a pretrained part has no origin, an origin is neither there nor a Hub id, or
        `init` names one that this stage does not take.
    """
    init = config["init"]
    _check_taken(stage, init)
    wanted = {part: part for part, origin in stage.parts.items() if origin == "pretrained"}
    if stage.parts.get("lora/mmdit") == "fresh" and init["lora"]:
        wanted["lora/mmdit"] = "lora"
    found = {}
    for part, field in wanted.items():
        place = init[field].strip()
        if not place:
            raise InputError(_missing(stage, part, config))
        if place == FRESH:
            _check_tokenizer(part, config)
            continue
        try:
            hub.check(place)
        except InputError as error:
            raise InputError(f"init.{field}: {error}, or {FRESH} for random parameters") from None
        found[part] = place
    return found


def _missing(stage: Stage, part: str, config: Mapping[str, Any]) -> str:
    """What to type for a pretrained part without an origin."""
    option = f"--config.init.{part}"
    public = PUBLIC.get(getattr(config_lib.model_config(config), part))
    if public:
        right = f"give {option}={public}, another folder or Hub id"
    else:
        right = f"give {option}=FOLDER_OR_HUB_ID (no public weights of its architecture are known)"
        if part == "mmdit" and config["size"] in ("3b", "7b"):
            right += f", take size 20b, which starts from {PUBLIC[_QWEN_IMAGE]}"
    return (
        f"{stage.name} starts from a pretrained {part}, and init.{part} is empty: {right}, or "
        f"{option}={FRESH} to draw it at random"
    )


def _check_tokenizer(part: str, config: Mapping[str, Any]) -> None:
    """Raises InputError when a fresh VLM is to read without a tokenizer."""
    if part == "vlm" and not config["data"]["tokenizer"]:
        public = PUBLIC.get(config_lib.model_config(config).vlm, "FOLDER_OR_HUB_ID")
        raise InputError(
            f"init.vlm={FRESH} brings no tokenizer; give one too, --config.data.tokenizer={public}"
        )


def _check_taken(stage: Stage, init: Mapping[str, Any]) -> None:
    """Raises InputError when `init` names an origin that the stage does not look at.

    `init.vlm` and `init.vae` are of use in every stage: for the tokenizer, and for the export.
    """
    for field, taken, instead in (
        ("mmdit", stage.parts["mmdit"] == "pretrained", f"its mmdit is {_words(stage, 'mmdit')}"),
        (
            "lora",
            stage.parts.get("lora/mmdit") == "fresh",
            f"its lora/mmdit is {_words(stage, 'lora/mmdit')}",
        ),
        ("checkpoint", bool(stage.previous), "it is the first stage"),
    ):
        if init[field] and not taken:
            raise InputError(
                f"init.{field} is {init[field]!r}, which {stage.name} does not take: {instead}; "
                "leave it out"
            )


def _words(stage: Stage, part: str) -> str:
    origin = stage.parts.get(part, "absent")
    return f"that of {stage.previous}" if origin in ("previous", "merged") else origin
