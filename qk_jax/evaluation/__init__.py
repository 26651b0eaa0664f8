"""What a model has learnt, in figures, from records that it was not trained on.

Evaluation during a training is `training.evals`; this room measures finished models.
"""

from qk_jax.evaluation.held_out import (
    LONG,
    SMOKE,
    Evaluator,
    Example,
    Extent,
    captions,
    evaluate,
    held_out_examples,
)

__all__ = [
    "LONG", "SMOKE", "Evaluator", "Example", "Extent", "captions", "evaluate", "held_out_examples",
]  # fmt: skip
