"""How many examples a batch has, by its number of condition pictures.

A batch is of one number of condition pictures, and takes memory and time by its tokens. With
config.data.tokens a batch that would have more tokens has fewer examples instead of the whole run
having the batch that fits the most pictures.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qk_jax.base.errors import InputError
from qk_jax.data import settings
from qk_jax.data.prompts import PromptBuilder, text_tokens
from qk_jax.pictures.fitting import Size
from qk_jax.pictures.roles import SOURCE
from qk_jax.pictures.sizes import PACKED


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Condition pictures -> examples of a global batch.

    Attributes:
      most: examples of any other number of condition pictures.
      of: of these numbers.
    """

    most: int
    of: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def __call__(self, pictures: int) -> int:
        return self.of.get(pictures, self.most)

    def all(self) -> set[int]:
        """Every size that a batch may have."""
        return {*self.of.values()} or {self.most}


def tokens_of(model: Mapping[str, Any], sequence: int, window: int, shape: Sequence[Size]) -> int:
    """Tokens of an example: those of the VLM's sequence, and of the generator's.

    Args:
      model: config.model.
      sequence: of the VLM.
      window: tokens of the text window, which the generator reads beside the kontext.
      shape: (H, W) of the target and of the condition pictures.
    """
    generated = shape if model["condition_latents"] else shape[:1]
    pictures = sum(math.prod(size) // PACKED**2 for size in generated)
    return sequence + window + model["num_queries"] + pictures


def fitting(data: Mapping[str, Any], pictures: int, tokens: int) -> int:
    """Examples of a batch: config.data.batch, halved until it has at most config.data.tokens.

    Args:
      data: config.data. Checkpoints from before there was a budget have none.
      pictures: condition pictures of each example, for the error.
      tokens: of each example.

    Raises:
      InputError: an odd batch is still too large.
    """
    found, budget = data["batch"], data.get("tokens", 0)
    while budget and found * tokens > budget and found % 2 == 0:
        found //= 2
    if budget and found * tokens > budget:
        raise InputError(
            f"config.data.tokens is {budget:,}, and a batch of {found} with {pictures} condition "
            f"pictures has {found * tokens:,} tokens of VLM and generator; raise it"
            + (", or make config.data.batch a power of two" if found > 1 else "")
        )
    return found


def batch_sizes(config: Mapping[str, Any], prompts: PromptBuilder) -> BatchSizes:
    """Examples of a training batch: for each number of condition pictures those of the shape with
    the most tokens that the config may train.

    Args:
      config: of the run.
      prompts: of the run.

    Raises:
      InputError: config.data.tokens is too small.
    """
    data, most = config["data"], Counter[int]()
    if not data.get("tokens", 0):
        return BatchSizes(data["batch"])
    for shape in settings.shapes(config):
        pictures = len(shape) - 1
        own = dataclasses.replace(prompts, max_text=text_tokens(config, pictures))
        built = own.build("", shape[1:], [SOURCE] * pictures)
        length, window = len(built["input_ids"]), len(built["text_mask"])
        most[pictures] = max(most[pictures], tokens_of(config["model"], length, window, shape))
    return BatchSizes(data["batch"], {n: fitting(data, n, tokens) for n, tokens in most.items()})
