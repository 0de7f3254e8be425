"""Calibration perplexity: the rise of the loss when units go, one layer and axis at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from shedder.nn import LanguageModel
from shedder.prune.calibration import Calibration, digest, fingerprint
from shedder.prune.journal import Journal
from shedder.prune.parallel import Workers
from shedder.prune.removal import STREAM, Removal
from shedder.prune.scores.contribution import contribution
from shedder.prune.scores.table import Found, with_groups
from shedder.prune.trials import Trial, Trials, evaluating
from shedder.prune.units import Axis, Rows


@dataclass(frozen=True)
class Sweep(Calibration):
    """What only this score needs: axes; how many levels a layer's units are removed in; the repair; a log to resume."""

    axes: tuple[Axis, ...] = ()
    levels: int = 8
    norm_repair: str = "stats"
    repairs: tuple[str, ...] = ()
    log: str | Path | None = None
    progress: bool = False
    workers: Workers = field(default_factory=Workers)


@dataclass(frozen=True)
class _Curve:
    """The units of one axis of a layer or of STREAM, least contribution first, and how many are gone at each level."""

    layer: int
    axis: Axis
    rows: list[list[int]]
    counts: list[int]

    def trials(self, model: LanguageModel) -> list[Trial]:
        def removal(units: list[int]) -> Removal:
            if self.layer == STREAM:
                return Removal(STREAM, d_model=tuple(sorted(units)))
            return Removal(self.layer, self.axis.cut(model.config.layers[self.layer], units))
        return [Trial((self.layer, self.axis.name, count), removal([unit for row in self.rows for unit in row[:count]]))
                for count in self.counts]


def perplexity_rise(model: LanguageModel, sweep: Calibration) -> Found:
    """The rise of log-perplexity as a layer (or the residual stream) loses more and more units of one axis, the rest of
    the model whole.

    Units go in `levels` bundles in the order of their contribution; each unit gets its share of what its bundle adds.
    Where a bundle adds less than the one before it, both get their mean, so that the order of the units holds.
    """
    assert isinstance(sweep, Sweep)
    needed = any(not (axis.whole or axis.ordered) for axis in sweep.axes)
    layers = (STREAM, *range(len(model.config.layers)))
    ranks = with_groups(model.config, contribution(model, sweep)) if needed else {layer: {} for layer in layers}
    curves = [curve for layer in layers for axis in sweep.axes
              for curve in _curve(model, layer, axis, ranks[layer].get(axis.name), sweep.levels)]
    with evaluating(model):
        trials = Trials(model, sweep, sweep.norm_repair, sweep.repairs, workers=sweep.workers)
        losses = _losses(model, sweep, trials, [trial for curve in curves for trial in curve.trials(model)])
    scores: Found = {layer: {} for layer in layers}
    for curve in curves:
        rises = [losses[curve.layer, curve.axis.name, count] - losses[_WHOLE] for count in curve.counts]
        scores[curve.layer][curve.axis.name] = _spread(curve, rises)
    return scores


_WHOLE = (-1, "", -1)


def _curve(model: LanguageModel, layer: int, axis: Axis, ranks: Tensor | None, levels: int) -> list[_Curve]:
    rows: Rows = ()
    if layer != STREAM:
        rows = axis.rows(model.config.layers[layer])
    elif axis.shared:
        rows = (tuple(range(model.config.d_model)),)
    if not rows:
        return []
    if axis.whole:
        return [_Curve(layer, axis, [list(rows[0])], [1])]
    most = len(rows[0]) - axis.keeps
    if most < 1:
        return []
    ordered = [list(row) for row in rows]
    if not axis.ordered:
        assert ranks is not None
        values = ranks.flatten().tolist()
        ordered = [sorted(row, key=lambda unit: (values[unit], unit)) for row in rows]
    return [_Curve(layer, axis, ordered, sorted({min(max(1, round(level * len(rows[0]) / levels)), most)
                                                 for level in range(1, levels + 1)}))]


def _losses(model: LanguageModel, sweep: Sweep, runner: Trials, trials: Sequence[Trial]) -> dict:
    journal = Journal(sweep.log, {"settings": {
        "score": "perplexity", "axes": [axis.name for axis in sweep.axes], "levels": sweep.levels,
        "norm_repair": sweep.norm_repair, "repairs": list(sweep.repairs), "rows": list(sweep.rows.shape),
        "batch": sweep.batch},
        "tokens": digest([sweep.rows]), "model": fingerprint(model)}, sweep.workers)
    try:
        if not journal.steps:
            journal.add_step({"step": 0, "loss": runner.loss()})
        known = dict(journal.trials[0])
        with tqdm(total=len(trials), initial=len(known), desc="scores", unit="trial",
                  disable=not (sweep.progress and sweep.workers.is_first)) as bar:
            def note(key, loss):
                journal.add_trial(key, loss)
                bar.update(sweep.workers.count)
            losses = runner.losses(trials, known, note)
        for key, loss in losses.items():
            journal.add_trial(key, loss)
        return {**losses, _WHOLE: journal.steps[0]["loss"]}
    finally:
        journal.close()


def _spread(curve: _Curve, rises: Sequence[float]) -> Tensor:
    """One value per unit, flattened as the axis numbers them; rises[i] is the rise at counts[i]."""
    if curve.axis.whole:
        return torch.tensor(rises[0], dtype=torch.float64)
    pools: list[list[float]] = []                      # [rise, units of a row], means never falling
    before, gone = 0.0, 0
    for rise, count in zip(rises, curve.counts, strict=True):
        pools.append([rise - before, count - gone])
        before, gone = rise, count
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:
            rise_above, units_above = pools.pop()
            pools[-1][0] += rise_above
            pools[-1][1] += units_above
    each = [rise / units / len(curve.rows) for rise, units in pools for _ in range(int(units))]
    each += each[-1:] * (len(curve.rows[0]) - len(each))                      # who always stays is worth the most
    step = 1e-9 * max(map(abs, each), default=0.0)     # keeps the order of equals
    values = torch.zeros(max(map(max, curve.rows)) + 1, dtype=torch.float64)
    for row in curve.rows:
        for rank, unit in enumerate(row):
            values[unit] = each[rank] + rank * step
    return values
