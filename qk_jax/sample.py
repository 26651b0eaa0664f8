"""Paints pictures with a trained model.

    python -m qk_jax.sample --prompt "a red apple on a blue background"
    python -m qk_jax.sample --checkpoint W/stage3 --prompt "a red kite" --out out.png
    python -m qk_jax.sample --checkpoint W/stage3 --prompt "make it blue" --source a.png --out b.png
    python -m qk_jax.sample --checkpoint W/stage3 --prompts many.jsonl --out-dir painted

Without --checkpoint the tiny model that is shipped paints. One picture is written to --out, or to
a file that is named after the prompt; with --num N they are numbered: out-0.png, out-1.png, ...
A line of --prompts is {"prompt": ..., "source": path, "references": [paths], "seed": n, "out":
name}, where all but the prompt may be left out and paths are relative to the file. The same
arguments give the same bits; with the same --batch a picture has them whatever else is painted.
Every PNG carries its prompt, seed and settings. Compiled programs are kept in the user's cache
folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import tqdm

from qk_jax import painting
from qk_jax.base import buckets, cli, runtime
from qk_jax.base.errors import exits
from qk_jax.diffusion import sampler
from qk_jax.painting.orders import jobs_of, make_folders, orders, parse_size, texts_of, write_png


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.sample", description=__doc__)
    add = out.add_argument
    add("--checkpoint", metavar="DIR", help="W/stage3 or an export (default: the tiny model)")
    add("--step", type=int, help="step of the checkpoint (default: the newest)")
    add("--no-ema", action="store_true", help="paint with the last weights, not their average")
    add("--prompt", help="what to paint, or what to do with the pictures")
    add("--source", metavar="PNG", help="picture to edit")
    add("--reference", metavar="PNG", action="append", default=[], help="subject; may be repeated")
    add("--out", metavar="PNG", help="file to write (default: named after the prompt)")
    add("--prompts", metavar="JSONL", help="many prompts, one JSON object a line")
    add("--out-dir", metavar="DIR", help="folder for the pictures of --prompts")
    add("--size", metavar="WxH", help="width x height, multiples of 16 (default: as the source)")
    add("--num", type=int, default=1, help="pictures per prompt (default 1)")
    add("--seed", type=int, default=0, help="seed of the noise (default 0)")
    add("--steps", type=int, default=30, help="sampler steps (default 30)")
    add("--guidance", type=float, default=4.0, help="weight of the text, 1 is off (default 4)")
    add("--image-guidance", type=float, default=1.5, help="weight of the pictures (default 1.5)")
    add("--solver", choices=sampler.SOLVERS, default="euler", help="default euler")
    add("--guidance-end", type=float, metavar="WEIGHT", help="of the text at the end (linear in t)")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FIRST", "LAST"),
        help="t between which there is guidance; 1 is noise (default 0 1)")  # fmt: skip
    add(
        "--renormalize",
        action=argparse.BooleanOptionalAction,
        help="keep the length of the unguided velocity (default: with Qwen-Image's law)",
    )
    add("--zero-init-steps", type=int, default=0, help="steps that stay noise (default 0)")
    add(
        "--symmetric-guidance",
        action="store_true",
        help="weigh the pictures against the text alone as well: a fourth evaluation a step",
    )
    add("--overwrite", action="store_true", help="replace pictures that exist")
    add("--batch", type=int, help="pictures painted at once (default: all of a shape, at most 8)")
    return out


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    runtime.quiet()
    buckets.check([args.checkpoint, args.source, *args.reference, args.prompts])
    buckets.check([args.out, args.out_dir])
    runtime.skip_absent_tpu()
    runtime.keep_programs()
    asked = orders(args)
    size = parse_size(args.size)
    names = [field.name for field in dataclasses.fields(painting.Settings)]
    settings = painting.Settings(**{name: getattr(args, name) for name in names})
    painter = painting.load(args.checkpoint, ema=not args.no_ema, step=args.step, batch=args.batch)
    jobs = [job for order in asked for job in jobs_of(painter, order, size, args.num)]
    make_folders([job.path for job in jobs], overwrite=args.overwrite)
    requests = [job.request for job in jobs]
    with tqdm.tqdm(total=len(jobs), desc="compiling", unit="picture") as bar:
        for index, picture in painter.stream(requests, settings, phase=bar.set_description):
            write_png(jobs[index].path, picture, texts_of(painter, jobs[index], settings))
            bar.update()
    for job in jobs:
        print(job.path)


def run() -> None:
    """Entry point of the console script."""
    main(sys.argv[1:])


if __name__ == "__main__":
    run()
