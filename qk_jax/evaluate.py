"""Shows what runs have learnt.

    python -m qk_jax.evaluate report W --out report.html
    python -m qk_jax.evaluate report W OTHER W3/stage3 --out report.html

report writes one HTML file that asks no host for anything: curves of loss, rate and norms by task
and part of t, painted pictures through the stages, figures of held-out examples with their errors,
time, memory and settings, of one run or of several side by side. A run may still be at work, or
have stopped anywhere: the page says what is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qk_jax.base import cli
from qk_jax.base.errors import exits


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.evaluate", description=__doc__)
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    report = verbs.add_parser("report", help="a page of one run, or of several side by side")
    report.add_argument("folders", nargs="+", metavar="DIR",
        help="a work directory, such as runs/quickstart, or the folder of a stage")  # fmt: skip
    report.add_argument("--out", default="report.html", metavar="FILE.html",
        help="the page to write (default: %(default)s)")  # fmt: skip
    return out


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    from qk_jax.base import runtime  # brings JAX, which --help need not
    from qk_jax.evaluation.report import page

    runtime.start_logging()
    print(page.write(args.folders, args.out))


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
