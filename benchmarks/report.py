"""Turns a results file into tables and plots, and keeps the pages that show them up to date.

A page has its figures between two comments::

    <!-- figures: summary -->
    <!-- end of figures -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import plots
from benchmarks.peers import LABELS
from benchmarks.plots import COMPARED, MAIN, OURS, Results
from benchmarks.workloads import IDLE_POINTS, WORKLOADS, Workload

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reference.json"
PLOTS = Path("docs", "plots")
PAGES = (
    Path("docs", "performance.md"),
    Path("docs", "guides", "asyncio.md"),
    Path("docs", "guides", "compiled.md"),
    Path("README.md"),
)
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
VARIANT = "uvsock-memoryview"
COMPILED = "uvsock-compiled"
# uvsock's own peers of asyncio's programs, and the same on uvloop.
DROP_IN = {
    "uvsock-streams": "uvloop-streams",
    "uvsock-protocol": "uvloop",
    "uvsock-loop-streams": "uvloop-streams",
    "uvsock-app": "uvloop-app",
}


# --- figures ----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def measured(workload: Workload, result: Results) -> list[float] | None:
    """What a lower value of is better, a value per round."""
    found: list[float] | None = result.get("bytes" if workload.kind == "idle" else "cpu")
    if workload.kind == "scaling" and "cpu_beside" in result:
        found = result["cpu_beside"].get(str(IDLE_POINTS[-1]))
    return found


def ratio(workload: Workload, ours: Results, theirs: Results) -> float | None:
    a, b = measured(workload, ours), measured(workload, theirs)
    return plots.ratio(a, b) if a and b else None


def _ratio(workload: Workload, found: Results, ours: str, peer: str) -> str:
    if peer == ours:
        return ""
    value = ratio(workload, found.get(ours, {}), found.get(peer, {}))
    return "" if value is None else f"{value:.2f}"


def _spread(values: list[float]) -> str:
    text = number(median(values))
    return text if len(values) == 1 else f"{text} ({number(min(values))}-{number(max(values))})"


def _middle(result: Results, name: str, scale: float = 1) -> str:
    return number(median(result[name]) * scale) if result.get(name) else ""


Column = tuple[str, Any]


def _columns(workload: Workload, found: Results) -> list[Column]:
    ratios: list[Column] = [
        (f"{ours} / peer", lambda peer, ours=ours: _ratio(workload, found, ours, peer))
        for ours in (OURS, VARIANT, *DROP_IN)
        if ours in found
    ]
    if workload.kind == "idle":
        return [
            ("bytes per connection", lambda peer: _spread(found[peer]["bytes"])),
            *ratios,
            ("GC objects per connection", lambda peer: _middle(found[peer], "gc_objects")),
            ("gc.collect(), ms", lambda peer: _middle(found[peer], "gc_ms")),
        ]
    if workload.kind == "scaling":
        return [
            (
                f"CPU beside {idle:,}, µs",
                lambda peer, idle=idle: _spread(found[peer]["cpu_beside"][str(idle)]),
            )
            for idle in IDLE_POINTS
        ]
    columns: list[Column] = [
        (f"CPU per {workload.unit}, µs", lambda peer: _spread(found[peer]["cpu"])),
        *ratios,
        ("per second", lambda peer: _middle(found[peer], "rate")),
    ]
    if any("p50" in result for result in found.values()):
        columns += [
            (f"{title}, µs", lambda peer, name=name: _middle(found[peer], name))
            for title, name in (("p50", "p50"), ("p99", "p99"), ("p99.9", "p999"))
        ]
    if workload.kind == "memory":
        columns.append(("memory taken, MiB", lambda peer: _middle(found[peer], "peak", 2**-20)))
    if any("resumed" in result for result in found.values()):
        columns.append(("resumed, %", lambda peer: _middle(found[peer], "resumed", 100)))
    columns.append(
        (
            "system calls",
            lambda peer: number(found[peer]["syscalls"]) if "syscalls" in found[peer] else "",
        )
    )
    return columns


def rows(workload: Workload, results: Results) -> list[list[str]]:
    """The table of a workload, its head first. Those that are missing or failed say why."""
    found = results["workloads"][workload.name]
    columns = _columns(workload, found)
    table = [["peer", *(title for title, _ in columns)]]
    for peer in LABELS:
        if peer not in found:
            continue
        if "error" in found[peer]:
            table.append([LABELS[peer], "failed: " + found[peer]["error"]])
        else:
            table.append([LABELS[peer], *(show(peer) for _, show in columns)])
    return table


def text(workload: Workload, results: Results) -> str:
    """A table for a terminal."""
    table = rows(workload, results)
    width = len(table[0])
    full = [row for row in table if len(row) == width]
    widths = [max(len(row[i]) for row in full) for i in range(width)]
    lines = [workload.title]
    for row in table:
        if len(row) < width:
            lines.append(f"  {row[0]:{widths[0]}}  {row[1]}")
        else:
            cells = [f"{cell:>{each}}" for cell, each in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join((f"  {row[0]:{widths[0]}}", *cells)))
    lines += [f"  {LABELS[name]}: {why}" for name, why in results["missing"].items()]
    return "\n".join(lines) + "\n"


# --- pages ------------------------------------------------------------------------------------


def markdown(table: list[list[str]]) -> str:
    width = len(table[0])
    lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in table]
    lines.insert(1, "|---" + "|---:" * (width - 1) + "|")
    return "\n".join(lines) + "\n"


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def machine(results: Results) -> str:
    meta = results["meta"]
    versions = ", ".join(
        f"{name} {version}" for name, version in meta["versions"].items() if version
    )
    left_out = "".join(f"- Left out, {LABELS[n]}: {why}\n" for n, why in results["missing"].items())
    left_out += "".join(f"- Left out, {name}: {why}\n" for name, why in results["skipped"].items())
    return (
        f"- {meta['date'][:10]}, commit `{meta['commit']}`, {_rounds(meta['rounds'])} of"
        f" {meta['seconds']} s{' (--quick)' if meta['quick'] else ''}\n"
        f"- {meta['processor']}, {meta['processors']} processors; server on processor"
        f" {meta['server_on']}, load on {meta['load_on']}; load average before:"
        f" {meta['load_average'][0]}\n"
        f"- {versions}\n{left_out}"
    )


def summary(results: Results, workloads: Sequence[Workload] = WORKLOADS) -> str:
    """One row per workload: what uvsock takes, and its ratio to the peers."""
    table = [["", "uvsock", *(f"/ {LABELS[peer]}" for peer in COMPARED)]]
    for workload in workloads:
        found = results["workloads"].get(workload.name, {})
        ours = measured(workload, found.get(OURS, {}))
        if ours is None:
            continue
        unit = "B" if workload.kind == "idle" else "µs"
        cells = [_ratio(workload, found, OURS, peer) for peer in COMPARED]
        table.append([workload.title, f"{number(median(ours))} {unit}", *cells])
    return markdown(table)


def brief(results: Results) -> str:
    """The same for the workloads of the plots."""
    return summary(results, [w for w in WORKLOADS if w.name in (*MAIN, "idle")])


def dropin(results: Results) -> str:
    """asyncio's programs on uvsock's loop and on uvloop's."""
    table = [["", "uvsock", "uvloop", "uvsock / uvloop"]]
    for workload in WORKLOADS:
        found = results["workloads"].get(workload.name, {})
        for ours, theirs in DROP_IN.items():
            values = [measured(workload, found.get(peer, {})) for peer in (ours, theirs)]
            if values[0] and values[1]:
                unit = "B" if workload.kind == "idle" else "µs"
                cells = [f"{number(median(each))} {unit}" for each in values if each]
                title = _program(workload, ours)
                table.append([title, *cells, _ratio(workload, found, ours, theirs)])
    return markdown(table)


def _program(workload: Workload, ours: str) -> str:
    """The workload, and which of uvsock's faces it is for where its own title does not say."""
    if ours == "uvsock-loop-streams":
        return f"{workload.title}; asyncio's own"
    streams = ours == "uvsock-streams" and "streams" not in workload.title.lower()
    return workload.title + "; streams" * streams


def losses(results: Results) -> str:
    """The rows in which a peer took less, the greatest loss first."""
    lost = []
    for workload in WORKLOADS:
        found = results["workloads"].get(workload.name, {})
        pairs = [(OURS, peer) for peer in LABELS if not peer.startswith(OURS)]
        for ours, peer in [*pairs, *DROP_IN.items()]:
            value = ratio(workload, found.get(ours, {}), found.get(peer, {}))
            if value is not None and value >= 1.005:
                lost.append((value, [_program(workload, ours), LABELS[peer], f"{value:.2f}"]))
    lost.sort(key=lambda item: -item[0])
    return markdown([["workload", "peer", "uvsock / peer"], *(row for _, row in lost)])


def tables(results: Results) -> str:
    return "\n".join(
        f"### {workload.title}\n\n{markdown(rows(workload, results))}"
        for workload in WORKLOADS
        if workload.name in results["workloads"]
    )


def compiled(results: Results) -> str:
    """What handlers in Cython take beside those in Python."""
    table = [["", "in Python", "in Cython"]]
    for workload in WORKLOADS:
        found = results["workloads"].get(workload.name, {})
        both = [measured(workload, found.get(peer, {})) for peer in (OURS, COMPILED)]
        if all(both):
            table.append([workload.title, *(f"{number(median(each or []))} µs" for each in both)])
    return markdown(table)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "brief": brief,
    "summary": summary,
    "dropin": dropin,
    "losses": losses,
    "tables": tables,
    "compiled": compiled,
}


def fill(page: str, results: Results) -> str:
    """The page with its figures replaced."""

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}\n{SECTIONS[found[2]](results)}\n{found[3]}"

    return MARKED.sub(replaced, page)


def check(results: Results, root: Path) -> list[str]:
    """The files that do not show these results."""
    stale = []
    for name, figure in plots.figures(results).items():
        file = root / PLOTS / f"{name}.svg"
        if not file.exists() or plots.digest_in(file.read_text()) != plots.digest(figure):
            stale.append(file)
    for page in PAGES:
        text = (root / page).read_text()
        if fill(text, results) != text:
            stale.append(root / page)
    return [str(file.relative_to(root)) for file in stale]


def write(results: Results, root: Path) -> None:
    (root / PLOTS).mkdir(exist_ok=True)
    for name, figure in plots.figures(results).items():
        (root / PLOTS / f"{name}.svg").write_text(plots.svg(figure))
    for page in PAGES:
        (root / page).write_text(fill((root / page).read_text(), results))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Writes the figures of a results file into the pages, and draws the plots.",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the results file (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it would")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree with the pages")
    arguments = parser.parse_args(words)
    try:
        results = json.loads(arguments.results.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--results: {error}")
    if not arguments.check:
        try:
            write(results, arguments.root)
        except ModuleNotFoundError as error:
            parser.error(f"{error}: pip install '.[bench]'")
    elif stale := check(results, arguments.root):
        print(f"not what {arguments.results} says: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0
