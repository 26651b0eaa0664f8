"""Paints the target of each job of a synthesis with a trained model of ours.

    python -m qk_jax.data synthesize --kind customization --input CUTOUTS --backgrounds PHOTOS \\
        --out MADE --command "python -m qk_jax.api.paint {jobs} {results} --checkpoint W/stage3"

A target has the trained size that is nearest in shape to the one it takes the place of. The noise
is that of --seed and of the name of the job. A job that the model cannot follow, with too long a
text or too many pictures, is not kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from qk_jax import painting
from qk_jax.base import cli, files, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.data import buckets
from qk_jax.data.example import hashed
from qk_jax.data.synthesis import commands


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = cli.Parser(prog="python -m qk_jax.api.paint", description=__doc__)
    add = out.add_argument
    add("jobs", metavar="JOBS", help="folder that synthesize has written")
    add("results", metavar="RESULTS", help="folder to write")
    add("--checkpoint", required=True, metavar="DIR", help="a trained stage, such as W/stage3")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--steps", type=int, default=30, help="of the sampler (default: %(default)s)")
    add("--guidance", type=float, default=4.0, help="weight of the text (default: %(default)s)")
    add("--image-guidance", type=float, default=1.5,
        help="weight of the pictures (default: %(default)s)")  # fmt: skip
    add("--batch", type=int, help="pictures painted at once (default: all of a shape, at most 8)")
    return out


def request_of(painter: painting.Painter, job: commands.Job, seed: int) -> painting.Request:
    """What the painter is asked for a job. Raises: InputError, also for a picture."""
    most = painter.limits.max_pixels
    pictures = [(role, commands.read_picture(path, most)) for role, path in job.pictures]
    sources = [picture for role, picture in pictures if role == "source"]
    with Image.open(job.target) as target:
        width, height = target.size
    sizes = painter.limits.sizes
    return painter.fit(
        job.instruction,
        sources[0] if sources else None,
        [picture for role, picture in pictures if role != "source"],
        sizes[int(buckets.nearest(height, width, sizes))],
        seed,
    )


def paint(
    painter: painting.Painter,
    jobs: Sequence[commands.Job],
    folder: files.PathLike,
    settings: painting.Settings,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Writes the painted targets as PNG into a folder; returns the results, in their order."""
    requests, dropped = dict[str, painting.Request](), dict[str, Mapping[str, Any]]()
    for job in jobs:
        try:
            request = request_of(painter, job, seed)
            requests[job.id] = dataclasses.replace(request, number=hashed(job.id) // 2)
        except InputError as error:
            dropped[job.id] = {"keep": False, "reason": str(error)}
    names, painted = list(requests), dict[str, Mapping[str, Any]]()
    for index, pixels in painter.stream(list(requests.values()), settings):
        path = pathlib.Path(folder) / f"{index:06d}.png"
        Image.fromarray(pixels).save(path)
        painted[names[index]] = {"target": path.name}
    return [{"id": job.id, **(dropped.get(job.id) or painted[job.id])} for job in jobs]


@exits
def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    args = parser().parse_args(argv)
    runtime.start_logging()
    runtime.skip_absent_tpu()
    runtime.keep_programs()
    jobs = commands.read_jobs(args.jobs)
    settings = painting.Settings(args.steps, args.guidance, args.image_guidance)
    painter = painting.load(args.checkpoint, batch=args.batch)
    commands.write_results(args.results, paint(painter, jobs, args.results, settings, args.seed))


if __name__ == "__main__":
    main(sys.argv[1:])
