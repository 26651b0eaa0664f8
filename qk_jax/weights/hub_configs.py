"""Reading diffusers' config.json strictly: every key is known, every value of the right kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qk_jax.base.errors import InputError


def fields_of(
    cls: type,
    values: Mapping[str, Any],
    name: str,
    fixed: Mapping[str, Any],
    required: Iterable[str] = (),
) -> dict:
    """The arguments of a config dataclass in a diffusers config.json, whose keys are its fields.

    Args:
      cls: the dataclass; its fields' annotations say what their values may be.
      values: the content of the config.json; keys that begin with an underscore do not count.
      name: the diffusers class.
      fixed: {key: the one value that is supported} of keys that are no fields.
      required: keys without which the class of diffusers means no public model.

    Raises:
      InputError: another class, an unknown or missing key, or a value that is not supported.
    """
    found = values.get("_class_name", name)
    if found != name:
        raise InputError(f"the config is of class {found!r}; give one of class {name!r}")
    for key in required:
        if key not in values:
            raise InputError(f"{name} config has no {key}; download the config.json again")
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    arguments = {}
    # Fields first: what is supported of the other keys may depend on them.
    for key, value in sorted(values.items(), key=lambda item: item[0] not in kinds):
        value = tuple(value) if isinstance(value, list) else value
        if key.startswith("_"):
            continue
        if key in kinds:
            if not _is_kind(value, kinds[key]):
                raise InputError(f"{name} config says {key} = {value!r}; {kinds[key]} is due")
            arguments[key] = value
        elif key not in fixed:
            raise InputError(f"{name} config has the unknown key {key!r}; remove it")
        elif value != fixed[key]:
            raise InputError(
                f"{name} config says {key} = {value!r}, but only {fixed[key]!r} is supported"
            )
    return arguments


def _is_kind(value: Any, kind: str) -> bool:
    """Whether a value of a config is what a field's annotation says; integers are sizes."""
    if kind.endswith(" | None"):
        return value is None or _is_kind(value, kind.removesuffix(" | None"))
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return isinstance(value, tuple) and all(_is_kind(item, inner) for item in value)
    if kind == "int":
        return type(value) is int and value > 0
    if kind == "float":
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is bool
