"""What one layer loses: the cuts of a plan, in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any


class PlanError(ValueError):
    """A plan that cannot be applied; the message names the layer, the field, the value and what is accepted."""


@dataclass(frozen=True)
class LayerPlan:
    """What is removed from one layer, in the numbering of the model that the plan applies to.

    Lists may come in any order and are kept sorted.
    """

    block: bool = False                                 # everything; the residual passes
    ssm: bool = False                                   # the state-space part; y = D x stays
    heads: tuple[int, ...] = ()                         # Mamba-2
    states: tuple[tuple[int, ...], ...] = ()            # one list per B/C group, all of one length
    channels: tuple[int, ...] = ()                      # Mamba-1
    groups: tuple[int, ...] = ()                        # B/C groups, with all heads or channels that read them
    merge: tuple[tuple[int, ...], ...] = ()             # sets of B/C groups that become one, their mean
    head_channels: tuple[tuple[int, ...], ...] = ()     # Mamba-2: one list per head, all of one length
    mlp: tuple[int, ...] = ()                           # Mamba-2 with d_ssm < d_inner: channels beside the SSM
    taps: int = 0                                       # how many of the oldest taps of the convolution
    ranks: int = 0                                      # Mamba-1: by how much the rank of dt falls

    def __post_init__(self) -> None:
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name} is {getattr(self, name)!r}; accepted: true or false")
        for name in COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise PlanError(f"{name} is {value!r}; accepted: an integer >= 0")
        for name in LISTS:
            object.__setattr__(self, name, indices(name, getattr(self, name)))
        for name, outer in LISTS_PER.items():
            lists = _nested(name, getattr(self, name), f"one list per {outer}")
            object.__setattr__(self, name, lists if any(lists) else ())
        object.__setattr__(self, "merge", tuple(sorted(_nested("merge", self.merge, "sets of groups"))))
        seen: set[int] = set()
        for number, groups in enumerate(self.merge):
            if len(groups) < 2:
                raise PlanError(f"merge[{number}] is {list(groups)}; accepted: at least two groups")
            if seen & set(groups):
                raise PlanError(f"merge lists group {min(seen & set(groups))} in more than one set")
            seen.update(groups)

    @property
    def empty(self) -> bool:
        return self == LayerPlan()

    def merged(self, other: LayerPlan) -> LayerPlan:
        """Both cuts together, both in one numbering; a removed block or SSM takes the cuts inside it along.

        Counts (taps, ranks) add up; sets of groups to merge that share a group become one.
        """
        if self.block or other.block:
            return LayerPlan(block=True)
        ssm = self.ssm or other.ssm
        together: dict[str, Any] = {name: tuple({*getattr(self, name), *getattr(other, name)}) for name in LISTS}
        for name in LISTS_PER:
            a, b = getattr(self, name), getattr(other, name)
            pairs = zip(a or ((),) * len(b), b or ((),) * len(a), strict=True)
            together[name] = tuple(tuple({*x, *y}) for x, y in pairs)
        for name in COUNTS:
            together[name] = getattr(self, name) + getattr(other, name)
        together["merge"] = joined([*self.merge, *other.merge])
        if ssm:
            together |= {name: getattr(LayerPlan(), name) for name in INSIDE_SSM}
        return LayerPlan(ssm=ssm, **together)

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

    def __str__(self) -> str:
        """The cut in words: "heads 0-1 4; taps the oldest 1"."""
        parts = ["the block"] if self.block else []
        parts += ["the SSM"] if self.ssm else []
        parts += [f"{NAMES[name]} {runs(getattr(self, name))}" for name in LISTS if getattr(self, name)]
        parts += [_per_unit(name, getattr(self, name)) for name in LISTS_PER if getattr(self, name)]
        if self.merge:
            parts.append("merge groups " + ", ".join(runs(groups) for groups in self.merge))
        if self.taps:
            parts.append("the oldest tap" if self.taps == 1 else f"the oldest {self.taps} taps")
        if self.ranks:
            parts.append(f"{self.ranks} of the rank of dt")
        return "; ".join(parts) if parts else "nothing"


FLAGS = ("block", "ssm")
LISTS = ("heads", "channels", "groups", "mlp")
LISTS_PER = {"states": "group", "head_channels": "head"}
COUNTS = ("taps", "ranks")
INSIDE_SSM = ("states", "merge", "ranks")               # what goes without saying when the SSM goes
NAMES = {"heads": "heads", "channels": "channels", "groups": "groups", "mlp": "MLP channels", "states": "states",
         "head_channels": "head channels"}


def indices(name: str, values: Any) -> tuple[int, ...]:
    """Sorted numbers >= 0, each once, or PlanError."""
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


def joined(sets: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """The sets, those that share a member as one."""
    found: list[set[int]] = []
    for one in map(set, sets):
        touched = [other for other in found if other & one]
        found = [*(other for other in found if other not in touched), one.union(*touched)]
    return tuple(sorted(tuple(sorted(one)) for one in found))


def _nested(name: str, values: Any, accepted: str) -> tuple[tuple[int, ...], ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise PlanError(f"{name} is {values!r}; accepted: {accepted}, each a list of integers")
    return tuple(indices(f"{name}[{i}]", inner) for i, inner in enumerate(values))


def runs(values: Sequence[int]) -> str:
    """1,2,3,7 as "1-3 7"."""
    found: list[list[int]] = []
    for value in values:
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _per_unit(name: str, lists: Sequence[Sequence[int]]) -> str:
    outer = LISTS_PER[name]
    texts = [runs(inner) for inner in lists]
    if len(set(texts)) == 1:
        return f"{NAMES[name]} {texts[0]}" + (f" of each {outer}" if len(texts) > 1 else "")
    return f"{NAMES[name]} " + ", ".join(f"{text} of {outer} {i}" for i, text in enumerate(texts))
