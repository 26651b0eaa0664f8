"""The quickstart's figures as one dict, as a page, and as the lines at its end."""

from __future__ import annotations

import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

PHASES = ("untrained", "stage1", "stage2", "stage3")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
Figures = dict[str, Any]


def machine() -> Figures:
    """What the figures were measured on."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    found = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
    }
    return found | {name: metadata.version(name) for name in PACKAGES}


def processor() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def collect(
    state: Figures,
    plan: Figures,
    phases: Mapping[str, Figures],
    comparison: Sequence[Figures] | None,
) -> Figures:
    """report.json: figures keyed by task, then by phase.

    Args:
      state: the quickstart's own notes: mode, seconds per part, peak memory.
      plan: how much was measured.
      phases: {'untrained', 'stage1', ...: figures of `evaluation.evaluate`}.
      comparison: of JAX with PyTorch, or None.
    """
    names = list(next(iter(phases.values()))["tasks"])
    report: Figures = {
        "mode": state["mode"],
        "tasks": {
            task: {phase: figures["tasks"][task] for phase, figures in phases.items()}
            for task in names
        },
        "retrieval": {phase: figures["retrieval"] for phase, figures in phases.items()},
        "roles": phases["stage3"].get("roles"),
        "pytorch": comparison,
        "plan": plan,
        "machine": machine(),
        "seconds": {name: part["seconds"] for name, part in state["parts"].items()},
        "processor_seconds": {
            name: part["processor_seconds"] for name, part in state["parts"].items()
        },
        "peak_memory_mib": state["peak_memory_mib"],
    }
    for clock in ("seconds", "processor_seconds"):
        report[clock]["total"] = round(sum(report[clock].values()), 1)
    return report


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _per_phase(report: Figures, cell: Any) -> str:
    rows = [[task, *map(cell, phases.values())] for task, phases in report["tasks"].items()]
    return table(["task", *PHASES], rows)


def _margin(f: Figures) -> str:
    return f"{f['loss']:.3f} / {f['margin']:+.4f} ± {f['margin_standard_error']:.4f}"


def _psnr_rows(report: Figures) -> list[list[str]]:
    rows = []
    for task, phases in report["tasks"].items():
        last = phases["stage3"]
        painted = [f"{phases[phase]['psnr']:.2f}" for phase in PHASES]
        copy = gain = "-"
        if last.get("psnr_copy", 99) < 99:  # reconstruction: the copy is the truth
            copy = f"{last['psnr_copy']:.2f}"
            gain = f"{last['gain_over_copy']:+.2f} ± {last['gain_standard_error']:.2f}"
        rows.append([task, *painted, copy, gain])
    return rows


def _retrieval_rows(report: Figures) -> list[list[str]]:
    rows = []
    for space in ("pixels", "vision"):
        for top in ("top1", "top5"):
            chance = report["retrieval"]["stage3"][f"chance_{top}"]
            found = [f"{report['retrieval'][phase][space][top]:.2f}" for phase in PHASES]
            rows.append([f"{space}, {top[:3]}-{top[3:]}", *found, f"{chance:.2f}"])
    return rows


def _role_rows(roles: Figures) -> list[list[str]]:
    words = {
        "identity_cosine": "identity: cosine in the vision tower",
        "identity_psnr": "identity: PSNR to the condition picture, dB",
        "layout_change": "freedom: 1 - correlation of the contours",
        "displacement": "freedom: shift that fits best, picture diagonals",
    }
    return [
        [
            text,
            f"{roles[name]['source']:.3f}",
            f"{roles[name]['reference']:.3f}",
            f"{roles[name]['source_minus_reference']:+.3f} ± {roles[name]['standard_error']:.3f}",
        ]
        for name, text in words.items()
    ]


def markdown(report: Figures) -> str:
    """report.md."""
    plan, where = report["plan"], report["machine"]
    first = next(iter(report["tasks"].values()))["stage3"]
    parts = [
        f"# Quickstart ({report['mode']})\n",
        f"Held-out subjects, {first['records']} records per task; {plan['painting']}. "
        "`report.json` has every figure, `samples/` the pictures.\n",
        "## Validation loss, and how much higher it is with another record's condition\n",
        f"Mean over t in {plan['times']}; the margin is paired, with its standard error.\n",
        _per_phase(report, _margin),
        "## PSNR of the painted picture against the truth, dB\n",
        "`copy` is the condition picture itself (the better one, on white at the target's size). "
        "In stages 1 and 2 pictures reach the generator through the kontext alone, in stage 3 also "
        "as VAE tokens.\n",
        table(["task", *PHASES, "copy", "stage 3 over copy"], _psnr_rows(report)),
        f"## Which of {report['retrieval']['stage3']['captions']} training captions was painted?\n",
        "Nearest true picture to the painted one, by the colours of an 8 x 8 grid (pixels) and by "
        "pooled features of the frozen vision tower (vision).\n",
        table(["", *PHASES, "chance"], _retrieval_rows(report)),
    ]
    if report["roles"]:
        parts += [
            "## The same picture as source and as reference (stage 3)\n",
            f"{report['roles']['records']} held-out customization records; only the positions of "
            "the picture's tokens differ.\n",
            table(["", "source", "reference", "difference"], _role_rows(report["roles"])),
        ]
    if report["pytorch"]:
        rows = [[x["name"], f"{x['difference']:.3g}"] for x in report["pytorch"]]
        parts += ["## The export in PyTorch, same noise\n", table(["", "difference"], rows)]
    seconds = [
        [name, f"{value:.0f}", f"{report['processor_seconds'][name]:.0f}"]
        for name, value in report["seconds"].items()
    ]
    memory = report["peak_memory_mib"]
    parts += [
        "## Time and memory\n",
        f"{where['processor']}, {where['cores']} cores, {where['system']}, Python "
        f"{where['python']}, jax {where['jax']}. Peak memory: {memory['driver']} MiB (measuring) "
        f"and {memory['child']} MiB (training), {sum(memory.values())} MiB together.\n",
        table(["part", "seconds", "seconds of all cores"], seconds),
    ]
    return "\n".join(parts)


def ending(out: pathlib.Path, report: Figures) -> str:
    """The lines that the quickstart ends with."""
    seconds, memory = report["seconds"]["total"], report["peak_memory_mib"]
    cost = f"{seconds / 60:.1f} min, at most {sum(memory.values())} MiB"
    lines = [f"\nAll is done in {out} ({cost}):"]
    for name, what in (
        ("report.html", "open it in a browser: curves, pictures, figures, settings"),
        ("report.md", "the figures"),
        ("samples/", "painted pictures, before training and after each stage"),
        ("stage3/", "the trained model"),
        ("pytorch/", "the same for diffusers"),
    ):
        lines.append(f"  {out / name}  {what}")
    if report["pytorch"]:
        worst = max(x["difference"] for x in report["pytorch"] if x["name"].endswith("of 255"))
        lines.append(f"  Painted by PyTorch from the same noise: at most {worst:g}/255 different")
    command = f".venv/bin/python -m qk_jax.sample --checkpoint {out / 'stage3'}"
    lines.append(f'  {command} --prompt "a red apple" --out apple.png')
    return "\n".join(lines)
