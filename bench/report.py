"""Tables and plots from the result files: every figure in the README or docs comes from here.

    python -m bench.report                             # all tables, as markdown
    python -m bench.report --fill docs/benchmarks.md   # between <!-- bench:h200/ssd --> and <!-- /bench -->
    python -m bench.report --plot docs/removal.png --gpu h200
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import claims, results
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


def _key(measured: Row | dict[str, Any]) -> str:
    names = ("op", "shape", "clock", "layout", "dtype", "state_dtype", "dispatch")
    return json.dumps([measured[name] for name in names], sort_keys=True)


def _keys(rows: Iterable[Workload]) -> dict[str, Workload]:
    """Workloads by what a row of theirs measures; of two the first."""
    found: dict[str, Workload] = {}
    for workload in rows:
        dispatch = workload.dispatch if workload.dispatch == "auto" else f"forced:{workload.dispatch}"
        found.setdefault(_key({**vars(workload), "dispatch": dispatch}), workload)
    return found


_WORKLOADS = _keys(WORKLOADS)


def workload_of(row: Row) -> Workload | None:
    """The table's entry that a row measured."""
    return _WORKLOADS.get(_key(row))


def _target(workload: Workload | None) -> str:
    if workload is None:
        return ""
    speed = f"{workload.must:g}x (aim {workload.aim:g}x)" if workload.must and workload.aim else (
        f"{workload.must:g}x" if workload.must else "")
    return "; ".join(part for part in (speed, workload.target) if part)


def table_text(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ("---",) * len(header), *lines))


def markdown(rows: Iterable[Row]) -> str:
    """One table of rows; a peer that raises is said to, in its own words, below it."""
    lines: list[tuple[str, ...]] = []
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
        lines.append((
            model + row["op"] + forced, f"{shape_text(row['shape'])}{layout} {row['dtype']}{state}{mark}", row["clock"],
            number(row["ours_us"]), number(row["peer_us"]), "-" if faster is None else f"{faster:.2f}x",
            _target(workload_of(row)), share, number(row["error"], 2), number(row["peer_error"], 2)))
    return "\n".join([table_text(_HEADER, lines), *(f"\n[{index}] {note}" for index, note in enumerate(notes, 1))])


def suite_table(path: Path) -> str:
    """The table of one suite: its targets and base rows, with the machine line above it."""
    data = results.load(path)
    order = {id(w): index for index, w in enumerate(WORKLOADS)}
    found = [(workload_of(row), row) for row in data["rows"]]
    shown = sorted(((order[id(w)] if w else len(order), row) for w, row in found
                    if w is None or w.table in ("must", "base")), key=lambda pair: pair[0])
    runs = "; ".join(
        f"{name}: {run['gpu']}, {run['clock_mhz']:g} MHz, copy {run['copy_tb_s']:g} TB/s, {run['date'][:10]}, commit "
        f"{run['commit']}, " + (f"medians of {run['passes']} passes, " if "passes" in run else "")
        + ", ".join(f"{key} {value}" for key, value in run["versions"].items())
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


# ---- does removal pay?


def _folder(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """All rows of a folder of results, and its runs; the runs of each file under names of their own."""
    rows: list[Row] = []
    runs: dict[str, Any] = {}
    for path in (path for path in results.files(folder.parent) if path.parent == folder):
        data = results.load(path)
        runs |= {f"{path.stem}-{name}": run for name, run in data["runs"].items()}
        rows += [{**row, "run": f"{path.stem}-{row['run']}"} for row in data["rows"]]
    return rows, runs


@dataclass(frozen=True)
class Cut:
    """One measured point of a sweep: its row, that of the dense shape in the same run, and the work left."""

    row: Row
    dense: Row
    left: float

    def share(self, side: str) -> float | None:
        """Time of "ours" or "peer", as a share of the same side's dense time."""
        small, large = self.row[f"{side}_us"], self.dense[f"{side}_us"]
        return small / large if small and large else None


def cuts(rows: list[Row], runs: dict[str, Any]) -> list[Cut]:
    """The points of the sweeps in the order of the workloads, the dense ones with themselves."""
    swept = _keys(workload for workload in WORKLOADS if workload.table == "sweep")
    order = {key: index for index, key in enumerate(swept)}
    found = []
    for row in sorted((row for row in rows if _key(row) in swept), key=lambda row: order[_key(row)]):
        workload = swept[_key(row)]
        wanted = _key({**row, "shape": workload.dense or row["shape"]})
        dense = next((other for other in rows if other["run"] == row["run"] and _key(other) == wanted), None)
        machine = results.machine_of(runs[row["run"]])
        if dense is not None and machine is not None:
            found.append(Cut(row, dense, limits.work_left(row["op"], row["shape"], dense["shape"], machine)))
    return found


def sweep_table(found: list[Cut]) -> str:
    lines = []
    for cut in found:
        shares = [cut.share(side) for side in ("ours", "peer")]
        ours, theirs = ("-" if share is None else f"{share:.2f}" for share in shares)
        faster = speed_up(cut.row)
        lines.append((cut.row["op"], shape_text(cut.row["shape"]), number(cut.row["ours_us"]), ours, f"{cut.left:.2f}",
                      number(cut.row["peer_us"]), theirs, "-" if faster is None else f"{faster:.2f}x"))
    return table_text(("op", "shape", "ours us", "of dense", "work left", "peer us", "of its dense", "speed-up"), lines)


def random_table(rows: list[Row]) -> str:
    """One line for each op: how its random shapes compare with the peer."""
    drawn = _keys(workload for workload in WORKLOADS if workload.table == "random")
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        if _key(row) in drawn:
            by_op.setdefault(row["op"], []).append(row)
    lines = []
    for op, measured in sorted(by_op.items()):
        ratios = sorted(((ratio, row) for row in measured if (ratio := speed_up(row))), key=lambda pair: pair[0])
        if not ratios:
            lines.append((op, f"{len(measured)}", "0", "-", "-", "-", "-", "-"))
            continue
        mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
        lines.append((op, f"{len(measured)}", f"{len(ratios)}", f"{mean:.2f}x", f"{ratios[0][0]:.2f}x",
                      shape_text(ratios[0][1]["shape"]), f"{ratios[-1][0]:.2f}x",
                      f"{sum(ratio < 1 for ratio, _ in ratios)}"))
    return table_text(
        ("op", "shapes", "with a peer's time", "geometric mean", "lowest", "at", "highest", "below 1x"), lines)


def contract_list(rows: list[Row], runs: dict[str, Any]) -> str:
    """Where removal does not pay, as a list; says so where it pays everywhere."""
    failures = results.removal_pays(rows, runs)
    return "\n".join(f"- {failure}" for failure in failures) or "Nowhere."


def claim_tables(path: Path) -> dict[str, str]:
    """The tables of a claims.json, and where its claims do not hold."""
    data, gpu = claims.load(path), path.parent.name
    found = claims.failures(data)

    def size(count: int | None) -> str:
        return "-" if count is None else f"{count / 2 ** 20:.1f}"

    return {
        f"{gpu}/accuracy": table_text(
            ("op", "inputs", "shape", "backend", "RMS error", "peer's", "largest error", "peer's"),
            ((row["op"], row["inputs"], f"{shape_text(row['shape'])} {row['dtype']}", row["backend"],
              *(number(row[name]) for name in ("rms", "peer_rms", "max", "peer_max"))) for row in data["accuracy"])),
        f"{gpu}/pieces": table_text(
            ("op", "shape", "one call, us", f"{claims.PIECES} pieces, us", "ratio", "RMS difference"),
            ((row["op"], f"{shape_text(row['shape'])} {row['dtype']}", number(row["whole_us"]),
              number(row["pieces_us"]), f"{row['pieces_us'] / row['whole_us']:.3f}", number(row["apart"], 2))
             for row in data["pieces"])),
        f"{gpu}/first_output": table_text(
            ("layers", "backend", "seconds", "allowed"),
            ((f"{row['layers']} of {row['family']}", row["backend"], number(row["seconds"]),
              number(claims.FIRST_OUTPUT_S[row["backend"]])) for row in data["first_output"])),
        f"{gpu}/workspace": table_text(
            ("op", "shape", "MiB", "peer's MiB"),
            ((row["op"], f"{shape_text(row['shape'])} {row['dtype']}", size(row["bytes"]), size(row["peer_bytes"]))
             for row in data["workspace"])),
        f"{gpu}/claims": "\n".join(f"- {failure}" for failure in found) or "All hold."}


# ---- the plot

PANELS = (("selective_scan", "N"), ("selective_scan", "D"), ("selective_scan", "L"), ("ssd", "H"), ("ssd", "P"),
          ("ssd", "N"))


def axis_points(found: list[Cut], op: str, axis: str) -> list[tuple[int, Cut]]:
    """The cuts of one axis alone, the dense shape with them, by what is left of the axis."""
    def others(shape: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in shape.items() if key != axis}

    return sorted(((cut.row["shape"][axis], cut) for cut in found if cut.row["op"] == op
                   and others(cut.row["shape"]) == others(cut.dense["shape"])), key=lambda point: point[0])


def plot(folder: Path, target: Path) -> None:
    """Time along each swept axis as a share of the same side's dense time, ours and the reference; the work left."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = cuts(*_folder(folder))
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.6), sharey=True)
    for panel, (op, axis) in zip(axes.flat, PANELS, strict=True):
        points = axis_points(found, op, axis)
        panel.plot([size for size, _ in points], [cut.left for _, cut in points], color="0.6", lw=1, label="work left")
        for side, name, colour, marker in (("ours", "ours", "tab:blue", "o"), ("peer", "reference", "tab:red", "x")):
            seen = [(size, cut.share(side)) for size, cut in points if cut.share(side) is not None]
            panel.plot([size for size, _ in seen], [share for _, share in seen], marker=marker, color=colour, ms=4,
                       lw=1, label=name)
        panel.axhline(1, color="0.85", lw=1, zorder=0)
        panel.set(title=f"{op.replace('_', ' ')}: {axis}")
        panel.set_xlim(0, 1.04 * max((size for size, _ in points), default=1))
    axes[0][0].set_ylim(bottom=0)                       # once all points are there: the panels share it
    axes[0][0].legend(frameon=False, loc="lower right")
    for row in axes:
        row[0].set_ylabel("time, share of dense")
    figure.tight_layout()
    figure.savefig(target, dpi=140)
    plt.close(figure)


def folder_tables(folder: Path) -> dict[str, str]:
    """What the results of one GPU say together: the sweeps, the random shapes, where removal does not pay."""
    rows, runs = _folder(folder)
    return {f"{folder.name}/sweep": sweep_table(cuts(rows, runs)), f"{folder.name}/random": random_table(rows),
            f"{folder.name}/contract": contract_list(rows, runs)}


def all_tables(root: Path) -> dict[str, str]:
    """Every table by the name that its mark in a document has."""
    files = results.files(root)
    tables = {f"{path.parent.name}/{path.stem}": suite_table(path) for path in files}
    for folder in sorted({path.parent for path in files}):
        tables |= folder_tables(folder)
        tables |= {f"{folder.name}/{name}": "Not measured." for name in ("claims", *claims.FIELDS)}
    for path in sorted(root.glob("*/claims.json")):
        tables |= claim_tables(path)
    return tables


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and plots from bench/results.")
    parser.add_argument("--gpu", default="h200", help="folder of bench/results for the plot (default h200)")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--fill", type=Path, help="fill the tables of this file in place")
    parser.add_argument("--plot", type=Path, help="write the plot of the sweeps here")
    options = parser.parse_args(arguments)
    try:
        tables = all_tables(options.results)
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
