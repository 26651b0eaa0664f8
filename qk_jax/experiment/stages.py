"""The stages as data: what is trained, what is frozen, and where each part starts from.

A stage is a table. `parts` says for every part of the parameter tree whether it is read from a
pretrained folder, drawn fresh, taken from the stage before, or taken with its adapter merged in;
what the table does not name does not exist in that stage (stage 2 has no stage-1 head). `rules`
are regexes over 'a/b/c' names: the first that matches decides, and a name that none matches is an
error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qk_jax.base.errors import InputError
from qk_jax.base.trees import FREEZE, TRAIN, Rule, first_match

Origin = Literal["pretrained", "fresh", "previous", "merged"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the recipe (paper, section 3; DESIGN of the four stages).

    Attributes:
      name: also the folder under the work directory.
      previous: stage whose checkpoint this one starts from, or ''.
      parts: origin of each top-level part; 'lora/<tower>' are adapters.
      rules: (regex, 'train' | 'freeze') over parameter names.
    """

    name: str
    previous: str
    parts: Mapping[str, Origin]
    rules: tuple[Rule, ...]


_CONTEXT_RULES = ((r"queries/.*", TRAIN), (r"connector/.*", TRAIN))
_PAINT_RULES = (
    *_CONTEXT_RULES,
    (r"lora/mmdit/.*", TRAIN),
    (r"(vlm|mmdit|vae)/.*", FREEZE),
)
STAGES = {
    "stage1": Stage(
        name="stage1",
        previous="",
        parts={
            "vlm": "pretrained",
            "vae": "pretrained",
            "queries": "fresh",
            "connector": "fresh",
            "mmdit": "fresh",
            "lora/vlm": "fresh",
        },
        rules=(
            *_CONTEXT_RULES,
            (r"lora/vlm/.*", TRAIN),
            (r"mmdit/.*", TRAIN),
            (r"(vlm|vae)/.*", FREEZE),
        ),
    ),
    "stage2": Stage(
        name="stage2",
        previous="stage1",
        parts={
            "vlm": "merged",
            "vae": "previous",
            "queries": "previous",
            "connector": "previous",
            "mmdit": "pretrained",
        },
        rules=(*_CONTEXT_RULES, (r"mmdit/.*", TRAIN), (r"(vlm|vae)/.*", FREEZE)),
    ),
    "stage3": Stage(
        name="stage3",
        previous="stage2",
        parts={
            "vlm": "previous",
            "vae": "previous",
            "queries": "previous",
            "connector": "previous",
            "mmdit": "previous",
            "lora/mmdit": "fresh",
        },
        rules=_PAINT_RULES,
    ),
    "highres": Stage(
        name="highres",
        previous="stage3",
        parts={
            "vlm": "previous",
            "vae": "previous",
            "queries": "previous",
            "connector": "previous",
            "mmdit": "previous",
            "lora/mmdit": "previous",
        },
        rules=_PAINT_RULES,
    ),
}


def get(name: str) -> Stage:
    """The stage called `name`.

    Raises:
      InputError: there is none.
    """
    if name not in STAGES:
        raise InputError(f"stage {name!r} is unknown; the stages are {', '.join(STAGES)}")
    return STAGES[name]


def resolve(config: Mapping[str, Any]) -> Stage:
    """The stage of a config: its parts, and the config's own rules.

    With an alignment term both include its projection.

    Raises:
      InputError: there is no such stage.
    """
    stage = get(config["stage"])
    parts = dict(stage.parts)
    rules = tuple((pattern, word) for pattern, word in config["rules"])
    if config["alignment"]["weight"]:
        parts["alignment"] = "fresh"
        rules += ((r"alignment/.*", TRAIN),)
    return dataclasses.replace(stage, parts=parts, rules=rules)


def report(names: Mapping[str, int], rules: Sequence[Rule]) -> list[str]:
    """One line per rule: its word, the parameters and tensors it decides (names: sizes)."""
    lines = []
    for index, (pattern, word) in enumerate(rules):
        sizes = [size for name, size in names.items() if first_match(name, rules) == index]
        lines.append(f"{word:6} {sum(sizes):>14,} parameters in {len(sizes):>4} tensors: {pattern}")
    return lines
