"""Reports: what they say is what happened, and the HTML file needs nothing but itself."""

from __future__ import annotations

import csv
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch

import shedder
from shedder import report, report_html
from shedder.evaluate import perplexity
from shedder.latency import Latency
from shedder.layout import NormSegment, ScanLayout, SSDLayout
from shedder.nn import LanguageModel, ModelConfig
from shedder.prune import LayerPlan, Plan, search
from shedder.report_html import render

SSD = SSDLayout(headdim=4, dstate=6, ngroups=2, head_to_group=(0, 0, 1, 1), norm_segments=(NormSegment(8, 1e-5),) * 2)
CONFIGS = {"mamba2": ModelConfig("mamba2", 8, 32, (SSD,) * 4),
           "mamba1": ModelConfig("mamba1", 8, 32, (ScanLayout(200, 4, 2),) * 4)}
CUTS = {"mamba2": {0: LayerPlan(block=True), 1: LayerPlan(ssm=True, heads=(2,)),
                   2: LayerPlan(heads=(0, 3), states=((1, 2), (4, 5)), taps=1)},
        "mamba1": {0: LayerPlan(block=True), 1: LayerPlan(ssm=True, channels=(5,)),
                   2: LayerPlan(channels=tuple(range(0, 200, 2)), states=((3,),), ranks=1)}}


def trajectory(sizes, perplexities):
    return [{"step": step, "params": size, "state": size, "perplexity": perplexity,
             **({} if step == 0 else {"layer": 2, "axis": "state", "removed": {"states": [[step], [step]]}})}
            for step, (size, perplexity) in enumerate(zip(sizes, perplexities, strict=True))]


def build(family="mamba2", **provenance) -> report.Report:
    plan = Plan(family, CUTS[family], provenance=provenance)
    times = [Latency("cpu", "float32", 1, 1, 16, prefill, 1.0, 1000.0) for prefill in (4.0, 2.0)]
    return report.collect("a <model> & its plan", CONFIGS[family], plan, perplexity=(10.0, 11.0), latency=times)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_figures_are_those_of_the_compacted_model(family):
    torch.manual_seed(0)
    dense = LanguageModel(CONFIGS[family])
    small = shedder.compact(dense, Plan(family, CUTS[family]))
    found = build(family)
    counts = found.figures[0]
    assert (counts.before, counts.after) == tuple(sum(p.numel() for p in m.parameters()) for m in (dense, small))
    for layer in found.layers:
        assert layer.parameters == tuple(sum(p.numel() for p in m.layers[layer.index].parameters())
                                         for m in (dense, small))
    assert [layer.fate for layer in found.layers] == ["block", "ssm", "cut", "whole"]
    assert "prefill time" in report.table(found) and "50.0 %" in report.table(found)


def test_kept_units_are_those_that_the_plan_leaves():
    kept = {units.axis: units for units in build().layers[2].kept}
    assert kept["head"].rows == ((False, True, True, False),)
    assert kept["state"].rows == ((True, False, False, True, True, True), (True, True, True, True, False, False))
    assert kept["tap"].count == (3, 4)
    ssm = {units.axis: units for units in build().layers[1].kept}
    assert ssm["head"].count == (3, 4) and ssm["state"].count == (0, 12)
    assert {units.axis: units.count for units in build("mamba1").layers[2].kept} == {
        "channel": (100, 200), "state": (3, 4), "rank": (1, 2), "tap": (4, 4)}


def test_the_pareto_front_is_what_nothing_beats():
    total = build().figures[0].before
    found = build(trajectory=trajectory([total, 900, 800, 800, 700, 600], [10.0, 9.0, 9.5, 8.0, 12.0, math.inf]))
    assert [point.is_pareto for point in found.points] == [False, False, False, True, True, True]
    rows = list(csv.DictReader(io.StringIO(report.to_csv(found))))
    assert [row["pareto"] for row in rows] == ["0", "0", "0", "1", "1", "1"]
    assert float(rows[1]["params_share"]) == pytest.approx(900 / total, rel=1e-5)
    assert rows[0]["layer"] == "" and rows[1]["removed"] == "states 1 of each group"


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "br", "rect", "line", "circle", "polyline", "i"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.fetched: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        self.labels += [value for name, value in attrs if name == "aria-label"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("perplexities", [[10.0, 9.0, 11.0], [None] * 3, [10.0, math.inf, 12.0], [10.0, 10.0, 10.0]])
def test_the_page_needs_nothing_but_itself(family, perplexities):
    html = render(build(family, trajectory=trajectory([3000, 2500, 2000], perplexities), method="greedy <search>"))
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"https?:|url\(|@import|javascript", html)
    assert "a &lt;model&gt; &amp; its plan" in html and "<model>" not in html and "<search>" not in html
    assert "block removed" in html and "SSM removed" in html
    assert ("3 of 4 heads stay" if family == "mamba2" else "100 of 200 channels stay") in page.labels
    assert not re.search(r'="[^"]*\b(nan|inf)\b', html)             # in no coordinate


def test_a_plan_by_hand_has_a_report_without_a_search(tmp_path):
    written = report_html.write(build(), tmp_path / "deep/er/report.html")
    assert [path.name for path in written] == ["report.html"]
    assert "The search" not in written[0].read_text()


@pytest.mark.parametrize("family", CONFIGS)
def test_points_along_the_search_are_those_models_on_held_out_text(family, tmp_path):
    torch.manual_seed(0)
    dense = LanguageModel(CONFIGS[family])
    tokens = torch.randint(32, (300,))
    plan = search(dense, tokens, {"params": 0.6}, method="one-shot", score="taylor1", norm_repair="exact",
                  sequences=2, length=32, progress=False)
    assert all(point.perplexity is None for point in report.collect("", dense.config, plan).points)
    heldout = torch.randint(32, (1200,))
    along = report.perplexity_along(dense, plan, None, heldout, 3)
    last = len(plan.provenance["trajectory"]) - 1
    assert sorted(along) == [0, round(last / 2), last]
    assert along[0] == pytest.approx(perplexity(dense, heldout))
    assert along[last] == pytest.approx(perplexity(shedder.compact(dense, plan), heldout))
    found = report.collect("t", dense.config, plan, along=along)
    assert [point.step for point in found.points if point.perplexity is not None] == sorted(along)
    assert "perplexity on held-out text" in render(found)
    with pytest.raises(ValueError, match="points is 1, the plan has"):
        report.perplexity_along(dense, plan, None, heldout, 1)


def test_csv_and_png_lie_beside_the_page(tmp_path):
    found = build(trajectory=trajectory([3000, 2500, 2000], [10.0, 9.0, 11.0]))
    written = report_html.write(found, tmp_path / "r.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.html", "r.png"] == sorted(
        path.name for path in written)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"report is 'r.txt'; accepted: a file name that ends in .html"):
        report_html.write(build(), type(tmp_path)("r.txt"))
