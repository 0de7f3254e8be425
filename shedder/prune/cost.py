"""What a greedy search will cost, said before it starts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from shedder.prune.greedy import Greedy


@dataclass(frozen=True)
class Cost:
    """layer_evaluations: blocks run over all calibration tokens. seconds: on this machine, with these processes."""

    candidates: int
    steps: int
    layer_evaluations: int
    seconds: float

    def __str__(self) -> str:
        return (f"{self.candidates} candidates, about {self.steps} steps, "
                f"{self.layer_evaluations:,} layer evaluations, {_duration(self.seconds)}")


def estimate(greedy: Greedy) -> Cost:
    """From the candidates of the first step: as if each step removed the geometric mean of what they remove (a block is
    a hundred bundles of states, and goes more seldom), and the model did not become smaller on the way."""
    candidates = greedy.candidates.of_model(greedy.pruned, greedy.budget)
    if not candidates:
        return Cost(0, 0, 0, 0.0)
    unmet = greedy.budget.unmet(greedy.pruned.config)
    left = greedy.budget.reached(greedy.pruned.config)
    excess = sum(left[name] - greedy.budget.shares[name] for name in unmet)
    steps = math.ceil(excess / math.exp(sum(math.log(candidate.gain) for candidate in candidates) / len(candidates)))
    first = greedy.trials.layer_evaluations([candidate.trial for candidate in candidates])
    share = 1.0
    if greedy.rescore is not None:                     # the best so far, and the axes of the layer just cut
        share = min(1.0, (greedy.rescore + len(greedy.candidates.axes)) / len(candidates))
    evaluations = first + round(max(steps - 1, 0) * first * share)
    started = time.perf_counter()
    greedy.trials.loss()
    each = (time.perf_counter() - started) / max(greedy.trials.blocks_left, 1)
    return Cost(len(candidates), steps, evaluations, evaluations * each / greedy.trials.workers.count)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
