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


class Batch(PaintingBatch):
    """Examples of one shape (`data.pipeline.collate`)."""

    target: Any  # uint8 [B, H, W, 3]
    task: Any  # int32 [B], index into TASKS
    record: NotRequired[Any]  # int64 [B], number of the example in its source
    target_pixel_values: NotRequired[Any]  # float32 [B, P', 1176], with an alignment term
    whole: NotRequired[Any]  # bool [B], no condition was dropped; with an alignment term


class Pictures(TypedDict):
    """Pixels of a batch, which only the autoencoder reads: a program for each of their sizes."""

    target: Any  # uint8 [B, H, W, 3]
    conditions: tuple[Any, ...]  # uint8 [B, h, w, 3] for each condition picture


class PaddedPrompt(TypedDict):
    """What the step reads of a batch (`training.padding`).

    Its shapes depend on the number of condition pictures, not on their sizes or the target's.
    """

    input_ids: Any  # int32 [B, S]
    attention_mask: Any  # bool [B, S]
    position_ids: Any  # int32 [B, 3, S], M-RoPE
    text_mask: Any  # bool [B, T]
    pixel_values: Any  # float32 [B, P, 1176], the condition pictures, then padding
    features: NotRequired[Any]  # [B, P / 4, D] of a cache; pixel_values is then [B, P, 0]
    windows: Any  # `qwen_vision.Windows` of them, of each slot; () without pictures
    grids: Any  # int32 [B, pictures, 2], packed tokens (rows, columns): target, then conditions
    condition_mask: Any  # bool [B]
    roles: Any  # int32 [B, n]
    task: Any  # int32 [B]
    region: NotRequired[Any]  # float32 [B, N], weights of target tokens, with loss.region_weight
    record: NotRequired[Any]
    target_pixel_values: NotRequired[Any]  # float32 [B, P', 1176], padded
    target_windows: NotRequired[Any]  # `Windows` of the target, of each slot
    whole: NotRequired[Any]


class PaddedBatch(PaddedPrompt, Pictures):
    """A batch whose tokens are padded, and the pixels that are still to be encoded.

    With a cache they are encoded: pictures are [B, H, W, 0], and what is `Encoded` is there.
    """

    posterior: NotRequired[Any]
    latents: NotRequired[tuple[Any, ...]]


class Encoded(TypedDict):
    """What the autoencoder makes of the pictures of a batch (`training.step.Encoder`)."""

    # mean and standard deviation of the target's normalised latents, float32 [B, N, 4 C], padded
    posterior: tuple[Any, Any]
    latents: tuple[Any, ...]  # normalised latents of the condition pictures, likewise


class StepBatch(PaddedPrompt, Encoded):
    """What a step reads: all padded."""
