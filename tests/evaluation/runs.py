"""Folders of runs as the trainer and the quickstart leave them, made up and small."""

import json

import numpy as np

from qk_jax.painting import sheets

PHASES = ("untrained", "stage1", "stage3")


def noise(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def line(step, kind="train", **values):
    return json.dumps({"step": step, "kind": kind, **values})


def train_line(step, loss):
    """A line of training of two tasks and two bins of t."""
    return line(
        step, lr=1e-3, grad_norm=loss / 2, loss=loss, pictures_per_second=30.0, data_wait=0.02,
        memory_gb=1.5,
        **{"loss/editing": loss + 0.1, "loss/text_to_image": loss - 0.1},
        **{"loss/t0.00-0.50": loss, "loss/t0.50-1.00": loss},
        **{"goodput/step": 0.75, "goodput/compile": 0.25},
    )  # fmt: skip


def write_stage(folder, name, losses, lr=1e-3, **config):
    """A stage with a line of training every 10 steps, from 10 on, and validation at both ends."""
    folder.mkdir(parents=True)
    config = {"stage": name, "size": "tiny", "steps": 10 * len(losses), **config}
    config["optimizer"] = {"lr": lr, "clip": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [line(0, "validation", loss=2.5, **{"loss/editing": 2.5})]
    lines += [train_line(10 * number, loss) for number, loss in enumerate(losses, start=1)]
    lines.append(line(10 * len(losses), "validation", loss=1.25, **{"loss/editing": 1.25}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def write_sheet(path, phase, prompts=("make the hat green", "a red kite"), source=True):
    """A sheet of two records whose source and truth are the same on each, unlike what is painted.

    Sources are noise(16, 16, 1) and so on, truths noise(16, 16, 11)."""
    lines = []
    for number, prompt in enumerate(prompts, start=1):
        cells = [("source", noise(16, 16, number))] if source else []
        cells.append(("painted", noise(16, 16, 100 * PHASES.index(phase) + 50 + number)))
        lines.append((prompt, [*cells, ("truth", noise(16, 16, 10 + number))]))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheets.save(sheets.draw(f"editing, {phase}", lines), path)


def figures(gain):
    return {
        "loss": 1.0, "margin": 0.2, "margin_standard_error": 0.01, "records": 8, "psnr": 15.0,
        "psnr_standard_error": 0.5, "psnr_copy": 14.0, "gain_over_copy": gain,
        "gain_standard_error": 0.25,
        "kinds": {"recolour": {"gain_over_copy": gain - 1, "gain_standard_error": 0.5}},
    }  # fmt: skip


def write_quickstart(folder, gain=2.5, lr=1e-3):
    """A run of two stages with sheets of three phases, figures and times."""
    write_stage(folder / "stage1", "stage1", [2.0, 1.75, 1.5], lr=lr)
    write_stage(folder / "stage3", "stage3", [1.5, 1.25, 1.0], lr=lr)
    for phase in PHASES:
        write_sheet(folder / "samples" / f"editing_{phase}.png", phase)
    space = {name: {"top1": 0.5} for name in ("pixels", "vision")}
    report = {
        "tasks": {
            "editing": {phase: figures(gain * n) for n, phase in enumerate(PHASES)},
            "reconstruction": {"stage3": figures(-70.0) | {"psnr_copy": 99.0, "kinds": {}}},
        },
        "retrieval": {"stage3": {"captions": 16, **space}},
        "seconds": {"train stage1": 200.0, "total": 300.0},
        "peak_memory_mib": {"driver": 900},
        "machine": {"jax": "0.10.2", "processor": "a slow one"},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
