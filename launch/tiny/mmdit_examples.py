"""What the tiny generator is pretrained on, but for the latents: pictures, words and text states.

    python launch/tiny/mmdit_examples.py [--out DIR] [--limit N] [--processes N]

Processes draw the examples of the tasks; the frozen tiny VLM reads their words, and each is read
once. The folder, some gigabytes, serves every later run of pretrain_mmdit.py, which makes it where
it is missing. It does not depend on the autoencoder, so it can be made while that is trained.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from common import SIZES, TINY
from PIL import Image

from qk_jax.base import cli, files, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.data import prompts
from qk_jax.data.example import Example, TaskSettings
from qk_jax.data.synthesis import corpus, tasks
from qk_jax.models import qwen_vl
from qk_jax.pictures.grids import MERGE, PATCH, PATCH_DIM, vision_size
from qk_jax.weights.read import import_model

FOLDER = files.Path("runs/tiny_examples")
MAX_TEXT = 32  # tokens of an instruction; the rest is cut
VLM_PIXELS = 112 * 112
SLOTS = 256  # of a batch that is drawn and read
VALUES = max(height * width * 3 for height, width in SIZES)  # of a picture
VARIANTS = 8  # text-to-image examples of each cut-out, with their own wording and background
# Examples of the tasks with one picture, by chance from all that the training side makes.
PICTURES = {"reconstruction": 8_000, "transformation": 40_000, "editing": 56_000}
HELD_OUT = 256  # examples of each task with a picture that give its figures
CANDIDATES = 100  # pictures of the retrieval figures
INPUTS = ("input_ids", "position_ids", "attention_mask", "text_mask")  # of the VLM


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Examples with one source picture or none; arrays have a leading axis of length n.

    Attributes:
      prompts: the words, unicode [n].
      size: int32 [n], index into SIZES, of the target and of the source.
      shown: bool [n], whether there is a source.
      target, source: uint8 [n, VALUES], pictures in a row, zeros after them.
      text: float16 [n, MAX_TEXT, D], the VLM's states, right-aligned; mask: bool [n, MAX_TEXT].
    """

    prompts: np.ndarray
    size: np.ndarray
    shown: np.ndarray
    target: np.ndarray
    source: np.ndarray
    text: np.ndarray
    mask: np.ndarray


NAMES = tuple(field.name for field in dataclasses.fields(Drawn))


# ---- which examples ----------------------------------------------------------------------------


@functools.cache
def source_of(side: str, task: str) -> tasks.Task:
    """A task on one side of the embedded corpus."""
    return tasks.SOURCES[task](corpus.Corpus(side), TaskSettings(sizes=SIZES))


def some(side: str, task: str, count: int) -> np.ndarray:
    """The numbers of `count` examples of a task, spread over its records."""
    return np.random.default_rng(7).permutation(len(source_of(side, task)))[:count]


def plain_squares(side: str, count: int) -> np.ndarray:
    """At most `count` square pictures on white, all of different subjects, for retrieval."""
    found: dict[tuple[str, ...], int] = {}
    for example in tasks.examples(side, "text_to_image", 120, size=SIZES[0], kind="plain"):
        found.setdefault(example.subjects, example.record)
    return np.array(list(found.values())[:count])


def groups(limit: int | None) -> dict[str, tuple[str, str, np.ndarray]]:
    """(side, task, numbers) of the examples to make, by the name of their folder.

    Training has the names of the tasks; held_out and retrieval are of `pretrain_mmdit.evaluate`.
    """
    words = "text_to_image"
    made = {words: ("train", words, np.arange(VARIANTS * len(corpus.Corpus("train")))[:limit])}
    for task, count in PICTURES.items():
        made[task] = "train", task, some("train", task, min(count, limit or count))
        chosen = some("validation", task, min(HELD_OUT, limit or HELD_OUT))
        made[f"held_out_{task}"] = "validation", task, chosen
    numbers = np.arange(2 * len(corpus.Corpus("validation")))[:limit]
    made["held_out"] = "validation", words, numbers
    for name, side in (("retrieval_train", "train"), ("retrieval_held_out", "validation")):
        made[name] = side, words, plain_squares(side, min(CANDIDATES, limit or CANDIDATES))
    return made


# ---- drawing, in many processes ----------------------------------------------------------------


@functools.cache
def layout() -> prompts.PromptBuilder:
    """How the VLM is asked."""
    return prompts.PromptBuilder(
        prompts.load_tokenizer(TINY / "tokenizer"), MAX_TEXT, 0, VLM_PIXELS
    )


def in_a_row(pictures: Iterable[np.ndarray], count: int) -> np.ndarray:
    """uint8 [H, W, 3] each -> uint8 [count, VALUES]; the rest is zero."""
    out = np.zeros((count, VALUES), np.uint8)
    for row, picture in zip(out, pictures, strict=False):
        row[: picture.size] = picture.ravel()
    return out


def as_seen(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] at the size that the VLM sees, as `prompts.patches` resizes it."""
    size = vision_size(*picture.shape[:2], VLM_PIXELS)
    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))


def draw(side: str, task: str, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of `Drawn` but for the text states, of examples of one size, and what the VLM
    reads: INPUTS, and `seen` uint8 [n, h, w, 3]."""
    made: list[Example] = [source_of(side, task)[number] for number in numbers]
    pictures = [example.pictures[0] for example in made if example.pictures]
    sizes = [pictures[0].shape[:2]] if pictures else []
    built = [layout().build(example.instruction, sizes, example.roles) for example in made]
    seen = np.stack([as_seen(x) for x in pictures]) if pictures else np.zeros((len(made), 0, 0, 3))
    return {name: np.stack([one[name] for one in built]) for name in INPUTS} | {
        "prompts": np.array([example.instruction for example in made]),
        "size": np.full(len(made), SIZES.index(made[0].target.shape[:2]), np.int32),
        "shown": np.full(len(made), bool(pictures)),
        "target": in_a_row([example.target for example in made], len(made)),
        "source": in_a_row(pictures, len(made)),
        "seen": seen.astype(np.uint8),
    }


def chunks(made: dict[str, tuple[str, str, np.ndarray]]) -> Iterator[tuple[str, tuple]]:
    """(group, arguments of `draw`) of at most SLOTS examples of one size each."""
    for group, (side, task, numbers) in made.items():
        size = source_of(side, task).size_of[numbers]
        for index in np.unique(size):
            chosen = numbers[size == index]
            for start in range(0, len(chosen), SLOTS):
                yield group, (side, task, chosen[start : start + SLOTS].tolist())


def drawn(
    work: Iterable[tuple[str, tuple]], processes: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(group, what `draw` gives) in order; processes are ahead by a few chunks, not by all."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit JAX's threads
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        ahead: collections.deque = collections.deque()
        for group, arguments in work:
            ahead.append((group, pool.submit(draw, *arguments)))
            if len(ahead) > 3 * processes:
                group, future = ahead.popleft()
                yield group, future.result()
        for group, future in ahead:
            yield group, future.result()


# ---- reading, on the device --------------------------------------------------------------------


def patches(seen: jax.Array) -> jax.Array:
    """Pictures uint8 [B, h, w, 3] of `as_seen` as the vision tower reads them, [B, P, 1176]: what
    `prompts.patches` gives for each, computed on the device, to which bytes are sent."""
    count, height, width = seen.shape[:3]
    x = (seen.astype(jnp.float32) * np.float32(1 / 255) - prompts.CLIP_MEAN) / prompts.CLIP_STD
    rows, columns = (side // (MERGE * PATCH) for side in (height, width))
    x = x.reshape(count, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(count, -1, 3, 1, PATCH * PATCH)
    return jnp.repeat(x, 2, axis=3).reshape(count, -1, PATCH_DIM)


class Reader:
    """The frozen VLM: words after a picture to states."""

    def __init__(self) -> None:
        config, self.params = import_model("vlm", TINY / "vlm")
        model = qwen_vl.QwenVL(config)
        self.width = config.text.hidden_size

        @functools.partial(jax.jit, static_argnums=5)
        def states(params, ids, positions, mask, seen, grids):
            shown = patches(seen) if grids else jnp.zeros((len(ids), 0, PATCH_DIM))
            hidden = model.apply({"params": params}, ids, positions, mask, shown, grids)
            end = hidden.shape[1] - layout().tail_tokens
            return hidden[:, end - MAX_TEXT : end].astype(jnp.float16)

        self.states = states

    def __call__(self, part: dict[str, np.ndarray]) -> np.ndarray:
        """States float16 [n, MAX_TEXT, D] at the words of what `draw` gave."""
        count, grids = len(part["size"]), ()
        if part["shown"][0]:
            grids = layout().grids([SIZES[part["size"][0]]])
        given = [part[name] for name in (*INPUTS[:3], "seen")]
        given = [np.resize(x, (SLOTS, *x.shape[1:])) for x in given]  # for one compiled shape
        return np.asarray(self.states(self.params, *given, grids))[:count]


# ---- the folder --------------------------------------------------------------------------------


def origin(limit: int | None) -> dict[str, int | None]:
    """What a folder's examples depend on; a folder of another origin is not read."""
    parts = (corpus.EMBEDDED / "train.array_record", TINY / "vlm/model.safetensors")
    digest = functools.reduce(lambda crc, path: zlib.crc32(path.read_bytes(), crc), parts, 0)
    return {"limit": limit, "inputs": digest, "variants": VARIANTS, **PICTURES}


def make(folder: files.Path, limit: int | None, processes: int) -> None:
    """Draws and reads all examples into a folder, one file for each group and column."""
    made, start = groups(limit), time.monotonic()
    read, filled = Reader(), dict.fromkeys(made, 0)
    columns: dict[str, dict[str, np.ndarray]] = {name: {} for name in made}
    for group, part in drawn(chunks(made), processes):
        part["text"], part["mask"] = read(part), part["text_mask"]
        part["prompts"] = part["prompts"].astype("U160")
        total, first = len(made[group][2]), filled[group]
        for name in NAMES:
            if name not in columns[group]:
                (folder / group).mkdir(parents=True, exist_ok=True)
                columns[group][name] = np.lib.format.open_memmap(
                    str(folder / group / f"{name}.npy"), "w+", part[name].dtype,
                    (total, *part[name].shape[1:]),
                )  # fmt: skip
            columns[group][name][first : first + len(part[name])] = part[name]
        filled[group] += len(part["size"])
    for column in (x for group in columns.values() for x in group.values()):
        column.flush()
    files.write_json(folder / "origin.json", origin(limit))
    print(f"{folder}: {filled} in {time.monotonic() - start:.0f} s", flush=True)


def load(folder: files.Path, limit: int | None) -> dict[str, Drawn]:
    """The groups of a folder, their arrays on disk; made first where there are none.

    Raises:
      InputError: the folder holds other examples.
    """
    if not (folder / "origin.json").is_file():
        make(folder, limit, os.cpu_count() or 1)
    found = files.read_json(folder / "origin.json")
    if found != origin(limit):
        raise InputError(f"{folder} has examples of another origin ({found}); remove it")
    return {
        group: Drawn(*(np.load(str(folder / group / f"{name}.npy"), "r") for name in NAMES))
        for group in groups(limit)
    }


@exits
def main() -> None:
    """Makes the folder."""
    options = cli.Parser(prog="launch/tiny/mmdit_examples.py", description=__doc__)
    options.add_argument("--out", type=files.Path, default=FOLDER, help="the folder")
    options.add_argument("--limit", type=int, help="at most so many examples of each kind")
    options.add_argument("--processes", type=int, default=os.cpu_count(), help="that draw")
    args = options.parse_args()
    runtime.skip_absent_tpu()
    make(args.out, args.limit, args.processes)


if __name__ == "__main__":
    main()
