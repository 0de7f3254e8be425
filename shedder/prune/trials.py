"""The calibration loss of a model as pruned so far, and of what it could become next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shedder.evaluate import negative_log_likelihood
from shedder.nn import LanguageModel
from shedder.prune.calibration import Calibration
from shedder.prune.parallel import Workers
from shedder.prune.plan import LayerPlan, Plan
from shedder.prune.slice import compact_block
from shedder.prune.statistics import dense_statistics

Streams = list[tuple[Tensor, Tensor | None]]           # hidden and residual, one pair per calibration batch
Key = tuple[int, str, int]                             # (layer, axis, unit); unit -1 where the axis has one candidate


@dataclass(frozen=True)
class Trial:
    """Layer `layer` with `cut` in place of the cut that it has."""

    key: Key
    layer: int
    cut: LayerPlan


class Trials:
    """Runs a model block by block, sliced and repaired as it will ship.

    A trial of layer k differs from the model from layer k on. With prefix_cache the layers before it run once for
    all trials; without (for comparison), in each.
    """

    def __init__(self, model: LanguageModel, calibration: Calibration, norm_repair: str, repairs: Sequence[str] = (),
                 *, prefix_cache: bool = True, workers: Workers | None = None) -> None:
        self.model, self.prefix_cache = model, prefix_cache
        self.plan = Plan(model.config.family, {}, norm_repair, repairs=tuple(repairs))
        self.statistics = (dense_statistics(model, calibration, self.plan.repairs)
                           if self.plan.needs_statistics else None)
        self.workers = workers or Workers()
        self.inputs, self.targets = calibration.inputs, calibration.targets
        self.blocks: list[nn.Module] = list(model.layers)

    def set(self, layer: int, cut: LayerPlan) -> None:
        self.blocks[layer] = self._sliced(layer, cut)

    def loss(self) -> float:
        """The mean loss per token of the model as it is."""
        return self._loss(self._forward(self._embedded(), self.blocks))

    def losses(self, trials: Sequence[Trial], known: Mapping[Key, float],
               on_loss: Callable[[Key, float], None]) -> dict[Key, float]:
        """The loss of each trial that is not known yet, in one walk along the layers.

        A loss that is no finite number counts as infinite. on_loss hears of each trial that this process ran.
        """
        losses = {trial.key: known[trial.key] for trial in trials if trial.key in known}
        pending = sorted((trial for trial in trials if trial.key not in known), key=lambda trial: trial.layer)
        if not pending:
            return losses
        mine = self.workers.mine(pending)
        streams, reached = self._embedded(), 0
        found: dict[Key, float] = {}
        for trial in mine:
            rest = [self._sliced(trial.layer, trial.cut), *self.blocks[trial.layer + 1:]]
            if self.prefix_cache:
                streams, reached = self._forward(streams, self.blocks[reached:trial.layer]), trial.layer
                value = self._loss(self._forward(streams, rest))
            else:
                value = self._loss(self._forward(self._embedded(), [*self.blocks[:trial.layer], *rest]))
            found[trial.key] = value if math.isfinite(value) else math.inf
            on_loss(trial.key, found[trial.key])
        return losses | self.workers.merged([trial.key for trial in pending], found)

    def layer_evaluations(self, trials: Sequence[Trial]) -> int:
        """How many blocks `losses` runs over the calibration tokens, one process and nothing known."""
        alive = [int(_runs(block)) for block in self.blocks]
        after = [sum(alive[layer + 1:]) for layer in range(len(alive))]
        count = sum(after[trial.layer] + (0 if trial.cut.block else 1) for trial in trials)
        before = [sum(alive[:trial.layer]) for trial in trials]
        return count + (max(before, default=0) if self.prefix_cache else sum(before))

    @property
    def blocks_left(self) -> int:
        return sum(map(_runs, self.blocks))

    def _embedded(self) -> Streams:
        return [(self.model.embed(tokens), None) for tokens in self.inputs]

    def _forward(self, streams: Streams, blocks: Sequence[nn.Module]) -> Streams:
        for block in blocks:
            if _runs(block):
                streams = [block(hidden, residual, None) for hidden, residual in streams]
        return streams

    def _loss(self, streams: Streams) -> float:
        """Summed in Python floats: the order, hence the value, is fixed."""
        total, count = 0.0, 0
        for (hidden, residual), targets in zip(streams, self.targets, strict=True):
            logits = self.model.head(hidden, residual)
            total += negative_log_likelihood(logits, targets).item() * targets.numel()
            count += targets.numel()
        return total / count

    def _sliced(self, layer: int, cut: LayerPlan) -> nn.Module:
        plan = replace(self.plan, layers={layer: cut})
        return compact_block(self.model.layers[layer], self.model.config, layer, plan, self.statistics)


def _runs(block: nn.Module) -> bool:
    """Whether a block is there: a removed one has no parameters."""
    return next(block.parameters(), None) is not None


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Eval mode without gradients, and back to the mode that the model was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
