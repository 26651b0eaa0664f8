"""The table of layouts for people: lines for the terminal, a page and a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qk_jax.bench.schedule import walk

PAGE, PICTURE = "layouts.md", "layouts.png"
Found = Mapping[str, Any]  # one row of layouts.jsonl
# Largest relative difference of losses and gradient norms of the same batch: sums in another order.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2), "float16": (1e-2, 5e-2)}

CONVENTION = """\
Model FLOPs are the matrix products and convolutions that training needs, 2 per multiply-add: a
frozen layer once (forward), a frozen layer with a gradient through it twice, a trained one three
times; attention, which has no weights, three times wherever a gradient passes. Recomputation is not
counted, whatever the layout recomputes; masked attention is counted as if it were full. MFU is
model FLOPs over step time x devices x the vendor's bfloat16 peak.
"""
ESTIMATE = f"""\
**What the estimate is.** The real train step in its two programs, the autoencoder's encoder and
everything else, optimizer and all, compiled by the compiler that the slice would use, for that
slice's devices and links; their times add up. Whether they fit into HBM, each beside what the
other takes, is that compiler's own answer. Compute is the sum of its cycle estimates for every op
that it scheduled, loop bodies as often as they run, at the clock of the generation. Attention
kernels, for which it has no estimate, are priced from their FLOPs at
{walk.FORWARD_EFFICIENCY:.0%} (forward) and
{walk.BACKWARD_EFFICIENCY:.0%} (backward) of the peak that their heads can fill, or from their bytes.
A collective takes its bytes over the published bandwidth of the links that its group spans; what
the schedule puts between its start and its end hides it, the rest is exposed.

**What it is not.** A measurement. It knows no input pipeline, host, checkpoint or straggler, no
contention for HBM between what runs at once, no power limit. It is for choosing between layouts,
and for whether one fits; differences of a few per cent mean nothing, and a real step is slower.
`--measure` on the slice says by how much.
"""


def header() -> str:
    """Names over `line`."""
    return (
        f"{'slice':<12} {'batch':>5} {'rows':>6} {'fits':<4} {'HBM GiB':>13} {'step s':>8} "
        f"{'pict/s':>8} {'MFU':>6} {'exposed':>8} {'compile':>8}  layout, remat"
    )


def line(found: Found) -> str:
    """One row for the terminal; a second line has what was measured, a third an error."""
    fits = {True: "yes", False: "NO", None: "?"}[found["fits"]]
    hbm = f"{number(found['hbm_peak_gib'], '.2f')}/{number(found['hbm_limit_gib'], '.2f')}"
    text = (
        f"{found['slice']:<12} {found['per_chip_batch']:>5g} {found['rows'] or '-':>6} {fits:<4} "
        f"{hbm:>13} {number(found['step_time_s'], '.3f'):>8} "
        f"{number(found['pictures_per_s'], '.1f'):>8} {number(found['mfu'], '.1%'):>6} "
        f"{number(found['exposed_comm_s'], '.3f'):>8} {number(found['compile_s'], '.0f'):>7}s  "
        f"{found['layout']}, {found['remat']}"
    )
    if found["measured_step_s"] is not None:
        text += f"\n    measured: {measured(found)}"
    if found["error"]:
        text += f"\n    error: {found['error']}"
    return text


def number(value: float | None, form: str) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def measured(found: Found) -> str:
    """What was measured of a row, in words."""
    words = f"step {found['measured_step_s']:.4g} s"
    if found["step_time_s"]:
        words += f" ({found['measured_step_s'] / found['step_time_s']:.2f} x the estimate)"
    words += f", {found['measured_pictures_per_s']:.4g} pictures/s"
    if found["measured_mfu"] is not None:
        words += f", MFU {found['measured_mfu']:.1%}"
    return f"{words}, loss {found['loss']:.6g}, gradient norm {found['grad_norm']:.6g}"


def differing(table: Sequence[Found]) -> list[str]:
    """Warnings about rows that computed something else than the first of the same batch."""
    groups: dict[str, list[Found]] = {}
    for found in table:
        if found["loss"] is not None:
            names = ("config", "overrides", "rows", "accumulation", "size", "pictures")
            groups.setdefault(repr([found[name] for name in names]), []).append(found)
    return [
        f"WRONG? {one['layout']} (remat {one['remat']}) has {name} {one[name]:.6g}, "
        f"{first['layout']} (remat {first['remat']}) has {first[name]:.6g} on the same batch: "
        f"more than rounding explains"
        for first, *others in groups.values()
        for one in others
        for name, limit in zip(("loss", "grad_norm"), TOLERANCE[one["dtype"]], strict=True)
        if not abs(one[name] - first[name]) <= limit * abs(first[name])
    ]


def ordered(table: Sequence[Found]) -> list[Found]:
    """Most pictures per second and chip first; what does not fit last."""

    def rank(found: Found) -> tuple:
        rate = found["pictures_per_s"] or found["measured_pictures_per_s"]
        return (not found["fits"], -(rate or 0) / found["chips"], found["hbm_peak_gib"] or 0)

    return sorted(table, key=rank)


def write(out: pathlib.Path, table: Sequence[Found]) -> None:
    """Writes the page and the picture of a table into `out`."""
    rows = ordered(table)
    (out / PAGE).write_text("\n".join(page(rows)) + "\n", encoding="utf-8")
    draw(out / PICTURE, rows)


def page(rows: Sequence[Found]) -> Iterator[str]:
    """Lines of the page: the table, what its words mean, and a section for each row."""
    yield from ("# Layouts", "", f"![step time and memory]({PICTURE})", "")
    heads = (
        "slice", "layout", "remat", "rows per device", "rows", "fits", "HBM peak / limit, GiB",
        "step, s", "pictures/s", "per chip", "MFU", "exposed comm., s", "compile, s",
    )  # fmt: skip
    yield from table_head(heads)
    for index, found in enumerate(rows, 1):
        yield cells(
            found["slice"], f"[{found['layout']}](#row-{index})", found["remat"],
            f"{found['per_chip_batch']:g}", found["rows"] or "-",
            "error" if found["error"] else {True: "yes", False: "**no**", None: "?"}[found["fits"]],
            f"{number(found['hbm_peak_gib'], '.2f')} / {number(found['hbm_limit_gib'], '.2f')}",
            number(found["step_time_s"], ".3f"), number(found["pictures_per_s"], ".1f"),
            number(found["pictures_per_s_per_chip"], ".3f"), number(found["mfu"], ".1%"),
            number(found["exposed_comm_s"], ".3f"), number(found["compile_s"], ".0f"),
        )  # fmt: skip
    warnings = differing(rows)
    yield from ("", *(f"**{warning}**" for warning in warnings), *[""] * bool(warnings))
    yield from (CONVENTION, ESTIMATE)
    for index, found in enumerate(rows, 1):
        yield from section(index, found)


def table_head(names: Sequence[str]) -> Iterator[str]:
    """The first two lines of a table; all columns but the first are numbers or short words."""
    yield cells(*names)
    yield cells("---", *["---:"] * (len(names) - 1))


def cells(*values: Any) -> str:
    """One line of a table."""
    return f"| {' | '.join(str(value) for value in values)} |"


def section(index: int, found: Found) -> Iterator[str]:
    """Lines about one row."""
    yield from (f"## Row {index}", "")
    yield (
        f"`{found['config']}` on {found['slice']}, `{found['layout']}`, remat `{found['remat']}`, "
        f"{found['rows'] or '?'} rows in {found['accumulation'] or '?'} micro-batches, target "
        f"{found['size'][0]}x{found['size'][1]}, {found['pictures']} condition pictures."
    )
    for name in ("overrides", "flags"):
        if found[name]:
            given = found[name].items() if name == "overrides" else found[name]
            words = (f"{one[0]}={one[1]}" if name == "overrides" else one for one in given)
            yield f"{name.capitalize()}: {', '.join(f'`{word}`' for word in words)}."
    yield ""
    if found["error"]:
        yield from (f"Error: {found['error']}", "")
    if found["measured_step_s"] is not None:
        yield from (f"Measured: {measured(found)}.", "")
    if found["model_tflops"]:
        yield from flops_table(found)
    if found["temp_gib"] is not None:
        yield from memory_line(found)
    if found["step_time_s"] is not None:
        yield from estimate_tables(found)


def flops_table(found: Found) -> Iterator[str]:
    """Model FLOPs by tower."""
    yield from table_head(("tower", "model TFLOP per step", "share"))
    whole = found["model_tflops_per_step"]
    for tower, work in found["model_tflops"].items():
        yield cells(tower, f"{work:,.1f}", f"{work / whole:.1%}")
    yield from (cells("all", f"{whole:,.1f}", "100.0%"), "")


def memory_line(found: Found) -> Iterator[str]:
    """What the peak is made of."""
    names = ("argument", "temp", "output", "code", "host")
    parts = ", ".join(f"{name} {found[f'{name}_gib']:.2f}" for name in names)
    yield from (f"Memory in GiB: {parts} (output without what the arguments give).", "")


def estimate_tables(found: Found) -> Iterator[str]:
    """Where the step's time goes."""
    names = ("compute_s", "attention_s", "exposed_comm_s", "comm_s")
    words = ("compute", "attention", "exposed communication", "all communication")
    parts = ", ".join(f"{word} {found[name]:.3f}" for word, name in zip(words, names, strict=True))
    yield from (f"Seconds of a step of {found['step_time_s']:.3f}: {parts}.", "")
    yield from table_head(("collective", "axes", "devices", "MB", "count", "async", "time, ms",
                           "exposed, ms", "source"))  # fmt: skip
    for one in sorted(found["collectives"], key=lambda one: -one["exposed_seconds"]):
        yield cells(
            one["kind"], "+".join(one["axes"]), one["group_size"], f"{one['nbytes'] / 1e6:,.2f}",
            one["count"], "yes" if one["asynchronous"] else "no", f"{one['seconds'] * 1e3:,.2f}",
            f"{one['exposed_seconds'] * 1e3:,.2f}", one["source"],
        )  # fmt: skip
    yield ""
    yield from table_head(("dearest ops", "kind", "count", "time, ms", "share", "source", "scope"))
    for op in found["ops"]:
        yield cells(
            op["name"], op["kind"], op["count"], f"{op['seconds'] * 1e3:,.2f}",
            f"{op['seconds'] / found['step_time_s']:.1%}", op["source"], f"`{op['scope']}`",
        )  # fmt: skip
    yield ""
    if found["unpriced"]:
        yield from (f"Without a price: {', '.join(f'`{name}`' for name in found['unpriced'])}.", "")


PARTS = (  # of the bars: field, word, colour
    ("compute_s", "compute", "#4477aa"),
    ("attention_s", "attention", "#66ccee"),
    ("exposed_comm_s", "exposed communication", "#ee6677"),
)


def draw(file: pathlib.Path, rows: Sequence[Found]) -> None:
    """The picture: bars of step time by its parts, and of HBM beside its limit."""
    import matplotlib  # here, so that the other verbs do not need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, memory) = pyplot.subplots(
        1, 2, figsize=(14, 1.9 + 0.42 * len(rows)), sharey=True, width_ratios=(2, 1),
        layout="constrained",
    )  # fmt: skip
    draw_times(times, rows)
    draw_memory(memory, rows)
    several = len({found["slice"] for found in rows}) > 1
    times.set_yticks(range(len(rows)), [label(found, several) for found in rows], fontsize=8)
    times.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    for axes in (times, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    names = dict.fromkeys(found["config"] for found in rows)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(", ".join(names), fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def label(found: Found, several: bool) -> str:
    """A row's name beside its bar; with the slice where there are several."""
    mesh, slash, rows = found["layout"].partition("/")
    first = f"{found['slice']}  {mesh}" if several else mesh
    if len(rows) < 20:
        first, rows = f"{first}{slash}{rows}", ""
    batch = f"{found['remat']}, {found['per_chip_batch']:g} per device"
    return f"{first}, {batch}\n{rows}" if rows else f"{first}\n{batch}"


def draw_times(axes: Any, rows: Sequence[Found]) -> None:
    """Step times, each with pictures per second and MFU at its end."""
    for field, word, colour in PARTS:
        lengths = [found[field] or 0.0 for found in rows]
        before = [sum(found[name] or 0.0 for name in before_of(field)) for found in rows]
        axes.barh(range(len(rows)), lengths, left=before, color=colour, label=word, height=0.6)
    times = [(index, found["measured_step_s"]) for index, found in enumerate(rows)]
    dots = [(seconds, index) for index, seconds in times if seconds is not None]
    if dots:
        axes.plot(*zip(*dots, strict=True), "kD", markersize=4, label="measured")
    for index, found in enumerate(rows):
        axes.annotate(
            remark(found), (end(found), index), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8, color="#bb0000" if not found["fits"] else "black",
        )  # fmt: skip
    axes.set_xlim(0, 1.45 * max([end(found) for found in rows] + [1e-9]))
    axes.set_xlabel("seconds of a step")


def before_of(field: str) -> list[str]:
    """The fields that are stacked before this one."""
    names = [name for name, *_ in PARTS]
    return names[: names.index(field)]


def end(found: Found) -> float:
    """Where the bar of a row ends, or its dot lies if that is further."""
    return max(found["step_time_s"] or 0.0, found["measured_step_s"] or 0.0)


def remark(found: Found) -> str:
    """What stands at the end of a bar."""
    if found["error"]:
        return f"error: {found['error'][:60]}"
    if not found["fits"]:
        return "does not fit"
    if found["step_time_s"] is None:
        return f"{number(found['measured_pictures_per_s'], '.4g')} pictures/s"
    return f"{found['pictures_per_s']:.4g} pictures/s, MFU {found['mfu']:.1%}"


def draw_memory(axes: Any, rows: Sequence[Found]) -> None:
    """Peaks of HBM, and the limit of each row as a line across its bar; a bar that goes far beyond
    is cut, its number stands beside it."""
    limits = [found["hbm_limit_gib"] or 0.0 for found in rows]
    top = 1.25 * max(limits) or max([found["hbm_peak_gib"] or 0.0 for found in rows]) or 1.0
    for index, (found, limit) in enumerate(zip(rows, limits, strict=True)):
        over = found["fits"] is False
        length = min(found["hbm_peak_gib"] or 0.0, top)
        axes.barh(
            index, length, height=0.6, color="#bb0000" if over else "#228833",
            hatch="//" if over else None, edgecolor="white",
        )  # fmt: skip
        axes.annotate(
            number(found["hbm_peak_gib"], ".1f"), (max(length, limit), index), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8,
            color="#bb0000" if over else "black",
        )  # fmt: skip
        if limit:
            axes.plot([limit, limit], [index - 0.4, index + 0.4], "k-", linewidth=1.5)
    axes.set_xlim(0, 1.15 * top)
    axes.set_xlabel("HBM of a device at its peak, GiB; | is the limit")
