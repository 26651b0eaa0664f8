"""Data for training: imports what others publish into record files.

    python -m qk_jax.data import --format folder --input PICTURES --task text_to_image --out DATA
    python -m qk_jax.data import --format omniedit --input DOWNLOADED --task editing --out DATA \\
        --validation 0.01 --workers 8
    python -m qk_jax.data import --format parquet --input FILES --task text_to_image --out DATA \\
        --columns text=caption,target=image
    python -m qk_jax.data bench

import writes shards of records with the pictures' own bytes, their side indexes, rejected.jsonl
and manifest.json. Every picture is decoded once; what cannot be used is a counted reject. An import
that was interrupted goes on with --resume and gives the same bytes. bench measures the rate and the
memory of the main formats on made-up pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qk_jax.base import cli
from qk_jax.base.errors import InputError, exits
from qk_jax.data.importers import importing
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job

_ENCODINGS = {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.data", description=__doc__)
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    take = verbs.add_parser("import", help="other people's sets into record files", more=_formats)
    add = take.add_argument
    add("--format", required=True, metavar="F", help="how the set lies on disk; listed below")
    add("--input", required=True, nargs="+", metavar="PATH", help="files or folders")
    add("--task", required=True, metavar="T", help="the task of all its examples")
    add("--out", required=True, metavar="DIR", help="folder to write; a new or an empty one")
    add("--columns", default="", metavar="ROLE=COLUMN,..", help="which column is what")
    add("--images", nargs="+", default=[], metavar="PATH",
        help="folders and uncompressed tars with the pictures that rows name")  # fmt: skip
    add("--control", nargs="+", default=[], metavar="DIR", help="folders of control images")
    add("--name", default="", help="of the set in figures by source (default: the format)")
    add("--licence", default="", help="for the manifest (default: the publisher's)")
    add("--split", default="train", help="of a TensorFlow data set (default: %(default)s)")
    add("--min-score", type=float, metavar="X", help="bound of the set's own quality filter")
    add(
        "--min-side", type=int, default=0, metavar="N", help="pixels; a smaller picture is rejected"
    )
    add("--max-pixels", type=int, default=1 << 26, metavar="N",
        help="a larger picture is rejected, undecoded (default: %(default)s)")  # fmt: skip
    add("--max-characters", type=int, default=10_000, metavar="N",
        help="a longer text is rejected (default: %(default)s)")  # fmt: skip
    add("--encode", default="", metavar="jpeg:95", help="write pictures as jpeg, webp or png")
    add("--validation", type=float, default=0.0, metavar="SHARE",
        help="share of the groups for the validation split")  # fmt: skip
    add("--dedup", action="store_true", help="leave out examples whose pictures came before")
    add("--shard-records", type=int, default=4096, metavar="N",
        help="rows of a shard where the format can choose (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    add("--ray", default="", metavar="ADDRESS", help="a Ray cluster instead, or 'auto'")
    add("--resume", action="store_true", help="go on with an import that was interrupted")
    rate = verbs.add_parser("bench", help="rate per core and memory of the main formats")
    rate.add_argument("--pictures", type=int, default=256, metavar="N",
        help="of the smaller of two sets (default: %(default)s)")  # fmt: skip
    return out


def _formats() -> str:
    lines = [f"  {name:20} {form.about}" for name, form in FORMATS.items()]
    return "\n".join(["\nformats:", *lines, ""])


def columns(text: str) -> dict[str, str]:
    """{role: column} of 'role=column,...'. Raises: InputError for anything else."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(role and equals and name for role, equals, name in pairs):
        raise InputError(f"--columns is {text!r}; give ROLE=COLUMN,.. such as text=caption")
    return {role: name for role, _, name in pairs}


def encoding(text: str) -> tuple[str, int] | None:
    """('JPEG', 95) of 'jpeg:95'. Raises: InputError for anything else."""
    name, colon, quality = text.partition(":")
    if not text:
        return None
    lossy = name in ("jpeg", "webp")
    if name not in _ENCODINGS or lossy != (quality.isdecimal() and 1 <= int(quality) <= 100):
        raise InputError(f"--encode is {text!r}; give jpeg:QUALITY or webp:QUALITY (1-100), or png")
    return _ENCODINGS[name], int(quality or 0)


def job_of(args: argparse.Namespace) -> Job:
    """The job of the arguments of import. Raises: InputError."""
    limits = (args.min_side, args.max_pixels, args.max_characters)
    if min(limits) < 0 or args.workers < 0:
        raise InputError("--min-side, --max-pixels, --max-characters and --workers are 0 or more")
    if args.ray and args.workers:
        raise InputError("--workers and --ray exclude each other; Ray knows its own cores")
    found = {name: getattr(args, name) for name in (
        "format", "task", "out", "name", "licence", "split", "min_score", "validation", "dedup",
        "shard_records",
    )}  # fmt: skip
    return Job(
        **found, inputs=tuple(args.input), images=tuple(args.images), control=tuple(args.control),
        columns=columns(args.columns), limits=Limits(*limits, encoding(args.encode)),
    )  # fmt: skip


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    from qk_jax.base import runtime  # brings JAX, which worker processes need not

    runtime.start_logging()
    if args.verb == "bench":
        from qk_jax.data.importers import bench

        if args.pictures < 1:
            raise InputError(f"--pictures {args.pictures} is less than 1")
        print(bench.run(args.pictures))
        return
    workers = args.workers or len(os.sched_getaffinity(0))
    engine = importing.Engine(workers, args.ray, args.resume)
    print(importing.told(importing.run(job_of(args), engine)))


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
