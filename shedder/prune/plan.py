"""A plan: what to remove from each layer, checked against the model it is for, and readable as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import FAMILIES, ModelConfig
from shedder.prune.kept import Kept, compacted_layout, rest
from shedder.prune.layer_plan import LISTS, LISTS_PER, LayerPlan, PlanError, indices, runs
from shedder.prune.legal import problems
from shedder.prune.size import parameter_count, state_bytes
from shedder.prune.words import describe_layout, difference, lists_differ, slow_shapes

__all__ = ["NORM_REPAIRS", "REPAIRS", "LayerPlan", "Plan", "PlanError", "compacted_layout", "write_atomically"]

VERSION = 1
NORM_REPAIRS = ("exact", "stats", "none")
REPAIRS = ("gain", "dt_bias", "x_proj", "out_proj")
ROUNDED = (*(name for name in LISTS if name != "groups"), *LISTS_PER, "d_model")        # what round_to knows


@dataclass(frozen=True)
class Plan:
    """What to remove from a model, layer by layer, and of the residual stream (d_model), for all layers.

    norm_repair says how a norm that loses channels is corrected: "exact" makes the compacted model equal to
    the dense one with those channels set to zero, "stats" leaves the surviving channels at the scale that they
    had in the dense model on calibration text, "none" leaves weight and eps alone. repairs lists further
    corrections, fitted on calibration text: see shedder.prune.repair. provenance is free-form JSON: where
    the plan comes from.
    """

    family: str
    layers: dict[int, LayerPlan] = field(default_factory=dict)
    norm_repair: str = "exact"
    provenance: dict[str, Any] = field(default_factory=dict)
    d_model: tuple[int, ...] = ()
    repairs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise PlanError(f"family is {self.family!r}; accepted: one of {FAMILIES}")
        if self.norm_repair not in NORM_REPAIRS:
            raise PlanError(f"norm_repair is {self.norm_repair!r}; accepted: one of {NORM_REPAIRS}")
        if isinstance(self.repairs, str) or not set(self.repairs) <= set(REPAIRS):
            raise PlanError(f"repairs is {self.repairs!r}; accepted: a list of {REPAIRS}")
        object.__setattr__(self, "repairs", tuple(name for name in REPAIRS if name in self.repairs))
        object.__setattr__(self, "d_model", indices("d_model", self.d_model))
        for index, cut in self.layers.items():
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise PlanError(f"layers has the key {index!r}; accepted: layer numbers >= 0")
            if not isinstance(cut, LayerPlan):
                raise PlanError(f"layers.{index} is a {type(cut).__name__}; accepted: a LayerPlan")
        object.__setattr__(self, "layers", {i: cut for i, cut in sorted(self.layers.items()) if not cut.empty})

    @property
    def needs_statistics(self) -> bool:
        """Whether applying the plan takes calibration text."""
        return self.norm_repair == "stats" or bool(self.repairs)

    # ---- checking against a model

    def problems(self, config: ModelConfig) -> list[str]:
        """Every reason why the plan does not fit a model of this config; none when it does."""
        if self.family != config.family:
            return [f"family is {self.family!r}, the model is {config.family!r}"]
        found = []
        if self.d_model and self.d_model[-1] >= config.d_model:
            found.append(f"d_model lists channel {self.d_model[-1]}; this model has channels 0..{config.d_model - 1}")
        elif len(self.d_model) == config.d_model:
            found.append(f"d_model lists all {config.d_model} channels; accepted: at most {config.d_model - 1} of them")
        for index, cut in self.layers.items():
            if index >= len(config.layers):
                found.append(f"layers.{index} does not exist; this model has layers 0..{len(config.layers) - 1}")
            else:
                found += problems(f"layers.{index}", cut, config.layers[index], config.family)
        return found

    def validate(self, config: ModelConfig) -> None:
        """Raises PlanError with all `problems`, one a line."""
        found = self.problems(config)
        if found:
            raise PlanError("\n".join(found))

    def compacted_config(self, config: ModelConfig) -> ModelConfig:
        """The config of the model after the plan."""
        self.validate(config)
        for index, cut in self.layers.items():
            config = config.with_layer(index, compacted_layout(config.layers[index], cut, self.norm_repair))
        return self.with_kept_d_model(config)

    def with_kept_d_model(self, config: ModelConfig) -> ModelConfig:
        """The config with the residual stream that stays.

        As in gated norms, exact repair scales weights and eps. The weights' factor is kept apart from them: it is one
        for all, and bf16 weights that are all alike, as before training, would all round it the same way.
        """
        kept = config.d_model - len(self.d_model)
        ratio = config.d_model / kept if self.norm_repair == "exact" else 1.0
        return replace(config, d_model=kept, norm_eps=config.norm_eps * ratio,
                       norm_scale=config.norm_scale * ratio ** 0.5)

    # ---- plans from plans

    def override(self, layers: Mapping[int, LayerPlan | None]) -> Plan:
        """The plan with other cuts for some layers; None leaves a layer whole."""
        return replace(self, layers={**self.layers, **{i: cut or LayerPlan() for i, cut in layers.items()}})

    def round_to(self, config: ModelConfig, multiples: Mapping[str, int],
                 importance: Callable[[int | None, str, int, int], float] | None = None) -> Plan:
        """A plan that removes less, so that what stays of each kind is a multiple (or everything).

        Args:
            multiples: of the fields of LayerPlan and "d_model", e.g. {"heads": 8, "states": 16}.
            importance: of (layer, field, group or head, unit); the most important units come back first. Layer is
                None for d_model. The default brings the lowest numbers back.
        """
        self.validate(config)
        check_multiples("multiples", multiples)

        def fewer(layer: int | None, name: str, outer: int, removed: Sequence[int], count: int) -> tuple[int, ...]:
            kept = count - len(removed)
            back = min(-kept % multiples.get(name, 1), len(removed))
            if importance is None:
                return tuple(removed[back:])
            return tuple(sorted(removed, key=lambda unit: (-importance(layer, name, outer, unit), unit))[back:])

        layers = {}
        for index, cut in self.layers.items():
            layout, changed = config.layers[index], dict[str, Any]()
            for name, count in _unit_counts(layout).items():
                value = getattr(cut, name)
                if name in LISTS_PER:
                    changed[name] = tuple(fewer(index, name, g, inner, count) for g, inner in enumerate(value))
                else:
                    changed[name] = fewer(index, name, 0, value, count)
            layers[index] = replace(cut, **changed)
        return replace(self, layers=layers, d_model=fewer(None, "d_model", 0, self.d_model, config.d_model))

    def then(self, other: Plan, config: ModelConfig) -> Plan:
        """One plan for a model of `config` that does what self and then `other`, on the compacted model, do.

        Raises:
            PlanError: a plan does not fit, or two cuts have no common plan: a mean of means of groups, or a low
                rank of dt fitted before channels go. compact one after the other then.
        """
        other.validate(self.compacted_config(config))
        for name in ("norm_repair", "repairs"):
            if getattr(other, name) != getattr(self, name):
                raise PlanError(f"{name} is {getattr(self, name)!r} and then {getattr(other, name)!r}; "
                                "accepted: the same in both plans")
        layers = dict(self.layers)
        for index, cut in other.layers.items():
            first = self.layers.get(index, LayerPlan())
            for names in (("merge", "merge"), ("ranks", "channels"), ("ranks", "groups")):
                if getattr(first, names[0]) and getattr(cut, names[1]):
                    raise PlanError(f"layers.{index}: {names[0]} and then {names[1]} are no single cut; accepted: "
                                    "apply the plans one after the other")
            layers[index] = first.merged(_in_original(config.layers[index], first, cut))
        stream = rest(config.d_model, self.d_model)
        return replace(self, layers=layers, provenance={**self.provenance, **other.provenance},
                       d_model=(*self.d_model, *(stream[j] for j in other.d_model)))

    # ---- words

    def explain(self, config: ModelConfig) -> str:
        """For people: what goes and what stays in each layer, the sizes before and after, and slow shapes."""
        after = self.compacted_config(config)
        lines = [f"Plan for a {self.family} model of {len(config.layers)} layers, norm repair {self.norm_repair}"
                 + (f", further repairs {', '.join(self.repairs)}" if self.repairs else "")]
        if self.d_model:
            lines.append(f"all layers: remove channels {runs(self.d_model)} of the residual stream: "
                         f"d_model {config.d_model} -> {after.d_model}")
        for index, cut in self.layers.items():
            lines.append(f"layer {index:3d}: remove {cut}")
            lines.append(f"           {describe_layout(config.layers[index], self.family)}"
                         f" -> {describe_layout(after.layers[index], self.family)}")
        untouched = len(config.layers) - len(self.layers)
        if untouched:
            lines.append(f"{untouched} {'layer stays' if untouched == 1 else 'layers stay'} as they are")
        for name, measure in (("parameters", parameter_count), ("state bytes per sequence (fp32)", state_bytes)):
            old, new = measure(config), measure(after)
            lines.append(f"{name}: {old:,} -> {new:,} ({100 * new / old if old else 100:.1f} %)")
        lines += [f"slow: {text}" for text in slow_shapes(after)]
        return "\n".join(lines)

    def diff(self, other: Plan) -> str:
        """What `other` does differently, a line each: + what it removes besides, - what it leaves; "" if nothing."""
        lines = [f"{name}: {getattr(self, name)} -> {getattr(other, name)}" for name in ("family", "norm_repair")
                 if getattr(self, name) != getattr(other, name)]
        if self.repairs != other.repairs:
            lines.append(f"repairs: {', '.join(self.repairs) or 'none'} -> {', '.join(other.repairs) or 'none'}")
        lines += lists_differ("d_model: {} channels", self.d_model, other.d_model)
        for index in sorted({*self.layers, *other.layers}):
            lines += difference(index, self.layers.get(index, LayerPlan()), other.layers.get(index, LayerPlan()))
        return "\n".join(lines)

    # ---- JSON

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The plan as JSON text; with a path also written there, whole or not at all."""
        data = {"version": VERSION, "family": self.family, "norm_repair": self.norm_repair,
                "repairs": self.repairs, "d_model": self.d_model,
                "layers": {str(index): cut.to_json() for index, cut in self.layers.items()},
                "provenance": self.provenance}
        text = _readable(data) + "\n"
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
        names = {"version", "family", "layers", "norm_repair", "repairs", "d_model", "provenance"}
        if not isinstance(data, Mapping) or not {"version", "family", "layers"} <= set(data) <= names:
            found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"a plan has the fields {sorted(names)}, all but version, family and layers optional; "
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
        return cls(data["family"], layers, data.get("norm_repair", "exact"), dict(data.get("provenance", {})),
                   data.get("d_model", ()), data.get("repairs", ()))


def check_multiples(argument: str, multiples: Mapping[str, int]) -> None:
    """Raises ValueError unless these are fields of a plan that can be rounded, each with a number."""
    for name, multiple in multiples.items():
        if name not in ROUNDED:
            raise ValueError(f"{argument} has the key {name!r}; accepted: some of {ROUNDED}")
        if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
            raise ValueError(f"{argument}[{name!r}] is {multiple!r}; accepted: an integer >= 1")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise PlanError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears more than once")
    return values


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replaces the file in one step: a reader, or a crash, sees the old content or the new one. Text becomes UTF-8."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)                     # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _readable(data: Mapping[str, Any]) -> str:
    """JSON with a line for each field of each layer: lists of numbers stay on one line."""
    def text(value: Any, indent: int) -> str:
        if not isinstance(value, Mapping) or not value:
            return json.dumps(value)
        inner = ",\n".join(f"{' ' * (indent + 1)}{json.dumps(key)}: {text(item, indent + 1)}"
                           for key, item in value.items())
        return f"{{\n{inner}\n{' ' * indent}}}"
    return text(data, 0)


# ---- numbers

def _unit_counts(layout: LayerLayout) -> dict[str, int]:
    """How many units of each field of LayerPlan that round_to knows a layer has."""
    if isinstance(layout, RemovedBlock):
        return {}
    if isinstance(layout, ScanLayout):
        return {"channels": layout.d_inner, "states": layout.dstate}
    counts = {"heads": layout.nheads, "channels": layout.nheads, "head_channels": layout.headdim,
              "mlp": layout.mlp_channels}
    return counts | ({"states": layout.dstate} if isinstance(layout, SSDLayout) else {})


def _in_original(layout: LayerLayout, first: LayerPlan, cut: LayerPlan) -> LayerPlan:
    """`cut`, numbered in the layer that `first` leaves, in the numbering of `layout`.

    Groups and heads that are gone lose as many states and channels as the others, whichever, so that counts
    stay equal.
    """
    kept = Kept.of(layout, first)
    units = tuple(kept.units[unit] for unit in cut.heads or cut.channels)
    own = "channels" if cut.channels else "heads"
    states: list[tuple[int, ...]] = []
    if cut.states and isinstance(layout, (ScanLayout, SSDLayout)):
        states = [kept.states[g][:len(cut.states[0])] for g in range(layout.ngroups)]
        for new, sources in enumerate(kept.groups):
            for group in sources:
                states[group] = tuple(kept.states[group][n] for n in cut.states[new])
        if isinstance(layout, ScanLayout):             # groups of a scan lose the same states
            states = [states[kept.groups[0][0]]] * layout.ngroups
    channels: list[tuple[int, ...]] = []
    if cut.head_channels and isinstance(layout, (RemovedSSM, SSDLayout)):
        channels = [stay[:len(cut.head_channels[0])] for stay in kept.head_channels]
        for new, head in enumerate(kept.units):
            channels[head] = tuple(kept.head_channels[head][p] for p in cut.head_channels[new])
    return LayerPlan(block=cut.block, ssm=cut.ssm, **{own: units}, states=tuple(states),      # type: ignore[arg-type]
                     head_channels=tuple(channels), mlp=tuple(kept.mlp[j] for j in cut.mlp),
                     groups=tuple(group for new in cut.groups for group in kept.groups[new]),
                     merge=tuple(tuple(kept.groups[new][0] for new in groups) for groups in cut.merge),
                     taps=cut.taps, ranks=cut.ranks)
