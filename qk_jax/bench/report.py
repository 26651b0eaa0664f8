"""The table of layouts for people: lines for the terminal, a page and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qk_jax.base import files
from qk_jax.bench.schedule import kernels

PAGE, PICTURE = "layouts.md", "layouts.png"
Row = Mapping[str, Any]  # of layouts.jsonl
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
**What the estimate is.** The real train step in its programs, the autoencoder's encoder for each
size of a picture and everything else, padded as in training, optimizer and all, compiled by the
compiler that the slice would use, for that slice's devices and links; their times add up. Whether
they fit into HBM, each beside what the
other takes, is that compiler's own answer. Compute is the sum of its cycle estimates for every op
that it scheduled, loop bodies as often as they run, at the clock of the generation. Attention
kernels, for which it has no estimate, are priced from their FLOPs at
{kernels.FORWARD_EFFICIENCY:.0%} (forward) and {kernels.BACKWARD_EFFICIENCY:.0%} (backward) of the
peak that their heads can fill, or from their bytes. A collective takes its bytes over the
published bandwidth of the links that its group spans; what the schedule puts between its start and
its end hides it, the rest is exposed.

**What it is not.** A measurement. It knows no input pipeline, host, checkpoint or straggler, no
contention for HBM between what runs at once, no power limit. It is for choosing between layouts,
and for whether one fits; differences of a few per cent mean nothing, and a real step is slower.
`--measure` on the slice says by how much.
"""


def header() -> str:
    """Names over `line`."""
    return (
        f"{'slice':<12} {'micro':>5} {'batch':>6} {'fits':<4} {'HBM GiB':>13} {'step s':>8} "
        f"{'pict/s':>8} {'MFU':>6} {'exposed':>8} {'compile':>8}  layout, remat"
    )


def line(row: Row) -> str:
    """One row for the terminal; a second line has what was measured, a third an error."""
    fits = {True: "yes", False: "NO", None: "?"}[row["fits"]]
    hbm = f"{number(row['hbm_peak_gib'], '.2f')}/{number(row['hbm_limit_gib'], '.2f')}"
    text = (
        f"{row['slice']:<12} {row['per_chip_batch']:>5g} {row['rows'] or '-':>6} {fits:<4} "
        f"{hbm:>13} {number(row['step_time_s'], '.3f'):>8} "
        f"{number(row['pictures_per_s'], '.1f'):>8} {number(row['mfu'], '.1%'):>6} "
        f"{number(row['exposed_comm_s'], '.3f'):>8} {number(row['compile_s'], '.0f'):>7}s  "
        f"{row['layout']}, {row['remat']}"
    )
    if row["measured_step_s"] is not None:
        text += f"\n    measured: {measured(row)}"
    if row["error"]:
        text += f"\n    error: {row['error']}"
    return text


def number(value: float | None, form: str) -> str:
    """A number, or a dash for None."""
    return "-" if value is None else format(value, form)


def measured(row: Row) -> str:
    """What was measured of a row, in words."""
    words = f"step {row['measured_step_s']:.4g} s"
    if row["step_time_s"]:
        words += f" ({row['measured_step_s'] / row['step_time_s']:.2f} x the estimate)"
    words += f", {row['measured_pictures_per_s']:.4g} pictures/s"
    if row["measured_mfu"] is not None:
        words += f", MFU {row['measured_mfu']:.1%}"
    return f"{words}, loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"


def differing(table: Sequence[Row]) -> list[str]:
    """Warnings about rows that computed something else than the first of the same batch."""
    groups: dict[str, list[Row]] = {}
    for row in table:
        if row["loss"] is not None:
            names = ("config", "overrides", "rows", "accumulation", "size", "pictures")
            groups.setdefault(repr([row[name] for name in names]), []).append(row)
    return [
        f"WRONG? {one['layout']} (remat {one['remat']}) has {name} {one[name]:.6g}, "
        f"{first['layout']} (remat {first['remat']}) has {first[name]:.6g} on the same batch: "
        f"more than rounding explains"
        for first, *others in groups.values()
        for one in others
        for name, limit in zip(("loss", "grad_norm"), TOLERANCE[one["dtype"]], strict=True)
        if not abs(one[name] - first[name]) <= limit * abs(first[name])
    ]


def ordered(table: Sequence[Row]) -> list[Row]:
    """Most pictures per second and chip first; what does not fit last."""

    def rank(row: Row) -> tuple[bool, float, float]:
        rate = row["pictures_per_s"] or row["measured_pictures_per_s"] or 0
        return (not row["fits"], -rate / row["chips"], row["hbm_peak_gib"] or 0)

    return sorted(table, key=rank)


def write(out: files.Path, table: Sequence[Row]) -> None:
    """Writes the page and the picture of a table into `out`."""
    rows = ordered(table)
    files.write_text(out / PAGE, "\n".join(page(rows)) + "\n")
    draw(out / PICTURE, rows)


def page(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of the page: the table, what its words mean, and a section for each row."""
    yield from ("# Layouts", "", f"![step time and memory]({PICTURE})", "")
    fits = {True: "yes", False: "**no**", None: "?"}
    yield from markdown({
        "slice": row["slice"],
        "layout": f"[{row['layout']}](#row-{index})",
        "remat": row["remat"],
        "per device": f"{row['per_chip_batch']:g}",
        "batch": row["rows"] or "-",
        "fits": "error" if row["error"] else fits[row["fits"]],
        "HBM peak / limit, GiB":
            f"{number(row['hbm_peak_gib'], '.2f')} / {number(row['hbm_limit_gib'], '.2f')}",
        "step, s": number(row["step_time_s"], ".3f"),
        "pictures/s": number(row["pictures_per_s"], ".1f"),
        "per chip": number(row["pictures_per_s_per_chip"], ".3f"),
        "MFU": number(row["mfu"], ".1%"),
        "exposed comm., s": number(row["exposed_comm_s"], ".3f"),
        "compile, s": number(row["compile_s"], ".0f"),
    } for index, row in enumerate(rows, 1))  # fmt: skip
    for warning in differing(rows):
        yield from (f"**{warning}**", "")
    yield from (CONVENTION, ESTIMATE)
    for index, row in enumerate(rows, 1):
        yield from section(index, row)


def markdown(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A table with a column for each key; all but the first are numbers or short words."""
    for index, cells in enumerate(lines):
        if not index:
            yield f"| {' | '.join(cells)} |"
            yield f"| {' | '.join(['---', *['---:'] * (len(cells) - 1)])} |"
        yield f"| {' | '.join(map(str, cells.values()))} |"
    yield ""


def section(index: int, row: Row) -> Iterator[str]:
    """Lines about one row."""
    yield from (f"## Row {index}", "")
    yield (
        f"`{row['config']}` on {row['slice']}, `{row['layout']}`, remat `{row['remat']}`, "
        f"a batch of {row['rows'] or '?'} in {row['accumulation'] or '?'} micro-batches, target "
        f"{row['size']}, {row['pictures']} condition pictures."
    )
    overrides = [f"{name}={text}" for name, text in row["overrides"].items()]
    for name, words in (("Overrides", overrides), ("Flags", row["flags"])):
        if words:
            yield f"{name}: {', '.join(f'`{word}`' for word in words)}."
    yield ""
    if row["error"]:
        yield from (f"Error: {row['error']}", "")
    if row["measured_step_s"] is not None:
        yield from (f"Measured: {measured(row)}.", "")
    if row["model_tflops"]:
        whole = row["model_tflops_per_step"]
        yield from markdown(
            {"tower": tower, "model TFLOP per step": f"{work:,.1f}", "share": f"{work / whole:.1%}"}
            for tower, work in [*row["model_tflops"].items(), ("all", whole)]
        )
    if row["temp_gib"] is not None:
        names = ("argument", "temp", "output", "code", "host")
        parts = ", ".join(f"{name} {row[f'{name}_gib']:.2f}" for name in names)
        yield from (f"Memory in GiB: {parts} (output without what the arguments give).", "")
    if row["step_time_s"] is not None:
        yield from estimate_tables(row)


def estimate_tables(row: Row) -> Iterator[str]:
    """Where the step's time goes."""
    names = ("compute_s", "attention_s", "exposed_comm_s", "comm_s")
    words = ("compute", "attention", "exposed communication", "all communication")
    parts = ", ".join(f"{word} {row[name]:.3f}" for word, name in zip(words, names, strict=True))
    yield from (f"Seconds of a step of {row['step_time_s']:.3f}: {parts}.", "")
    yield from markdown({
        "collective": one["kind"],
        "axes": "+".join(one["axes"]),
        "devices": one["group_size"],
        "MB": f"{one['nbytes'] / 1e6:,.2f}",
        "count": one["count"],
        "async": "yes" if one["asynchronous"] else "no",
        "time, ms": f"{one['seconds'] * 1e3:,.2f}",
        "exposed, ms": f"{one['exposed_seconds'] * 1e3:,.2f}",
        "source": one["source"],
    } for one in sorted(row["collectives"], key=lambda one: -one["exposed_seconds"]))  # fmt: skip
    yield from markdown({
        "most expensive ops": op["name"],
        "kind": op["kind"],
        "count": op["count"],
        "time, ms": f"{op['seconds'] * 1e3:,.2f}",
        "share": f"{op['seconds'] / row['step_time_s']:.1%}",
        "source": op["source"],
        "scope": f"`{op['scope']}`",
    } for op in row["ops"])  # fmt: skip
    if row["unpriced"]:
        yield from (f"Without a price: {', '.join(f'`{name}`' for name in row['unpriced'])}.", "")


PARTS = {  # of the bars: field, word and colour
    "compute_s": ("compute", "#4477aa"),
    "attention_s": ("attention", "#66ccee"),
    "exposed_comm_s": ("exposed communication", "#ee6677"),
}
WRONG, FINE = "#bb0000", "#228833"
BESIDE: dict[str, Any] = dict(xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)


def draw(file: files.Path, rows: Sequence[Row]) -> None:
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
    several = len({row["slice"] for row in rows}) > 1
    times.set_yticks(range(len(rows)), [label(row, several) for row in rows], fontsize=8)
    times.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    for axes in (times, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    names = dict.fromkeys(row["config"] for row in rows)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(", ".join(names), fontsize=10, x=0.01, ha="left")
    with files.beside(file) as part, part.open("wb") as output:
        figure.savefig(output, dpi=110, format="png")
    pyplot.close(figure)


def label(row: Row, several: bool) -> str:
    """A row's name beside its bar; with the slice where there are several."""
    mesh, slash, rows = row["layout"].partition("/")
    first = f"{row['slice']}  {mesh}" if several else mesh
    batch = f"{row['remat']}, {row['per_chip_batch']:g} per device"
    if len(rows) < 20:
        return f"{first}{slash}{rows}\n{batch}"
    return f"{first}, {batch}\n{rows}"


def draw_times(axes: Any, rows: Sequence[Row]) -> None:
    """Step times, each with pictures per second and MFU at its end."""
    ends = [0.0] * len(rows)
    for field, (word, colour) in PARTS.items():
        lengths = [row[field] or 0.0 for row in rows]
        axes.barh(range(len(rows)), lengths, left=ends, color=colour, label=word, height=0.6)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    dots = [(row["measured_step_s"], index) for index, row in enumerate(rows)
            if row["measured_step_s"] is not None]  # fmt: skip
    if dots:
        axes.plot(*zip(*dots, strict=True), "kD", markersize=4, label="measured")
    ends = [max(row["step_time_s"] or 0.0, row["measured_step_s"] or 0.0) for row in rows]
    for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
        axes.annotate(remark(row), (end, index), **BESIDE, color="black" if row["fits"] else WRONG)
    axes.set_xlim(0, 1.45 * max([*ends, 1e-9]))
    axes.set_xlabel("seconds of a step")


def remark(row: Row) -> str:
    """The text at the end of a bar."""
    if row["error"]:
        return f"error: {row['error'][:60]}"
    if not row["fits"]:
        return "does not fit"
    if row["step_time_s"] is None:
        return f"{number(row['measured_pictures_per_s'], '.4g')} pictures/s"
    return f"{row['pictures_per_s']:.4g} pictures/s, MFU {row['mfu']:.1%}"


def draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    """Peaks of HBM, and the limit of each row as a line across its bar; a bar that goes far beyond
    is cut, its number stands beside it."""
    limits = [row["hbm_limit_gib"] or 0.0 for row in rows]
    top = 1.25 * max(limits) or max(row["hbm_peak_gib"] or 0.0 for row in rows) or 1.0
    for index, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        over = row["fits"] is False
        length = min(row["hbm_peak_gib"] or 0.0, top)
        axes.barh(
            index, length, height=0.6, color=WRONG if over else FINE,
            hatch="//" if over else None, edgecolor="white",
        )  # fmt: skip
        axes.annotate(
            number(row["hbm_peak_gib"], ".1f"), (max(length, limit), index), **BESIDE,
            color=WRONG if over else "black",
        )  # fmt: skip
        if limit:
            axes.plot([limit, limit], [index - 0.4, index + 0.4], "k-", linewidth=1.5)
    axes.set_xlim(0, 1.15 * top)
    axes.set_xlabel("HBM of a device at its peak, GiB; | is the limit")
