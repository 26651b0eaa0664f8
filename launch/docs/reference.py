"""The reference pages, made from the code: command lines, config fields, Python objects."""

from __future__ import annotations

import argparse
import html
import importlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from qk_jax.base import cli
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import glossary

SETUP = pathlib.Path(__file__).resolve().parents[2] / "setup.py"
STAGES, SIZES = ("stage1", "stage2", "stage3", "highres"), ("tiny", "20b")
LONGEST = 60  # letters of a value
OBJECTS = {
    "Trained models": ("qk_jax.api.trained.load", "qk_jax.api.trained.TrainedModel"),
    "Published models": (
        "qk_jax.api.published.load_vlm", "qk_jax.api.published.load_mmdit",
        "qk_jax.api.published.load_vae", "qk_jax.api.published.LoadedVLM",
        "qk_jax.api.published.LoadedMMDiT", "qk_jax.api.published.LoadedVAE",
    ),
    "Painting": ("qk_jax.painting.Settings", "qk_jax.painting.Request", "qk_jax.painting.Painter"),
    "Data": ("qk_jax.data.writer.Writer", "qk_jax.data.example.Example"),
    "Errors": ("qk_jax.base.errors.InputError", "qk_jax.base.errors.Failure"),
}  # fmt: skip


def commands() -> str:
    """The page of all commands: what --help prints."""
    parts = [
        "# Command lines",
        "What `--help` prints, of the code that this site was built from. Every command is also "
        "there as `python -m qk_jax.NAME`, and ends with status 2 and one line for wrong input "
        "([errors](errors.md)).",
    ]
    for module in re.findall(r'"qk-\w+ = (qk_jax[\w.]+):run"', SETUP.read_text(encoding="utf-8")):
        parser = importlib.import_module(module).parser()
        parts += [f"## {parser.script}", *prose(parser.description or ""), table(parser)]
        for verb, found in cli.verbs(parser).items():
            parts += [f"### {parser.script} {verb}", *prose(found.description or "")]
            parts += [usage(found), table(found)]
            if isinstance(found, cli.Parser) and (more := found.more().strip()):
                parts.append(f"```text\n{more}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def usage(parser: argparse.ArgumentParser) -> str:
    """The line of usage."""
    return f"```text\n{' '.join(parser.format_usage().removeprefix('usage: ').split())}\n```"


def prose(text: str) -> Iterator[str]:
    """The paragraphs of a docstring; an indented one is commands."""
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("    "):
            lines = "\n".join(line.removeprefix("    ") for line in paragraph.splitlines())
            yield f"```bash\n{lines}\n```"
        elif paragraph:
            yield escaped(" ".join(paragraph.split()))


def escaped(text: str) -> str:
    """Text in which Markdown sees no markup, but for `code`."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part if index % 2 else re.sub(r"([*_\[\]|])", r"\\\1", html.escape(part, quote=False))
        for index, part in enumerate(parts)
    )


def cell(text: str) -> str:
    """Code in a cell of a table."""
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def table(parser: argparse.ArgumentParser) -> str:
    """The options of a command or of a verb."""
    rows = []
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        if action.option_strings and action.nargs != 0:
            value = formatter._format_args(action, action.dest.upper())
            names = f"{names} {value}"
        about = formatter._expand_help(action) if action.help else ""
        rows.append(f"| {cell(names)} | {cell(default(action))} | {escaped(about)} |")
    return "\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows])


def default(action: argparse.Action) -> str:
    """The default of an option, as one would write it."""
    if action.required:
        return "required"
    if action.default in (None, False, "", argparse.SUPPRESS) or action.default in ([], ()):
        return ""
    value = action.default
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def fields() -> str:
    """The page of all config fields with their values by stage and size."""
    found = {
        size: [dict(config_lib.fields(config_lib.load(f"{stage}:{size}"))) for stage in STAGES]
        for size in SIZES
    }
    names = {name: None for size in SIZES for config in found[size] for name in config}
    groups: dict[str, list[str]] = {"The run": []}
    for name in names:
        if not name.startswith("sharding."):
            head = ".".join(name.split(".")[:-1][:2])
            groups.setdefault(head or "The run", []).append(name)
    parts = [
        "# Config fields",
        "Every field of the shipped configs, set with `--config.FIELD=VALUE`, with its values in "
        f"{', '.join(STAGES)} where they differ. `--config NAME:SIZE --help` lists those of any "
        "config; [train](train.md#every-field) says more of each, and how towers are "
        "[sharded](train.md#sharding).",
    ]
    for head, group in groups.items():
        rows = [
            f"| `{name}` | {' | '.join(values(found[size], name) for size in SIZES)} "
            f"| {escaped(glossary.meaning(name))} |"
            for name in group
        ]
        columns = " | ".join(f"`{size}`" for size in SIZES)
        parts += [
            f"## {head}",
            "\n".join([f"| field | {columns} | meaning |", "| --- | --- | --- | --- |", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def values(configs: list[dict[str, Any]], name: str) -> str:
    """The value of a field over the stages; one where all have the same."""
    each = [shown(config[name]) if name in config else "" for config in configs]
    return each[0] if len(set(each)) == 1 else ", ".join(x or "none" for x in each)


def shown(value: Any) -> str:
    """A value as the command line takes it, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value) or "''"
    text = text.replace("\n", "\\n").replace("`", "'")
    return cell(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def objects() -> str:
    """The page of Python objects, which mkdocstrings fills from the docstrings."""
    parts = [
        "# Python objects",
        "From the docstrings. How they are used: [from Python](python.md). The letters of shapes: "
        "[contributing](contributing.md#letters-of-shapes).",
    ]
    for title, names in OBJECTS.items():
        parts += [f"## {title}", *(f"::: {name}" for name in names)]
    return "\n\n".join(parts) + "\n"
