"""Random batches in the pipeline's form, a pure function of the step, without a corpus."""

import pathlib

import jax
import numpy as np

import qk_jax
from qk_jax.data import prompts
from qk_jax.data.example import TASKS
from qk_jax.data.templates import PromptTemplate
from qk_jax.training import step as step_lib
from qk_jax.training.padding import Padding

TOKENIZER = pathlib.Path(qk_jax.__file__).parent / "assets/tiny/tokenizer"
SIZE = (32, 32)
WORDS = ("a red cat", "mirror it", "two cups side by side", "make it grey")


def batch(config, seed, rows=None, pictures=0, size=SIZE, shown=None):
    """`rows` random rows with `pictures` condition pictures each, of the sizes `shown`."""
    shown_sizes = shown or [size] * pictures
    rng = np.random.default_rng(seed)
    rows = rows or config.data.batch
    model = config.model
    layout = prompts.PromptBuilder(
        prompts.load_tokenizer(TOKENIZER), model.max_text, model.num_queries, model.vlm_pixels,
        PromptTemplate(**config.prompt),
    )  # fmt: skip
    draw = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)  # noqa: E731
    conditions = tuple(draw(rows, *one, 3) for one in shown_sizes)
    shown = rng.random(rows) < 0.8
    roles = [i % 2 for i in range(pictures)]
    texts = [
        layout.build(WORDS[i % len(WORDS)], shown_sizes, roles, bool(shown[i])) for i in range(rows)
    ]
    pixels = [
        prompts.pixel_values(
            [c[i] for c in conditions], model.vlm_pixels, config.prompt.picture_multiple
        )
        for i in range(rows)
    ]
    target = draw(rows, *size, 3)
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


def encoded(plan, frozen, batch, padding=None):
    """What a step reads of a batch, by the real padding and encoder."""
    padding = padding or Padding.from_config(plan.config)
    padded = jax.device_put(padding(batch), plan.batch_sharding)
    return step_lib.Encoder(plan)(frozen, padded)


class Pipeline:
    """Stands in for data.pipeline.Pipeline: pictures only at every second step."""

    def __init__(self, config, split, prompts, finish):
        self.config, self.split, self.prompts, self.finish = config, split, prompts, finish

    def batches(self, first):
        step = first
        while True:
            yield self.finish(batch(self.config, step, pictures=2 * (step % 2)))
            step += 1

    def abstract(self):
        return [batch(self.config, step, pictures=2 * step) for step in range(2)]

    def fixed(self):
        for index in range(self.config.validation.batches):
            rows = self.config.validation.batch
            yield self.finish(batch(self.config, 1000 + index, rows))

    def digest(self):
        return ""

    def bad_counts(self):
        return {}

    def close(self):
        pass
