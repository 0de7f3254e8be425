"""What each repair of shedder.prune gives back: held-out perplexity of one cut of each kind, with and without it.

    python -m bench.repairs                          # prints a table, adds its rows to bench/results/cpu/quality.json
    python -m bench.repairs --families mamba1 --no-write

The models are the ones that ship; statistics come from demo/text/calibration.txt, perplexity from
demo/text/heldout.txt. No training. What goes is chosen by the energy behind out_proj, or blindly.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import shedder
from bench.quality import DEMO, commit, write
from shedder.evaluate import perplexity
from shedder.layout import ScanLayout, SSDLayout
from shedder.nn import LanguageModel
from shedder.prune import LayerPlan, Plan
from shedder.prune.calibration import Calibration, calibration_rows
from shedder.prune.plan import REPAIRS
from shedder.prune.slice import compact
from shedder.prune.statistics import DenseStatistics, dense_statistics

SEQUENCES, LENGTH, HELDOUT_TOKENS = 16, 512, 16384
Fit = tuple[str, tuple[str, ...]]                       # norm repair, other repairs
MODES: list[Fit] = [("exact", ()), ("none", ()), ("stats", ())]
REFIT: list[Fit] = [("stats", ("out_proj",))]


@dataclass(frozen=True)
class Cut:
    """A plan without repairs, and the repairs to try on it."""

    name: str
    plan: Plan
    repairs: list[Fit]


def cuts(model: LanguageModel, statistics: DenseStatistics) -> Iterator[Cut]:
    config = model.config
    count = len(config.layers)
    every, late = range(count), (3, count - 3, count - 2)
    layout = config.layers[0]
    stream = tuple(range(0, config.d_model, 7))
    family = config.family

    def plan(layers: dict[int, LayerPlan], d_model: tuple[int, ...] = ()) -> Plan:
        return Plan(family, layers, d_model=d_model)

    assert isinstance(layout, (ScanLayout, SSDLayout))
    half = tuple(range(0, layout.dstate, 2))
    yield Cut("a seventh of d_model, blindly", plan({}, stream), MODES + REFIT)
    yield Cut("half of the states, blindly", plan({i: LayerPlan(states=(half,) * layout.ngroups) for i in every}),
              MODES[:1] + REFIT)
    yield Cut("the oldest tap", plan({i: LayerPlan(taps=1) for i in every}), MODES[:1] + REFIT)
    removed = plan({i: LayerPlan(ssm=True) for i in late})
    yield Cut("3 SSMs", removed, [*MODES[:1], ("exact", ("gain",)), *REFIT, ("stats", ("gain", "out_proj"))])
    energy = [_energy(model, statistics, i) for i in every]
    if isinstance(layout, SSDLayout):
        heads, headdim = layout.nheads, layout.headdim
        per_head = [value.view(heads, headdim) for value in energy]
        yield Cut("4 of 14 heads, the weakest", plan({
            i: LayerPlan(heads=tuple(per_head[i].sum(1).argsort()[:4].tolist())) for i in every}), MODES + REFIT)
        yield Cut("every fourth head, blindly", plan({
            i: LayerPlan(heads=tuple(range(0, heads, 4))) for i in every}), MODES + REFIT)
        yield Cut("8 of 32 channels of each head, the weakest", plan({
            i: LayerPlan(head_channels=tuple(tuple(row.argsort()[:8].tolist()) for row in per_head[i]))
            for i in every}), MODES + REFIT)
        return
    quarter, ranks = layout.d_inner // 4, layout.dt_rank
    fits: list[Fit] = [("exact", repairs) for repairs in (
        (), ("dt_bias",), ("x_proj",), ("x_proj", "dt_bias"), ("out_proj",), ("x_proj", "dt_bias", "out_proj"))]
    weakest = [tuple(value.argsort()[:quarter].tolist()) for value in energy]
    yield Cut("a quarter of the channels, the weakest", plan({
        i: LayerPlan(channels=weakest[i]) for i in every}), fits)
    yield Cut("a sixth of the channels, blindly", plan({
        i: LayerPlan(channels=tuple(range(0, layout.d_inner, 6))) for i in every}), fits)
    yield Cut(f"rank {ranks} of dt to {ranks // 2}", plan({
        i: LayerPlan(ranks=ranks - ranks // 2) for i in every}), fits)
    for left in (2, 1):
        yield Cut(f"rank {ranks} of dt to {left}", plan({i: LayerPlan(ranks=ranks - left) for i in every}), fits)


def _energy(model: LanguageModel, statistics: DenseStatistics, index: int) -> torch.Tensor:
    """Of each channel behind the gated norm and out_proj."""
    layer, mixer = statistics.layers[index], model.mixers[index]
    assert layer is not None and layer.gated is not None and mixer is not None
    weight = getattr(mixer, "norm", None)
    scale = 1.0 if weight is None else weight.weight.double().square()
    return (layer.gated * scale * mixer.out_proj.weight.double().square().sum(0)).detach()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.repairs", description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=("mamba1", "mamba2"), default=["mamba2", "mamba1"])
    parser.add_argument("--no-write", action="store_true", help="only print")
    arguments = parser.parse_args()
    text = (DEMO / "text" / "calibration.txt").read_text(encoding="utf-8")
    heldout_text = (DEMO / "text" / "heldout.txt").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for family in arguments.families:
        model = shedder.load(DEMO / "models" / family, dtype=torch.float32)
        heldout = torch.tensor(model.tokenizer.encode(heldout_text))[:HELDOUT_TOKENS + 1]
        calibration = Calibration(calibration_rows(model, text, SEQUENCES, LENGTH, 0))
        statistics = dense_statistics(model, calibration, REPAIRS)
        dense = perplexity(model, heldout, length=LENGTH)
        print(f"\n{family}: dense perplexity {dense:.3f}")
        for cut in cuts(model, statistics):
            for norm_repair, repairs in cut.repairs:
                small = compact(model, Plan(family, cut.plan.layers, norm_repair, {}, cut.plan.d_model, repairs),
                                statistics)
                row = {"model": family, "table": "repairs", "case": cut.name, "norm_repair": norm_repair,
                       "repairs": list(repairs), "perplexity": perplexity(small, heldout, length=LENGTH),
                       "dense_perplexity": dense, "calibration": [SEQUENCES, LENGTH],
                       "heldout_tokens": HELDOUT_TOKENS, "commit": commit()}
                rows.append(row)
                print(f"{cut.name:46} {norm_repair:>6} {' '.join(repairs):24} {row['perplexity']:8.3f}", flush=True)
    if not arguments.no_write:
        write(rows)


if __name__ == "__main__":
    main()
