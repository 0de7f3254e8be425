"""Greedy removal by calibration perplexity (Mamba-Shedder, Munoz et al., 2025), down to heads, channels and states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from shedder.prune.budget import Budget, figures
from shedder.prune.candidates import Candidate, Candidates, Pruned
from shedder.prune.journal import Journal, Losses
from shedder.prune.removal import Removal
from shedder.prune.trials import Key, Trials

RULES = ("rise_per_size", "perplexity")


@dataclass
class Greedy:
    """One step scores what can go by the loss of the model without it, and removes the best."""

    pruned: Pruned
    budget: Budget
    candidates: Candidates
    trials: Trials
    rule: str
    rescore: int | None
    on_trial: Callable[[int, int], None] = lambda done, of: None

    def __post_init__(self) -> None:
        self.loss = math.nan                           # of the model as pruned so far
        self.rises: dict[Key, float] = {}              # of log-perplexity, when each candidate was last scored
        self.layer_evaluations = 0

    def start(self, journal: Journal) -> None:
        """From the untouched model, or from the last step of the journal that the budget needs."""
        if not journal.steps:
            self.loss = self.trials.loss()
            if not math.isfinite(self.loss):
                raise ValueError(f"the loss of the model on the calibration text is {self.loss}; accepted: a finite "
                                 "one (a wider dtype may help)")
            self.layer_evaluations = self.trials.blocks_left
            journal.add_step({"step": 0, **self._figures()})
            return
        self._note(journal.steps[0])
        taken = 1
        while taken < len(journal.steps) and not self.met:
            self._learn(journal.trials[taken - 1])
            record = journal.steps[taken]
            self._apply(Removal.from_json(record))
            self._note(record)
            taken += 1
        journal.keep(taken)
        self.trials.become(replace(self.trials.plan, layers=dict(self.pruned.cuts), d_model=self.pruned.d_model))

    @property
    def met(self) -> bool:
        return not self.budget.unmet(self.pruned.config)

    def step(self, journal: Journal) -> dict[str, Any]:
        """Raises ValueError when nothing is left to remove, or nothing that leaves the loss finite."""
        candidates = self.candidates.of_model(self.pruned, self.budget)
        if not candidates:
            raise out_of_candidates(self.budget, self.pruned, self.candidates)
        scored = self._worth_scoring(candidates)
        losses = self._losses(scored, journal)
        if not any(map(math.isfinite, losses.values())):
            losses |= self._losses([candidate for candidate in candidates if candidate.key not in losses], journal)
            scored = candidates
        chosen = min(scored, key=self._rank)
        if not math.isfinite(losses[chosen.key]):
            raise ValueError(f"each of the {len(candidates)} things left to remove makes the loss infinite; accepted: "
                             f"a budget of {self.budget.reached(self.pruned.config)} or more, or a wider dtype")
        self.trials.set(self._apply(chosen.removal))
        self.loss = losses[chosen.key]
        record = {"step": len(journal.steps), "axis": chosen.axis, **chosen.removal.to_json(), **self._figures(),
                  "candidates": len(candidates), "scored": len(scored)}
        journal.add_step(record)
        return record

    def _losses(self, scored: list[Candidate], journal: Journal) -> Losses:
        """Without each of them; the journal and the rises know them from now on."""
        trials = [candidate.trial for candidate in scored]
        known = dict(journal.trials[-1])
        done = len(known)

        def note(key: Key, loss: float) -> None:
            nonlocal done
            done += self.trials.workers.count
            journal.add_trial(key, loss)
            self.on_trial(min(done, len(trials)), len(trials))

        self.layer_evaluations += self.trials.layer_evaluations(trials)
        losses = self.trials.losses(trials, known, note)
        for key, loss in losses.items():
            journal.add_trial(key, loss)
        self._learn(losses)
        return losses

    def _learn(self, losses: Losses) -> None:
        for key, loss in losses.items():
            self.rises[key] = loss - self.loss

    def _apply(self, removal: Removal) -> Removal:
        self.rises = {key: rise for key, rise in self.rises.items() if key[0] != removal.layer}
        return self.pruned.apply(removal)

    def _note(self, record: dict[str, Any]) -> None:
        self.loss, self.layer_evaluations = record["loss"], record["layer_evaluations"]

    def _worth_scoring(self, candidates: list[Candidate]) -> list[Candidate]:
        if self.rescore is None:
            return candidates
        fresh = [candidate for candidate in candidates if candidate.key not in self.rises]
        known = sorted((c for c in candidates if c.key in self.rises), key=self._rank)
        return fresh + known[:self.rescore]

    def _rank(self, candidate: Candidate) -> tuple[bool, float, Key]:
        """Smaller goes first; ties by layer, axis and unit."""
        rise = self.rises[candidate.key]
        value = rise / candidate.gain if self.rule == "rise_per_size" and rise > 0 else rise
        return rise > 0, value, candidate.key

    def _figures(self) -> dict[str, Any]:
        return {"loss": self.loss, "perplexity": perplexity_or_none(self.loss), **figures(self.pruned.config),
                "layer_evaluations": self.layer_evaluations}


def perplexity_or_none(loss: float) -> float | None:
    """None, JSON's null, where it is beyond a float."""
    return math.exp(loss) if loss < 700 else None


def out_of_candidates(budget: Budget, pruned: Pruned, candidates: Candidates) -> ValueError:
    left = {name: round(share, 4) for name, share in budget.reached(pruned.config).items()}
    return ValueError(f"budget {budget.shares} cannot be met with axes {[axis.name for axis in candidates.axes]}: "
                      f"nothing is left to remove at {left}")
