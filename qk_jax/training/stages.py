"""The stages as data: what is trained, what is frozen, and where each part starts from.

A stage is a table. `parts` says for every part of the parameter tree whether it is read from a
pretrained folder, drawn fresh, taken from the stage before, or taken with its adapter merged in;
what the table does not name does not exist in that stage (stage 2 has no stage-1 head). `rules`
are regexes over 'a/b/c' names: the first that matches decides, and a name that none matches is an
error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flax import traverse_util

from qk_jax.errors import InputError

Origin = Literal["pretrained", "fresh", "previous", "merged"]
Rule = tuple[str, str]
TRAIN, FREEZE = "train", "freeze"


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


def first_match(name: str, rules: Sequence[tuple[str, Any]]) -> int | None:
    """Index of the first rule whose regex matches the whole of `name`."""
    for index, (pattern, _) in enumerate(rules):
        if re.fullmatch(pattern, name):
            return index
    return None


def by_rule(names: Sequence[str], rules: Sequence[tuple[str, Any]], what: str) -> dict[str, Any]:
    """{name: value of the first rule that matches it}.

    Raises:
      InputError: a name without a rule, a rule that no name reaches, or a regex that is none.
    """
    try:
        hits = {name: first_match(name, rules) for name in names}
    except re.error as error:
        raise InputError(f"{what}: {error.pattern!r} is no regular expression: {error}") from error
    missed = [name for name, index in hits.items() if index is None]
    if missed:
        raise InputError(
            f"{what}: no rule covers {missed[0]!r} ({len(missed)} parameters in all); add one"
        )
    idle = sorted(set(range(len(rules))) - set(hits.values()))
    if idle:
        raise InputError(
            f"{what}: rule {rules[idle[0]][0]!r} decides no parameter; mend or remove it"
        )
    return {name: rules[index][1] for name, index in hits.items()}


def split(tree: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[dict, dict]:
    """(trained, frozen): the nested trees of the leaves that `rules` train and freeze.

    Raises:
      InputError: as `by_rule`, or a rule whose value is neither 'train' nor 'freeze'.
    """
    wrong = [rule for rule in rules if rule[1] not in (TRAIN, FREEZE)]
    if wrong:
        raise InputError(f"rule {wrong[0]} must end in {TRAIN!r} or {FREEZE!r}")
    flat = traverse_util.flatten_dict(tree, sep="/")
    fate = by_rule(list(flat), rules, "rules")
    pick = lambda word: traverse_util.unflatten_dict(  # noqa: E731
        {name: leaf for name, leaf in flat.items() if fate[name] == word}, sep="/"
    )
    return pick(TRAIN), pick(FREEZE)


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """One nested tree from disjoint ones."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def report(names: Mapping[str, int], rules: Sequence[Rule]) -> list[str]:
    """One line per rule: its word, the parameters and tensors it decides (names: sizes)."""
    lines = []
    for index, (pattern, word) in enumerate(rules):
        sizes = [size for name, size in names.items() if first_match(name, rules) == index]
        lines.append(f"{word:6} {sum(sizes):>14,} parameters in {len(sizes):>4} tensors: {pattern}")
    return lines
