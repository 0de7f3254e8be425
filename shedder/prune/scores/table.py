"""Scores of units: one tensor per axis and layer, saved so that another budget is solved without the model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shedder.nn.config import FAMILIES, ModelConfig
from shedder.prune.kept import group_of
from shedder.prune.plan import write_atomically
from shedder.prune.removal import STREAM
from shedder.prune.units import ALL, AXES

FORMAT = "shedder.scores"
VERSION = 1
SHARED = tuple(axis.name for axis in ALL if axis.shared)

# What a method finds: of each layer, and of STREAM for what all layers share, scores by axis.
Found = dict[int, dict[str, Tensor]]


class ScoresError(ValueError):
    """Scores that cannot be read or do not fit a model; the message names the file, the layer and the axis."""


@dataclass(frozen=True)
class Scores:
    """What each unit is worth: the higher, the later it goes. The score of a set of units is the sum of theirs.

    layers[i][axis] has one fp64 value per unit of layer i: (), for "block" and "ssm"; (H,) for "head"; (D,) for
    "channel"; (G, N), in Mamba-1 (N,), for "state"; (H, P) for "head_channel"; one per pair of groups, (0, 1), (0, 2)
    and so on, for "merge". shared has those of what no layer owns: (d_model,) for "d_model". An axis that was not
    scored is missing.
    comparable: values of different layers, and of different axes, may be compared.
    provenance is free-form JSON: which model, tokens and method.
    """

    family: str
    layers: tuple[dict[str, Tensor], ...]
    comparable: bool
    provenance: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def of(self, layer: int, axis: str) -> list[float]:
        """Flattened values of one layer, or with STREAM for a layer of what all share.

        Raises:
            ScoresError: the axis was not scored.
        """
        scores = self.shared if layer == STREAM else self.layers[layer]
        if axis not in scores:
            known = sorted({name for layer in (*self.layers, self.shared) for name in layer})
            where = "" if layer == STREAM else f" in layer {layer}"
            raise ScoresError(f"axis {axis!r} has no scores{where}; these scores have {known}")
        return scores[axis].flatten().tolist()

    def check(self, config: ModelConfig) -> None:
        """Raises ScoresError unless every score belongs to a unit of a model of this config."""
        if self.family != config.family or len(self.layers) != len(config.layers):
            raise ScoresError(f"scores are of a {self.family} model of {len(self.layers)} layers; "
                              f"this is a {config.family} model of {len(config.layers)}")
        for name, values in self.shared.items():
            if values.numel() != config.d_model:
                raise ScoresError(f"{name} has {values.numel()} scores; this model has d_model {config.d_model}")
        for index, (layout, scores) in enumerate(zip(config.layers, self.layers, strict=True)):
            units = {axis.name: sum(map(len, axis.rows(layout))) for axis in ALL if config.family in axis.families}
            for name, values in scores.items():
                if values.numel() != units.get(name, 0):
                    raise ScoresError(f"layers.{index}.{name} has {values.numel()} scores; this layer has "
                                      f"{units.get(name, 0)} units of that axis")

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, its facts as JSON in the metadata; written whole or not at all."""
        facts = {"format": FORMAT, "version": VERSION, "family": self.family, "layers": len(self.layers),
                 "comparable": self.comparable, "provenance": self.provenance}
        tensors = {f"layers.{index}.{axis}": values.contiguous() for index, scores in enumerate(self.layers)
                   for axis, values in scores.items()}
        tensors |= {f"shared.{axis}": values.contiguous() for axis, values in self.shared.items()}
        facts["digest"] = _digest(facts, tensors)
        write_atomically(Path(path), save(tensors, {"shedder": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Raises ScoresError unless the file holds scores of this version, all finite, just as they were written."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("shedder", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}    # noqa: SIM118  not a dict
        except (OSError, SafetensorError, ValueError) as error:
            raise ScoresError(f"{path}: cannot be read as scores: {error}") from error
        try:
            return cls._from_data(facts, tensors)
        except ScoresError as error:
            raise ScoresError(f"{path}: {error}") from error

    @classmethod
    def _from_data(cls, facts: Any, tensors: Mapping[str, Tensor]) -> Scores:
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ScoresError("is not a file of scores; accepted: what Scores.save wrote")
        if facts.get("version") != VERSION:
            raise ScoresError(f"version is {facts.get('version')!r}; accepted: {VERSION}")
        family, count, provenance = facts.get("family"), facts.get("layers"), facts.get("provenance")
        if (family not in FAMILIES or not isinstance(count, int) or not 0 <= count <= len(tensors) + 10_000
                or not isinstance(facts.get("comparable"), bool) or not isinstance(provenance, dict)):
            raise ScoresError(f"has the facts {facts}; accepted: family, layers, comparable and provenance")
        layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
        shared: dict[str, Tensor] = {}
        known = {f"shared.{axis}": (shared, axis) for axis in SHARED} | {
            f"layers.{index}.{axis}": (layers[index], axis) for index in range(count) for axis in AXES[family]}
        for name, values in tensors.items():
            if name not in known:
                raise ScoresError(f"has the tensor {name!r}; accepted: layers.N.AXIS with N < {count} and an axis of "
                                  f"{AXES[family]}, and shared.AXIS with an axis of {SHARED}")
            if values.dtype != torch.float64 or not values.isfinite().all():
                raise ScoresError(f"{name} is {values.dtype}; accepted: finite float64")
            scores, axis = known[name]
            scores[axis] = values
        if facts.get("digest") != _digest({name: facts[name] for name in facts if name != "digest"}, tensors):
            raise ScoresError("is not what was written: its digest differs")
        return cls(family, tuple(layers), facts["comparable"], provenance, shared)


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    as_read = json.loads(json.dumps(facts))             # keys are strings by then
    found = hashlib.sha256(json.dumps(as_read, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].cpu().numpy().tobytes())
    return found.hexdigest()


def combined(parts: Mapping[str, Scores]) -> Scores:
    """The scores of several methods as one: of each axis those that `parts` names. Comparable if all are one."""
    methods = list({id(scores): scores for scores in parts.values()}.values())
    first = methods[0]
    layers = tuple({axis: scores.layers[index][axis] for axis, scores in parts.items() if axis in scores.layers[index]}
                   for index in range(len(first.layers)))
    shared = {axis: scores.shared[axis] for axis, scores in parts.items() if axis in scores.shared}
    return Scores(first.family, layers, len(methods) == 1 and first.comparable,
                  {axis: scores.provenance for axis, scores in parts.items()} if len(methods) > 1
                  else first.provenance, shared)


def with_groups(config: ModelConfig, found: Found) -> Found:
    """Scores of B/C groups too, where a method has none of its own: the sum over the heads or channels of a group."""
    found = dict(found)
    for index, layout in enumerate(config.layers):
        scores = found[index]
        units = scores.get("head", scores.get("channel"))
        groups = group_of(layout)
        if units is not None and max(groups, default=0) > 0 and "group" not in scores:
            sums = torch.zeros(max(groups) + 1, dtype=units.dtype, device=units.device)
            found[index] = {**scores, "group": sums.index_add(0, torch.tensor(groups, device=units.device), units)}
    return found


def layer_adaptive(values: Sequence[float]) -> list[float]:
    """Each value over the sum of itself and all larger ones: its share of what is left when the smaller are gone."""
    shares, total = [0.0] * len(values), 0.0
    for unit in sorted(range(len(values)), key=lambda unit: (-values[unit], unit)):
        total += values[unit]
        shares[unit] = values[unit] / total if total > 0 else 0.0
    return shares
