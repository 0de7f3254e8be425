"""From scores to a plan, without running the model: a new budget takes seconds."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from shedder.prune.budget import Budget, figures
from shedder.prune.candidates import Candidate, Candidates, Pruned
from shedder.prune.greedy import out_of_candidates
from shedder.prune.removal import STREAM
from shedder.prune.scores import Scores

WHOLE = ("block", "ssm")              # what a layer loses after parts of it have gone


def take_lowest(pruned: Pruned, budget: Budget, candidates: Candidates, scores: Scores) -> list[dict[str, Any]]:
    """Removes the bundle with the least score per share of the budget that it removes, until the budget is met.

    The score of a block or an SSM counts what the layer has not yet lost: who has paid for half the heads of a
    layer pays the rest for its block. Returns one record per removal, the untouched model first.
    """
    records = [_record(0, pruned)]
    paid: dict[int, float] = defaultdict(float)
    # By layer, while it, what the budget lacks and d_model stay the same.
    known: dict[int, list[Candidate]] = {}
    lacks: list[str] = []
    while unmet := budget.unmet(pruned.config):
        if unmet != lacks or pruned.blocks_left == 1:
            known, lacks = {}, unmet
        known[STREAM] = list(candidates.of_stream(pruned, budget, unmet))
        for layer in range(len(pruned.config.layers)):
            if layer not in known:
                known[layer] = list(candidates.of_layer(pruned, budget, unmet, layer))
        choices = [(_price(candidate, scores, paid) / candidate.gain, candidate.key, candidate)
                   for of_layer in known.values() for candidate in of_layer]
        if not choices:
            raise out_of_candidates(budget, pruned, candidates)
        chosen = min(choices, key=lambda choice: choice[:2])[2]
        paid[chosen.layer] += _price(chosen, scores, paid)
        _remove(pruned, chosen, records)
        if chosen.layer == STREAM:
            known = {}
        else:
            del known[chosen.layer]
    return records


def take_evenly(pruned: Pruned, budget: Budget, candidates: Candidates) -> list[dict[str, Any]]:
    """Removes the lowest bundle of every layer, axis by axis, in rounds, until a round has met the budget: layers
    that were equal stay equal, whatever the scores of one layer are to those of another."""
    records = [_record(0, pruned)]
    while budget.unmet(pruned.config):
        before = len(records)
        for axis in candidates.axes:
            for candidate in candidates.of_model(pruned, budget):
                if candidate.axis == axis.name:
                    _remove(pruned, candidate, records)
        if len(records) == before:
            raise out_of_candidates(budget, pruned, candidates)
    return records


def _price(candidate: Candidate, scores: Scores, paid: dict[int, float]) -> float:
    values = scores.of(candidate.layer, candidate.axis)
    price = sum(values[unit] for unit in candidate.units)
    return max(price - paid[candidate.layer], 0.0) if candidate.axis in WHOLE else price


def _remove(pruned: Pruned, chosen: Candidate, records: list[dict[str, Any]]) -> None:
    pruned.apply(chosen.removal)
    records.append({**_record(len(records), pruned), "axis": chosen.axis, **chosen.removal.to_json()})


def _record(step: int, pruned: Pruned) -> dict[str, Any]:
    return {"step": step, **figures(pruned.config)}
