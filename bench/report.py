"""Tables and plots from the result files: every figure in the README or docs comes from here.

    python -m bench.report                             # all tables, as markdown
    python -m bench.report --fill docs/benchmarks.md   # between <!-- bench:h200/ssd --> and <!-- /bench -->
    python -m bench.report --plot docs/removal.png --gpu h200
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import results
from bench.workloads import WORKLOADS, Workload
from shedder import limits

Row = dict[str, Any]
_HEADER = ("op", "shape", "clock", "ours us", "peer us", "speed-up", "target", "of speed of light", "error",
           "peer error")


def shape_text(shape: dict[str, Any]) -> str:
    def value(v: Any) -> str:
        return f" {'+'.join(map(str, v))}" if isinstance(v, list) else str(v)

    return " ".join(f"{key}{value(v)}" for key, v in shape.items())


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; a dash where there is nothing."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 10 ** digits else f"{value:.0f}"


def speed_up(row: Row) -> float | None:
    return row["peer_us"] / row["ours_us"] if row["ours_us"] and row["peer_us"] else None


def workload_of(row: Row) -> Workload | None:
    """The table's entry that a row measured."""
    for workload in WORKLOADS:
        dispatch = workload.dispatch if workload.dispatch == "auto" else f"forced:{workload.dispatch}"
        wanted = {"op": workload.op, "shape": workload.shape, "clock": workload.clock, "layout": workload.layout,
                  "dtype": workload.dtype, "state_dtype": workload.state_dtype, "dispatch": dispatch}
        if all(row[name] == value for name, value in wanted.items()):
            return workload
    return None


def _target(workload: Workload | None) -> str:
    if workload is None:
        return ""
    speed = f"{workload.must:g}x (aim {workload.aim:g}x)" if workload.must and workload.aim else (
        f"{workload.must:g}x" if workload.must else "")
    return "; ".join(part for part in (speed, workload.target) if part)


def markdown(rows: Iterable[Row]) -> str:
    """One table of rows; a peer that raises is said to, in its own words, below it."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + " --- |" * len(_HEADER)]
    notes: list[str] = []
    for row in rows:
        faster = speed_up(row)
        time = row["ours_us"] if row["ours_us"] is not None else row["peer_us"]
        share = f"{row['floor_us'] / time:.0%}" if row["floor_us"] and time else "-"
        if share != "-" and row["ours_us"] is None:
            share += " (peer)"
        mark = ""
        if row["note"]:
            if row["note"] not in notes:
                notes.append(row["note"])
            mark = f" [{notes.index(row['note']) + 1}]"
        forced = "" if row["dispatch"] == "auto" else f" ({row['dispatch'].removeprefix('forced:')} alone)"
        model = f"{row['model']}: " if row["model"] else ""
        layout = f" {row['layout']}" if row["op"] == "conv1d" else ""
        state = f", {row['state_dtype']} state" if row["state_dtype"] else ""
        lines.append("| " + " | ".join((
            model + row["op"] + forced, f"{shape_text(row['shape'])}{layout} {row['dtype']}{state}{mark}", row["clock"],
            number(row["ours_us"]), number(row["peer_us"]), "-" if faster is None else f"{faster:.2f}x",
            _target(workload_of(row)), share, number(row["error"], 2), number(row["peer_error"], 2))) + " |")
    lines += [f"\n[{index}] {note}" for index, note in enumerate(notes, 1)]
    return "\n".join(lines)


def suite_table(path: Path) -> str:
    """The table of one suite: its targets and base rows, with the machine line above it."""
    data = results.load(path)
    order = {id(w): index for index, w in enumerate(WORKLOADS)}
    found = [(workload_of(row), row) for row in data["rows"]]
    shown = sorted(((order[id(w)] if w else len(order), row) for w, row in found
                    if w is None or w.table in ("must", "base")), key=lambda pair: pair[0])
    runs = "; ".join(
        f"{name}: {run['gpu']}, {run['clock_mhz']:g} MHz, copy {run['copy_tb_s']:g} TB/s, {run['date'][:10]}, commit "
        f"{run['commit']}, " + ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        for name, run in data["runs"].items())
    return f"{runs}\n\n{markdown(row for _, row in shown)}"


def fill(text: str, tables: dict[str, str]) -> str:
    """Replace what stands between <!-- bench:NAME --> and <!-- /bench --> with the table of that name."""
    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in tables:
            raise results.ResultsError(f"<!-- bench:{name} -->: no results of that suite; there are {sorted(tables)}")
        return f"<!-- bench:{name} -->\n{tables[name]}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\S+) -->.*?<!-- /bench -->", table, text, flags=re.DOTALL)


# ---- the plot: does removal pay?


def _axis_points(rows: list[Row], runs: dict[str, Any], op: str) -> list[tuple[float, float | None, float | None]]:
    """(work left, ours, peer) of the cuts of one op, times as shares of the same side's dense time."""
    chosen = [row for row in rows if row["op"] == op and row["clock"] == "gpu" and row["dispatch"] == "auto"
              and row["dtype"] == "bf16"]
    points = []
    for run in {row["run"] for row in chosen}:
        same = [row for row in chosen if row["run"] == run]
        known = runs[run]
        machine = limits.machine(known["gpu"], known["copy_tb_s"], known["clock_mhz"] or None)
        for row in same:
            workload = workload_of(row)
            if workload is None:
                continue
            dense_shape = workload.dense or row["shape"]
            dense = next((other for other in same if other["shape"] == dense_shape), None)
            if dense is None or (workload.dense is None and workload.table != "must"):
                continue
            if workload.dense is None and not any(
                    w.op == op and w.dense == row["shape"] for w in WORKLOADS):
                continue
            left = limits.work_left(op, row["shape"], dense_shape, machine)
            shares = [row[side] / dense[side] if row[side] and dense[side] else None for side in ("ours_us", "peer_us")]
            points.append((left, shares[0], shares[1]))
    return sorted(points, key=lambda point: point[0])


def plot(folder: Path, target: Path, ops: tuple[str, ...] = ("selective_scan", "ssd")) -> None:
    """Time left against work left, ours and the reference, with the line on which removal pays in full."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: list[Row] = []
    runs: dict[str, Any] = {}
    for path in (path for path in results.files(folder.parent) if path.parent == folder):
        data = results.load(path)
        runs |= {f"{path.stem}-{name}": run for name, run in data["runs"].items()}
        rows += [{**row, "run": f"{path.stem}-{row['run']}"} for row in data["rows"]]
    figure, axes = plt.subplots(1, len(ops), figsize=(5.2 * len(ops), 4.4), squeeze=False, sharey=True)
    for axis, op in zip(axes[0], ops, strict=True):
        points = _axis_points(rows, runs, op)
        axis.plot([0, 1], [0, 1], color="0.6", lw=1, label="work left")
        for index, (name, colour, marker) in enumerate((("ours", "tab:blue", "o"), ("reference", "tab:red", "x"))):
            seen = [(point[0], point[index + 1]) for point in points if point[index + 1] is not None]
            if seen:
                axis.plot(*zip(*seen, strict=True), marker, color=colour, ms=5, label=name)
        axis.axhline(1, color="0.85", lw=1, zorder=0)
        axis.set(title=op.replace("_", " "), xlabel="work left", xlim=(0, 1.05))
        axis.legend(frameon=False, loc="upper left")
    axes[0][0].set_ylim(bottom=0)                       # once all points are there: the axes share it
    axes[0][0].set_ylabel("time, share of the same side's dense time")
    figure.tight_layout()
    figure.savefig(target, dpi=140)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and plots from bench/results.")
    parser.add_argument("--gpu", default="h200", help="folder of bench/results for the plot (default h200)")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--fill", type=Path, help="fill the tables of this file in place")
    parser.add_argument("--plot", type=Path, help="write the plot of work left here")
    options = parser.parse_args(arguments)
    try:
        tables = {f"{path.parent.name}/{path.stem}": suite_table(path)
                  for path in results.files(options.results)}
        if not tables:
            raise results.ResultsError(f"{options.results} has no results; run pytest bench/ on a GPU first")
        if options.fill:
            options.fill.write_text(fill(options.fill.read_text(), tables))
        if options.plot:
            plot(options.results / options.gpu, options.plot)
    except (results.ResultsError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    if not options.fill and not options.plot:
        for name, table in tables.items():
            print(f"## {name}\n\n{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
