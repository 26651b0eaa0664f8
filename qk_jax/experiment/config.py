"""Configs: a Python file with get_config(size), overrides on the command line, and the checks.

Every value is a field of an ml_collections ConfigDict; an override must name a field that exists
and keep its type, and what does not is an InputError with the nearest right name.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.data import templates
from qk_jax.diffusion import flow
from qk_jax.experiment import bounds, config_files, glossary
from qk_jax.models import mmdit, qwen_text, qwen_vision, qwen_vl, rotary, vae
from qk_jax.models.query_kontext import ModelConfig
from qk_jax.pictures.sizes import format_size

_SPEC = re.compile(r"(.*\.py|[^:]*)(?::(.*))?", re.DOTALL)  # folders of a file may have colons


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The config that `spec` names, with overrides, locked.

    The file is run: a config is code, trusted as the rest of the program.

    Args:
      spec: 'NAME:SIZE' of a shipped config ('stage1:tiny'), or 'FILE.py:SIZE'.
      overrides: {field: text}, see `override`.

    Raises:
      InputError: no such config or size, no get_config, an unknown field, a value of another type
        or a number out of its bounds.
    """
    path, size = _SPEC.fullmatch(spec).groups("")  # type: ignore[union-attr]  # matches any text
    config = config_files.run(config_files.find(path), size)
    for name, text in (overrides or {}).items():
        override(config, name, text)
    bounds.check(fields(config))
    return config.lock()


def fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('a.b.c', value) of every leaf of a config."""
    for name, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


LONGEST = 32  # letters of a value in `listing`


def listing(config: ConfigDict) -> Iterator[str]:
    """A line for each field with its value and its meaning; a tower's sharding is one line."""
    rows = [
        (name, _shown(value), glossary.meaning(name))
        for name, value in fields(config)
        if not name.startswith("sharding.")
    ]
    known = {name: dataclasses.asdict(row) for name, row in sharding.ROWS.items()}
    for tower, cells in config.sharding.items():
        row = next((name for name, row in known.items() if row == cells.to_dict()), "its own")
        rows.append((f"sharding.{tower}", row, f"a row of the table: {', '.join(known)}"))
    width = max(len(name) for name, _, _ in rows)
    for name, value, meaning in rows:
        yield f"{name:<{width}}  {value:<{LONGEST}}  {meaning}"
    for column, kind in (
        (sharding.COLUMNS, sharding.Rules),
        (("activations",), sharding.Activations),
    ):
        axes = " ".join(field.name for field in dataclasses.fields(kind))
        name = f"sharding.TOWER.COLUMN.AXIS, COLUMN {' '.join(column)}"
        yield f"{name}, AXIS {axes}: {glossary.meaning('sharding.mmdit.params.embed')}"


def table(config: ConfigDict) -> str:
    """A table in Markdown of each field with its whole value and its meaning."""
    cell = lambda value: str(value).replace("\n", "\\n").replace("|", "\\|")  # noqa: E731
    rows = [f"| {n} | {cell(x)} | {cell(glossary.meaning(n))} |" for n, x in fields(config)]
    return "\n".join(["| field | value | meaning |", "| --- | --- | --- |", *rows])


def _shown(value: Any) -> str:
    """A value as the command line takes it, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value) or "''"
    text = text.replace("\n", "\\n")
    if len(text) <= LONGEST:
        return text
    end = isinstance(value, str)  # of a path the end tells more
    return f"...{text[3 - LONGEST :]}" if end else f"{text[: LONGEST - 3]}..."


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets field `name` ('optimizer.lr') from the text of a command line.

    A whole section 'sharding.TOWER' takes the name of one of `sharding.ROWS`, and the section
    'prompt' that of one of `templates.PRESETS`.

    Raises:
      InputError: no such field or row, or a text that is no value of the field's type.
    """
    section, _, tower = name.rpartition(".")
    if section == "sharding" and tower in config.sharding:
        config.sharding[tower] = dataclasses.asdict(sharding.row(text))
        return
    if name == "prompt":
        config.prompt = ConfigDict(dataclasses.asdict(templates.preset(text)))
        return
    known = dict(fields(config))
    if name not in known:
        inside = [field for field in known if field.startswith(f"{name}.")]
        raise InputError(
            f"config has no field {name!r}{', which is a section' if inside else ''}; did you mean "
            f"{glossary.nearest(name, inside or list(known))!r}?"
        )
    value = _parse(text, known[name])
    if value is _WRONG:
        kind = type(known[name]).__name__
        hint = "; a tuple of one ends in a comma: (...,)" if kind == "tuple" else ""
        raise InputError(
            f"config field {name!r} is a {kind} (now {known[name]!r}), not {text!r}{hint}"
        )
    *parents, last = name.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value


_WRONG = object()


def _parse(text: str, old: Any) -> Any:
    """`text` as a value of the type of `old`, or _WRONG."""
    are_names = isinstance(old, tuple) and all(isinstance(o, str) for o in old)
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), _WRONG)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(part for part in text.split(",") if part) if are_names else _WRONG
    if old and are_names and isinstance(value, int):  # '0x64' is a size, though a wrong one
        return (text,)
    if old is None:
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(value)
    return value if type(value) is type(old) else _WRONG


def to_json(config: ConfigDict) -> str:
    """The resolved config as indented JSON (tuples become lists)."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """A locked config from the JSON of a checkpoint; lists become tuples again.

    One that names no prompt is of a time when there was one template. Fields of the model that a
    checkpoint lacks came later, and their default is what it was made with.
    """
    values = {"prompt": dataclasses.asdict(templates.PRESETS["numbered"])} | dict(values)
    later = ("query_noise", "bidirectional_queries", "vlm_layers")
    defaults = {x.name: x.default for x in dataclasses.fields(ModelConfig) if x.name in later}
    values["model"] = defaults | dict(values["model"])

    def tuples(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: tuples(item) for name, item in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value

    config = ConfigDict(tuples(values))
    config.data.sizes = tuple(
        size if isinstance(size, str) else format_size(size) for size in config.data.sizes
    )
    return config.lock()


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """A config as its JSON has it, with lists for tuples."""
    return json.loads(to_json(config))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """'name: old -> new' of every field that differs; both in their JSON form."""
    a, b = dict(fields(old)), dict(fields(new))
    absent = "absent"
    return [
        f"{name}: {a.get(name, absent)} -> {b.get(name, absent)}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name, absent) != b.get(name, absent)
    ]


def _build(kind: type, values: Mapping[str, Any], **replaced: Any) -> Any:
    """A frozen dataclass from its config section; JSON's lists become tuples again."""
    known = {field.name for field in dataclasses.fields(kind)}
    kwargs = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value
        for name, value in values.items()
        if name in known
    }
    return kind(**(kwargs | replaced))


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model's own config from the sections `model` and `lora`, of a ConfigDict or its JSON."""
    section = config["model"]
    vlm, kind = section["vlm"], section["vae"]["kind"]
    if kind not in vae.KINDS:
        raise InputError(
            f"config field 'model.vae.kind' is {kind!r}; give one of {sorted(vae.KINDS)}"
        )
    rank, layers = config["lora"]["rank"], vlm["text"]["num_hidden_layers"]
    if not all(type(layer) is int and 0 < layer < layers for layer in section["vlm_layers"]):
        raise InputError(
            f"config field 'model.vlm_layers' is {section['vlm_layers']}; give numbers of layers "
            f"from 1 to {layers - 1} (the last states are read anyway)"
        )
    return _build(
        ModelConfig,
        section,
        vlm=_build(
            qwen_vl.VLMConfig,
            vlm,
            text=_build(qwen_text.TextConfig, vlm["text"]),
            vision=_build(qwen_vision.VisionConfig, vlm["vision"]),
        ),
        mmdit=_build(mmdit.MMDiTConfig, section["mmdit"]),
        vae=_build(vae.KINDS[kind], section["vae"]),
        law=_law(section["law"]),
        keep_tail=config["prompt"]["keep_tail"],
        picture_multiple=config["prompt"]["picture_multiple"],
        lora_scale=config["lora"]["alpha"] / rank if rank else 1.0,
        remat=section["remat"] or None,
    )


def _law(section: Mapping[str, Any]) -> rotary.PositionLaw:
    try:
        return _build(rotary.PositionLaw, section)
    except ValueError as error:
        raise InputError(f"config.model.law: {error}") from None


def time_law(config: Mapping[str, Any]) -> flow.TimeLaw:
    """The law of the timesteps from the section `time`."""
    return _build(flow.TimeLaw, config["time"])


def dtype(name: str) -> Any:
    """A floating dtype by name.

    Raises:
      InputError: neither float32 nor bfloat16 nor float16.
    """
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    if name not in known:
        raise InputError(f"dtype {name!r} is unknown; give one of {', '.join(known)}")
    return known[name]
