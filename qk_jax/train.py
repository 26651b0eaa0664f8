"""Trains one stage of Query-Kontext.

    python -m qk_jax.train --config configs/stage1.py:tiny --workdir runs/tiny
        [--config.optimizer.lr=3e-4 ...]
    python -m qk_jax.train --config configs/stage1.py:7b --help

writes <workdir>/<stage>/: checkpoints/, frozen/, tokenizer/, metrics.jsonl, TensorBoard events,
config.json.
The same command again resumes after the last whole checkpoint, bit for bit. SIGTERM saves and
leaves with status 42, Ctrl-C with 130; wrong input ends with one line and status 2.
--help lists every field of the config.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from qk_jax.base import cli, errors, runtime
from qk_jax.experiment import config as config_lib
from qk_jax.training import loop

BESIDE = pathlib.Path(__file__).parents[1] / "configs/stage1.py"  # in a checkout


@errors.exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    runtime.start_logging()
    runtime.skip_absent_tpu()
    args, overrides = arguments(argv)
    loop.train(config_lib.load(args.config, overrides), args.workdir)


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and the overrides --config.FIELD=VALUE."""
    parser = cli.Parser(
        prog="python -m qk_jax.train", description=__doc__, more=lambda: fields_help(argv)
    )
    parser.add_argument("--config", required=True, metavar="FILE.py:SIZE", help="the experiment")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="for the stage's folder")
    return cli.parse_with_overrides(parser, argv)


def fields_help(argv: Sequence[str]) -> str:
    """Every field of the config that `argv` names, or else of stage 1 at its tiny size."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scan.add_argument("--config")
    spec = scan.parse_known_args(argv)[0].config
    if spec is None:
        found = [file for file in (pathlib.Path("configs/stage1.py"), BESIDE) if file.is_file()]
        if not found:
            return "\nwith --config FILE.py:SIZE, --help lists the fields of that config\n"
        spec = f"{found[0]}:tiny"
    head = f"fields of {spec}, set with --config.FIELD=VALUE (of another: --config ... --help):"
    return "\n".join(["", head, *config_lib.listing(config_lib.load(spec)), ""])


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
