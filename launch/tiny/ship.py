"""A trained tiny stage 3 -> qk_jax/assets/tiny/stage3, the model that paints without a checkpoint.

    python launch/tiny/ship.py --checkpoint runs/long/stage3

It is the export of `convert to-pytorch` in float16 without what the other shipped parts have as
well: the text encoder is the adapter of stage 1, beside which stage 3 must lie. Its figures on
held-out subjects are measured as it is shipped, and go into its card.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence

import jax.numpy as jnp
from common import card  # beside this file

from qk_jax import evaluation
from qk_jax.base import cli, files, runtime
from qk_jax.base.errors import InputError, exits
from qk_jax.base.trees import flatten
from qk_jax.checkpoints import run_folder
from qk_jax.experiment import config as config_lib
from qk_jax.export.folder import export_pipeline
from qk_jax.painting import loading, sheets
from qk_jax.weights.write import export_lora

KEPT = ("text_encoder", "transformer", "kontext", "scheduler", "model_index.json")
CODE = "kontext/kontext.py"  # of PyTorch


def parser() -> cli.Parser:
    """The command line."""
    out = cli.Parser(prog="launch/tiny/ship.py", description=__doc__)
    add = out.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="stage 3 of a tiny run")
    add("--out", default=str(loading.SHIPPED), metavar="DIR", help="folder to write")
    add("--records", type=int, default=96, help="held-out examples of each task (default 96)")
    add("--sheets", metavar="DIR", help="folder for a sheet of pictures of each task")
    return out


@exits
def main(argv: Sequence[str]) -> None:
    """The command."""
    args = parser().parse_args(argv)
    runtime.quiet()
    runtime.skip_absent_tpu()
    runtime.keep_programs()
    loaded = run_folder.load(args.checkpoint)
    out = files.Path(args.out)
    with tempfile.TemporaryDirectory() as temporary:
        whole = files.Path(temporary) / "stage3"
        export_pipeline(loaded, whole, "float16")
        (whole / CODE).unlink()
        write_adapter(files.Path(args.checkpoint).parent / "stage1", loaded, whole)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        for name in KEPT:
            shutil.move(whole / name, out / name)
    extent = evaluation.Extent(records=args.records)
    figures = measure(out, loaded.plan.config, extent, args.sheets)
    files.write_json(out / "metrics.json", figures)
    files.write_text(out / "README.md", told(loaded, files.Path(args.checkpoint), figures))


def write_adapter(stage: files.Path, loaded: run_folder.Loaded, out: files.Path) -> None:
    """Writes what stage 1 taught the text encoder in place of the text encoder.

    Raises:
      InputError: with it the shipped VLM is not the text encoder of `loaded`.
    """
    first = run_folder.load(stage)
    shutil.rmtree(out / "text_encoder")
    scale = first.plan.model.config.lora_scale
    export_lora(first.params["lora"]["vlm"], scale, out / "text_encoder", jnp.float16, "vlm")
    shipped = flatten(loading.load_shipped(out).params["vlm"])
    for name, leaf in flatten(loaded.params["vlm"]).items():
        if not jnp.allclose(shipped[name], leaf, rtol=1e-3, atol=1e-3):
            raise InputError(
                f"{stage} is not what {loaded.name} comes from, {name} differs; give a stage 3 "
                "that lies beside its stage 1"
            )


def measure(out: files.Path, config, extent: evaluation.Extent, folder: str | None) -> dict:
    """Figures of the shipped weights on held-out subjects; with `folder`, sheets too."""
    painter = loading.load_shipped(out, batch=extent.batch)
    cases = evaluation.held_out_cases(config, extent.records)
    captions = evaluation.captions(config, extent.captions)
    figures, painted = evaluation.evaluate(painter, extent, cases, captions, print)
    for task, pictures in painted.items() if folder else ():
        shown = cases[task][: extent.sheet]
        requests, truths = [case.request for case in shown], [case.truth for case in shown]
        title = f"{task.replace('_', ' ')}: held-out subjects"
        sheet = sheets.of_requests(title, requests, pictures[: extent.sheet], truths)
        sheets.save(sheet, files.Path(folder) / f"{task}.png")
    return figures


def told(loaded: run_folder.Loaded, stage: files.Path, figures: dict) -> str:
    """The card."""
    steps = []
    for name in ("stage1", "stage2", "stage3"):
        config = config_lib.from_dict(files.read_json(stage.parent / name / run_folder.CONFIG))
        tasks = ", ".join(f"{task} {share:g}" for task, share in config.data.tasks.items() if share)
        steps.append(f"| {name} | {config.steps:,} | {config.data.batch} | {tasks} |")
    rows = []
    for task, found in figures["tasks"].items():
        for name, part in {task: found, **found.get("kinds", {})}.items():
            gain = "" if "gain_over_copy" not in part or part["psnr_copy"] > 98 else (
                f"{part['gain_over_copy']:+.2f} ± {part['gain_standard_error']:.2f}"
            )  # fmt: skip
            title = name if name == task else f"{task}: {name}"
            psnr = f"{part['psnr']:.2f} ± {part['psnr_standard_error']:.2f}"
            rows.append(f"| {title.replace('_', ' ')} | {psnr} | {gain} | {part['records']} |")
    grounds = " and ".join(
        f"{found['background']:.0%} of {found['backgrounds']} ({task})"
        for task, found in figures["tasks"].items()
        if "background" in found
    )
    nearest = figures["retrieval"]["pixels"]["top1"]
    return card(
        "stage3", steps="\n".join(steps), rows="\n".join(rows), grounds=grounds,
        nearest=nearest, captions=figures["retrieval"]["captions"], step=loaded.step,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
