"""What the tiny generator is pretrained on: latents and text states, each computed once.

Used by pretrain_mmdit.py, so that a step of it is the transformer alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.data.example import Example, TaskSettings
from qk_jax.data.synthesis import corpus, tasks
from qk_jax.models import mmdit, qwen_vl, rotary, vae
from qk_jax.pictures.roles import SOURCE
from qk_jax.weights.read import import_vae, import_vlm

CONFIG = mmdit.PRESETS["tiny"]
LAW = rotary.PositionLaw("shifted", source_mode="translate")  # as configs/common.py has it
SIZES = ((64, 64), (48, 80), (80, 48))  # (height, width) of the targets
TOKENS = 16  # of the largest size; the others are padded to it, so that one batch holds all
MAX_TEXT = 32  # tokens of an instruction; the rest is cut
TEXT_STEP = 8  # a group's text is as long as a multiple of it
VLM_PIXELS = 112 * 112
CHUNK = 4096  # examples that are held as pictures at a time
VARIANTS = 4  # text-to-image examples of each cut-out, with their own wording and background
# Examples of the tasks with one picture, by chance from all that the training side makes.
PICTURES = {"reconstruction": 6_000, "transformation": 24_000, "editing": 36_000}


@dataclasses.dataclass(frozen=True)
class Examples:
    """Pictures with prompts; arrays have a leading axis of length n.

    Attributes:
      prompts: the words.
      record: int [n], number of the example in its task; one cut-out has several.
      size: int [n], index into SIZES, of the target and of the source.
      mean, std: float32 [n, TOKENS, 64], posterior of the packed latents, normalised.
      source: float32 [n, S, 64], the same of the picture that is given, without noise; S is TOKENS
        or, for tasks without a picture, 0.
      text: float16 [n, T, 192], the VLM's states, right-aligned; mask: bool [n, T].
    """

    prompts: tuple[str, ...]
    record: np.ndarray
    size: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    source: np.ndarray
    text: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> Examples:
        """The examples with these numbers; their text is cut to the longest of them, rounded up to
        a multiple of TEXT_STEP."""
        longest = TEXT_STEP * math.ceil(int(self.mask[rows].sum(1).max()) / TEXT_STEP)
        arrays = {
            field.name: getattr(self, field.name)[rows]
            for field in dataclasses.fields(self)
            if field.name != "prompts"
        }
        for name in ("text", "mask"):
            arrays[name] = arrays[name][:, -longest:]
        return Examples(prompts=tuple(self.prompts[row] for row in rows), **arrays)


def join(parts: Sequence[Examples]) -> Examples:
    """Examples of one kind one after another."""
    words = tuple(itertools.chain.from_iterable(part.prompts for part in parts))
    names = [field.name for field in dataclasses.fields(Examples) if field.name != "prompts"]
    return Examples(words, **{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def by_length(data: Examples) -> list[Examples]:
    """The examples in groups of similar prompt length, so that short prompts cost little."""
    steps = -(-data.mask.sum(1) // TEXT_STEP)
    return [data.take(np.flatnonzero(steps == step)) for step in np.unique(steps)]


def device_rows(data: Examples) -> dict[str, jax.Array]:
    """The arrays that a step reads."""
    names = ("size", "mean", "std", "source", "text", "mask")
    return {name: jnp.asarray(getattr(data, name)) for name in names}


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Packed tokens (rows, columns) of a picture of (height, width) pixels."""
    return size[0] // 16, size[1] // 16


@functools.cache
def places() -> tuple[np.ndarray, np.ndarray]:
    """Positions of a target and of a source of its size, int32 [sizes, 2 TOKENS, 3], and which of
    a picture's tokens are real, bool [sizes, TOKENS]."""
    positions, real = [], []
    roles = np.full((1, 1), SOURCE)
    for size in SIZES:
        grid = grid_of(size)
        with jax.ensure_compile_time_eval():  # the first call may come while a step is traced
            at = np.split(np.asarray(rotary.image_positions(LAW, grid, (grid,), roles)[0]), 2)
        rest = ((0, TOKENS - len(at[0])), (0, 0))
        positions.append(np.concatenate([np.pad(part, rest) for part in at]))
        real.append(np.arange(TOKENS) < len(at[0]))
    return np.stack(positions), np.stack(real)


class Encoder:
    """The frozen parts: pictures to latents, and words after a picture to states."""

    def __init__(self, vlm: pathlib.Path, tokens: pathlib.Path, autoencoder: pathlib.Path):
        vlm_config, self.vlm_params = import_vlm(vlm)
        self.vae_config, self.vae_params = import_vae(autoencoder)
        if vlm_config.text.hidden_size != CONFIG.joint_attention_dim:
            raise InputError(
                f"{vlm} has states of {vlm_config.text.hidden_size} channels, the transformer "
                f"reads {CONFIG.joint_attention_dim}; give the tiny Qwen2.5-VL"
            )
        vlm_model, self.vae = qwen_vl.QwenVL(vlm_config), vae.VAE(self.vae_config)
        self.states = jax.jit(vlm_model.apply, static_argnums=5)
        self.moments = jax.jit(functools.partial(self.vae.apply, method="encode"))
        self.pixels = jax.jit(functools.partial(self.vae.apply, method="decode"))
        tokenizer = prompts.load_tokenizer(tokens)
        self.layout = prompts.PromptLayout(tokenizer, MAX_TEXT, 0, VLM_PIXELS)

    def texts(
        self, words: Sequence[str], pictures: Sequence[np.ndarray] = (), batch: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        """States float16 [n, MAX_TEXT, D] at the words and their mask bool [n, MAX_TEXT].

        `pictures` is one of each row, uint8 [H, W, 3] of one size, or empty.
        """
        sizes = [pictures[0].shape[:2]] if len(pictures) else []
        grids = self.layout.grids(sizes)
        states, masks = [], []
        for part in _batches(range(len(words)), batch):
            rows = [self.layout.build(words[i], sizes) for i in part]
            shown = [prompts.pixel_values(pictures[i : i + 1], VLM_PIXELS) for i in part]
            ids, mask, at = (
                np.stack([row[name] for row in rows])
                for name in ("input_ids", "attention_mask", "position_ids")
            )
            hidden = self.states({"params": self.vlm_params}, ids, at, mask, np.stack(shown), grids)
            end = hidden.shape[1] - self.layout.tail_tokens
            states.append(np.asarray(hidden[:, end - MAX_TEXT : end].astype(jnp.float16)))
            masks.append(np.stack([row["text_mask"] for row in rows]))
        return np.concatenate(states)[: len(words)], np.concatenate(masks)[: len(words)]

    def latents(self, pictures: Sequence[np.ndarray], batch: int = 64) -> np.ndarray:
        """uint8 [H, W, 3] of one size -> packed (mean, std) float32 [2, n, TOKENS, 64]."""
        parts = []
        for part in _batches(range(len(pictures)), batch):
            x = np.stack([pictures[i] for i in part]).astype(np.float32) / 127.5 - 1
            mean, logvar = self.moments({"params": self.vae_params}, x)
            edge = vae.normalize(mean + jnp.exp(0.5 * logvar), self.vae_config)
            mean = vae.normalize(mean, self.vae_config)
            parts.append(np.stack([mmdit.pack(mean), mmdit.pack(edge - mean)]))
        packed = np.concatenate(parts, axis=1)[:, : len(pictures)]
        return np.pad(packed, ((0, 0), (0, 0), (0, TOKENS - packed.shape[2]), (0, 0)))

    def decode(self, tokens: np.ndarray, size: int) -> np.ndarray:
        """Normalised packed latents [n, TOKENS, 64] of one size -> uint8 [n, H, W, 3]."""
        height, width = SIZES[size]
        real = tokens[:, : math.prod(grid_of(SIZES[size]))]
        z = vae.denormalize(mmdit.unpack(real, height // 8, width // 8), self.vae_config)
        x = np.asarray(self.pixels({"params": self.vae_params}, z))
        return np.clip((x + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def _batches(rows: range, batch: int) -> Iterator[list[int]]:
    """Slices of `batch`; the last is filled up with the first row, for one compiled shape."""
    for start in range(0, len(rows), batch):
        part = list(rows[start : start + batch])
        yield part + [rows[0]] * (batch - len(part))


def encode(encoder: Encoder, made: Sequence[Example]) -> Examples:
    """Latents and text states of examples with one source picture each, or with none."""
    count, shown = len(made), len(made[0].pictures)
    size = np.array([SIZES.index(example.target.shape[:2]) for example in made])
    moments = np.zeros((2, count, TOKENS, CONFIG.in_channels), np.float32)
    source = np.zeros((count, TOKENS * shown, CONFIG.in_channels), np.float32)
    text = np.zeros((count, MAX_TEXT, CONFIG.joint_attention_dim), np.float16)
    mask = np.zeros((count, MAX_TEXT), bool)
    for index in range(len(SIZES)):
        (rows,) = np.nonzero(size == index)
        if len(rows):
            words = [made[row].instruction for row in rows]
            given = [made[row].pictures[0] for row in rows] if shown else []
            moments[:, rows] = encoder.latents([made[row].target for row in rows])
            text[rows], mask[rows] = encoder.texts(words, given)
            if shown:
                source[rows] = encoder.latents(given)[0]
    record = np.array([example.record for example in made])
    words = tuple(example.instruction for example in made)
    return Examples(words, record, size, *moments, source, text, mask)


def encode_all(encoder: Encoder, made: Iterable[Example]) -> Examples:
    """`encode` of any number of examples, of which few are held as pictures at a time."""
    made = iter(made)
    chunks = iter(lambda: list(itertools.islice(made, CHUNK)), [])
    return join([encode(encoder, chunk) for chunk in chunks])


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
    found = {}
    for example in tasks.examples(side, "text_to_image", 120, size=SIZES[0], kind="plain"):
        found.setdefault(example.subjects, example)
    return list(found.values())[:count]
