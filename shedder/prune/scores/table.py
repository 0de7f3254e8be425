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
from shedder.prune.units import ALL, AXES

FORMAT = "shedder.scores"
VERSION = 1


class ScoresError(ValueError):
    """Scores that cannot be read or do not fit a model; the message names the file, the layer and the axis."""


@dataclass(frozen=True)
class Scores:
    """What each unit is worth: the higher, the later it goes. The score of a set of units is the sum of theirs.

    layers[i][axis] has one fp64 value per unit of layer i: (), for "block" and "ssm"; (H,) for "head"; (D,) for
    "channel"; (G, N), in Mamba-1 (N,), for "state"; (H, P) for "head_channel". An axis that was not scored is missing.
    comparable: values of different layers, and of different axes, may be compared.
    provenance is free-form JSON: which model, tokens and method.
    """

    family: str
    layers: tuple[dict[str, Tensor], ...]
    comparable: bool
    provenance: dict[str, Any] = field(default_factory=dict)

    def of(self, layer: int, axis: str) -> list[float]:
        """Flattened values of one layer.

        Raises:
            ScoresError: the axis was not scored.
        """
        if axis not in self.layers[layer]:
            known = sorted({name for scores in self.layers for name in scores})
            raise ScoresError(f"axis {axis!r} has no scores in layer {layer}; these scores have {known}")
        return self.layers[layer][axis].flatten().tolist()

    def check(self, config: ModelConfig) -> None:
        """Raises ScoresError unless every score belongs to a unit of a model of this config."""
        if self.family != config.family or len(self.layers) != len(config.layers):
            raise ScoresError(f"scores are of a {self.family} model of {len(self.layers)} layers; "
                              f"this is a {config.family} model of {len(config.layers)}")
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
        for name, values in tensors.items():
            head, _, rest = name.partition(".")
            index, _, axis = rest.partition(".")
            if head != "layers" or not index.isdecimal() or int(index) >= count or axis not in AXES[family]:
                raise ScoresError(f"has the tensor {name!r}; accepted: layers.N.AXIS with N < {count} and an axis of "
                                  f"{AXES[family]}")
            if values.dtype != torch.float64 or not values.isfinite().all():
                raise ScoresError(f"{name} is {values.dtype}; accepted: finite float64")
            layers[int(index)][axis] = values
        if facts.get("digest") != _digest({name: facts[name] for name in facts if name != "digest"}, tensors):
            raise ScoresError("is not what was written: its digest differs")
        return cls(family, tuple(layers), facts["comparable"], provenance)


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
    return Scores(first.family, layers, len(methods) == 1 and first.comparable,
                  {axis: scores.provenance for axis, scores in parts.items()} if len(methods) > 1 else first.provenance)


def with_groups(config: ModelConfig, layers: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Scores of B/C groups too, where a method has none of its own: the sum over the heads or channels of a group."""
    found = []
    for layout, scores in zip(config.layers, layers, strict=True):
        units = scores.get("head", scores.get("channel"))
        groups = group_of(layout)
        if units is not None and max(groups, default=0) > 0 and "group" not in scores:
            sums = torch.zeros(max(groups) + 1, dtype=units.dtype, device=units.device)
            scores = {**scores, "group": sums.index_add(0, torch.tensor(groups, device=units.device), units)}
        found.append(scores)
    return found


def layer_adaptive(values: Sequence[float]) -> list[float]:
    """Each value over the sum of itself and all larger ones: its share of what is left when the smaller are gone."""
    shares, total = [0.0] * len(values), 0.0
    for unit in sorted(range(len(values)), key=lambda unit: (-values[unit], unit)):
        total += values[unit]
        shares[unit] = values[unit] / total if total > 0 else 0.0
    return shares
