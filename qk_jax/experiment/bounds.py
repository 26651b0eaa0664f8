"""The numbers that a field may have, so that a wrong one is refused before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from qk_jax.base.errors import InputError

POSITIVE = frozenset(
    "data.batch data.max_groups data.reference_size validation.batch "
    "validation.batches validation.max_groups log.every log.t_bins checkpoint.keep "
    "optimizer.accumulation optimizer.max_skipped optimizer.eps model.num_queries model.max_text "
    "model.vlm_pixels distributed.timeout_s programs.at_once watchdog.factor watchdog.first_s "
    "checkpoint.max_failures spike.window alignment.temperature".split()
)
NOT_NEGATIVE = frozenset(
    "steps seed data.max_pixels data.tokens data.workers checkpoint.every checkpoint.keep_every "
    "optimizer.lr optimizer.warmup optimizer.clip optimizer.weight_decay optimizer.lr_end "
    "alignment.weight loss.region_weight lora.rank model.query_noise model.query_std "
    "watchdog.floor_s "
    "validation.seed checkpoint.minutes checkpoint.grace_s spike.zscore spike.max_rollbacks".split()
)
SHARES = frozenset(  # 0 to 1
    "data.max_bad_share data.dropout.text data.dropout.pictures data.dropout.both sharding_limit "
    "optimizer.ema optimizer.b1 optimizer.b2".split()
)


def check(fields: Iterable[tuple[str, Any]]) -> None:
    """Raises InputError for the first of the (name, value) whose number is out of its bounds."""
    for name, value in fields:
        if name in POSITIVE and not 0 < value < math.inf:
            wanted = "above 0"
        elif (
            name in NOT_NEGATIVE
            or name.startswith("data.tasks.")
            or (name.startswith("evals.") and name.endswith(".every"))
        ) and not 0 <= value < math.inf:
            wanted = "0 or more"
        elif name in SHARES and not 0 <= value <= 1:
            wanted = "from 0 to 1"
        else:
            continue
        raise InputError(f"config field {name!r} is {value!r}, expected a number {wanted}")
