"""What the VLM reads: pictures as patches, and a sequence of tokens around an instruction.

A sequence is left-padded and ends with the K queries:

    [pad | system turn | <|im_start|>user\\n | Picture 1 (source): <|vision_start|>... | text |
     <|im_end|>\\n<|im_start|>assistant\\n | K queries]

The *window* is what the generator reads of it besides the queries: the text, and with some
templates the pictures before and the tail behind it. The length depends on the picture sizes only,
and window and queries are static slices counted from the end.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from PIL import Image

from qk_jax.base import buckets, files, hub
from qk_jax.base.errors import InputError
from qk_jax.base.types import PaintingBatch
from qk_jax.data.templates import TAIL, PromptTemplate
from qk_jax.pictures.grids import (
    MERGE,
    PATCH,
    PATCH_DIM,
    Grids,
    grid_of,
    mrope_positions,
    picture_tokens,
    rounded_size,
    vision_size,
)
from qk_jax.pictures.roles import REFERENCE, SOURCE

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

NEEDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
)  # fmt: skip


def load_tokenizer(folder: files.PathLike) -> Any:
    """The transformers tokenizer of a Hugging Face folder, from disk only.

    Raises:
      InputError: the folder has no tokenizer.json, it cannot be read, or it lacks a Qwen2.5-VL
        special token.
    """
    # Only the tokenizer is used, so the advice to install PyTorch is of no use.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Slow to import, and only needed here; AutoTokenizer, which would take this class, imports
    # PyTorch too where it is installed.
    from transformers import Qwen2Tokenizer

    folder = files.Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json; give the folder of a Qwen2.5-VL tokenizer"
        )
    try:
        with buckets.staged_folder(folder, (".json", ".txt", ".jinja")) as here:
            tokenizer = Qwen2Tokenizer.from_pretrained(str(here), local_files_only=True)
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
      InputError: the size is no multiple of 28.
    """
    rows, columns = grid_of(*size)
    if image.shape[:2] != tuple(size):
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    x = (image.astype(np.float32) * np.float32(1 / 255) - CLIP_MEAN) / CLIP_STD
    x = x.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH * PATCH)
    return np.repeat(x, 2, axis=2).reshape(rows * columns, PATCH_DIM)


def pixel_values(pictures: Sequence[np.ndarray], vlm_pixels: int, multiple: int = 0) -> np.ndarray:
    """Pictures uint8 [h, w, 3], one after another at their vision size: float32 [P, 1176].

    With a multiple they are first resized to `rounded_size` (PIL Lanczos), as the edit pipelines
    of Qwen-Image do it.
    """
    parts = [np.zeros((0, PATCH_DIM), np.float32)]
    for picture in pictures:
        height, width = picture.shape[:2]
        shown = vision_size(height, width, vlm_pixels, multiple)
        if multiple:
            first = rounded_size(height, width, vlm_pixels, multiple)
            if first != (height, width):
                image = Image.fromarray(picture)
                picture = np.asarray(image.resize(first[::-1], Image.Resampling.LANCZOS))
        parts.append(patches(picture, shown))
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """Builds sequences of tokens of a fixed length.

    Attributes:
      tokenizer: of `load_tokenizer`.
      max_text: T, at most so many tokens of the user's text.
      queries: K, tokens at the end.
      vlm_pixels: area at which the VLM sees a picture (`pictures.grids.vision_size`).
      template: the words around text and pictures.
    """

    tokenizer: Any
    max_text: int
    queries: int
    vlm_pixels: int
    template: PromptTemplate = PromptTemplate()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PromptBuilder:
        """As an experiment config says. Raises InputError when it has no tokenizer."""
        model = config["model"]
        origin = config["data"]["tokenizer"] or config["init"]["vlm"]
        if not origin:
            raise InputError("no tokenizer; give its folder as config.data.tokenizer")
        tokenizer = load_tokenizer(hub.component_folder(origin, "tokenizer"))
        return cls(
            tokenizer,
            model["max_text"],
            model["num_queries"],
            model["vlm_pixels"],
            PromptTemplate(**config["prompt"]),
        )

    @functools.cached_property
    def _openings(self) -> dict[bool, np.ndarray]:
        """By whether there are pictures."""
        return {
            pictures: self._encode(self.template.opening(pictures)) for pictures in (True, False)
        }

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
        area, multiple = self.vlm_pixels, self.template.picture_multiple
        return tuple(grid_of(*vision_size(*size, area, multiple)) for size in picture_sizes)

    def _picture(self, number: int, role: int, grid: tuple[int, int]) -> np.ndarray:
        """Ids of one condition picture and of the words before it."""
        shown = self._encode(self.template.picture(number, role))
        where = int(np.flatnonzero(shown == self.image_token_id)[0])
        tokens = np.full(picture_tokens((grid,)), self.image_token_id, np.int32)
        return np.concatenate([shown[:where], tokens, shown[where + 1 :]])

    def _pictures(self, grids: Grids, roles: Sequence[int]) -> np.ndarray:
        numbered = enumerate(zip(roles, grids, strict=True), start=1)
        parts = [self._picture(number, role, grid) for number, (role, grid) in numbered]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    def _most_picture_tokens(self, grids: Grids) -> int:
        """The tokens of `_pictures` in the wordiest roles: the length does not depend on them."""
        return sum(
            max(len(self._picture(number, role, grid)) for role in (SOURCE, REFERENCE))
            for number, grid in enumerate(grids, start=1)
        )

    def window(self, picture_sizes: Sequence[tuple[int, int]]) -> int:
        """W, the tokens of the window for pictures of (H, W) pixels."""
        return self._window(self._most_picture_tokens(self.grids(picture_sizes)))

    def _window(self, longest: int) -> int:
        """W for at most so many tokens of pictures."""
        kept = self.tail_tokens if self.template.keep_tail else 0
        return self.max_text + kept + (longest if self.template.keep_pictures else 0)

    def encode_text(self, text: str, strict: bool = False) -> np.ndarray:
        """Ids [n], n <= T, of a user's text; special tokens in it are ordinary characters.

        Raises:
          InputError: it is not valid Unicode, or, when strict, has more than T tokens.
        """
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

    def unknown(self, text: str) -> str:
        """The characters of a text that the tokenizer does not know, each once.

        Byte-level BPE reads everything, at the worst a byte at a time. Unknown is a character of
        several bytes each of which is a token of its own: none was merged with a neighbour, so the
        texts that the tokenizer was trained on had no use for it. Those are emoji and letters of
        other scripts, and with a small vocabulary accented ones too.

        Args:
          text: valid Unicode.
        """
        plain = self._plain
        read = plain.normalizer.normalize_str(text) if plain.normalizer else text
        # A token is written with one letter for each of its bytes.
        ends = {0, *itertools.accumulate(map(len, plain.encode(text).tokens))}
        found, start = [], 0
        for character in read:
            end = start + len(character.encode())
            if end - start > 1 and ends.issuperset(range(start, end + 1)):
                found.append(character)
            start = end
        return "".join(dict.fromkeys(found))

    def build(
        self,
        text: str,
        picture_sizes: Sequence[tuple[int, int]] = (),
        roles: Sequence[int] = (),
        pictures: bool = True,
    ) -> dict[str, np.ndarray]:
        """One sequence, whose length S depends on `picture_sizes` only.

        Args:
          text: the user's words; more than T tokens are cut.
          picture_sizes: (H, W) of the condition pictures in pixels, in order.
          roles: SOURCE or REFERENCE for each of them.
          pictures: False drops the pictures from the sequence, which keeps its length.

        Returns:
          input_ids int32 [S], attention_mask bool [S], position_ids int32 [3, S] (M-RoPE) and
          text_mask bool [W], right-aligned like the window, which ends before the queries, or
          before the tail where the template does not keep it.

        Raises:
          InputError: see `encode_text`; or a picture that cannot be shown.
        """
        grids, seen = self.grids(picture_sizes), pictures and bool(picture_sizes)
        longest = self._most_picture_tokens(grids)
        shown = self._pictures(grids, roles) if seen else np.zeros(0, np.int32)
        words = self.encode_text(self.template.instruction(text, roles if seen else ()))
        queries = np.full(self.queries, self.pad_id, np.int32)
        used = np.concatenate([self._openings[seen], shown, words, self._tail, queries])
        opening = len(self._openings[False])
        if picture_sizes:
            opening = max(map(len, self._openings.values()))
        length = opening + longest + self.max_text + self.tail_tokens + self.queries
        input_ids = np.full(length, self.pad_id, np.int32)
        input_ids[length - len(used) :] = used
        mask = np.arange(length) >= length - len(used)
        window, template = self._window(longest), self.template
        read = len(words) + template.keep_pictures * len(shown)
        read += template.keep_tail * self.tail_tokens
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": mrope_positions(
                input_ids[None], mask[None], grids, self.image_token_id
            )[0],
            "text_mask": np.arange(window) >= window - read,
        }

    def batch(
        self,
        texts: Sequence[str],
        pictures: Sequence[Sequence[np.ndarray]],
        roles: Sequence[Sequence[int]],
        shown: Sequence[bool],
    ) -> PaintingBatch:
        """What the model is asked in B slots, as numpy arrays.

        Args:
          texts: the user's words of each slot.
          pictures: condition pictures uint8 [h, w, 3] of each, of the same sizes in all slots.
          roles: SOURCE or REFERENCE for each picture.
          shown: False drops the pictures of a slot.
        """
        sizes = [picture.shape[:2] for picture in pictures[0]]
        slots = zip(texts, roles, shown, strict=True)
        built = [self.build(text, sizes, kinds, x) for text, kinds, x in slots]
        area, multiple = self.vlm_pixels, self.template.picture_multiple
        return PaintingBatch(
            input_ids=np.stack([x["input_ids"] for x in built]),
            attention_mask=np.stack([x["attention_mask"] for x in built]),
            position_ids=np.stack([x["position_ids"] for x in built]),
            text_mask=np.stack([x["text_mask"] for x in built]),
            pixel_values=np.stack([pixel_values(x, area, multiple) for x in pictures]),
            conditions=tuple(map(np.stack, zip(*pictures, strict=True))),
            condition_mask=np.array(shown),
            roles=np.array(roles, np.int32).reshape(len(texts), len(sizes)),
        )


def text_tokens(config: Mapping[str, Any], pictures: int) -> int:
    """T, the text tokens of a batch with so many condition pictures.

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
