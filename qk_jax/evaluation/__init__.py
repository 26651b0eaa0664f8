"""What a finished model has learnt, in figures, on subjects that it was not trained on.

Evaluation during training is `training.evals`.
"""

from qk_jax.evaluation.held_out import (
    LONG,
    SMOKE,
    Case,
    Evaluator,
    Extent,
    captions,
    evaluate,
    held_out_cases,
)

__all__ = ["LONG", "SMOKE", "Case", "Evaluator", "Extent", "captions", "evaluate", "held_out_cases"]
