"""Types of every room: trees of parameters, and the batch that data gives and a model reads."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

Tree = dict[str, Any]  # a nested dict of arrays, abstract arrays or shardings


class Prompt(TypedDict):
    """What the VLM reads of a batch (`data.prompts.PromptBuilder`)."""

    input_ids: Any  # int32 [B, S]
    attention_mask: Any  # bool [B, S]
    position_ids: Any  # int32 [B, 3, S], M-RoPE
    text_mask: Any  # bool [B, T], right-aligned like the text window
    pixel_values: Any  # float32 [B, P, 1176], the condition pictures one after another
    conditions: tuple[Any, ...]  # uint8 [B, h, w, 3] for each condition picture


class PaintingBatch(Prompt):
    """What painting reads besides: which condition pictures count, and as what."""

    condition_mask: Any  # bool [B], False hides all condition pictures of a slot
    roles: Any  # int32 [B, n], SOURCE or REFERENCE


class Encoded(TypedDict):
    """What the autoencoder makes of the pictures of a batch (`QueryKontext.encode`)."""

    posterior: tuple[Any, Any]  # mean, log variance of the target, float32 [B, H/8, W/8, C]
    latents: tuple[Any, ...]  # of the condition pictures, float32 [B, h/8, w/8, C]


class Batch(PaintingBatch):
    """What a training step reads (`data.pipeline.collate`)."""

    target: Any  # uint8 [B, H, W, 3]
    task: Any  # int32 [B], index into TASKS
    record: NotRequired[Any]  # int64 [B], number of the example in its source
    target_pixel_values: NotRequired[Any]  # float32 [B, P', 1176], with an alignment term
    whole: NotRequired[Any]  # bool [B], no condition was dropped; with an alignment term


class EncodedBatch(Batch, Encoded):
    """A batch with its latents."""
