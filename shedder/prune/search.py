"""From a budget to a plan: greedy removal by calibration perplexity, or one shot by scores."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from shedder.layout import SSDLayout
from shedder.nn import LanguageModel
from shedder.nn.config import ModelConfig
from shedder.prune.budget import Budget
from shedder.prune.calibration import calibration_rows, digest, fingerprint
from shedder.prune.candidates import Bundle, Candidates, Pruned
from shedder.prune.cost import estimate
from shedder.prune.greedy import RULES, Greedy, perplexity_or_none
from shedder.prune.journal import Journal
from shedder.prune.plan import NORM_REPAIRS, Plan, check_multiples
from shedder.prune.removal import Removal, together
from shedder.prune.scores import METHODS, Scores, Sweep, combined, score_rows
from shedder.prune.solve import WHOLE, take_evenly, take_lowest
from shedder.prune.trials import Trials, evaluating
from shedder.prune.units import AXIS_OF_FIELD, DEFAULT_AXES, Axis, axes_named
from shedder.text import Tokenizer

SEARCHES = ("greedy", "one-shot")
DEFAULT_SCORE = {"greedy": "contribution", "one-shot": "taylor1"}

Score = str | Mapping[str, str] | Scores | os.PathLike[str]
Progress = bool | Callable[[dict[str, Any]], None]


def search(model: LanguageModel, text: str | Tensor | Sequence[int], budget: Mapping[str, float],
           axes: Sequence[str] | None = None, *, method: str = "greedy", rule: str = "rise_per_size",
           score: Score | None = None, bundle: Bundle | Mapping[str, Bundle] = 0.125, rescore: int | None = None,
           group_aware: bool = False, evenly: bool | None = None, round_to: Mapping[str, int] | None = None,
           sequences: int = 16, length: int = 512, batch: int = 8, seed: int = 0, norm_repair: str = "stats",
           repairs: Sequence[str] = (), tokenizer: Tokenizer | None = None, prefix_cache: bool = True,
           log: str | Path | None = None, solve_only: bool = False, progress: Progress = True) -> Plan:
    """A plan that meets the budget.

    "greedy" removes one thing at a time. Each step scores every candidate (a block, an SSM, or the bundle of the
    least important heads, channels or states of one layer, or of the channels of d_model) by the calibration perplexity
    of the model without it, sliced by the slicer and repaired as it will ship, and removes the best one. A candidate in
    layer k runs the layers from k on: what comes before is computed once per step.

    "one-shot" removes what has the lowest score, without looking again: as good as its scores are.

    Under torchrun (see shedder.prune.parallel) the processes share the candidates and come to the same plan.

    Args:
        model: the model to prune; it is not changed.
        text: calibration text, or tokens (T,), or rows of tokens (S, L+1).
        budget: {"params": 0.7} stops when 70 % of the parameters are left, {"state": 0.5} at half of the bytes of
            decode state, {"flops": 0.8} at 80 % of the flops of a prefill; with several, when all hold.
        axes: of "block", "ssm", "head" (Mamba-2), "channel" (Mamba-1), "state", which are the default, and "group",
            "merge" (of B/C groups, whose units are pairs), "head_channel" and "mlp" (Mamba-2), "rank" (of dt, Mamba-1),
            "tap" (of the convolution, the oldest first), "d_model" (channels of the residual stream, in all layers).
        method: "greedy" or "one-shot".
        rule: of greedy. "rise_per_size" removes what raises log-perplexity least per share of the budget's measure
            that it removes (shares of the measures not yet met are added), which makes axes comparable; what lowers
            perplexity goes first. "perplexity" is plain Mamba-Shedder: the lowest perplexity wins, whatever its size.
        score: what ranks units: a method of shedder.prune.scores (greedy: "contribution", one-shot: "taylor1"), one
            for each axis, {"head": "activation", "state": "ghost"}, or scores that were saved, or their file.
        bundle: heads, channels and states go in bundles of this share of a layer's number, or of this number if it
            is an integer; {"head": 1, "state": 0.25} by axis. A share of d_model is divided by the number of layers,
            since it takes from all of them. None (greedy only): each unit is a candidate.
        rescore: of greedy. None scores every candidate in every step. A number scores only so many of those that
            looked best when last scored, and those of the layer just cut: far faster, close to the same plan.
        group_aware: every B/C group loses as many heads, and every head the same channels, as kernels without a
            head_to_group need it.
        evenly: of one-shot. True takes as much from every layer, False what is worth least wherever it is; the
            default is False if the scores of different layers may be compared. Blocks and SSMs cannot go evenly.
        round_to: {"channels": 8, "d_model": 64}: what stays of these fields of a plan is a multiple wherever something
            went, as vector loads and tensor cores like it; bundles take so many units more.
        sequences, length, batch, seed: how many windows of how many tokens are drawn (by the seed) from the text,
            and how many run at once.
        norm_repair, repairs: of every candidate, and of the plan; see Plan. "stats" and all repairs are fitted on the
            calibration tokens, so compact() takes the text too.
        tokenizer: for text; the default is the model's own.
        prefix_cache: False runs every candidate from the first layer (for comparison: the same plan, slower).
        log: of greedy and of the score "perplexity": a JSONL file, appended to with every candidate and step; if it
            exists the search goes on from there. With a single measure in the budget, a log serves any share of it.
        solve_only: never runs the model: from saved scores, or from a log that reached the budget.
        progress: True says what the search will cost and shows a bar; a function is called with each step's record.

    Returns:
        The plan, numbered as in `model`. provenance["trajectory"] has one record per step, the untouched model
        first; `prefix(plan, n)` is the plan after n steps.
    Raises:
        ValueError: an argument is wrong, the log belongs to another search, or nothing is left to remove before
            the budget is met.
    """
    _check_choice("method", method, SEARCHES)
    _check_choice("rule", rule, RULES)
    _check_choice("norm_repair", norm_repair, NORM_REPAIRS)
    for name, value in (("sequences", sequences), ("length", length), ("batch", batch), ("rescore", rescore or 1)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; accepted: an integer >= 1")
    chosen = axes_named(model.config.family, axes, group_aware)
    if group_aware:
        _check_equal_groups(model.config, chosen)
    bundles = _bundles(bundle, chosen, method)
    candidates = Candidates(chosen, bundles, None, _multiples(round_to, bundles))
    goal = Budget(budget, model.config, keeps_d_model=not any(axis.shared for axis in chosen))
    rows = calibration_rows(model, text, sequences, length, seed, tokenizer)
    score = score if score is not None else DEFAULT_SCORE[method]
    sweep = Sweep(rows, batch, seed, chosen, norm_repair=norm_repair, repairs=tuple(repairs), progress=progress is True,
                  log=log if method == "one-shot" else None)
    settings = {"method": method, "budget": dict(budget), "axes": [axis.name for axis in chosen], "bundle": bundles,
                "score": _name(score), "group_aware": group_aware, "round_to": dict(round_to or {}),
                "norm_repair": norm_repair, "repairs": list(repairs), "seed": seed, "rows": list(rows.shape),
                "batch": batch}
    if method == "one-shot":
        candidates.scores = _scores(model, score, sweep, chosen, solve_only)
        return _one_shot(model, goal, candidates, evenly, sweep, settings, solve_only)
    settings |= {"rule": rule, "rescore": rescore}
    trials = Trials(model, sweep, norm_repair, repairs, prefix_cache=prefix_cache, workers=sweep.workers)
    greedy = Greedy(Pruned(model.config, norm_repair), goal, candidates, trials, rule, rescore)
    header_budget = list(goal.shares) if len(goal.shares) == 1 else dict(budget)
    journal = Journal(log, {"settings": {**settings, "budget": header_budget}, "tokens": digest([rows]),
                            "model": fingerprint(model)}, sweep.workers)
    try:
        with evaluating(model):
            greedy.start(journal)
            if not greedy.met and solve_only:
                raise ValueError(f"log {log} does not reach the budget {dict(budget)}, only "
                                 f"{goal.reached(greedy.pruned.config)}; search on without solve_only")
            if not greedy.met:
                ranked = [axis for axis in chosen
                          if not (axis.whole or axis.ordered) and bundles[axis.name] is not None]
                candidates.scores = _scores(model, score, sweep, ranked, False) if ranked else None
                _run(greedy, journal, progress)
        return Plan(model.config.family, greedy.pruned.cuts, norm_repair, {
            "method": "greedy removal by calibration perplexity", "settings": settings,
            "layer_evaluations": greedy.layer_evaluations, "trajectory": journal.steps},
            greedy.pruned.d_model, tuple(repairs))
    finally:
        journal.close()


def solve(model: LanguageModel | ModelConfig, scores: Scores | str | os.PathLike[str], budget: Mapping[str, float],
          axes: Sequence[str] | None = None, *, bundle: Bundle | Mapping[str, Bundle] = 0.125,
          group_aware: bool = False, evenly: bool | None = None, round_to: Mapping[str, int] | None = None,
          norm_repair: str = "stats", repairs: Sequence[str] = ()) -> Plan:
    """The plan of a one-shot search() from saved scores, without calibration text and without running the model.

    axes: the default is what is scored of search()'s.
    """
    config = model if isinstance(model, ModelConfig) else model.config
    _check_choice("norm_repair", norm_repair, NORM_REPAIRS)
    scores = scores if isinstance(scores, Scores) else Scores.load(scores)
    scores.check(config)
    scored = {axis for layer in (*scores.layers, scores.shared) for axis in layer}
    if axes is None:
        axes = [axis for axis in DEFAULT_AXES[config.family] if axis in scored] or sorted(scored)
    chosen = axes_named(config.family, axes, group_aware)
    if group_aware:
        _check_equal_groups(config, chosen)
    bundles = _bundles(bundle, chosen, "one-shot")
    candidates = Candidates(chosen, bundles, scores, _multiples(round_to, bundles))
    goal = Budget(budget, config, keeps_d_model=not any(axis.shared for axis in chosen))
    return _solved(config, goal, candidates, evenly, norm_repair, repairs, {
        "method": "one-shot", "budget": dict(budget), "axes": [axis.name for axis in chosen], "bundle": bundles,
        "group_aware": group_aware, "round_to": dict(round_to or {}), "norm_repair": norm_repair,
        "repairs": list(repairs)})


def prefix(plan: Plan, steps: int) -> Plan:
    """The plan after the first `steps` steps of the search that found it; every one of them is a valid plan."""
    trajectory = plan.provenance.get("trajectory")
    if not isinstance(trajectory, list):
        raise ValueError("plan has no provenance['trajectory']; accepted: plans that search returned")
    if not 0 <= steps < len(trajectory):
        raise ValueError(f"steps is {steps}; this search took 0..{len(trajectory) - 1} steps")
    cuts, d_model = together(Removal.from_json(record) for record in trajectory[1:steps + 1])
    return replace(plan, layers=cuts, d_model=d_model,
                   provenance={**plan.provenance, "trajectory": trajectory[:steps + 1]})


# ---- checking


def _check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: one of {tuple(accepted)}")


def _bundles(bundle: Bundle | Mapping[str, Bundle], axes: Sequence[Axis], method: str) -> dict[str, Bundle]:
    """The bundle of each axis; blocks and SSMs go whole."""
    names = [axis.name for axis in axes if not axis.whole]
    if isinstance(bundle, Mapping) and not set(bundle) == set(names):
        raise ValueError(f"bundle has the axes {sorted(bundle)}; accepted: one bundle for all, "
                         f"or one for each of {names}")
    bundles: dict[str, Bundle] = dict(bundle) if isinstance(bundle, Mapping) else dict.fromkeys(names, bundle)
    for one in [*bundles.values(), *([] if isinstance(bundle, Mapping) else [bundle])]:
        if one is None and method == "greedy":
            continue
        is_share = isinstance(one, float) and 0 < one <= 1
        if not is_share and (not isinstance(one, int) or isinstance(one, bool) or one < 1):
            raise ValueError(f"bundle is {one!r}; accepted: a share in (0, 1], a number of units >= 1"
                             + (", or None" if method == "greedy" else ""))
    return bundles


def _multiples(round_to: Mapping[str, int] | None, bundles: Mapping[str, Bundle]) -> dict[str, int]:
    """By axis; of those that are not searched nothing goes."""
    check_multiples("round_to", round_to or {})
    multiples = {AXIS_OF_FIELD[name]: multiple for name, multiple in (round_to or {}).items()}
    if single := [axis for axis in multiples if axis in bundles and bundles[axis] is None]:
        raise ValueError(f"bundle is None for {single}, which round_to has too; accepted: a share or a number of units")
    return multiples


def _check_equal_groups(config: ModelConfig, axes: Sequence[Axis]) -> None:
    if any(axis.name == "merge" for axis in axes):
        raise ValueError("axes has 'merge', which makes groups of unequal numbers of heads; accepted: group_aware "
                         "without it")
    for index, layout in enumerate(config.layers):
        if isinstance(layout, SSDLayout):
            sizes = [layout.head_to_group.count(group) for group in range(layout.ngroups)]
            if len(set(sizes)) > 1:
                raise ValueError(f"group_aware needs groups of equal numbers of heads; layer {index} has {sizes}")


def _name(score: Score) -> Any:
    """Which scores these are, as JSON."""
    if isinstance(score, Scores):
        return score.provenance
    return dict(score) if isinstance(score, Mapping) else str(score)


# ---- scores


def _scores(model: LanguageModel, score: Score, sweep: Sweep, axes: Sequence[Axis], solve_only: bool) -> Scores:
    """Scores of these axes: saved ones, or taken now."""
    names = [axis.name for axis in axes]
    if isinstance(score, (Scores, os.PathLike)):
        scores = score if isinstance(score, Scores) else Scores.load(score)
        scores.check(model.config)
        theirs = scores.provenance.get("model")
        if theirs is not None and theirs != fingerprint(model):
            raise ValueError("score holds the scores of another model; score this one")
        return scores
    if solve_only:
        raise ValueError(f"solve_only takes saved scores; score is {score!r}")
    methods = dict(score) if isinstance(score, Mapping) else dict.fromkeys(names, score)
    if missing := sorted(set(names) - set(methods)):
        raise ValueError(f"score names no method for {missing}; accepted: one for each of {names}")
    for method in methods.values():
        _check_choice("score", method, tuple(METHODS))
    parts: dict[str, Scores] = {}
    for method in dict.fromkeys(methods[name] for name in names):
        its = [name for name in names if methods[name] == method]
        own = replace(sweep, axes=tuple(axis for axis in axes if axis.name in its))
        parts |= dict.fromkeys(its, score_rows(model, own, method, its))
    return combined(parts)


# ---- one shot


def _one_shot(model: LanguageModel, goal: Budget, candidates: Candidates, evenly: bool | None, sweep: Sweep,
              settings: dict[str, Any], solve_only: bool) -> Plan:
    plan = _solved(model.config, goal, candidates, evenly, sweep.norm_repair, sweep.repairs, settings)
    if solve_only:
        return plan
    with evaluating(model):
        trials = Trials(model, sweep, sweep.norm_repair, sweep.repairs, workers=sweep.workers)
        trials.become(plan)
        loss = trials.loss()
    if not math.isfinite(loss):
        raise ValueError(f"the loss of the plan on the calibration text is {loss}; accepted: a finite one (a wider "
                         "dtype or another score may help)")
    return replace(plan, provenance={**plan.provenance, "loss": loss, "perplexity": perplexity_or_none(loss)})


def _solved(config: ModelConfig, goal: Budget, candidates: Candidates, evenly: bool | None, norm_repair: str,
            repairs: Sequence[str], settings: dict[str, Any]) -> Plan:
    scores = candidates.scores
    assert scores is not None
    whole = [axis.name for axis in candidates.axes if axis.name in WHOLE]
    if evenly is None:
        evenly = not scores.comparable and len(whole) < len(candidates.axes)
    if evenly and whole:
        raise ValueError(f"axes has {whole}, which cannot go evenly from all layers, and the values of these scores "
                         "are comparable only within a layer; accepted: other axes, or evenly=False")
    pruned = Pruned(config, norm_repair)
    records = take_evenly(pruned, goal, candidates) if evenly else take_lowest(pruned, goal, candidates, scores)
    return Plan(config.family, pruned.cuts, norm_repair, {
        "method": "one shot by scores", "settings": {**settings, "evenly": evenly}, "scores": scores.provenance,
        "trajectory": records}, pruned.d_model, tuple(repairs))


# ---- greedy


def _run(greedy: Greedy, journal: Journal, progress: Progress) -> None:
    shown = progress is True and greedy.trials.workers.is_first
    if shown:
        print(f"search: {estimate(greedy)}", file=sys.stderr)
    with tqdm(total=100, desc="search", unit="%", disable=not shown,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        if shown:
            greedy.on_trial = lambda done, of: _show(bar, greedy, journal, f"scored {done} of {of}")
        while not greedy.met:
            record = greedy.step(journal)
            if callable(progress):
                progress(record)
        bar.n = 100
        bar.set_postfix_str(f"{len(journal.steps) - 1} steps; loss {greedy.loss:.4f}")


def _show(bar: tqdm[Any], greedy: Greedy, journal: Journal, doing: str) -> None:
    bar.n = round(100 * greedy.budget.progress(greedy.pruned.config))
    bar.set_postfix_str(f"step {len(journal.steps)}: {doing}; loss {greedy.loss:.4f}")
