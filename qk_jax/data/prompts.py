"""What the VLM reads: pictures as patches, and one row of tokens around an instruction.

A row is left-padded and ends with the query slots:

    [pad | system turn | <|im_start|>user\\n | Picture 1: <|vision_start|>...<|vision_end|> ... |
     text | <|im_end|>\\n<|im_start|>assistant\\n | K query slots]

Its length depends on the picture sizes only, so a bucket compiles once, and both the text window
and the queries are static slices counted from the end.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from PIL import Image

from qk_jax.base import hub
from qk_jax.base.errors import InputError
from qk_jax.pictures.grids import (
    MERGE,
    PATCH,
    PATCH_DIM,
    Grids,
    grid_of,
    mrope_positions,
    picture_tokens,
    vision_size,
)

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

SYSTEM = "You are a helpful assistant."
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
NEEDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
)  # fmt: skip


# A conversation as the training laid it out: pictures are numbered, the system prompt comes first.
CHAT = r"""{%- set shown = namespace(pictures=0) -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\n' + SYSTEM + '<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{%- set shown.pictures = shown.pictures + 1 -%}
{{ 'Picture ' ~ shown.pictures ~ ': <|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


def chat_template(system: str = SYSTEM) -> str:
    """The layout of prompts as a Jinja template for `apply_chat_template` of transformers."""
    return CHAT.replace("SYSTEM", json.dumps(system, ensure_ascii=False))


def load_tokenizer(folder: str | pathlib.Path) -> Any:
    """The transformers tokenizer of a Hugging Face folder, from disk only.

    Raises:
      InputError: the folder has no tokenizer.json, it cannot be read, or it lacks a Qwen2.5-VL
        special token.
    """
    # Only the tokenizer is used: that PyTorch is missing is no news to anybody.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # slow to import, and only needed here

    folder = pathlib.Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json; give the folder of a Qwen2.5-VL tokenizer"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of tokenizers, json or transformers, without a common class
        raise InputError(f"the tokenizer in {folder} cannot be read: {error}") from error
    missing = [token for token in NEEDED if token not in tokenizer.get_vocab()]
    if missing:
        raise InputError(f"the tokenizer in {folder} lacks {missing}; it is not Qwen2.5-VL's")
    return tokenizer


def patches(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture as the vision tower reads it, equal to Qwen2VLImageProcessorPil at that size.

    Args:
      image: uint8 [H, W, 3].
      size: (height, width) to resize to (PIL bicubic), multiples of 28.

    Returns:
      float32 [P, 1176], patches in merge-block order, each (channel, frame twice, 14, 14).

    Raises:
      InputError: the picture is not uint8 RGB, or the size no multiple of 28.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise InputError(f"a picture is {image.dtype}{list(image.shape)}; give uint8 [H, W, 3]")
    rows, columns = grid_of(*size)
    if image.shape[:2] != tuple(size):
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    x = (image.astype(np.float32) * np.float32(1 / 255) - CLIP_MEAN) / CLIP_STD
    x = x.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH * PATCH)
    return np.repeat(x, 2, axis=2).reshape(rows * columns, PATCH_DIM)


def pixel_values(pictures: Sequence[np.ndarray], vlm_pixels: int) -> np.ndarray:
    """Pictures uint8 [h, w, 3], one after another at their vision size: float32 [P, 1176]."""
    shown = [patches(x, vision_size(*x.shape[:2], vlm_pixels)) for x in pictures]
    return np.concatenate([np.zeros((0, PATCH_DIM), np.float32), *shown])


@dataclasses.dataclass(frozen=True)
class PromptLayout:
    """Builds rows of tokens of a fixed shape.

    Attributes:
      tokenizer: of `load_tokenizer`.
      max_text: T, at most so many tokens of the user's text.
      queries: K, slots at the end of the row.
      vlm_pixels: area at which the VLM sees a picture (`pictures.grids.vision_size`).
      system: the system prompt.
    """

    tokenizer: Any
    max_text: int
    queries: int
    vlm_pixels: int
    system: str = SYSTEM

    @functools.cached_property
    def _prefix(self) -> np.ndarray:
        return self._encode(f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n")

    @functools.cached_property
    def _tail(self) -> np.ndarray:
        return self._encode(TAIL)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without added tokens, to which `<|im_end|>` is ordinary text."""
        whole = self.tokenizer.backend_tokenizer
        plain = tokenizers.Tokenizer(whole.model)
        plain.normalizer, plain.pre_tokenizer = whole.normalizer, whole.pre_tokenizer
        return plain

    @functools.cached_property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    @functools.cached_property
    def pad_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids("<|endoftext|>")

    @property
    def tail_tokens(self) -> int:
        """Tokens between the text and the queries."""
        return len(self._tail)

    def _encode(self, template: str) -> np.ndarray:
        """Ids of our own text, in which special tokens count."""
        return np.asarray(self.tokenizer.encode(template, add_special_tokens=False), np.int32)

    def grids(self, picture_sizes: Sequence[tuple[int, int]]) -> Grids:
        """Patches (rows, columns) of pictures of (H, W) pixels as the VLM sees them."""
        shown = (vision_size(*size, self.vlm_pixels) for size in picture_sizes)
        return tuple(grid_of(*size) for size in shown)

    def length(self, picture_sizes: Sequence[tuple[int, int]]) -> int:
        """S, the length of every row with pictures of these (H, W)."""
        fixed = len(self._prefix) + self.tail_tokens + self.queries
        return fixed + len(self._pictures(self.grids(picture_sizes))) + self.max_text

    def _pictures(self, grids: Grids) -> np.ndarray:
        parts = [np.zeros(0, np.int32)]
        for number, grid in enumerate(grids, start=1):
            shown = self._encode(f"Picture {number}: <|vision_start|><|image_pad|><|vision_end|>")
            where = int(np.flatnonzero(shown == self.image_token_id)[0])
            slots = np.full(picture_tokens((grid,)), self.image_token_id, np.int32)
            parts += [shown[:where], slots, shown[where + 1 :]]
        return np.concatenate(parts)

    def encode_text(self, text: str, strict: bool = False) -> np.ndarray:
        """Ids [n], n <= T, of a user's text; special tokens in it are ordinary characters.

        Raises:
          InputError: it is no string, or, when strict, has more than T tokens.
        """
        if not isinstance(text, str):
            raise InputError(f"a prompt is {type(text).__name__} {text!r:.60}; give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # lone surrogates, which no tokenizer can read
            raise InputError(f"a prompt is not valid Unicode: {error}") from error
        ids = np.asarray(self._plain.encode(text).ids, np.int32)
        if strict and len(ids) > self.max_text:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the model reads {self.max_text}; "
                f"shorten {text[:40]!r}..."
            )
        return ids[: self.max_text]

    def build(
        self,
        text: str,
        picture_sizes: Sequence[tuple[int, int]] = (),
        pictures: bool = True,
        strict: bool = False,
    ) -> dict[str, np.ndarray]:
        """One row of the static length S = `length(picture_sizes)`.

        Args:
          text: the user's words.
          picture_sizes: (H, W) of the condition pictures in pixels, in order.
          pictures: False drops the pictures from this row, which keeps its length.
          strict: a text of more than T tokens is an error instead of being cut.

        Returns:
          input_ids int32 [S], attention_mask bool [S], position_ids int32 [3, S] (M-RoPE) and
          text_mask bool [T], right-aligned like the text window [S - K - tail - T, S - K - tail).

        Raises:
          InputError: see `encode_text`; or a picture that cannot be shown.
        """
        grids = self.grids(picture_sizes)
        shown = self._pictures(grids)
        words = self.encode_text(text, strict)
        slots = np.full(self.queries, self.pad_id, np.int32)
        content = [self._prefix, *([shown] if pictures else []), words, self._tail, slots]
        row = np.concatenate(content)
        whole = len(self._prefix) + len(shown) + self.max_text + self.tail_tokens + self.queries
        input_ids = np.full(whole, self.pad_id, np.int32)
        input_ids[whole - len(row) :] = row
        mask = np.arange(whole) >= whole - len(row)
        positions = mrope_positions(input_ids[None], mask[None], grids, self)[0]
        text_mask = np.arange(self.max_text) >= self.max_text - len(words)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": positions,
            "text_mask": text_mask,
        }


def text_tokens(config: Mapping[str, Any], pictures: int) -> int:
    """T, the text tokens of a batch's rows with so many condition pictures.

    Raises:
      InputError: config.data.text_tokens asks for more than the model reads, or for none.
    """
    table, most = config["data"]["text_tokens"], config["model"]["max_text"]
    if not table:
        return most
    count = table[min(pictures, len(table) - 1)]
    if not 0 < count <= most:
        raise InputError(
            f"config.data.text_tokens has {count} for {pictures} pictures; give 1 to "
            f"config.model.max_text = {most}"
        )
    return count


def make_layout(config: Mapping[str, Any]) -> PromptLayout:
    """The layout of token rows that a config asks for. Raises: InputError (no tokenizer)."""
    model = config["model"]
    place = config["data"]["tokenizer"] or config["init"]["vlm"]
    if not place:
        raise InputError("no tokenizer; give its folder as config.data.tokenizer")
    tokenizer = load_tokenizer(hub.component_folder(place, "tokenizer"))
    return PromptLayout(tokenizer, model["max_text"], model["num_queries"], model["vlm_pixels"])
