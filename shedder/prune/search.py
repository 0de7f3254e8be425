"""Greedy removal by calibration perplexity (Mamba-Shedder, Munoz et al., 2025), down to heads, channels and states."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shedder.evaluate import negative_log_likelihood, windows
from shedder.layout import RemovedBlock, RemovedSSM
from shedder.nn import LanguageModel
from shedder.nn.config import ModelConfig
from shedder.prune.importance import Importance, importance
from shedder.prune.plan import NORM_REPAIRS, LayerPlan, Plan, compacted_layout, write_atomically
from shedder.prune.size import parameter_count, state_bytes
from shedder.prune.slice import compact_block
from shedder.text import Tokenizer

AXES = {"mamba1": ("block", "ssm", "channel", "state"), "mamba2": ("block", "ssm", "head", "state")}
MEASURES: dict[str, Callable[[ModelConfig], int]] = {"params": parameter_count, "state": state_bytes}
RULES = ("rise_per_size", "perplexity")
LOG_VERSION = 1

Streams = list[tuple[Tensor, Tensor | None]]           # hidden and residual, one pair per calibration batch
Key = tuple[int, str]                                  # (layer, axis)


def search(model: LanguageModel, text: str | Tensor | Sequence[int], budget: Mapping[str, float],
           axes: Sequence[str] | None = None, *, rule: str = "rise_per_size", bundle: float = 0.125,
           rescore: int | None = None, sequences: int = 16, length: int = 512, batch: int = 8, seed: int = 0,
           norm_repair: str = "exact", tokenizer: Tokenizer | None = None, prefix_cache: bool = True,
           log: str | Path | None = None, progress: bool | Callable[[dict[str, Any]], None] = True) -> Plan:
    """A plan that meets the budget, found by removing one thing at a time.

    Each step scores every candidate (a block, an SSM, or the bundle of the least important heads, channels or
    states of one layer) by the calibration perplexity of the model without it, sliced by the slicer and repaired
    as it will ship, and removes the best one. A candidate in layer k runs the layers from k on: what comes before
    is computed once per step.

    Args:
        model: the model to prune; it is not changed.
        text: calibration text, or tokens (T,), or rows of tokens (S, L+1).
        budget: {"params": 0.7} stops when 70 % of the parameters are left, {"state": 0.5} at half of the bytes
            of decode state; with both, when both hold.
        axes: of "block", "ssm", "head" (Mamba-2), "channel" (Mamba-1), "state"; the default is all of the family.
        rule: "rise_per_size" removes what raises log-perplexity least per share of the budget's measure that
            it removes (shares of the measures not yet met are added), which makes axes comparable; what lowers
            perplexity goes first. "perplexity" is plain Mamba-Shedder: the lowest perplexity wins, whatever its size.
        bundle: heads, channels and states go in bundles of this share of a layer's number.
        rescore: None scores every candidate in every step. A number scores only so many of those that looked
            best when last scored, and those of the layer just cut: far faster, close to the same plan.
        sequences, length, batch, seed: how many windows of how many tokens are drawn (by the seed) from the text,
            and how many run at once.
        tokenizer: for text; the default is the model's own.
        prefix_cache: False runs every candidate from the first layer (for tests: the same plan, slower).
        log: a JSONL file, rewritten whole after each step; if it exists the search goes on from its last step.
        progress: True shows a bar; a function is called with the record of each step.

    Returns:
        The plan, numbered as in `model`. provenance["trajectory"] has one record per step, the untouched model
        first; `prefix(plan, n)` is the plan after n steps.
    Raises:
        ValueError: an argument is wrong, the log belongs to another search, or nothing is left to remove before
            the budget is met.
    """
    config = model.config
    axes = _checked_axes(config, axes)
    budget = _checked_budget(config, budget)
    _check_choice("rule", rule, RULES)
    _check_choice("norm_repair", norm_repair, NORM_REPAIRS)
    if not 0 < bundle <= 1:
        raise ValueError(f"bundle is {bundle!r}; accepted: a share in (0, 1]")
    for name, value in (("sequences", sequences), ("length", length), ("batch", batch), ("rescore", rescore or 1)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; accepted: an integer >= 1")
    rows = calibration_rows(model, text, sequences, length, seed, tokenizer)
    settings = {"budget": dict(budget), "axes": list(axes), "rule": rule, "bundle": bundle, "rescore": rescore,
                "norm_repair": norm_repair, "seed": seed, "rows": list(rows.shape), "batch": batch}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            greedy = _Greedy(model, rows, settings, prefix_cache)
            journal = _Journal(log, {"version": LOG_VERSION, "settings": settings, "tokens": _digest([rows]),
                                     "model": _fingerprint(model)})
            return _run(greedy, journal, progress)
    finally:
        model.train(was_training)


def prefix(plan: Plan, steps: int) -> Plan:
    """The plan after the first `steps` steps of the search that found it; every one of them is a valid plan."""
    trajectory = plan.provenance.get("trajectory")
    if not isinstance(trajectory, list):
        raise ValueError("plan has no provenance['trajectory']; accepted: plans that search returned")
    if not 0 <= steps < len(trajectory):
        raise ValueError(f"steps is {steps}; this search took 0..{len(trajectory) - 1} steps")
    cuts: dict[int, LayerPlan] = {}
    for record in trajectory[1:steps + 1]:
        _merge(cuts, record["layer"], LayerPlan.from_json(record["removed"]))
    return Plan(plan.family, cuts, plan.norm_repair, {**plan.provenance, "trajectory": trajectory[:steps + 1]})


def calibration_rows(model: LanguageModel, text: str | Tensor | Sequence[int], sequences: int, length: int,
                     seed: int, tokenizer: Tokenizer | None = None) -> Tensor:
    """(S, L+1) tokens on the model's device: windows of the text, drawn without replacement and left in order."""
    if isinstance(text, str):
        text = (tokenizer or model.tokenizer).encode(text)
    tokens = torch.as_tensor(text).long()
    if tokens.dim() not in (1, 2):
        raise ValueError(f"text has shape {tuple(tokens.shape)}; accepted: tokens (T,) or rows of tokens (S, L+1)")
    rows = windows(tokens, min(length, max(tokens.numel() - 1, 1))) if tokens.dim() == 1 else tokens
    if rows.shape[0] < 1 or rows.shape[1] < 2:
        raise ValueError(f"text has rows of shape {tuple(rows.shape)}; accepted: at least one row of 2 tokens")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"text has tokens in [{low}, {high}]; accepted: [0, {model.config.vocab_size - 1}]")
    if rows.shape[0] > sequences:
        order = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
        rows = rows[order[:sequences].sort().values.to(rows.device)]
    return rows.to(next(model.parameters()).device)


def _checked_axes(config: ModelConfig, axes: Sequence[str] | None) -> tuple[str, ...]:
    known = AXES[config.family]
    if axes is None:
        return known
    if isinstance(axes, str) or not axes or not set(axes) <= set(known):
        raise ValueError(f"axes is {axes!r}; a {config.family} model accepts a list of {known}")
    return tuple(axis for axis in known if axis in axes)


def _checked_budget(config: ModelConfig, budget: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(budget, Mapping) or not budget or not set(budget) <= set(MEASURES):
        raise ValueError(f"budget is {budget!r}; accepted: a dict with some of {sorted(MEASURES)}")
    for name, share in budget.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"budget[{name!r}] is {share!r}; accepted: a share of the model in (0, 1]")
    bare = config.vocab_size * config.d_model / max(parameter_count(config), 1)
    if budget.get("params", 1.0) < bare:
        raise ValueError(f"budget['params'] is {budget['params']}; accepted: more than {bare:.4f}, the share of the "
                         "embeddings alone")
    return {name: float(share) for name, share in budget.items()}


def _check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: one of {tuple(accepted)}")


@dataclass(frozen=True)
class _Candidate:
    layer: int
    axis: str
    increment: LayerPlan
    cut: LayerPlan                                     # of the layer, with the increment
    config: ModelConfig                                # of the model, with the increment
    gain: float                                        # shares of the unmet measures that it removes

    @property
    def key(self) -> Key:
        return self.layer, self.axis


class _Greedy:
    """The model as pruned so far, and the scoring of what could go next."""

    def __init__(self, model: LanguageModel, rows: Tensor, settings: dict[str, Any], prefix_cache: bool) -> None:
        self.model, self.settings, self.prefix_cache = model, settings, prefix_cache
        self.dense = {name: measure(model.config) for name, measure in MEASURES.items()}
        self.inputs = [part[:, :-1] for part in rows.split(settings["batch"])]
        self.targets = [part[:, 1:] for part in rows.split(settings["batch"])]
        self.importance: list[Importance | None] = []
        self.config = model.config
        self.cuts: dict[int, LayerPlan] = {}
        self.blocks: list[nn.Module] = list(model.layers)
        self.loss = math.nan                           # of the model as pruned so far
        self.rises: dict[Key, float] = {}              # of log-perplexity, when each candidate was last scored
        self.layer_evaluations = 0                     # one block over all calibration tokens
        self.on_score: Callable[[int, int], None] = lambda done, of: None

    def rank_units(self) -> None:
        if {"head", "channel", "state"} & set(self.settings["axes"]):
            self.importance = importance(self.model, self.inputs)

    def unmet(self) -> list[str]:
        return [name for name, share in self.settings["budget"].items()
                if MEASURES[name](self.config) > share * self.dense[name]]

    # ---- what can go

    def candidates(self) -> list[_Candidate]:
        found = [candidate for layer in range(len(self.blocks)) for candidate in self._of_layer(layer)]
        return [candidate for candidate in found if candidate.gain > 0]

    def _of_layer(self, layer: int) -> Iterator[_Candidate]:
        layout = self.model.config.layers[layer]
        cut = self.cuts.get(layer, LayerPlan())
        if isinstance(self.config.layers[layer], RemovedBlock):
            return
        has_ssm = not isinstance(self.config.layers[layer], RemovedSSM)
        for axis in self.settings["axes"]:
            increment = LayerPlan()
            if axis == "block":
                left = sum(not isinstance(other, RemovedBlock) for other in self.config.layers)
                increment = LayerPlan(block=left > 1)
            elif axis == "ssm":
                increment = LayerPlan(ssm=has_ssm)
            elif axis == "head":
                increment = LayerPlan(heads=self._bundle(self._ranks(layer).units, cut.heads))
            elif axis == "channel":
                increment = LayerPlan(channels=self._bundle(self._ranks(layer).units, cut.channels))
            elif has_ssm:
                increment = LayerPlan(states=self._state_bundle(layer, cut))
            if not increment.empty:
                merged = cut.merged(increment)
                config = self.config.with_layer(layer, compacted_layout(layout, merged, self.settings["norm_repair"]))
                yield _Candidate(layer, axis, increment, merged, config, self._gain(config))

    def _ranks(self, layer: int) -> Importance:
        ranks = self.importance[layer]
        assert ranks is not None
        return ranks

    def _bundle(self, values: Tensor, gone: Sequence[int]) -> tuple[int, ...]:
        """The least important units that are still there, ties by number; one unit always stays."""
        left = [unit for unit in range(len(values)) if unit not in set(gone)]
        count = min(max(1, round(self.settings["bundle"] * len(values))), len(left) - 1)
        return tuple(sorted(left, key=lambda unit: (float(values[unit]), unit))[:count])

    def _state_bundle(self, layer: int, cut: LayerPlan) -> tuple[tuple[int, ...], ...]:
        values = self._ranks(layer).states
        assert values is not None
        gone = cut.states or ((),) * len(values)
        if self.config.family == "mamba1":             # all groups lose the same states
            return (self._bundle(values.sum(0), gone[0]),) * len(values)
        return tuple(self._bundle(group, removed) for group, removed in zip(values, gone, strict=True))

    def _gain(self, config: ModelConfig) -> float:
        """Alignment padding is left out: a small cut that padding eats up still brings the next one nearer."""
        gain = 0.0
        for name in self.unmet():
            if name == "params":
                removed = parameter_count(self.config, padding=False) - parameter_count(config, padding=False)
            else:
                removed = MEASURES[name](self.config) - MEASURES[name](config)
            gain += removed / self.dense[name]
        return gain

    # ---- running

    def measure(self) -> None:
        """The loss of the model as it is."""
        self.loss = self._loss(self._forward(self._embedded(), self.blocks))

    def _embedded(self) -> Streams:
        return [(self.model.embed(tokens), None) for tokens in self.inputs]

    def _forward(self, streams: Streams, blocks: Sequence[nn.Module]) -> Streams:
        for block in blocks:
            if next(block.parameters(), None) is None:                        # a removed block
                continue
            streams = [block(hidden, residual, None) for hidden, residual in streams]
            self.layer_evaluations += 1
        return streams

    def _loss(self, streams: Streams) -> float:
        """Mean loss per token. Summed in Python floats: the order, hence the value, is fixed."""
        total, count = 0.0, 0
        for (hidden, residual), targets in zip(streams, self.targets, strict=True):
            logits = self.model.head(hidden, residual)
            total += negative_log_likelihood(logits, targets).item() * targets.numel()
            count += targets.numel()
        return total / count

    def _sliced(self, layer: int, cut: LayerPlan) -> nn.Module:
        return compact_block(self.model.layers[layer], self.model.config, layer, cut, self.settings["norm_repair"])

    def score(self, candidates: Sequence[_Candidate]) -> dict[Key, float]:
        """The loss of the model without each candidate, in one walk along the layers."""
        losses: dict[Key, float] = {}
        last = max(candidate.layer for candidate in candidates)
        streams = self._embedded()
        for layer in range(last + 1):
            for candidate in candidates:
                if candidate.layer == layer:
                    rest = [self._sliced(layer, candidate.cut), *self.blocks[layer + 1:]]
                    if self.prefix_cache:
                        losses[candidate.key] = self._loss(self._forward(streams, rest))
                    else:
                        losses[candidate.key] = self._loss(
                            self._forward(self._embedded(), [*self.blocks[:layer], *rest]))
                    self.on_score(len(losses), len(candidates))
            if self.prefix_cache and layer < last:
                streams = self._forward(streams, [self.blocks[layer]])
        return losses

    # ---- one step

    def step(self) -> dict[str, Any]:
        candidates = self.candidates()
        if not candidates:
            reached = {name: round(MEASURES[name](self.config) / self.dense[name], 4) for name in self.unmet()}
            raise ValueError(f"budget {self.settings['budget']} cannot be met with axes {self.settings['axes']}: "
                             f"nothing is left to remove at {reached}")
        scored = self._worth_scoring(candidates)
        losses = self.score(scored)
        for key, loss in losses.items():
            self.rises[key] = loss - self.loss
        chosen = min(scored, key=self._rank)
        self._remove(chosen, losses[chosen.key])
        return {"layer": chosen.layer, "axis": chosen.axis, "removed": chosen.increment.to_json(),
                **self.figures(), "candidates": len(candidates), "scored": len(scored)}

    def _worth_scoring(self, candidates: list[_Candidate]) -> list[_Candidate]:
        if self.settings["rescore"] is None:
            return candidates
        fresh = [candidate for candidate in candidates if candidate.key not in self.rises]
        known = sorted((c for c in candidates if c.key in self.rises), key=self._rank)
        return fresh + known[:self.settings["rescore"]]

    def _rank(self, candidate: _Candidate) -> tuple[bool, float, int, str]:
        """Smaller goes first; ties by layer and axis."""
        rise = self.rises[candidate.key]
        value = rise / candidate.gain if self.settings["rule"] == "rise_per_size" and rise > 0 else rise
        return rise > 0, value, candidate.layer, candidate.axis

    def _remove(self, chosen: _Candidate, loss: float) -> None:
        self.apply(chosen.layer, chosen.increment)
        self.loss = loss

    def apply(self, layer: int, increment: LayerPlan) -> None:
        _merge(self.cuts, layer, increment)
        self.blocks[layer] = self._sliced(layer, self.cuts[layer])
        self.config = self.config.with_layer(layer, compacted_layout(
            self.model.config.layers[layer], self.cuts[layer], self.settings["norm_repair"]))
        for axis in self.settings["axes"]:
            self.rises.pop((layer, axis), None)

    def figures(self) -> dict[str, Any]:
        return {"loss": self.loss, "perplexity": math.exp(self.loss),
                **{name: measure(self.config) for name, measure in MEASURES.items()}}


def _merge(cuts: dict[int, LayerPlan], layer: int, increment: LayerPlan) -> None:
    cuts[layer] = cuts.get(layer, LayerPlan()).merged(increment)


def _run(greedy: _Greedy, journal: _Journal, progress: bool | Callable[[dict[str, Any]], None]) -> Plan:
    if journal.records:
        _resume(greedy, journal)
    else:
        greedy.measure()
        journal.add({"step": 0, **greedy.figures(), "layer_evaluations": greedy.layer_evaluations}, greedy)
    bar = tqdm(total=100, desc="search", unit="%", disable=progress is not True,
               bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")
    with bar:
        if progress is True:
            greedy.on_score = lambda done, of: _show(bar, greedy, journal.records[-1], f"scored {done} of {of}")
        if greedy.unmet():
            greedy.rank_units()
        while greedy.unmet():
            record = {"step": len(journal.records), **greedy.step()}
            record["layer_evaluations"] = greedy.layer_evaluations
            journal.add(record, greedy)
            if callable(progress):
                progress(record)
        bar.n = 100
        bar.set_postfix_str(f"{len(journal.records) - 1} steps; perplexity {math.exp(greedy.loss):.3f}")
    settings = greedy.settings
    return Plan(greedy.model.config.family, greedy.cuts, settings["norm_repair"], {
        "method": "greedy removal by calibration perplexity", "settings": settings,
        "layer_evaluations": greedy.layer_evaluations, "trajectory": journal.trajectory()})


def _show(bar: tqdm[Any], greedy: _Greedy, record: dict[str, Any], doing: str) -> None:
    """How far the last step brought the measure that is furthest from its budget."""
    done = min((1 - record[name] / greedy.dense[name]) / (1 - share) if share < 1 else 1.0
               for name, share in greedy.settings["budget"].items())
    bar.n = round(100 * min(max(done, 0.0), 1.0))
    bar.set_postfix_str(f"step {record['step'] + 1}: {doing}; perplexity {record['perplexity']:.3f}")


def _resume(greedy: _Greedy, journal: _Journal) -> None:
    for record in journal.records[1:]:
        greedy.apply(record["layer"], LayerPlan.from_json(record["removed"]))
    last = journal.records[-1]
    greedy.loss = last["loss"]
    greedy.layer_evaluations = last["layer_evaluations"]
    greedy.rises = {(layer, axis): rise for layer, axis, rise in last["rises"]}


class _Journal:
    """The log of a search: a header line that says which search it is, then one line per step."""

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.header = json.loads(json.dumps(header))
        self.records: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            found, *self.records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path} is not the log of a search: {error}; move it away to start anew") from error
        for name, value in self.header.items():
            theirs = found.get(name) if isinstance(found, dict) else None
            if theirs != value:
                raise ValueError(f"{path} belongs to another search: its {name} is {theirs!r}, now {value!r}; "
                                 "move it away to start anew")

    def add(self, record: dict[str, Any], greedy: _Greedy) -> None:
        record = {**record, "rises": [[*key, rise] for key, rise in sorted(greedy.rises.items())]}
        self.records.append(record)
        if self.path is not None:
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in (self.header, *self.records)))

    def trajectory(self) -> list[dict[str, Any]]:
        """The records without what only a resumed search needs."""
        return json.loads(json.dumps([{name: value for name, value in record.items() if name != "rises"}
                                      for record in self.records]))


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprint(model: LanguageModel) -> str:
    """Of the config and the first 4096 numbers of each tensor: another model differs somewhere there."""
    config = hashlib.sha256(json.dumps(model.config.to_json(), sort_keys=True).encode()).hexdigest()[:16]
    return config + _digest([p.flatten()[:4096] for p in model.parameters()])
