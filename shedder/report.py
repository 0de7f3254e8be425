"""What a pruning did, gathered once: sizes and measurements before and after, what each layer kept, the search.

Written as a table for terminals, as CSV and PNG of the search, and as one HTML file (shedder.report_html).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from shedder.evaluate import perplexity as perplexity_of
from shedder.latency import Latency
from shedder.layout import RemovedBlock, RemovedSSM
from shedder.nn import LanguageModel
from shedder.nn.config import ModelConfig
from shedder.prune.plan import LayerPlan, Plan
from shedder.prune.removal import Removal
from shedder.prune.search import prefix
from shedder.prune.size import flops, layer_parameters, parameter_count, state_bytes
from shedder.prune.slice import compact
from shedder.prune.units import ALL, Axis
from shedder.prune.words import describe_layout


@dataclass(frozen=True)
class Figure:
    """One quantity before and after; `unit` is said once, and smaller is better in all of them."""

    name: str
    unit: str
    before: float
    after: float
    digits: int = 0

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0

    def text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class KeptUnits:
    """Of one kind of unit in one layer, in rows (a row per B/C group, or one for all): True where it stays."""

    axis: str
    rows: tuple[tuple[bool, ...], ...]

    @property
    def count(self) -> tuple[int, int]:
        """(kept, of)."""
        return sum(map(sum, self.rows)), sum(map(len, self.rows))


@dataclass(frozen=True)
class LayerReport:
    index: int
    before: str                                         # the layouts in words
    after: str
    removed: str                                        # "" for nothing
    parameters: tuple[int, int]
    fate: str                                           # "whole", "cut", "ssm" or "block": how much is gone
    kept: tuple[KeptUnits, ...]


@dataclass(frozen=True)
class Point:
    """One step of the search. Shares are of the dense model; perplexity is on the text that the report names."""

    step: int
    layer: int | None                                   # None: nothing is removed yet, or something of all layers
    axis: str
    removed: str
    params: float
    state: float
    flops: float | None
    perplexity: float | None
    is_pareto: bool = False                             # no other point is smaller and has a lower perplexity


@dataclass(frozen=True)
class Report:
    title: str
    family: str
    figures: tuple[Figure, ...]
    layers: tuple[LayerReport, ...]
    points: tuple[Point, ...]
    plan: Plan
    d_model: tuple[int, int]
    text: str                                           # of the perplexity of points
    notes: tuple[str, ...] = field(default=())


def collect(title: str, before: ModelConfig, plan: Plan, *, perplexity: tuple[float, float] | None = None,
            along: Mapping[int, float] | None = None, latency: Sequence[Latency] = (), notes: Sequence[str] = ()
            ) -> Report:
    """Gathers the report of a plan for a model of config `before`.

    Args:
        perplexity: before and after, on a text that the search did not see.
        along: the perplexity after some steps of the search on such a text; the default is the search's own.
        latency: before and after, measured in one run.
    """
    after = plan.compacted_config(before)
    figures = [Figure("parameters", "", parameter_count(before), parameter_count(after)),
               Figure("decode state", "bytes per sequence", state_bytes(before), state_bytes(after)),
               Figure("prefill", "flops per token", flops(before), flops(after))]
    if perplexity is not None:
        figures.append(Figure("perplexity", "held-out text", *perplexity, digits=3))
    if latency:
        dense, small = latency
        where = f"{dense.device}, batch {dense.batch}"
        figures.append(Figure("prefill time", f"ms, {dense.prompt} tokens, {where}", dense.prefill_ms,
                              small.prefill_ms, 2))
        figures.append(Figure("decode time", f"ms per token, {where}", dense.decode_ms, small.decode_ms, 3))
    layers = tuple(_layer(index, before, after, plan) for index in range(len(before.layers)))
    return Report(title, before.family, tuple(figures), layers, _points(before, plan, along), plan,
                  (before.d_model, after.d_model), "calibration text" if along is None else "held-out text",
                  tuple(notes))


def perplexity_along(model: LanguageModel, plan: Plan, text: str | None, heldout: Tensor, count: int
                     ) -> dict[int, float]:
    """The perplexity on held-out tokens after about `count` steps of the search, the first and the last among them.

    text: what compact() fits the plan's repairs on.
    """
    last = len(plan.provenance.get("trajectory", [])) - 1
    if last < 1 or count < 2:
        raise ValueError(f"points is {count}, the plan has {max(last, 0)} steps; accepted: 2 or more points of a "
                         "plan that search() found")
    steps = sorted({round(last * number / (count - 1)) for number in range(count)})
    return {step: perplexity_of(compact(model, prefix(plan, step), text), heldout)
            for step in tqdm(steps, desc="points of the search")}


def _layer(index: int, before: ModelConfig, after: ModelConfig, plan: Plan) -> LayerReport:
    old, new = before.layers[index], after.layers[index]
    cut = plan.layers.get(index, LayerPlan())
    fate = "whole" if cut.empty else "cut"
    if isinstance(new, RemovedBlock):
        fate = "block"
    elif isinstance(new, RemovedSSM):
        fate = "ssm"
    kept = [] if fate == "block" else [_kept(axis, old, cut) for axis in ALL if not axis.whole
                                       and before.family in axis.families and axis.name != "merge"]
    return LayerReport(index, describe_layout(old, before.family), describe_layout(new, before.family),
                       "" if cut.empty else str(cut), (layer_parameters(before, old), layer_parameters(after, new)),
                       fate, tuple(units for units in kept if units.rows))


def _kept(axis: Axis, layout: Any, cut: LayerPlan) -> KeptUnits:
    gone = axis.removed(layout, cut)
    is_gone_with_ssm = cut.ssm and axis.name in ("state", "rank", "group")
    rows = tuple(tuple(not is_gone_with_ssm and unit not in gone for unit in row) for row in axis.rows(layout))
    return KeptUnits(axis.name, rows)


def _points(before: ModelConfig, plan: Plan, along: Mapping[int, float] | None) -> tuple[Point, ...]:
    records = plan.provenance.get("trajectory")
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        return ()
    dense = {"params": parameter_count(before), "state": state_bytes(before), "flops": flops(before)}
    points = []
    for record in records:
        shares = {name: record[name] / max(size, 1) if name in record else None for name, size in dense.items()}
        removed = str(Removal.from_json(record)) if "removed" in record else ""
        points.append(Point(record["step"], record.get("layer"), record.get("axis", ""), removed,
                            shares["params"] or 0.0, shares["state"] or 0.0, shares["flops"],
                            record.get("perplexity") if along is None else along.get(record["step"])))
    return tuple(Point(**{**vars(point), "is_pareto": _is_pareto(point, points)}) for point in points)


def _is_pareto(point: Point, others: Sequence[Point]) -> bool:
    if point.perplexity is None:
        return False
    mine = (point.params, point.perplexity)
    return not any(other.perplexity is not None and (other.params, other.perplexity) != mine
                   and other.params <= point.params and other.perplexity <= point.perplexity for other in others)


# ---- what is written


def table(report: Report) -> str:
    """Before and after, for a terminal."""
    rows = [("", "before", "after", "left")]
    rows += [(f"{one.name} ({one.unit})" if one.unit else one.name, one.text(one.before), one.text(one.after),
              f"{100 * one.ratio:.1f} %") for one in report.figures]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}"
                     for row in rows)


def to_csv(report: Report) -> str:
    """The search, one step a row; the column pareto marks the steps that no other one beats in both."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "layer", "axis", "removed", "params_share", "state_share", "flops_share", "perplexity",
                     "pareto"])
    for point in report.points:
        numbers = [point.params, point.state, point.flops, point.perplexity]
        writer.writerow([point.step, "" if point.layer is None else point.layer, point.axis, point.removed,
                         *("" if number is None else f"{number:.6g}" for number in numbers), int(point.is_pareto)])
    return text.getvalue()


def draw(report: Report, path: Path) -> None:
    """Parameters against perplexity along the search, as PNG."""
    import matplotlib
    matplotlib.use("Agg")                               # a file, no window
    import matplotlib.pyplot as plt

    points = [(100 * point.params, point.perplexity, point.is_pareto) for point in report.points
              if point.perplexity is not None]
    figure, axis = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    axis.plot([share for share, _, _ in points], [perplexity for _, perplexity, _ in points], color="#94a3b8",
              linewidth=1)
    for front, color, label in ((False, "#94a3b8", "beaten by another step"), (True, "#0f766e", "Pareto front")):
        some = [(share, perplexity) for share, perplexity, is_pareto in points if is_pareto == front]
        if some:
            axis.plot(*zip(*some, strict=True), "o", color=color, markersize=5, label=label)
    axis.set(title=report.title, xlabel="parameters left, %", ylabel=f"perplexity on {report.text}")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    if points:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
