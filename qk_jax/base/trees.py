"""Parameter trees by name: one vocabulary of regexes over 'a/b/c' decides what happens to a leaf.

It is big_vision's: the first regex that matches the whole name wins, and a leaf without a rule is
an error. Freezing, learning rates and weight decay are written in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from qk_jax.base.errors import InputError

Tree = dict[str, Any]  # a nested dict of arrays, shapes or shardings
Rule = tuple[str, str]
TRAIN, FREEZE = "train", "freeze"


def flatten(tree: Mapping[str, Any]) -> Tree:
    """{'a/b/c': leaf} of a nested dict."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def named(tree: Any) -> dict[str, Any]:
    """{'a/b/c': leaf} of any pytree, optimizer states included."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def shardings(tree: Any) -> Any:
    """The shardings of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def first_match(name: str, rules: Sequence[tuple[str, Any]]) -> int | None:
    """Index of the first rule whose regex matches the whole of `name`."""
    for index, (pattern, _) in enumerate(rules):
        if re.fullmatch(pattern, name):
            return index
    return None


def check_rules(rules: Sequence[tuple[str, Any]], what: str) -> None:
    """Raises InputError for a rule that begins with no text; the message begins with `what`."""
    if odd := [rule for rule in rules if not isinstance(rule[0], str)]:
        raise InputError(f"{what}: the rule {odd[0]!r} begins with no regular expression")


def by_rule(names: Iterable[str], rules: Sequence[tuple[str, Any]], what: str) -> dict[str, Any]:
    """{name: value of the first rule that matches it}.

    Raises:
      InputError: a name without a rule, a rule that decides nothing, or an invalid regex; the
        message begins with `what`.
    """
    check_rules(rules, what)
    try:
        hits = {name: first_match(name, rules) for name in names}
    except re.error as error:
        raise InputError(f"{what}: {error.pattern!r} is no regular expression: {error}") from error
    missed = [name for name, index in hits.items() if index is None]
    if missed:
        raise InputError(
            f"{what}: no rule covers {missed[0]!r} ({len(missed)} parameters in all); add one"
        )
    idle = sorted(set(range(len(rules))) - {index for index in hits.values() if index is not None})
    if idle:
        raise InputError(
            f"{what}: rule {rules[idle[0]][0]!r} decides no parameter; correct or remove it"
        )
    return {name: rules[index][1] for name, index in hits.items() if index is not None}


def split(tree: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[Tree, Tree]:
    """(trained, frozen): the nested trees of the leaves that `rules` train and freeze.

    Raises:
      InputError: as `by_rule`, or a rule whose value is neither 'train' nor 'freeze'.
    """
    wrong = [rule for rule in rules if rule[1] not in (TRAIN, FREEZE)]
    if wrong:
        raise InputError(f"rule {wrong[0]} must end in {TRAIN!r} or {FREEZE!r}")
    flat = flatten(tree)
    fate = by_rule(flat, rules, "rules")

    def leaves(word: str) -> Tree:
        return unflatten({name: leaf for name, leaf in flat.items() if fate[name] == word})

    return leaves(TRAIN), leaves(FREEZE)


def join(*trees: Mapping[str, Any]) -> Tree:
    """One nested tree from disjoint ones."""
    flat: Tree = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)
