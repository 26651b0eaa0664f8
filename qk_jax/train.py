"""Trains one stage of Query-Kontext.

    python -m qk_jax.train --config configs/stage1.py:tiny --workdir runs/tiny
        [--config.optimizer.lr=3e-4 ...]

writes <workdir>/<stage>/: checkpoints/, frozen/, tokenizer/, metrics.jsonl, TensorBoard events,
config.json.
The same command again resumes after the last whole checkpoint, bit for bit. SIGTERM saves and
leaves with status 42, Ctrl-C with 130; wrong input ends with one line and status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qk_jax.base import cli, errors, runtime
from qk_jax.experiment import config as config_lib
from qk_jax.training import loop


@errors.exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    runtime.start_logging()
    runtime.skip_absent_tpu()
    parser = cli.Parser(prog="python -m qk_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py:SIZE", help="the experiment")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="for the stage's folder")
    args, overrides = cli.parse_with_overrides(parser, argv)
    loop.train(config_lib.load(args.config, overrides), args.workdir)


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
