"""Random batches in the pipeline's form, a pure function of the step, without a corpus."""

import pathlib

import numpy as np

import qk_jax
from qk_jax.data import prompts
from qk_jax.data.example import TASKS

TOKENIZER = pathlib.Path(qk_jax.__file__).parent / "assets/tiny/tokenizer"
SIZE = (32, 32)
WORDS = ("a red cat", "mirror it", "two cups side by side", "make it grey")


def batch(config, seed, rows=None, pictures=0):
    """`rows` random rows with `pictures` condition pictures each."""
    rng = np.random.default_rng(seed)
    rows = rows or config.data.batch
    model = config.model
    layout = prompts.PromptBuilder(
        prompts.load_tokenizer(TOKENIZER), model.max_text, model.num_queries, model.vlm_pixels
    )
    draw = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)  # noqa: E731
    conditions = tuple(draw(rows, *SIZE, 3) for _ in range(pictures))
    shown = rng.random(rows) < 0.8
    roles = [i % 2 for i in range(pictures)]
    texts = [
        layout.build(WORDS[i % len(WORDS)], [SIZE] * pictures, roles, bool(shown[i]))
        for i in range(rows)
    ]
    pixels = [
        prompts.pixel_values([c[i] for c in conditions], model.vlm_pixels) for i in range(rows)
    ]
    target = draw(rows, *SIZE, 3)
    out = {name: np.stack([text[name] for text in texts]) for name in texts[0]}
    out |= {
        "pixel_values": np.stack(pixels),
        "target": target,
        "conditions": conditions,
        "condition_mask": shown,
        "roles": np.tile(np.array(roles, np.int32), (rows, 1)),
        "task": rng.integers(0, len(TASKS), rows).astype(np.int32),
        "record": np.arange(rows, dtype=np.int64),
    }
    if config.alignment.weight:
        shown_targets = [prompts.pixel_values([x], model.vlm_pixels) for x in target]
        out["target_pixel_values"] = np.stack(shown_targets)
        out["whole"] = rng.random(rows) < 0.8
    return out


class Pipeline:
    """Stands in for data.pipeline.Pipeline: pictures only at every second step."""

    def __init__(self, config, split, prompts):
        self.config, self.split, self.prompts = config, split, prompts

    def batches(self, first):
        step = first
        while True:
            yield batch(self.config, step, pictures=2 * (step % 2))
            step += 1

    def fixed(self):
        for index in range(self.config.validation.batches):
            yield batch(self.config, 1000 + index, self.config.validation.batch)

    def digest(self):
        return ""

    def close(self):
        pass
