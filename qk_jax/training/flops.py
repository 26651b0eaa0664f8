"""Model FLOPs of a training step, from the shapes of its parameters and of its batch.

A compiler's own count misses custom kernels and counts the body of a loop once. Here the matrix
products and convolutions are counted from shapes, 2 FLOPs per multiply-add; everything else is left
out, as in every MFU. A weight costs 2 * size * positions, where positions are the vectors that it
multiplies: once in the forward pass, once for the gradient of its input where that depends on
anything trained, and once for its own gradient where it is trained. A product of attention costs
as much again for the gradient of each factor. Masked attention is counted as if it were full.
Recomputation is not counted, nor is a product with a constant matrix, such as a permutation.
Pictures count with their own tokens, not with those that a batch is padded to (`padding`).

`tests/training/jaxpr_flops.py` counts the same in the traced gradient of the loss.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.base.types import Batch, PaddedBatch
from qk_jax.experiment.plan import Plan
from qk_jax.models.query_kontext import ModelConfig
from qk_jax.models.qwen_vision import VisionConfig, windows_of
from qk_jax.pictures.grids import MERGE, Grids, grid_of, picture_tokens, vision_size
from qk_jax.pictures.sizes import PACKED

# bfloat16 peak of one JAX device in TFLOP/s by device_kind (vendors' published figures; a TPU7x
# chip is two devices).
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}
OTHER = "other"  # what belongs to no tower: the projection of the alignment term
# Kinds of parameters, by the last part of their names: those of products, and those of sums,
# scales and look-ups.
WEIGHTS = frozenset({"kernel", "lora_a", "lora_b"})
NO_WEIGHTS = frozenset({"bias", "scale", "embedding"})


def peak(device: Any) -> float | None:
    """bfloat16 FLOP/s of one device, or None when it is not known."""
    tera = PEAK_TFLOPS.get(device.device_kind)
    return tera * 1e12 if tera else None


def of_step(plan: Plan, batch: Batch | PaddedBatch) -> int:
    """Model FLOPs of one training step on a batch (arrays or shapes), padded or not."""
    return sum(by_tower_of_step(plan, batch).values())


def by_tower_of_step(plan: Plan, batch: Batch | PaddedBatch) -> Counter[str]:
    """Model FLOPs of one training step by the towers of `sharding.TOWERS`, and OTHER.

    Raises:
      ValueError: a parameter is unknown here, as after a module has been renamed.
    """
    shapes = {name: leaf.shape for name, leaf in trees.flatten(plan.everything).items()}
    rest = {name for name in shapes if _kind(name) not in NO_WEIGHTS}
    count = _Count(shapes, frozenset(trees.flatten(plan.params)), Counter(), rest)
    config = plan.model.config
    length, window = _lengths(plan, batch)
    reached = _context(count, config, batch, length, window)
    _generator(count, config, batch, window + config.num_queries, reached)
    encoded = () if "posterior" in batch else _encoded(config, batch)
    _encoder(count, config.vae.downscale, [x.shape[:3] for x in encoded])
    for unused in ("vlm/lm_head/", "vae/(decoder|post_quant_conv)/"):
        count.products(unused, 0)
    if rest:
        raise ValueError(
            f"the FLOPs of {', '.join(sorted(rest))} are not counted; add them in training/flops.py"
        )
    return +count.work


@dataclasses.dataclass(frozen=True)
class _Count:
    """A count in progress.

    Attributes:
      shapes: of all parameters, by name.
      trained: names of the trained parameters.
      work: FLOPs by tower so far.
      rest: names of the weights that have not been counted yet.
    """

    shapes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]
    work: Counter[str]
    rest: set[str]

    def named(self, pattern: str) -> list[str]:
        """Parameters whose names begin with a regex; adapters have the names of what they adapt."""
        return [name for name in self.shapes if re.match(pattern, name.removeprefix("lora/"))]

    def trains(self, pattern: str) -> bool:
        """Whether any of the parameters is trained."""
        return not self.trained.isdisjoint(self.named(pattern))

    def products(self, pattern: str, positions: int, reached: bool = False) -> bool:
        """Adds the products of parallel layers, each with an input of so many positions.

        Args:
          pattern: regex of the beginning of their parameters' names.
          positions: vectors that each weight multiplies; of a convolution, those it returns.
          reached: whether the input depends on anything trained, and so has a gradient.

        Returns:
          Whether the output does.
        """
        for name in self.named(pattern):
            module, kind = name.rpartition("/")[0], _kind(name)
            if kind not in WEIGHTS:
                continue
            entered = reached or (kind == "lora_b" and f"{module}/lora_a" in self.trained)
            passes = 1 + entered + (name in self.trained)
            tower = OTHER if name.startswith("alignment/") else sharding.tower(name)
            self.work[tower] += passes * 2 * positions * math.prod(self.shapes[name])
            self.rest.discard(name)
        return reached or self.trains(pattern)

    def attention(self, tower: str, pairs: int, width: int, reached: bool = False) -> None:
        """Adds the two products of attention between so many pairs of a query and a key.

        width: channels of all query heads together.
        """
        self.work[tower] += (3 if reached else 1) * 2 * 2 * pairs * width


def _kind(name: str) -> str:
    return name.rpartition("/")[2]


def _encoded(config: ModelConfig, batch: Batch | PaddedBatch) -> tuple[Any, ...]:
    """The pictures that reach the generator as latents."""
    return (batch["target"], *(batch["conditions"] if config.condition_latents else ()))


def _lengths(plan: Plan, batch: Batch | PaddedBatch) -> tuple[int, int]:
    """Tokens of the VLM's sequence and of the text window, without those that pad pictures."""
    shown = plan.model.config.vision_grids([x.shape[1:3] for x in batch["conditions"]])
    spare = batch["pixel_values"].shape[1] // MERGE**2 - picture_tokens(shown)
    window = batch["text_mask"].shape[1] - (spare if plan.config.prompt.keep_pictures else 0)
    return batch["input_ids"].shape[1] - spare, window


def _context(
    count: _Count, config: ModelConfig, batch: Batch | PaddedBatch, length: int, window: int
) -> bool:
    """VLM, connector and alignment term; whether the context depends on anything trained."""
    text, examples = config.vlm.text, batch["input_ids"].shape[0]
    grids = config.vision_grids([picture.shape[1:3] for picture in batch["conditions"]])
    seen = _vision(count, config.vlm.vision, examples, () if "features" in batch else grids)
    # The queries, and the words and pictures before them, are two segments: the latter have no
    # backward pass where nothing in the language model is trained.
    queries, layers = config.num_queries, "vlm/language_model/layers/"
    words = length - queries
    words_reached = seen or count.trains("vlm/language_model/embed_tokens/") or count.trains(layers)
    queries_reached = words_reached or count.trains("queries/")
    for tokens, keys, reached in (
        (words, words, words_reached), (queries, length, queries_reached)
    ):  # fmt: skip
        count.products(layers, examples * tokens, reached)
        pairs = text.num_hidden_layers * examples * tokens * keys
        count.attention("text", pairs, text.hidden_size, reached)
    reached = queries_reached or count.trains("vlm/language_model/norm/")
    if "target_pixel_values" in batch:
        teacher = dataclasses.replace(count, trained=frozenset())  # no gradient enters it
        height, width = batch["target"].shape[1:3]
        shown = vision_size(height, width, config.vlm_pixels)
        _vision(teacher, config.vlm.vision, examples, (grid_of(*shown),))
        count.products("alignment/", examples, reached)
    states = examples * (window + queries)
    reached = count.products("connector/(layers_)?fc1/", states, reached)
    return count.products("connector/(layers_)?fc2/", states, reached)


def _vision(count: _Count, config: VisionConfig, examples: int, grids: Grids) -> bool:
    """The vision tower on pictures of `grids`; whether its features depend on anything trained."""
    patches, blocks = sum(map(math.prod, grids)), "vlm/visual/blocks/"
    reached = count.products("vlm/visual/patch_embed/", examples * patches)
    reached = reached or count.trains(blocks)
    count.products(blocks, examples * patches, reached)
    if grids:
        # Each block branches into attention within windows and within pictures; of the two, the
        # more expensive is counted in every block.
        windows, longest = windows_of(grids, config.window_size).slots.shape
        pairs = config.depth * examples * max(patches**2, windows * longest**2)
        count.attention("vision", pairs, config.hidden_size, reached)
    reached = reached or count.trains("vlm/visual/merger/ln_q/")
    for layer in ("mlp_0", "mlp_2"):
        tokens = examples * patches // MERGE**2
        reached = count.products(f"vlm/visual/merger/{layer}/", tokens, reached)
    return reached and bool(grids)


def _generator(
    count: _Count, config: ModelConfig, batch: Batch | PaddedBatch, context: int, reached: bool
) -> None:
    """The MMDiT; `reached` says whether its `context` tokens depend on anything trained."""
    pictures, examples = _encoded(config, batch), batch["target"].shape[0]
    tokens = sum(math.prod(side // PACKED for side in x.shape[1:3]) for x in pictures)
    # The time t = 0 of clean pictures is embedded once for all examples.
    times = examples + (config.mmdit.zero_cond_t and len(pictures) > 1)
    embedder, blocks = "mmdit/time_text_embed/timestep_embedder/", "mmdit/transformer_blocks/"
    time = count.products(embedder + "linear_1/", times)
    time = count.products(embedder + "linear_2/", times, time)
    image = count.products("mmdit/img_in/", examples * tokens)
    reached = reached or count.trains("mmdit/txt_norm/")
    reached = count.products("mmdit/txt_in/", examples * context, reached)
    # Streams that enter the first block without a gradient have one in the loop over the blocks.
    reached = reached or image or time or count.trains(blocks)
    count.products(blocks + "img_mod_1/", times, time)
    count.products(blocks + "txt_mod_1/", examples, time)
    for stream, layers in (
        (tokens, "attn/to_([qkv]|out_0)|img_mlp"),
        (context, "attn/(add_[qkv]_proj|to_add_out)|txt_mlp"),
    ):
        count.products(f"{blocks}({layers})/", examples * stream, reached)
    pairs = config.mmdit.num_layers * examples * (tokens + context) ** 2
    count.attention("mmdit", pairs, config.mmdit.width, reached)
    reached = count.products("mmdit/norm_out/", examples, time) or reached
    count.products("mmdit/proj_out/", examples * tokens, reached)


def _encoder(count: _Count, downscale: int, pictures: Sequence[tuple[int, int, int]]) -> None:
    """The encoder of the autoencoder, always frozen, on pictures of [B, H, W] pixels."""
    encoder, positions = "vae/encoder/", sum(map(math.prod, pictures))
    count.products(encoder + "conv_in/", positions)
    index = 0
    while count.named(block := f"{encoder}down_blocks_{index}/"):
        count.products(block + r"(resnets_\d+/)?conv", positions)
        if count.named(strided := block + "(downsamplers_0/conv|resample_1)/"):
            positions //= 4
            count.products(strided, positions)
        index += 1
    count.products("vae/(encoder/(mid_block|conv_out)|quant_conv)/", positions)
    if count.named(encoder + "mid_block/attentions_0/"):
        pairs = sum(b * (h * w // downscale**2) ** 2 for b, h, w in pictures)
        count.attention("vae", pairs, count.shapes[encoder + "conv_out/kernel"][-2])
