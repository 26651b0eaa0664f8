"""Trains the same stage in several ways, over the same seeds, and compares their validation losses.

    python launch/compare.py --config configs/stage1.py:tiny --out DIR --seeds 3 \\
        --all steps=250 evals.loss.every=50 \\
        --case plain --case bidirectional model.bidirectional_queries=true

Each --case has a name and fields of the config, --all gives fields to every case. The first case is
what the others are compared with, seed by seed, so that what a seed has in common cancels. {seed}
in a value is the number of the run: init.checkpoint=W/plain-{seed}/stage1 goes on from a comparison
of the stage before. A run that is finished is not repeated: a case can be added later.

Losses are means over the seeds of the flow-matching loss on the validation batches, which are the
same at all steps and in all cases; a difference has its standard error over the seeds. Negative is
better. The last step is the one that is shown by task.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qk_jax.base import cli, files
from qk_jax.base.errors import InputError, exits
from qk_jax.evaluation import similarity
from qk_jax.experiment import config as config_lib

Losses = dict[int, dict[str, float]]  # by step, then by name


class Case(NamedTuple):
    """One way to train.

    Attributes:
      name: of the table and of the folders.
      fields: of the config that it changes, as text.
    """

    name: str
    fields: dict[str, str]


def fields_of(words: Iterable[str]) -> dict[str, str]:
    """{'a.b': 'value'} of 'a.b=value'. Raises InputError for another form."""
    pairs = [word.partition("=") for word in words]
    for name, sign, _ in pairs:
        if not sign:
            raise InputError(f"{name!r} is no FIELD=VALUE; give for instance steps=250")
    return {name: value for name, _, value in pairs}


def run(config: str, case: Case, seed: int, out: files.Path) -> Losses:
    """The validation losses of one run, which is trained where it is not finished.

    Raises:
      SystemExit: with the status of a training that failed.
    """
    folder = out / f"{case.name}-{seed}"
    given = {name: value.replace("{seed}", str(seed)) for name, value in case.fields.items()}
    fields = {"seed": str(seed), **given}
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    # All runs share what they compile.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((out / "compiled").resolve())}
    status = subprocess.run(
        [
            sys.executable,
            "-m",
            "qk_jax.train",
            "--config",
            config,
            "--workdir",
            str(folder),
            *words,
        ],
        env=environment,
    ).returncode
    if status:
        raise SystemExit(status)
    stage = config_lib.load(config, fields).stage
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if line["kind"] == "validation"]
    if not found:
        raise InputError(f"{folder} has no validation losses; give evals.loss.every=STEPS")
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("loss")} for line in found}


def row(label: str, runs: Sequence[float], first: Sequence[float]) -> str:
    """A line: the mean, and how far it is from that of the first case."""
    mean = np.mean(runs)
    if runs is first:
        return f"{label:<32} {mean:.4f}"
    difference, error = similarity.mean_and_error(np.subtract(runs, first))
    return f"{label:<32} {mean:.4f}  {difference:+.4f} ± {error:.4f}"


def table(found: dict[str, list[Losses]]) -> list[str]:
    """The lines of all cases, step by step and then by task, from the losses of each seed."""
    (first, *_), lines = found.values(), []
    last = max(first[0])
    keys = [(step, "loss") for step in first[0]]
    keys += [(last, name) for name in first[0][last] if name != "loss"]
    for step, name in keys:
        lines.append(f"step {step}, {name}")
        reference = [losses[step][name] for losses in first]
        for case, runs in found.items():
            values = reference if runs is first else [losses[step][name] for losses in runs]
            lines.append("  " + row(case, values, reference))
    return lines


@exits
def main(argv: Sequence[str]) -> None:
    """Trains, and prints the table."""
    options = cli.Parser(prog="launch/compare.py", description=__doc__)
    add = options.add_argument
    add("--config", required=True, help="as for qk_jax.train")
    add("--out", required=True, type=files.Path, help="a folder; each run has its own inside")
    add("--seeds", type=int, default=3, help="runs of each case (default 3)")
    add("--all", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of every case")
    add("--case", nargs="+", action="append", required=True, metavar="NAME FIELD=VALUE")
    args = options.parse_args(argv)
    if args.seeds < 2:
        raise InputError("--seeds must be at least 2, so that differences have an error")
    shared = fields_of(args.all)
    cases = [Case(name, shared | fields_of(words)) for name, *words in args.case]
    if len({case.name for case in cases}) < len(cases):
        raise InputError("two cases have the same name; give each its own")
    for case in cases:  # a wrong field is found before anything is trained
        config_lib.load(args.config, case.fields)
    found: dict[str, list[Losses]] = {case.name: [] for case in cases}
    for seed in range(args.seeds):
        for case in cases:
            found[case.name].append(run(args.config, case, seed, args.out))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
