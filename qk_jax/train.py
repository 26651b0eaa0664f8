"""Trains one stage of Query-Kontext.

    python -m qk_jax.train --config stage1:tiny --workdir runs/tiny [--config.optimizer.lr=3e-4 ...]
    python -m qk_jax.train --config path/mine.py:7b --workdir runs/mine
    python -m qk_jax.train --config stage1:7b --help

writes <workdir>/<stage>/: checkpoints/, frozen/, tokenizer/, metrics.jsonl, TensorBoard events,
config.json. A config is a shipped one's name, or the path of a file.
The same command again resumes after the last whole checkpoint, bit for bit. SIGTERM saves and
leaves with status 42, Ctrl-C with 130; wrong input ends with one line and status 2.
--help lists every field of the config.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from qk_jax.base import cli, distributed, errors, runtime
from qk_jax.experiment import config as config_lib
from qk_jax.training import loop


@errors.exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    imported_s = runtime.age()
    runtime.start_logging()
    runtime.skip_absent_tpu()
    args, overrides = arguments(argv)
    if not args.workdir:  # such as a variable of the shell that is not set
        raise errors.InputError("--workdir is empty; give a folder")
    config = config_lib.load(args.config, overrides)
    with runtime.answered(distributed.interrupted):
        distributed.start(
            distributed.Given.of(args),
            timeout_s=config.distributed.timeout_s,
            slices=math.prod(config.slices.values()),
        )
        loop.train(config, args.workdir, imported_s=imported_s)


def parser(argv: Sequence[str] = ()) -> cli.Parser:
    """The command line; --help lists the fields of the config that `argv` names."""
    out = cli.Parser(
        prog="python -m qk_jax.train", description=__doc__, more=lambda: fields_help(argv)
    )
    about = "the experiment: a shipped config, or FILE.py:SIZE"
    out.add_argument("--config", required=True, metavar="NAME:SIZE", help=about)
    out.add_argument("--workdir", required=True, metavar="DIR", help="for the stage's folder")
    distributed.add_options(out)
    return out


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the overrides --config.FIELD=VALUE."""
    return cli.parse_with_overrides(parser(argv), argv)


def fields_help(argv: Sequence[str]) -> str:
    """Every field of the config that `argv` names, or else of stage 1 at its tiny size."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--config")
    spec = scan.parse_known_args(argv)[0].config or "stage1:tiny"
    head = f"fields of {spec}, set with --config.FIELD=VALUE (of another: --config ... --help):"
    return "\n".join(["", head, *config_lib.listing(config_lib.load(spec)), ""])


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
