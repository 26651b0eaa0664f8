"""Command lines: one parser for all mains, their completion, and overrides of a config."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from qk_jax import __version__
from qk_jax.base.errors import InputError

SHELLS = ("bash", "zsh", "fish")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are InputErrors and whose --help shows a whole docstring.

    That of a command, not of one of its verbs, has --version, and --print-completion where the
    command has a console script.
    """

    def __init__(
        self,
        *,
        prog: str,
        description: str | None = None,
        more: Callable[[], str] = lambda: "",
        is_verb: bool = False,
        **kwargs: Any,
    ):
        """`more` gives what --help prints at the end; it is called when it is asked for."""
        self.more = more
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(
            prog=prog, description=inspect.cleandoc(description or ""), allow_abbrev=False, **kwargs
        )
        if is_verb:
            return
        version, about = f"qk_jax {__version__}", "print the version and exit"
        self.add_argument("--version", action="version", version=version, help=about)
        if self.script:
            about = f"print the completion of {self.script} for a shell and exit"
            self.add_argument("--print-completion", action=_Print, choices=SHELLS,
                default=argparse.SUPPRESS, help=about)  # fmt: skip

    @property
    def script(self) -> str:
        """The console script of the command, such as 'qk-train'; '' where it has none."""
        found = re.fullmatch(r"python -m qk_jax\.(\w+)", self.prog)
        return f"qk-{found[1]}" if found else ""

    def add_subparsers(self, **kwargs: Any) -> Any:
        kwargs.setdefault("parser_class", functools.partial(type(self), is_verb=True))
        return super().add_subparsers(**kwargs)

    def format_help(self) -> str:
        return super().format_help() + self.more()

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the arguments")


class _Print(argparse.Action):
    """Prints the completion of a command for the shell that is named, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, value: Any, *__: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        print(completion(parser, value))
        parser.exit()


def completion(parser: Parser, shell: str) -> str:
    """The script by which one of SHELLS completes a command that has a console script: verbs,
    options, their choices, and files and folders where the metavar says so."""
    import shtab

    for action in _actions(parser):
        place = str(action.metavar)
        if not action.choices and re.search("DIR|WORKDIR", place):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif not action.choices and re.search("FILE|PATH|PNG|JSONL", place):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    prog, parser.prog = parser.prog, parser.script  # the shell knows the script alone
    try:
        return shtab.complete(parser, shell)
    finally:
        parser.prog = prog


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """{verb: its parser} of a command; {} where it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a command and of its verbs."""
    yield from parser._actions
    for verb in verbs(parser).values():
        yield from verb._actions


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
