"""A report as one HTML file that needs nothing else: no scripts, no fonts, no network; charts are inline SVG."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from shedder.prune.plan import write_atomically
from shedder.report import Figure, KeptUnits, LayerReport, Point, Report, draw, to_csv

AXIS_NAMES = {"head": "heads", "channel": "channels", "state": "states", "group": "B/C groups",
              "merge": "merged groups", "head_channel": "head channels", "mlp": "MLP channels", "rank": "rank of dt",
              "tap": "taps", "d_model": "d_model",
              "block": "a block", "ssm": "an SSM"}
COLORS = {"block": "#475569", "ssm": "#c2410c", "head": "#0f766e", "channel": "#0f766e", "state": "#7c3aed",
          "group": "#be123c", "head_channel": "#2563eb", "mlp": "#4d7c0f", "rank": "#db2777", "tap": "#0891b2",
          "merge": "#b45309", "d_model": "#1e3a8a", "": "#94a3b8"}
FATES = {"block": "block removed", "ssm": "SSM removed", "cut": "", "whole": "untouched"}
MANY = 96                                               # units of a row that still get a cell each

STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --card: #ffffff; --page: #f8fafc; --gone: #e2e8f0;
  --kept: #0f766e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --soft: #94a3b8; --line: #334155; --card: #1e293b;
  --page: #0f172a; --gone: #334155; --kept: #2dd4bf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 40px 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 72ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 12px; margin-top: 24px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.2; letter-spacing: -0.02em; }
.card span { color: var(--soft); font-size: 13px; }
.panel { margin-top: 12px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.unit, .small { color: var(--soft); font-size: 13px; }
.bar { width: 120px; }
.layer { display: grid; grid-template-columns: 76px 1fr; gap: 12px; padding: 8px 0;
  border-bottom: 1px solid var(--line); }
.layer:last-child { border-bottom: 0; }
.layer > b { font-variant-numeric: tabular-nums; }
.axis { display: grid; grid-template-columns: 108px 1fr 88px; gap: 10px; align-items: center; min-height: 20px; }
.axis span { font-size: 13px; color: var(--soft); }
.axis span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.fate { display: inline-block; border-radius: 999px; padding: 0 9px; font-size: 12px; line-height: 20px;
  background: var(--gone); color: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 12px; margin-top: 12px; }
.charts .panel { margin: 0; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--soft); margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg .grid { stroke: var(--line); } svg .path { stroke: var(--soft); fill: none; stroke-width: 1.2; opacity: .6; }
svg .kept { fill: var(--kept); } svg .gone { fill: var(--gone); }
.strip { height: 14px; } .legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
p + details, details + details { margin-top: 12px; } details[open] > summary { margin-bottom: 6px; }
td { min-width: 64px; } summary { cursor: pointer; color: var(--soft); }
pre { overflow: auto; max-height: 480px; font-size: 12px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } .panel, .card { break-inside: avoid; } }
@media (max-width: 560px) { .charts { grid-template-columns: 1fr; } .axis { grid-template-columns: 84px 1fr 64px; } }
"""


def render(report: Report) -> str:
    """The whole page."""
    parts = [_head(report), _cards(report), _figures(report), _map(report), _search(report), _layers(report),
             _plan(report)]
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            + "\n".join(part for part in parts if part) + "\n</main>\n</body>\n</html>\n")


def _head(report: Report) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return f"<header><h1>{escape(report.title)}</h1>{notes}</header>"


def _cards(report: Report) -> str:
    return '<div class="cards">' + "".join(_card(figure) for figure in report.figures) + "</div>"


def _card(figure: Figure) -> str:
    """Sizes as the share that is left, times as a speed-up, perplexity as its rise."""
    if figure.name.endswith("time"):
        big, small = f"{1 / figure.ratio:.2f} ×", f"{figure.name.removesuffix(' time')} speed"
    elif figure.name == "perplexity":
        big, small = f"{100 * (figure.ratio - 1):+.1f} %", "perplexity"
    else:
        what = "prefill flops" if figure.name == "prefill" else figure.name
        big, small = f"{100 * figure.ratio:.1f} %", f"{what} left"
    return f'<div class="card"><b>{big}</b><span>{escape(small)}</span></div>'


def _figures(report: Report) -> str:
    rows = "".join(
        f'<tr><td>{escape(one.name)} <span class="unit">{escape(one.unit)}</span></td>'
        f'<td class="number">{one.text(one.before)}</td><td class="number">{one.text(one.after)}</td>'
        f'<td class="number">{100 * one.ratio:.1f} %</td><td class="bar">{_bar(one.ratio)}</td></tr>'
        for one in report.figures)
    return ('<h2>Before and after</h2><div class="panel"><table><tr><th></th><th class="number">before</th>'
            f'<th class="number">after</th><th class="number">after / before</th><th></th></tr>{rows}</table></div>')


def _bar(ratio: float) -> str:
    """The ratio as a bar; the outline is what there was."""
    kept = min(ratio, 1.2) / 1.2 * 120
    return (f'<svg class="strip" viewBox="0 0 120 14" preserveAspectRatio="none" role="img" '
            f'aria-label="{100 * ratio:.1f} %"><rect class="gone" width="100" height="10" y="2" rx="3"/>'
            f'<rect class="kept" width="{kept:.1f}" height="10" y="2" rx="3"/></svg>')


# ---- what each layer kept


def _map(report: Report) -> str:
    layers = "".join(f'<div class="layer"><b>layer {layer.index}</b><div>{_strips(layer)}</div></div>'
                     for layer in report.layers)
    before, after = report.d_model
    width = f" The residual stream has {after} of {before} channels." if before != after else ""
    return ('<h2>What each layer kept</h2><p>One cell or sliver per unit, in the order of the dense model: '
            f'<span style="color:var(--kept)">■</span> stays, <span style="color:var(--gone)">■</span> is gone.{width}'
            f'</p><div class="panel">{layers}</div>')


def _strips(layer: LayerReport) -> str:
    if layer.fate == "block":
        return f'<span class="fate">{FATES["block"]}</span> <span class="small">{escape(layer.before)}</span>'
    label = f'<span class="fate">{FATES[layer.fate]}</span>' if FATES[layer.fate] else ""
    # Taps, ranks, groups and channels of heads are shown where some are gone; heads, channels and states always.
    shown = [units for units in layer.kept
             if units.axis in ("head", "channel", "state") or units.count[0] < units.count[1]]
    if layer.fate == "ssm":                             # all of these went with it
        shown = [units for units in shown if units.count[0]]
    return label + "".join(_strip(units) for units in shown)


def _strip(units: KeptUnits) -> str:
    kept, count = units.count
    name = AXIS_NAMES[units.axis]
    gap = 2.0 if len(units.rows) > 1 else 0.0           # between groups
    width = (1000.0 - gap * (len(units.rows) - 1)) / count
    shapes, left = [], 0.0
    for row in units.rows:
        for stays, length in (_cells if count <= MANY else _runs)(row):
            inset = min(1.5, 0.15 * width) if count <= MANY else 0.0
            shapes.append(f'<rect class="{"kept" if stays else "gone"}" x="{left + inset:.2f}" y="0" '
                          f'width="{length * width - 2 * inset:.2f}" height="14"/>')
            left += length * width
        left += gap
    strip = (f'<svg class="strip" viewBox="0 0 1000 14" preserveAspectRatio="none" role="img" '
             f'aria-label="{kept} of {count} {name} stay">{"".join(shapes)}</svg>')
    return f'<div class="axis"><span>{name}</span>{strip}<span>{kept} of {count}</span></div>'


def _cells(row: Sequence[bool]) -> Iterator[tuple[bool, int]]:
    return ((stays, 1) for stays in row)


def _runs(row: Sequence[bool]) -> Iterator[tuple[bool, int]]:
    start = 0
    for place in range(1, len(row) + 1):
        if place == len(row) or row[place] != row[start]:
            yield row[start], place - start
            start = place


# ---- the search


def _search(report: Report) -> str:
    points = report.points
    if len(points) < 2:
        return ""
    used = [axis for axis in COLORS if any(point.axis == axis for point in points)]
    legend = "".join(f'<span><i style="background:{COLORS[axis]}"></i>{AXIS_NAMES.get(axis, "nothing yet")}</span>'
                     for axis in used)
    charts = [_chart("What is left, step by step", points, lambda point: point.step,
                     lambda point: 100 * point.params, "step", "parameters left, %", False)]
    known = [point for point in points if point.perplexity is not None and math.isfinite(point.perplexity)]
    if len(known) > 1:
        quality = f"perplexity on {report.text}"
        charts = [_chart("Parameters against perplexity; ringed points are the Pareto front", known,
                         lambda point: 100 * point.params, lambda point: point.perplexity or 0.0,
                         "parameters left, %", quality, True),
                  _chart("Perplexity, step by step", known, lambda point: point.step,
                         lambda point: point.perplexity or 0.0, "step", quality, False)]
    method = report.plan.provenance.get("method", "search")
    return (f"<h2>The search</h2><p>{escape(str(method)).capitalize()}: {len(points) - 1} steps. A point is the model "
            f'after a step; its colour says what the step removed.</p><div class="legend">{legend}</div>'
            f'<div class="charts">{"".join(charts)}</div>')


def _chart(caption: str, points: Sequence[Point], x: Callable[[Point], float], y: Callable[[Point], float],
           x_name: str, y_name: str, is_front: bool) -> str:
    """A line through the steps with a dot for each; the front ringed, x falling from left to right."""
    width, height, left, right, top, bottom = 480, 300, 48, 12, 12, 40
    (x_low, x_high, xs), (y_low, y_high, ys) = (_scale([of(point) for point in points]) for of in (x, y))

    def across(value: float) -> float:
        share = (value - x_low) / (x_high - x_low)
        return left + (width - left - right) * (1 - share if is_front else share)

    def down(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - y_low) / (y_high - y_low)

    shapes = [f'<line class="grid" x1="{left}" x2="{width - right}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
              f'<text x="{left - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>' for tick in ys]
    shapes += [f'<text x="{across(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>'
               for tick in xs]
    shapes.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{x_name}</text>')
    line = " ".join(f"{across(x(point)):.1f},{down(y(point)):.1f}" for point in points)
    shapes.append(f'<polyline class="path" points="{line}"/>')
    for point in points:
        ring = ' stroke="currentColor" stroke-width="1.4"' if is_front and point.is_pareto else ""
        color = COLORS.get(point.axis, COLORS[""])
        shapes.append(f'<circle cx="{across(x(point)):.1f}" cy="{down(y(point)):.1f}" r="4" fill="{color}"{ring}>'
                      f"<title>{escape(_words(point))}</title></circle>")
    return (f'<div class="panel"><figure><figcaption>{escape(caption)}<br>{escape(y_name)}</figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(caption)}">{"".join(shapes)}</svg>'
            "</figure></div>")


def _words(point: Point) -> str:
    where = "all layers" if point.layer is None else f"layer {point.layer}"
    what = f"{where}: {point.removed}" if point.removed else "nothing removed yet"
    quality = "" if point.perplexity is None else f", perplexity {point.perplexity:.4g}"
    return f"step {point.step}: {what}; {100 * point.params:.1f} % of the parameters{quality}"


def _scale(values: Sequence[float], count: int = 6) -> tuple[float, float, list[float]]:
    """Bounds with a margin around the values, and round numbers within them, evenly apart."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    return low, high, [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ---- the rest


def _layers(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="number">{layer.index}</td><td>{escape(layer.before)}</td><td>{escape(layer.after)}</td>'
        f'<td class="small">{_removed(layer.removed)}</td><td class="number">{layer.parameters[0]:,}</td>'
        f'<td class="number">{layer.parameters[1]:,}</td></tr>' for layer in report.layers)
    return ('<h2>Layer by layer</h2><div class="panel"><table><tr><th class="number">layer</th><th>before</th>'
            '<th>after</th><th>removed, in the numbering before</th><th class="number">parameters</th>'
            f'<th class="number">left</th></tr>{rows}</table></div>')


def _removed(words: str) -> str:
    """Long lists of numbers are folded: the map shows them already."""
    if len(words) <= 120:
        return escape(words) or "nothing"
    cut = words.rfind(" ", 0, 80)
    return f"<details><summary>{escape(words[:cut])} …</summary>{escape(words)}</details>"


def _plan(report: Report) -> str:
    plan = json.loads(report.plan.to_json())
    provenance = plan.pop("provenance", {})
    settings = {name: value for name, value in provenance.items() if name != "trajectory"}
    facts = f"Norm repair {report.plan.norm_repair}" + (
        f"; refitted: {', '.join(report.plan.repairs)}." if report.plan.repairs else ".")
    return (f"<h2>The plan</h2><p>{escape(facts)}</p><details><summary>plan as JSON</summary>"
            f"<pre>{escape(json.dumps(plan, indent=1))}</pre></details><details><summary>how it was found</summary>"
            f"<pre>{escape(json.dumps(settings, indent=1))}</pre></details>")


def write(report: Report, path: Path) -> list[Path]:
    """The HTML file, and beside it the search as CSV and PNG where there was one. Returns what was written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"report is {str(path)!r}; accepted: a file name that ends in .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path]
    write_atomically(path, render(report))
    if report.points:
        write_atomically(path.with_suffix(".csv"), to_csv(report))
        written.append(path.with_suffix(".csv"))
    if any(point.perplexity is not None for point in report.points):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draw(report, Path(folder) / "plot.png")
            (Path(folder) / "plot.png").replace(path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    return written
