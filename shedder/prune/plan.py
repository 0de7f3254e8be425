"""A plan: what to remove from each layer, checked against the model it is for, and readable as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from shedder.layout import LayerLayout, NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import FAMILIES, ModelConfig
from shedder.prune.size import parameter_count, state_bytes

VERSION = 1
NORM_REPAIRS = ("exact", "none")
ROW_MULTIPLE = 8                    # rows of a cut in_proj: 16 bytes of bf16, so that z, x, B, C stay aligned


class PlanError(ValueError):
    """A plan that cannot be applied; the message names the layer, the field, the value and what is accepted."""


@dataclass(frozen=True)
class LayerPlan:
    """What is removed from one layer, in the numbering of the model that the plan applies to.

    states holds one tuple per B/C group, all of one length; heads belong to Mamba-2, channels to
    Mamba-1. Lists may come in any order and are kept sorted.
    """

    block: bool = False
    ssm: bool = False
    heads: tuple[int, ...] = ()
    states: tuple[tuple[int, ...], ...] = ()
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("block", "ssm"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name} is {getattr(self, name)!r}; accepted: true or false")
        for name in ("heads", "channels"):
            object.__setattr__(self, name, _indices(name, getattr(self, name)))
        if isinstance(self.states, str) or not isinstance(self.states, Sequence):
            raise PlanError(f"states is {self.states!r}; accepted: one list of state numbers per group")
        groups = tuple(_indices(f"states[{g}]", group) for g, group in enumerate(self.states))
        object.__setattr__(self, "states", groups if any(groups) else ())

    @property
    def empty(self) -> bool:
        return self == LayerPlan()

    def merged(self, other: LayerPlan) -> LayerPlan:
        """Both cuts together, both in one numbering; a removed block or SSM takes the cuts inside it along."""
        if self.block or other.block:
            return LayerPlan(block=True)
        ssm = self.ssm or other.ssm
        pairs = zip(self.states or ((),) * len(other.states), other.states or ((),) * len(self.states), strict=True)
        return LayerPlan(ssm=ssm, heads=tuple({*self.heads, *other.heads}),
                         states=() if ssm else tuple(tuple({*a, *b}) for a, b in pairs),
                         channels=tuple({*self.channels, *other.channels}))

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_json(cls, data: Any) -> LayerPlan:
        names = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise PlanError(f"is {data!r}; accepted: an object with some of {names}")
        unknown = sorted(set(data) - set(names))
        if unknown:
            raise PlanError(f"has unknown fields {unknown}; accepted: {names}")
        return cls(**data)


def _indices(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise PlanError(f"{name} is {values!r}; accepted: a list of integers")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise PlanError(f"{name} lists {value!r}; accepted: integers >= 0")
    ordered = sorted(values)
    for first, second in pairwise(ordered):
        if first == second:
            raise PlanError(f"{name} lists {first} more than once")
    return tuple(ordered)


@dataclass(frozen=True)
class Plan:
    """What to remove from a model, layer by layer.

    norm_repair says how a gated norm that loses channels is corrected: "exact" makes the compacted
    model equal to the dense one with those channels set to zero, "none" leaves weight and eps alone.
    provenance is free-form JSON: where the plan comes from.
    """

    family: str
    layers: dict[int, LayerPlan] = field(default_factory=dict)
    norm_repair: str = "exact"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise PlanError(f"family is {self.family!r}; accepted: one of {FAMILIES}")
        if self.norm_repair not in NORM_REPAIRS:
            raise PlanError(f"norm_repair is {self.norm_repair!r}; accepted: one of {NORM_REPAIRS}")
        for index, cut in self.layers.items():
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise PlanError(f"layers has the key {index!r}; accepted: layer numbers >= 0")
            if not isinstance(cut, LayerPlan):
                raise PlanError(f"layers.{index} is a {type(cut).__name__}; accepted: a LayerPlan")
        object.__setattr__(self, "layers", {i: cut for i, cut in sorted(self.layers.items()) if not cut.empty})

    # ---- checking against a model

    def validate(self, config: ModelConfig) -> None:
        """Raises PlanError unless every cut exists in a model of this config and leaves something of its kind."""
        if self.family != config.family:
            raise PlanError(f"family is {self.family!r}, the model is {config.family!r}")
        for index, cut in self.layers.items():
            if index >= len(config.layers):
                raise PlanError(f"layers.{index} does not exist; this model has layers 0..{len(config.layers) - 1}")
            _check_cut(f"layers.{index}", cut, config.layers[index], config.family)

    def compacted_config(self, config: ModelConfig) -> ModelConfig:
        """The config of the model after the plan."""
        self.validate(config)
        for index, cut in self.layers.items():
            config = config.with_layer(index, compacted_layout(config.layers[index], cut, self.norm_repair))
        return config

    def then(self, other: Plan, config: ModelConfig) -> Plan:
        """One plan for a model of `config` that does what self and then `other`, on the compacted model, do."""
        compacted = self.compacted_config(config)
        other.validate(compacted)
        if other.norm_repair != self.norm_repair:
            raise PlanError(f"norm_repair is {self.norm_repair!r} and then {other.norm_repair!r}; "
                            "accepted: the same in both plans")
        layers = dict(self.layers)
        for index, cut in other.layers.items():
            first = self.layers.get(index, LayerPlan())
            kept = Kept.of(config.layers[index], first)
            in_original = LayerPlan(
                block=cut.block, ssm=cut.ssm,
                heads=tuple(kept.heads[h] for h in cut.heads), channels=tuple(kept.channels[c] for c in cut.channels),
                states=_states_in_original(config.layers[index], kept, cut))
            layers[index] = first.merged(in_original)
        return replace(self, layers=layers, provenance={**self.provenance, **other.provenance})

    # ---- words

    def explain(self, config: ModelConfig) -> str:
        """For people: what goes and what stays in each layer, and the sizes before and after."""
        after = self.compacted_config(config)
        lines = [f"Plan for a {self.family} model of {len(config.layers)} layers, norm repair {self.norm_repair}"]
        for index, cut in self.layers.items():
            lines.append(f"layer {index:3d}: remove {_describe_cut(cut)}")
            lines.append(f"           {describe_layout(config.layers[index], self.family)}"
                         f" -> {describe_layout(after.layers[index], self.family)}")
        untouched = len(config.layers) - len(self.layers)
        if untouched:
            lines.append(f"{untouched} {'layer stays' if untouched == 1 else 'layers stay'} as they are")
        for name, measure in (("parameters", parameter_count), ("state bytes per sequence (fp32)", state_bytes)):
            old, new = measure(config), measure(after)
            lines.append(f"{name}: {old:,} -> {new:,} ({100 * new / old if old else 100:.1f} %)")
        return "\n".join(lines)

    # ---- JSON

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The plan as JSON text; with a path also written there, whole or not at all."""
        data = {"version": VERSION, "family": self.family, "norm_repair": self.norm_repair,
                "layers": {str(index): cut.to_json() for index, cut in self.layers.items()},
                "provenance": self.provenance}
        text = json.dumps(data, indent=1) + "\n"
        if path is not None:
            write_atomically(Path(path), text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Plan:
        """A plan from a path, from JSON text (a string that starts with a brace) or from the parsed object."""
        if isinstance(source, Mapping):
            return cls._from_data(source)
        if isinstance(source, str) and source.lstrip().startswith("{"):
            return cls._from_text(source)
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{source}: cannot be read as a plan: {error}") from error
        try:
            return cls._from_text(text)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from error

    @classmethod
    def _from_text(cls, text: str) -> Plan:
        try:
            data = json.loads(text, object_pairs_hook=_without_repeated_keys)
        except json.JSONDecodeError as error:
            raise PlanError(f"is not JSON: {error}") from error
        return cls._from_data(data)

    @classmethod
    def _from_data(cls, data: Any) -> Plan:
        names = {"version", "family", "layers", "norm_repair", "provenance"}
        if not isinstance(data, Mapping) or not {"version", "family", "layers"} <= set(data) <= names:
            found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"a plan has the fields {sorted(names)}, norm_repair and provenance optional; "
                            f"found {found}")
        if data["version"] != VERSION:
            raise PlanError(f"version is {data['version']!r}; accepted: {VERSION}")
        for name in ("layers", "provenance"):
            if not isinstance(data.get(name, {}), Mapping):
                raise PlanError(f"{name} is {data[name]!r}; accepted: an object")
        layers = {}
        for key, value in data["layers"].items():
            if not (isinstance(key, int) or (isinstance(key, str) and key.isascii() and key.isdigit())):
                raise PlanError(f"layers has the key {key!r}; accepted: layer numbers")
            if int(key) in layers:
                raise PlanError(f"layers lists layer {int(key)} more than once")
            try:
                layers[int(key)] = LayerPlan.from_json(value)
            except PlanError as error:
                separator = " " if str(error).startswith(("is ", "has ")) else "."
                raise PlanError(f"layers.{key}{separator}{error}") from error
        return cls(data["family"], layers, data.get("norm_repair", "exact"), dict(data.get("provenance", {})))


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise PlanError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears more than once")
    return values


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader, or a crash, sees the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)                     # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# ---- what a cut leaves

@dataclass(frozen=True)
class Kept:
    """The units that stay in one layer, in the numbering before the cut. Mamba-1 has channels, Mamba-2 heads.

    groups are the B/C groups that some head or channel still reads; states[g] belongs to group g
    of the layer before the cut.
    """

    heads: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    states: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, layout: LayerLayout, cut: LayerPlan) -> Kept:
        if cut.block or isinstance(layout, RemovedBlock):
            return cls()
        units = layout.d_inner if isinstance(layout, ScanLayout) else layout.nheads
        removed = cut.heads or cut.channels            # a removed SSM has one or the other, by family
        stay = _rest(units, removed)
        if isinstance(layout, ScanLayout):
            reads = layout.channel_to_group or (0,) * layout.d_inner
            groups = tuple(sorted({reads[c] for c in stay}))
            return cls(channels=stay, groups=groups, states=_kept_states(layout, cut))
        if isinstance(layout, RemovedSSM):
            return cls(heads=stay, channels=stay)
        groups = tuple(sorted({layout.head_to_group[h] for h in stay}))
        return cls(heads=stay, groups=groups, states=_kept_states(layout, cut))


def _rest(count: int, removed: Sequence[int]) -> tuple[int, ...]:
    gone = set(removed)
    return tuple(i for i in range(count) if i not in gone)


def _kept_states(layout: ScanLayout | SSDLayout, cut: LayerPlan) -> tuple[tuple[int, ...], ...]:
    return tuple(_rest(layout.dstate, removed) for removed in cut.states or ((),) * layout.ngroups)


def _states_in_original(layout: LayerLayout, kept: Kept, cut: LayerPlan) -> tuple[tuple[int, ...], ...]:
    """cut.states, numbered in the compacted layer, in the numbering of `layout`.

    Groups that are gone lose as many states as the others, whichever, so that counts stay equal.
    """
    if not cut.states or not isinstance(layout, (ScanLayout, SSDLayout)):
        return ()
    removed = [kept.states[g][:len(cut.states[0])] for g in range(layout.ngroups)]
    for new, group in enumerate(kept.groups):
        removed[group] = tuple(kept.states[group][n] for n in cut.states[new])
    if isinstance(layout, ScanLayout):                 # groups of a scan lose the same states
        removed = [removed[kept.groups[0]]] * layout.ngroups
    return tuple(removed)


def compacted_layout(layout: LayerLayout, cut: LayerPlan, norm_repair: str) -> LayerLayout:
    """The layout of a layer after a cut that `Plan.validate` accepts."""
    if cut.block or isinstance(layout, RemovedBlock):
        return RemovedBlock()
    if cut.empty:
        return layout
    kept = Kept.of(layout, cut)
    if isinstance(layout, ScanLayout):
        if cut.ssm:
            return RemovedSSM(nheads=len(kept.channels), headdim=1, conv_width=layout.conv_width)
        reads = layout.channel_to_group
        return replace(layout, d_inner=len(kept.channels), dstate=len(kept.states[0]), channel_to_group=None
                       if reads is None or len(kept.groups) == 1
                       else tuple(kept.groups.index(reads[c]) for c in kept.channels))
    segments = tuple(segment for segment, _ in repaired_segments(layout, kept, norm_repair))
    if isinstance(layout, RemovedSSM):
        return replace(layout, nheads=len(kept.heads), norm_segments=segments)
    if cut.ssm:
        return RemovedSSM(len(kept.heads), layout.headdim, segments, layout.conv_width)
    compacted = SSDLayout(
        headdim=layout.headdim, dstate=len(kept.states[0]), ngroups=len(kept.groups),
        head_to_group=tuple(kept.groups.index(layout.head_to_group[h]) for h in kept.heads),
        norm_segments=segments, conv_width=layout.conv_width)
    return replace(compacted, row_padding=-compacted.in_proj_rows % ROW_MULTIPLE)


def repaired_segments(layout: SSDLayout | RemovedSSM, kept: Kept, norm_repair: str) -> list[tuple[NormSegment, float]]:
    """The norm segments that stay, each with the factor of its weights.

    With K of d channels kept, the mean of squares grows by d/K over that of the masked layer; weights times
    sqrt(d/K) and eps times d/K undo it exactly.
    """
    stays = [head in set(kept.heads) for head in range(layout.nheads) for _ in range(layout.headdim)]
    segments, start = [], 0
    for segment in layout.norm_segments:
        channels = sum(stays[start:start + segment.channels])
        start += segment.channels
        if channels:
            ratio = segment.channels / channels if norm_repair == "exact" else 1.0
            segments.append((NormSegment(channels, segment.eps * ratio), ratio ** 0.5))
    return segments


def _check_cut(where: str, cut: LayerPlan, layout: LayerLayout, family: str) -> None:
    if isinstance(layout, RemovedBlock):
        raise PlanError(f"{where} cuts a block that is already removed; accepted: no entry for this layer")
    if cut.block and cut != LayerPlan(block=True):
        raise PlanError(f"{where} removes the block and also {_describe_cut(replace(cut, block=False))}; "
                        "accepted: block alone, it takes everything along")
    own, other = ("channels", "heads") if family == "mamba1" else ("heads", "channels")
    if getattr(cut, other):
        raise PlanError(f"{where}.{other} is {list(getattr(cut, other))}; a {family} layer has {own}, use {own}")
    units = layout.d_inner if family == "mamba1" else layout.nheads           # type: ignore[union-attr]
    _check_range(f"{where}.{own}", own[:-1], getattr(cut, own), units, "ssm or block")
    if isinstance(layout, RemovedSSM):
        for name in ("ssm", "states"):
            if getattr(cut, name):
                raise PlanError(f"{where}.{name} cuts an SSM that is already removed; accepted: {own} or block")
        return
    if cut.ssm and cut.states:
        raise PlanError(f"{where} removes the ssm and also lists states; accepted: ssm without states, "
                        "it takes all states along")
    if not cut.states:
        return
    if len(cut.states) != layout.ngroups:
        raise PlanError(f"{where}.states has {len(cut.states)} lists; this layer has {layout.ngroups} B/C groups, "
                        "accepted: one list per group")
    counts = [len(group) for group in cut.states]
    if len(set(counts)) > 1:
        raise PlanError(f"{where}.states removes {counts} states from groups 0..{layout.ngroups - 1}; "
                        "accepted: the same number from each group")
    for group, states in enumerate(cut.states):
        _check_range(f"{where}.states[{group}]", "state", states, layout.dstate, "ssm")
    if isinstance(layout, ScanLayout) and len(set(cut.states)) > 1:
        raise PlanError(f"{where}.states differs between groups; accepted for a {family} layer: the same states "
                        "in each group, because each column of A_log serves all channels")


def _check_range(field_name: str, unit: str, values: Sequence[int], count: int, instead: str) -> None:
    for value in values:
        if value >= count:
            raise PlanError(f"{field_name} lists {unit} {value}; this layer has {unit}s 0..{count - 1}")
    if len(values) == count:
        raise PlanError(f"{field_name} lists all {count} {unit}s; accepted: at most {count - 1} of them, "
                        f"use {instead} to remove them all")


def _runs(values: Sequence[int]) -> str:
    """1,2,3,7 as "1-3 7"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _describe_cut(cut: LayerPlan) -> str:
    parts = ["the block"] if cut.block else []
    parts += ["the SSM"] if cut.ssm else []
    for name in ("heads", "channels"):
        if getattr(cut, name):
            parts.append(f"{name} {_runs(getattr(cut, name))}")
    if cut.states:
        sets = [_runs(group) for group in cut.states]
        parts.append(f"states {sets[0]}" + (" of each group" if len(sets) > 1 else "") if len(set(sets)) == 1
                     else "states " + ", ".join(f"{s} of group {g}" for g, s in enumerate(sets)))
    return "; ".join(parts) if parts else "nothing"


def describe_layout(layout: LayerLayout, family: str) -> str:
    """One layer in a few words."""
    if isinstance(layout, RemovedBlock):
        return "no block"
    if isinstance(layout, ScanLayout):
        groups = f", {layout.ngroups} groups" if layout.ngroups > 1 else ""
        return f"{layout.d_inner} channels{groups}, {layout.dstate} states"
    units = f"{layout.d_inner} channels" if family == "mamba1" else f"{layout.nheads} heads of {layout.headdim}"
    if isinstance(layout, RemovedSSM):
        return f"{units}, no SSM"
    sizes = [layout.head_to_group.count(g) for g in range(layout.ngroups)]
    spread = f" ({', '.join(map(str, sizes))} heads each)" if len(set(sizes)) > 1 else ""
    groups = f", {layout.ngroups} groups{spread}" if layout.ngroups > 1 else ""
    return f"{units}{groups}, {layout.dstate} states"
