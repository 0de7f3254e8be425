"""What each head, channel, state, SSM and block is worth, by several methods with one interface.

A method takes a model and calibration tokens and returns one tensor of scores per axis: for each layer, and for the
residual stream that all share. A new one is a function and a line in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shedder.nn import LanguageModel
from shedder.prune.calibration import Calibration, calibration_rows, digest, fingerprint
from shedder.prune.removal import STREAM
from shedder.prune.scores.activation import activation
from shedder.prune.scores.contribution import contribution
from shedder.prune.scores.magnitude import magnitude
from shedder.prune.scores.perplexity import Sweep, perplexity_rise
from shedder.prune.scores.states import controllability_observability, delta_activity, h_infinity
from shedder.prune.scores.table import Found, Scores, ScoresError, combined, with_groups
from shedder.prune.scores.taylor import first_order, second_order
from shedder.prune.units import axes_named
from shedder.text import Tokenizer

__all__ = ["METHODS", "Scores", "ScoresError", "Sweep", "combined", "score"]


@dataclass(frozen=True)
class Method:
    """comparable: values of different layers (and axes) may be compared, as rises of the loss may."""

    run: Callable[[LanguageModel, Calibration], Found]
    comparable: bool


METHODS = {
    "magnitude": Method(magnitude, False),
    "activation": Method(activation, False),
    "contribution": Method(contribution, False),
    "taylor1": Method(first_order, True),
    "taylor2": Method(second_order, True),
    "ghost": Method(controllability_observability, False),
    "delta": Method(delta_activity, False),
    "hinf": Method(h_infinity, True),
    "perplexity": Method(perplexity_rise, True),
}


def score(model: LanguageModel, text: str | Tensor | Sequence[int], method: str, axes: Sequence[str] | None = None, *,
          sequences: int = 16, length: int = 512, batch: int = 8, seed: int = 0, levels: int = 8,
          norm_repair: str = "stats", repairs: Sequence[str] = (), tokenizer: Tokenizer | None = None,
          log: str | Path | None = None, progress: bool = True) -> Scores:
    """The scores of a model's units; `Scores.save` keeps them, and solve() makes plans of them.

    Args:
        model, text, sequences, length, batch, seed, tokenizer: as for search().
        method: one of METHODS, see the functions there.
        axes: which units; the default is all that the method knows.
        levels, norm_repair, repairs, log: of "perplexity", which runs each layer with more and more of its units
            removed, in so many levels, repaired so; killed, it goes on from the log.
    Raises:
        ValueError: an argument is wrong, or the method has no scores for an axis.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; accepted: one of {tuple(METHODS)}")
    rows = calibration_rows(model, text, sequences, length, seed, tokenizer)
    return score_rows(model, Sweep(rows, batch, seed, axes_named(model.config.family, axes), levels, norm_repair,
                                   tuple(repairs), log, progress), method, None if axes is None else tuple(axes))


def score_rows(model: LanguageModel, sweep: Sweep, method: str, axes: Sequence[str] | None) -> Scores:
    """The scores on tokens that are already drawn."""
    was_training = model.training
    model.eval()
    try:
        found = with_groups(model.config, METHODS[method].run(model, sweep))
    finally:
        model.train(was_training)
    known = {axis for scores in found.values() for axis in scores}
    there = {axis.name for axis in sweep.axes
             if axis.shared or any(axis.is_in(layout) for layout in model.config.layers)}
    missing = sorted(there.intersection(axes or ()) - known)
    if missing:
        raise ValueError(f"method {method!r} has no scores for {missing}; it has {sorted(known)}")
    kept = {index: {axis: values.detach().double().cpu() for axis, values in scores.items()
                    if axes is None or axis in axes} for index, scores in found.items()}
    if not all(values.isfinite().all() for scores in kept.values() for values in scores.values()):
        raise ValueError(f"method {method!r} gives scores that are not finite; the model's activations overflow")
    shared = kept.pop(STREAM, {})
    return Scores(model.config.family, tuple(kept[index] for index in sorted(kept)), METHODS[method].comparable, {
        "method": method, "model": fingerprint(model), "tokens": digest([sweep.rows]), "rows": list(sweep.rows.shape),
        "seed": sweep.seed}, shared)
