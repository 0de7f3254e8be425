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
from shedder.prune.plan import Plan
from shedder.prune.removal import STREAM, Removal
from shedder.prune.slice import compact_block, compact_outside
from shedder.prune.statistics import dense_statistics

Streams = list[tuple[Tensor, Tensor | None]]           # hidden and residual, one pair per calibration batch
Key = tuple[int, str, int]                             # (layer, axis, unit); unit -1 where the axis has one candidate


@dataclass(frozen=True)
class Trial:
    """The model with `total` in place of what is gone from that layer, or from the residual stream."""

    key: Key
    total: Removal

    @property
    def layer(self) -> int:
        return self.total.layer


class Trials:
    """Runs a model block by block, sliced and repaired as it will ship.

    A trial of layer k differs from the model from layer k on. With prefix_cache the layers before it run once for
    all trials; without (for comparison), in each. A trial of the residual stream runs all layers.
    """

    def __init__(self, model: LanguageModel, calibration: Calibration, norm_repair: str, repairs: Sequence[str] = (),
                 *, prefix_cache: bool = True, workers: Workers | None = None) -> None:
        self.model, self.prefix_cache = model, prefix_cache
        self.plan = Plan(model.config.family, {}, norm_repair, repairs=tuple(repairs))
        self.statistics = (dense_statistics(model, calibration, self.plan.repairs)
                           if self.plan.needs_statistics else None)
        self.workers = workers or Workers()
        self.inputs, self.targets = calibration.inputs, calibration.targets
        self.outside, self.blocks = model, list(model.layers)

    def become(self, plan: Plan) -> None:
        """Makes the model as pruned so far the one after `plan`."""
        self.outside, self.blocks = self._sliced(plan)
        self.plan = plan

    def set(self, total: Removal) -> None:
        self.become(self._plan_with(total))

    def loss(self) -> float:
        """The mean loss per token of the model as it is."""
        return self._loss(self.outside, self._forward(self._embedded(self.outside), self.blocks))

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
        streams, reached = self._embedded(self.outside), 0
        found: dict[Key, float] = {}
        for trial in mine:
            outside, blocks = self._sliced(self._plan_with(trial.total))
            if self.prefix_cache and trial.layer != STREAM:
                streams, reached = self._forward(streams, self.blocks[reached:trial.layer]), trial.layer
                value = self._loss(outside, self._forward(streams, blocks[trial.layer:]))
            else:
                value = self._loss(outside, self._forward(self._embedded(outside), blocks))
            found[trial.key] = value if math.isfinite(value) else math.inf
            on_loss(trial.key, found[trial.key])
        return losses | self.workers.merged([trial.key for trial in pending], found)

    def layer_evaluations(self, trials: Sequence[Trial]) -> int:
        """How many blocks `losses` runs over the calibration tokens, one process and nothing known."""
        alive = [int(_runs(block)) for block in self.blocks]
        after = [sum(alive[layer + 1:]) for layer in range(len(alive))]
        of_layers = [trial for trial in trials if trial.layer != STREAM]
        count = sum(after[trial.layer] + (0 if trial.total.cut.block else 1) for trial in of_layers)
        before = [sum(alive[:trial.layer]) for trial in of_layers]
        return (count + (max(before, default=0) if self.prefix_cache else sum(before))
                + sum(alive) * (len(trials) - len(of_layers)))

    @property
    def blocks_left(self) -> int:
        return sum(map(_runs, self.blocks))

    def _embedded(self, outside: LanguageModel) -> Streams:
        return [(outside.embed(tokens), None) for tokens in self.inputs]

    def _forward(self, streams: Streams, blocks: Sequence[nn.Module]) -> Streams:
        for block in blocks:
            if _runs(block):
                streams = [block(hidden, residual, None) for hidden, residual in streams]
        return streams

    def _loss(self, outside: LanguageModel, streams: Streams) -> float:
        """Summed in Python floats: the order, hence the value, is fixed."""
        total, count = 0.0, 0
        for (hidden, residual), targets in zip(streams, self.targets, strict=True):
            logits = outside.head(hidden, residual)
            total += negative_log_likelihood(logits, targets).item() * targets.numel()
            count += targets.numel()
        return total / count

    def _plan_with(self, total: Removal) -> Plan:
        if total.layer == STREAM:
            return replace(self.plan, d_model=total.d_model)
        return replace(self.plan, layers={**self.plan.layers, total.layer: total.cut})

    def _sliced(self, plan: Plan) -> tuple[LanguageModel, list[nn.Module]]:
        """What surrounds the blocks, and the blocks, after `plan`; where it does as self.plan they are taken over."""
        model, statistics = self.model, self.statistics
        if plan.d_model != self.plan.d_model:
            return (compact_outside(model, plan, statistics),
                    [compact_block(block, model.config, index, plan, statistics)
                     for index, block in enumerate(model.layers)])
        return self.outside, [
            block if plan.layers.get(index) == self.plan.layers.get(index)
            else compact_block(model.layers[index], model.config, index, plan, statistics)
            for index, block in enumerate(self.blocks)]


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
