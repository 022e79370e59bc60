"""The plots, as SVG.

What is plotted is data first, and drawn afterwards. Versions of matplotlib draw the same data with
other bytes, so each file holds a digest of its data: that is what can be compared, without
matplotlib.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import StringIO
from statistics import median
from typing import Any

from benchmarks.peers import LABELS
from benchmarks.workloads import ACTIVE, WORKLOADS

Results = dict[str, Any]

OURS = "uvsock"
# Those that the relative plot and the short table show.
MAIN = (
    "echo-1024-50",
    "pipeline",
    "small_writes",
    "fan_out-20-8",
    "echo-262144-50",
    "tls_echo-1024-20",
    "churn",
)
# And these peers, without those that nobody would choose for speed.
COMPARED = ("c", "bun", "uvloop", "uvloop-streams", "aiofastnet", "asyncio", "node")
# Beside longer bars than this the differences of the others could not be seen.
WIDEST = 3.0


@dataclass(frozen=True)
class Bars:
    """One panel of horizontal bars for each group: its title, and a value for each peer."""

    title: str
    unit: str
    groups: tuple[tuple[str, dict[str, float]], ...]
    # A line to compare with, and where longer bars are cut off.
    line: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Lines:
    title: str
    unit: str
    beside: str
    points: tuple[int, ...]
    series: dict[str, tuple[float, ...]]


Figure = Bars | Lines


# --- what is plotted --------------------------------------------------------------------------


def ratio(some: list[float], others: list[float]) -> float:
    """The median of the ratios within each round, in which both met the same machine."""
    return median(a / b for a, b in zip(some, others, strict=True) if b > 0)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _relative(results: Results) -> Bars | None:
    groups = []
    for workload in WORKLOADS:
        found = results["workloads"].get(workload.name, {})
        if workload.name not in MAIN or "cpu" not in found.get(OURS, {}):
            continue
        values = {
            peer: _rounded(ratio(found[peer]["cpu"], found[OURS]["cpu"]))
            for peer in LABELS
            if peer in (OURS, *COMPARED) and "cpu" in found.get(peer, {})
        }
        groups.append((workload.title, values))
    if not groups:
        return None
    unit = f"uvsock's is 1; shorter is better; cut off at {WIDEST:g}"
    return Bars("Processor time of the server per message", unit, tuple(groups), 1.0, WIDEST)


def _idle(results: Results) -> Bars | None:
    groups = []
    for workload in WORKLOADS:
        found = results["workloads"].get(workload.name, {})
        values = {
            peer: _rounded(median(found[peer]["bytes"]) / 1024)
            for peer in LABELS
            if "bytes" in found.get(peer, {})
        }
        if workload.kind == "idle" and not workload.tls and values:
            groups.append((workload.title, values))
    if not groups:
        return None
    return Bars("Memory of an idle connection", "KiB; shorter is better", tuple(groups))


def _scaling(results: Results) -> Lines | None:
    found = results["workloads"].get("scaling", {})
    series = {
        peer: {int(idle): _rounded(median(cpu)) for idle, cpu in found[peer]["cpu_beside"].items()}
        for peer in LABELS
        if "cpu_beside" in found.get(peer, {})
    }
    if not series:
        return None
    points = tuple(sorted(set.intersection(*(set(values) for values in series.values()))))
    return Lines(
        f"Echo, 1 KiB, {ACTIVE} connections, beside idle ones",
        "processor time per message, µs; lower is better",
        "idle connections",
        points,
        {peer: tuple(values[point] for point in points) for peer, values in series.items()},
    )


PLOTS: dict[str, Callable[[Results], Figure | None]] = {
    "relative": _relative,
    "idle": _idle,
    "scaling": _scaling,
}


def figures(results: Results) -> dict[str, Figure]:
    """What each plot shows. One without figures is left out."""
    found = {name: make(results) for name, make in PLOTS.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def digest(figure: Figure) -> str:
    """The same for the same figures, on every machine."""
    return hashlib.sha256(json.dumps(asdict(figure)).encode()).hexdigest()


def digest_in(svg: str) -> str | None:
    """That of the figures which a file shows."""
    found = re.search(r"<dc:description>sha256:(\w+)<", svg)
    return found[1] if found else None


# --- how it is drawn --------------------------------------------------------------------------

COLOUR = "#9aa7b5"
OUR_COLOUR = "#c2410c"
COLOURS = {"c": "#475569", "uvsock": OUR_COLOUR, "bun": "#7c3aed", "uvloop": "#0369a1"}
STYLE: Any = {
    # Without these two each run names its elements anew, and letters are drawn as paths.
    "svg.hashsalt": "uvsock",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    # A page may be dark around the plot.
    "figure.facecolor": "white",
}


def _draw_bars(plot: Any, bars: Bars) -> Any:
    columns = 2 if len(bars.groups) > 1 else 1
    panels = [bars.groups[i : i + columns] for i in range(0, len(bars.groups), columns)]
    most = max(len(values) for _, values in bars.groups)
    figure, axes = plot.subplots(
        len(panels),
        columns,
        figsize=(9, 0.8 + len(panels) * (0.45 + 0.18 * most)),
        squeeze=False,
        layout="constrained",
    )
    longest = max(max(values.values()) for _, values in bars.groups)
    end = min(longest, bars.limit or longest)
    for axis in axes.flat[len(bars.groups) :]:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes.flat, bars.groups, strict=False):
        labels = [LABELS[peer] for peer in values]
        drawn = axis.barh(
            labels,
            [min(value, end) for value in values.values()],
            color=[OUR_COLOUR if peer == OURS else COLOUR for peer in values],
            height=0.75,
        )
        texts = [f"{value:.2f}" + " →" * (value > end) for value in values.values()]
        axis.bar_label(drawn, texts, padding=3, fontsize=7)
        axis.set_title(title)
        axis.set_xlim(0, end * 1.12)
        axis.tick_params(length=0, labelsize=7)
        axis.invert_yaxis()
        if bars.line is not None:
            axis.axvline(bars.line, color=OUR_COLOUR, linewidth=0.7, zorder=0)
    figure.supxlabel(bars.unit, fontsize=8)
    return figure


def _draw_lines(plot: Any, lines: Lines) -> Any:
    figure, axis = plot.subplots(figsize=(9, 4), layout="constrained")
    for peer, values in lines.series.items():
        width = 2.5 if peer == OURS else 1.5
        style = {"color": COLOURS.get(peer), "linewidth": width, "marker": "o", "markersize": 4}
        axis.plot(lines.points, values, label=LABELS[peer], **style)
    # Logarithmic, with room for no idle connections at all.
    axis.set_xscale("symlog", linthresh=10, linscale=0.5)
    axis.set_xticks(lines.points, [f"{point:,}" for point in lines.points])
    axis.minorticks_off()
    axis.set_ylim(0)
    axis.set_xlabel(lines.beside)
    axis.set_ylabel(lines.unit)
    axis.grid(axis="y", color="#e5e7eb")
    axis.legend(frameon=False, loc="lower left", ncols=len(lines.series))
    return figure


def svg(figure: Figure) -> str:
    """The file. Needs matplotlib."""
    from matplotlib import pyplot, rc_context

    pyplot.switch_backend("svg")
    with rc_context(STYLE):
        if isinstance(figure, Bars):
            drawn = _draw_bars(pyplot, figure)
        else:
            drawn = _draw_lines(pyplot, figure)
        drawn.suptitle(figure.title, fontsize=11, fontweight="bold")
        output = StringIO()
        metadata = {
            "Title": figure.title,
            "Description": f"sha256:{digest(figure)}",
            "Creator": None,
            "Date": None,
        }
        drawn.savefig(output, format="svg", metadata=metadata)
        pyplot.close(drawn)
    # Spaces at the ends of lines would be changes to whoever edits the tree with care.
    return "".join(line.rstrip() + "\n" for line in output.getvalue().splitlines())
