"""What the tiny generator is pretrained on: latents and text states, each computed once.

Used by pretrain_mmdit.py, so that a step of it is the transformer alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from common import SIZES, TINY

from qk_jax.data import prompts
from qk_jax.data.example import Example, TaskSettings
from qk_jax.data.synthesis import corpus, tasks
from qk_jax.models import mmdit, qwen_vl, rotary, vae
from qk_jax.pictures.roles import SOURCE
from qk_jax.weights.read import import_model

CONFIG = mmdit.PRESETS["tiny"]
LAW = rotary.PositionLaw("shifted", source_mode="translate")  # as configs/common.py has it
TOKENS = 16  # of the largest size; the others are padded to it, so that one batch holds all
MAX_TEXT = 32  # tokens of an instruction; the rest is cut
TEXT_STEP = 8  # a group's text is as long as a multiple of it
VLM_PIXELS = 112 * 112
CHUNK = 4096  # examples that are held as pictures at a time
SLOTS = 64  # of a batch that is encoded
VARIANTS = 4  # text-to-image examples of each cut-out, with their own wording and background
# Examples of the tasks with one picture, by chance from all that the training side makes.
PICTURES = {"reconstruction": 6_000, "transformation": 24_000, "editing": 36_000}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Encoded examples; arrays have a leading axis of length n.

    Attributes:
      prompts: the words, object [n].
      size: int [n], index into SIZES, of the target and of the source.
      mean, std: float32 [n, TOKENS, 64], posterior of the packed latents, normalised.
      source: float32 [n, S, 64], the same of the picture that is given, without noise; S is TOKENS
        or, for tasks without a picture, 0.
      text: float16 [n, T, 192], the VLM's states, right-aligned; mask: bool [n, T].
    """

    prompts: np.ndarray
    size: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    source: np.ndarray
    text: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, chosen: np.ndarray) -> Examples:
        """The examples with these numbers; their text is cut to the longest of them, rounded up to
        a multiple of TEXT_STEP."""
        longest = TEXT_STEP * math.ceil(int(self.mask[chosen].sum(1).max()) / TEXT_STEP)
        found = Examples(*(array[chosen] for array in vars(self).values()))
        text, mask = found.text[:, -longest:], found.mask[:, -longest:]
        return dataclasses.replace(found, text=text, mask=mask)

    def by_length(self) -> list[Examples]:
        """Groups of similar prompt length, so that short prompts cost little."""
        steps = -(-self.mask.sum(1) // TEXT_STEP)
        return [self.take(np.flatnonzero(steps == step)) for step in np.unique(steps)]

    def arrays(self) -> dict[str, jax.Array]:
        """What a step reads."""
        return {name: jnp.asarray(x) for name, x in vars(self).items() if name != "prompts"}


def join(parts: Iterable[Examples]) -> Examples:
    """Examples of one kind one after another."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Examples(*(np.concatenate(column) for column in columns))


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Packed tokens (rows, columns) of a picture of (height, width) pixels."""
    return size[0] // 16, size[1] // 16


@functools.cache
def token_positions() -> tuple[np.ndarray, np.ndarray]:
    """Positions of a target and of a source of its size, int32 [sizes, 2 TOKENS, 3], and which of
    a picture's tokens are real, bool [sizes, TOKENS]."""
    positions, real = [], []
    for size in SIZES:
        grid = grid_of(size)
        with jax.ensure_compile_time_eval():  # the first call may come while a step is traced
            found = rotary.image_positions(LAW, grid, (grid,), jnp.full((1, 1), SOURCE))
            at = np.split(np.asarray(found[0]), 2)
        rest = ((0, TOKENS - len(at[0])), (0, 0))
        positions.append(np.concatenate([np.pad(part, rest) for part in at]))
        real.append(np.arange(TOKENS) < len(at[0]))
    return np.stack(positions), np.stack(real)


class Encoder:
    """The frozen parts: pictures to latents, and words after a picture to states."""

    def __init__(self) -> None:
        vlm_config, vlm_params = import_model("vlm", TINY / "vlm")
        self.config, self.params = import_model("vae", TINY / "vae")
        vlm_model, autoencoder = qwen_vl.QwenVL(vlm_config), vae.VAE(self.config)
        self.states = functools.partial(
            jax.jit(vlm_model.apply, static_argnums=5), {"params": vlm_params}
        )
        self.moments = jax.jit(functools.partial(autoencoder.apply, method="encode"))
        self.pixels = jax.jit(functools.partial(autoencoder.apply, method="decode"))
        tokenizer = prompts.load_tokenizer(TINY / "tokenizer")
        self.layout = prompts.PromptBuilder(tokenizer, MAX_TEXT, 0, VLM_PIXELS)

    def texts(
        self, words: Sequence[str], pictures: Sequence[np.ndarray] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """States float16 [n, MAX_TEXT, D] at the words and their mask bool [n, MAX_TEXT].

        `pictures` is one for each prompt, uint8 [H, W, 3] of one size, or empty.
        """
        sizes = [pictures[0].shape[:2]] if len(pictures) else []
        grids = self.layout.grids(sizes)

        def encode(part: list[int]) -> tuple[np.ndarray, np.ndarray]:
            built = [self.layout.build(words[i], sizes) for i in part]
            shown = [prompts.pixel_values(pictures[i : i + 1], VLM_PIXELS) for i in part]
            ids, at, mask, text_mask = (
                np.stack([one[name] for one in built])
                for name in ("input_ids", "position_ids", "attention_mask", "text_mask")
            )
            hidden = self.states(ids, at, mask, np.stack(shown), grids)
            end = hidden.shape[1] - self.layout.tail_tokens
            return np.asarray(hidden[:, end - MAX_TEXT : end].astype(jnp.float16)), text_mask

        return in_batches(encode, len(words))

    def latents(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [H, W, 3] of one size -> packed mean and std, float32 [n, TOKENS, 64]."""

        def encode(part: list[int]) -> tuple[np.ndarray, np.ndarray]:
            x = np.stack([pictures[i] for i in part]).astype(np.float32) / 127.5 - 1
            mean, logvar = self.moments({"params": self.params}, x)
            edge = vae.normalize(mean + jnp.exp(0.5 * logvar), self.config)
            mean = vae.normalize(mean, self.config)
            return padded(mmdit.pack(mean)), padded(mmdit.pack(edge - mean))

        return in_batches(encode, len(pictures))

    def decode(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Normalised packed latents [n, TOKENS, 64] of one size -> uint8 [n, H, W, 3]."""
        height, width = SIZES[size]
        real = jnp.asarray(tokens[:, : math.prod(grid_of(SIZES[size]))])
        z = vae.denormalize(mmdit.unpack(real, height // 8, width // 8), self.config)
        x = np.asarray(self.pixels({"params": self.params}, z))
        return np.clip((x + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def padded(tokens: jax.Array) -> np.ndarray:
    """[B, N, 64] -> [B, TOKENS, 64]."""
    return np.pad(tokens, ((0, 0), (0, TOKENS - tokens.shape[1]), (0, 0)))


def in_batches(
    encode: Callable[[list[int]], tuple[np.ndarray, ...]], count: int
) -> tuple[np.ndarray, ...]:
    """`encode` of the numbers below `count`, SLOTS at a time; the last batch is filled with zeros,
    whose results are dropped, for one compiled shape."""
    parts = []
    for start in range(0, count, SLOTS):
        part = list(range(start, min(start + SLOTS, count)))
        parts.append(encode(part + [0] * (SLOTS - len(part))))
    return tuple(np.concatenate(column)[:count] for column in zip(*parts, strict=True))


def encode(encoder: Encoder, made: Sequence[Example]) -> Examples:
    """Latents and text states of examples with one source picture each, or with none."""
    count, shown = len(made), len(made[0].pictures)
    size = np.array([SIZES.index(example.target.shape[:2]) for example in made])
    mean, std = np.zeros((2, count, TOKENS, CONFIG.in_channels), np.float32)
    source = np.zeros((count, TOKENS * shown, CONFIG.in_channels), np.float32)
    text = np.zeros((count, MAX_TEXT, CONFIG.joint_attention_dim), np.float16)
    mask = np.zeros((count, MAX_TEXT), bool)
    for index in np.unique(size):
        (chosen,) = np.nonzero(size == index)
        given = [made[i].pictures[0] for i in chosen] if shown else []
        mean[chosen], std[chosen] = encoder.latents([made[i].target for i in chosen])
        text[chosen], mask[chosen] = encoder.texts([made[i].instruction for i in chosen], given)
        if shown:
            source[chosen] = encoder.latents(given)[0]
    words = np.array([example.instruction for example in made], object)
    return Examples(words, size, mean, std, source, text, mask)


def encode_all(encoder: Encoder, made: Iterable[Example]) -> Examples:
    """`encode` of any number of examples, of which few are held as pictures at a time."""
    made = iter(made)
    chunks = iter(lambda: list(itertools.islice(made, CHUNK)), [])
    return join(encode(encoder, chunk) for chunk in chunks)


def captioned(side: str, variants: int, limit: int | None = None) -> Iterator[Example]:
    """`variants` text-to-image examples of every picture of a corpus side, or the first `limit`."""
    subjects = corpus.Corpus(side)
    source = tasks.TextToImage(subjects, TaskSettings(sizes=SIZES))
    return (source[number] for number in range(variants * len(subjects))[:limit])


def edited(side: str, task: str, count: int) -> Iterator[Example]:
    """`count` examples of a task with one picture, spread over its records."""
    source = tasks.SOURCES[task](corpus.Corpus(side), TaskSettings(sizes=SIZES))
    order = np.random.default_rng(7).permutation(len(source))[:count]
    return (source[int(number)] for number in order)


def plain_squares(side: str, count: int) -> list[Example]:
    """At most `count` square pictures on white, all of different subjects, for retrieval."""
    found: dict[tuple[str, ...], Example] = {}
    for example in tasks.examples(side, "text_to_image", 120, size=SIZES[0], kind="plain"):
        found.setdefault(example.subjects, example)
    return list(found.values())[:count]
