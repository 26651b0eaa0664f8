"""Data for training: imports what others publish into record files, and looks at examples.

    python -m qk_jax.data import --format folder --input PICTURES --task text_to_image --out DATA
    python -m qk_jax.data import --format omniedit --input DOWNLOADED --task editing --out DATA \\
        --validation 0.01 --workers 8
    python -m qk_jax.data import --format parquet --input FILES --task text_to_image --out DATA \\
        --columns text=caption,target=image
    python -m qk_jax.data index --input TARS --task text_to_image --out TARS
    python -m qk_jax.data synthesize --kind transformation --input DATA --out CHANGED --workers 8
    python -m qk_jax.data synthesize --kind edit --input CUTOUTS --backgrounds PHOTOS --out MADE
    python -m qk_jax.data look DATA --n 48 --out page.html
    python -m qk_jax.data look stage3:tiny --step 100 --out page.html --png sheet.png
    python -m qk_jax.data plan --config stage3:7b --config.data.records=DATA --hosts 8 --step-s 4.2
    python -m qk_jax.data encode --config stage3:7b --workdir W --out CACHE
    python -m qk_jax.data bench
    python -m qk_jax.data bench load
    python -m qk_jax.data bench plan --rows 50000000

import writes shards of records with the pictures' own bytes, their side indexes, rejected.jsonl
and manifest.json. Every picture is decoded once; what cannot be used is a counted reject. An import
that was interrupted goes on with --resume and gives the same bytes. index checks WebDataset tars
alike, but writes where their members lie; config.data.records=tar:DIR reads them there. synthesize
makes shards from other records: a picture asked for again or changed as a whole, and cut-outs (with
transparency or a mask) set on backgrounds, as customization, composition or edits; its bytes do not
depend on the number of workers. look writes a page of examples as training sees them: of a folder
of records, or of a run by its config, any field of which can be given as --config.FIELD=VALUE. plan
prints what a run will read, and how fast this host makes it. encode keeps what the frozen towers
make of the pictures of a run, so that its steps run neither. bench measures, on what it makes up,
the rate and the memory of imports from the main formats; with load, the rate of batches beside that
of PyTorch's DataLoader; with plan, the start, the memory and the look-up of a large set.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence

from qk_jax.base import cli
from qk_jax.base.errors import InputError, exits
from qk_jax.data.importers import importing, pieces
from qk_jax.data.importers.drafts import Limits
from qk_jax.data.importers.formats import FORMATS
from qk_jax.data.importers.job import Job
from qk_jax.data.synthesis import from_records
from qk_jax.data.synthesis.order import KINDS, Order

_LEAST_ROWS = 100_000  # of a plan that is measured: each shape should have a batch
_ON_PAGE, _ON_SHEET = 10_000, 200  # examples
_SIZES = "stage3:7b"  # whose sizes a folder is shown at, and measured
_ENCODINGS = {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.data", description=__doc__)
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    take = verbs.add_parser("import", help="other people's sets into record files", more=_formats)
    add = take.add_argument
    add("--format", required=True, metavar="F", help="how the set lies on disk; listed below")
    add("--input", required=True, nargs="+", metavar="PATH", help="files or folders")
    add("--out", required=True, metavar="DIR", help="folder to write; a new or an empty one")
    add("--images", nargs="+", default=[], metavar="PATH",
        help="folders and uncompressed tars with the pictures that rows name")  # fmt: skip
    add("--control", nargs="+", default=[], metavar="DIR", help="folders of control images")
    add("--split", default="train", help="of a TensorFlow data set (default: %(default)s)")
    add("--encode", default="", metavar="jpeg:95", help="write pictures as jpeg, webp or png")
    add("--shard-records", type=int, default=4096, metavar="N",
        help="rows of a shard where the format can choose (default: %(default)s)")  # fmt: skip
    take.set_defaults(in_place=False)
    _add_choice(take)
    _add_index(verbs.add_parser("index", help="WebDataset tars that are then read in place"))
    _add_synthesize(verbs.add_parser("synthesize", help="training records from other records"))
    rate = verbs.add_parser("bench", help="what imports, loading, or the plan of a large set cost")
    rate.add_argument("what", nargs="?", default="import", choices=("import", "load", "plan"),
        help="(default: %(default)s)")  # fmt: skip
    rate.add_argument("--pictures", type=int, default=256, metavar="N",
        help="loaded, or imported of the smaller set (default: %(default)s)")  # fmt: skip
    rate.add_argument("--rows", type=int, default=1_000_000, metavar="N",
        help="of the plan; on disk they take 167 bytes each (default: %(default)s)")  # fmt: skip
    _add_plan(verbs.add_parser("plan", help="what a run will read, and whether a host keeps up"))
    _add_encode(verbs.add_parser("encode", help="what frozen towers make of a run's pictures"))
    _add_look(verbs.add_parser("look", help="a page of examples as training sees them"))
    return out


def _add_index(index: argparse.ArgumentParser) -> None:
    add = index.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="uncompressed tars, or folders")
    add("--out", required=True, metavar="DIR", help="folder to write, such as that of the tars")
    index.set_defaults(
        format="webdataset", in_place=True, images=[], control=[], split="", encode="",
        shard_records=1,
    )  # fmt: skip
    _add_choice(index)


def _add_choice(take: argparse.ArgumentParser) -> None:
    """Which examples of a set are taken, as what, and by how many processes."""
    add = take.add_argument
    add("--task", required=True, metavar="T", help="the task of all its examples")
    add("--columns", default="", metavar="ROLE=COLUMN,..", help="which column is what")
    add("--name", default="", help="of the set in figures by source (default: the format)")
    add("--licence", default="", help="for the manifest (default: the publisher's)")
    add("--min-score", type=float, metavar="X", help="bound of the set's own quality filter")
    add(
        "--min-side", type=int, default=0, metavar="N", help="pixels; a smaller picture is rejected"
    )
    add("--max-pixels", type=int, default=1 << 26, metavar="N",
        help="a larger picture is rejected, undecoded (default: %(default)s)")  # fmt: skip
    add("--max-characters", type=int, default=10_000, metavar="N",
        help="a longer text is rejected (default: %(default)s)")  # fmt: skip
    add("--validation", type=float, default=0.0, metavar="SHARE",
        help="share of the groups for the validation split")  # fmt: skip
    add("--dedup", action="store_true", help="leave out examples whose pictures came before")
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    add("--ray", default="", metavar="ADDRESS", help="a Ray cluster instead, or 'auto'")
    add("--resume", action="store_true", help="go on with what was interrupted")


def _add_synthesize(make: argparse.ArgumentParser) -> None:
    add = make.add_argument
    add("--kind", required=True, metavar="KIND", help=", ".join(KINDS))
    add("--input", required=True, metavar="DIR", help="records with pictures, or with cut-outs")
    add("--backgrounds", default="", metavar="DIR", help="records that cut-outs are set on")
    add("--out", required=True, metavar="DIR", help="folder to write; a new or an empty one")
    add("--count", type=int, default=0, metavar="N",
        help="examples in all (default: one per usable record of --input)")  # fmt: skip
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--language", default="en", metavar="L", help="of the words: en (the default), zh or both")
    add("--validation", type=float, default=0.0, metavar="SHARE",
        help="of the records of a folder that has no validation split")  # fmt: skip
    add("--scale", type=float, nargs=2, default=(0.2, 0.7), metavar=("LEAST", "MOST"),
        help="longer side of a subject, of the picture's shorter (default: 0.2 0.7)")  # fmt: skip
    add("--overlap", type=float, default=0.1, metavar="SHARE",
        help="most of a subject that another may cover (default: %(default)s)")  # fmt: skip
    add("--side", type=int, default=1024, metavar="N",
        help="most pixels of a background's shorter side (default: %(default)s)")  # fmt: skip
    add("--command", action="append", default=[], metavar="CMD",
        help="with {jobs} and {results}: paints targets, or filters; may be repeated")  # fmt: skip
    add("--name", default="", help="of the set in figures by source (default: the kind)")
    add("--max-pixels", type=int, default=1 << 26, metavar="N",
        help="a larger picture is rejected, undecoded (default: %(default)s)")  # fmt: skip
    add("--shard-records", type=int, default=4096, metavar="N",
        help="examples of a shard (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    add("--resume", action="store_true", help="go on with a synthesis that was interrupted")


def _add_plan(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    add("--config", required=True, metavar="CONFIG", help="of the run: NAME:SIZE, or FILE.py:SIZE")
    add("--seconds", type=float, default=10.0, metavar="S",
        help="for which batches are made and timed (default: %(default)s)")  # fmt: skip
    add("--hosts", type=int, default=1, metavar="N",
        help="of the run, of which this is the first (default: %(default)s)")  # fmt: skip
    add("--step-s", type=float, default=0.0, metavar="S", help="seconds of a step of the run")


def _add_encode(encode: argparse.ArgumentParser) -> None:
    add = encode.add_argument
    add("--config", required=True, metavar="CONFIG", help="of the run: NAME:SIZE, or FILE.py:SIZE")
    add("--workdir", default=".", metavar="W",
        help="of the run, where the stage before is found (default: %(default)s)")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="folder to write, or to add to")
    add("--part", default="0/1", metavar="I/N",
        help="of N commands that share the work (default: %(default)s)")  # fmt: skip


def _add_look(look: argparse.ArgumentParser) -> None:
    add = look.add_argument
    add("what", metavar="DIR_OR_CONFIG", 
        help="a folder of records, tar:FOLDER, or a config NAME:SIZE or FILE.py:SIZE")  # fmt: skip
    add("--out", default="", metavar="FILE.html", help="the page to write")
    add("--png", default="", metavar="FILE.png", help="a sheet to write, with or without a page")
    add("--n", type=int, default=48, metavar="N", help="at most so many (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    add("--step", type=int, metavar="N", help="the batch of this training step, counted from 0")
    add("--records", metavar="N,..", help="the records with these numbers, counted from 0")
    add("--split", default="train", choices=("train", "validation"), help="(default: train)")


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The verb's options, and the overrides --config.FIELD=VALUE of encode, look and plan.

    Raises: InputError.
    """
    args, overrides = cli.parse_with_overrides(parser(), argv)
    if overrides and args.verb not in ("encode", "look", "plan"):
        raise InputError(f"{args.verb} has no config; leave --config.{next(iter(overrides))} out")
    return args, overrides


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
    """The job of the arguments of import or index. Raises: InputError."""
    limits = (args.min_side, args.max_pixels, args.max_characters)
    if min(limits) < 0 or args.workers < 0:
        raise InputError("--min-side, --max-pixels, --max-characters and --workers are 0 or more")
    if args.ray and args.workers:
        raise InputError("--workers and --ray exclude each other; Ray knows its own cores")
    found = {name: getattr(args, name) for name in (
        "format", "task", "out", "name", "licence", "split", "min_score", "validation", "dedup",
        "shard_records", "in_place",
    )}  # fmt: skip
    return Job(
        **found, inputs=tuple(args.input), images=tuple(args.images), control=tuple(args.control),
        columns=columns(args.columns), limits=Limits(*limits, encoding(args.encode)),
    )  # fmt: skip


def order_of(args: argparse.Namespace) -> Order:
    """The order of the arguments of synthesize. Raises: InputError."""
    if args.workers < 0:
        raise InputError(f"--workers is {args.workers}; give 0 or more")
    found = {name: getattr(args, name) for name in (
        "out", "kind", "input", "backgrounds", "count", "seed", "language", "validation", "name",
        "overlap", "side", "shard_records", "max_pixels",
    )}  # fmt: skip
    return Order(**found, scale=tuple(args.scale), commands=tuple(args.command))


def check_look(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The record numbers of the arguments of look. Raises: InputError."""
    if not (args.out or args.png):
        raise InputError("look has nothing to write; give --out FILE.html, --png FILE.png, or both")
    if args.step is not None and args.records is not None:
        raise InputError("--step and --records exclude each other")
    records = None
    if args.records is not None:
        parts = args.records.split(",")
        if not all(part.isascii() and part.isdecimal() for part in parts):
            raise InputError(f"--records is {args.records!r}; give numbers such as 1,5,9")
        records = tuple(map(int, parts))
    most, where = (_ON_SHEET, " with --png") if args.png else (_ON_PAGE, "")
    count = len(records) if records else args.n
    if not 1 <= count <= most:
        raise InputError(f"{count} examples are asked for; give 1 to {most:,}{where}")
    return records


def _bench(args: argparse.Namespace) -> str:
    """The tables of bench. Raises: InputError."""
    from qk_jax.data.bench import imports, loading, plans
    from qk_jax.experiment import config as config_lib

    if args.pictures < 1 or args.rows < _LEAST_ROWS:
        raise InputError(
            f"--pictures is {args.pictures} and --rows {args.rows}; give at least 1 picture "
            f"and {_LEAST_ROWS:,} rows"
        )
    load = functools.partial(config_lib.load, _SIZES)
    if args.what == "import":
        return imports.run(args.pictures)
    if args.what == "load":
        return loading.run(args.pictures, load)
    return plans.run(args.rows, load)


def _plan(args: argparse.Namespace, overrides: dict[str, str]) -> str:
    """The report of plan. Raises: InputError."""
    from qk_jax.data.pipeline import Pipeline
    from qk_jax.experiment import config as config_lib
    from qk_jax.training import evals, reading

    reading.check(args.seconds, args.step_s, args.hosts)
    config = config_lib.load(args.config, overrides)
    evals.check_data(config)
    pipeline = Pipeline(config, "train", 0, args.hosts)
    return reading.told(pipeline, args.seconds, args.step_s)


def _encode(args: argparse.Namespace, overrides: dict[str, str]) -> str:
    """Writes the rows; returns what to print. Raises: InputError."""
    from qk_jax.experiment import config as config_lib
    from qk_jax.training import cached

    config = config_lib.load(args.config, overrides)
    return cached.encode(config, args.out, args.workdir, args.part)


def _look(args: argparse.Namespace, overrides: dict[str, str]) -> str:
    """Writes the page and the sheet; returns what to print."""
    records = check_look(args)
    from qk_jax.data.pipeline import Pipeline
    from qk_jax.data.viewer import look, page, shown
    from qk_jax.experiment import config as config_lib
    from qk_jax.experiment import origins
    from qk_jax.painting import sheets

    folder = look.is_folder(args.what)
    if folder:
        fields = look.folder_fields(args.what, args.split)
        fields["data.tokenizer"] = str(origins.EMBEDDED / "tokenizer")
        config = config_lib.load(_SIZES, fields | overrides)
    elif ":" in args.what or args.what.endswith(".py"):
        config = config_lib.load(args.what, overrides)
    else:
        raise InputError(
            f"{args.what} is no folder; give a folder of records, or a config such as stage3:tiny"
        )
    choice = look.Choice(args.split, args.n, args.seed, args.step, records)
    reader, about, chosen = look.choose(Pipeline(config, args.split, 0, 1), choice, not folder)
    tally = look.Tally(chosen, small=sheets.SIDE if args.png else 0)
    facts = look.run_facts(config)
    if folder:
        facts = look.folder_facts(args.what)
        about += f" Sizes are those of {_SIZES}; tokens are counted by the shipped tokenizer."
    if args.out:
        sizes = shown.sizes_of(reader.sources())
        page.write(args.out, page.Heading(args.what, about, facts), tally, sizes)
    else:
        tally.exhaust()
    if args.png:
        sheets.save(sheets.draw(f"{args.what}: {about}", tally.lines), args.png)
    names = " and ".join(filter(None, [args.out, args.png]))
    return f"{names}: {tally.examples} examples, {tally.bad} of them with bad records"


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args, overrides = arguments(argv)
    from qk_jax.base import runtime  # brings JAX, which worker processes need not

    runtime.start_logging()
    if args.verb == "bench":
        print(_bench(args))
        return
    if args.verb == "plan":
        print(_plan(args, overrides))
        return
    if args.verb == "encode":
        print(_encode(args, overrides))
        return
    if args.verb == "look":
        print(_look(args, overrides))
        return
    workers = args.workers or len(os.sched_getaffinity(0))
    if args.verb == "synthesize":
        print(
            pieces.told(from_records.run(order_of(args), pieces.Engine(workers, "", args.resume)))
        )
        return
    engine = pieces.Engine(workers, args.ray, args.resume)
    print(pieces.told(importing.run(job_of(args), engine)))


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
