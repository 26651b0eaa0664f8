"""Command lines: one parser for all mains, and overrides of a config."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qk_jax.base.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors and whose --help shows a whole docstring."""

    def __init__(
        self,
        *,
        prog: str,
        description: str | None = None,
        more: Callable[[], str] = lambda: "",
        **kwargs: Any,
    ):
        """`more` gives what --help prints at the end; it is called when it is asked for."""
        self.more = more
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(
            prog=prog, description=inspect.cleandoc(description or ""), allow_abbrev=False, **kwargs
        )

    def format_help(self) -> str:
        return super().format_help() + self.more()

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the arguments")


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parsed arguments, and {field: text} from --config.FIELD=VALUE or --config.FIELD VALUE.

    Raises:
      InputError: an unknown argument, or an override without a value.
    """
    args, rest = parser.parse_known_args(argv)
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config."):
            raise InputError(f"argument {word!r} is unknown; --help lists the arguments")
        text = value if equals else next(words, None)
        if text is None:
            raise InputError(f"{name} needs a value: {name}=VALUE")
        found[name.removeprefix("--config.")] = text
    return args, found
