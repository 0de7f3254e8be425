"""What can be removed: for each axis, which units a layer has, which a cut has taken, and the cut that takes some.

Units are numbered within their layer as in scores, flattened: state n of group g is g * N + n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import FAMILIES
from shedder.prune.kept import Kept, group_of
from shedder.prune.layer_plan import LayerPlan, joined

Rows = tuple[tuple[int, ...], ...]


class Axis(ABC):
    """One kind of unit."""

    name: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    whole: ClassVar[bool] = False                      # one unit, which goes whole
    ordered: ClassVar[bool] = False                    # units go in their order, whatever their scores
    shared: ClassVar[bool] = False                     # no layer has units of its own: all share them
    alike: bool = False                                # every row loses the units at the same places
    keeps: ClassVar[int] = 1                           # units of a row that always stay

    @abstractmethod
    def rows(self, layout: LayerLayout) -> Rows:
        """The units of a layer of this layout, in rows that lose equal numbers; no rows where the axis is missing."""

    @abstractmethod
    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        """The units that the cut takes from a layer of this layout."""

    @abstractmethod
    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        """The cut of a layer of this layout that takes these units."""

    def is_in(self, layout: LayerLayout) -> bool:
        """Whether a layer of this layout has units that may go."""
        return any(self.whole or len(row) > self.keeps for row in self.rows(layout))


class BlockAxis(Axis):
    name, families, whole = "block", ("mamba1", "mamba2"), True

    def rows(self, layout: LayerLayout) -> Rows:
        return () if isinstance(layout, RemovedBlock) else ((0,),)

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return {0} if cut.block else set()

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(block=bool(units))


class SSMAxis(Axis):
    name, families, whole = "ssm", ("mamba1", "mamba2"), True

    def rows(self, layout: LayerLayout) -> Rows:
        return ((0,),) if isinstance(layout, (ScanLayout, SSDLayout)) else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return {0} if cut.ssm or cut.block else set()

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(ssm=bool(units))


@dataclass(frozen=True)
class HeadAxis(Axis):
    """per_group: every B/C group loses as many heads, as kernels without a head_to_group need it."""

    per_group: bool = False
    name, families = "head", ("mamba2",)

    def rows(self, layout: LayerLayout) -> Rows:
        if isinstance(layout, SSDLayout) and self.per_group:
            return tuple(tuple(head for head, group in enumerate(layout.head_to_group) if group == g)
                         for g in range(layout.ngroups))
        return (tuple(range(layout.nheads)),) if isinstance(layout, (SSDLayout, RemovedSSM)) else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return {*cut.heads, *_in_groups(layout, cut)}

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(heads=tuple(units))


class ChannelAxis(Axis):
    name, families = "channel", ("mamba1",)

    def rows(self, layout: LayerLayout) -> Rows:
        return (tuple(range(layout.d_inner)),) if isinstance(layout, (ScanLayout, RemovedSSM)) else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return {*cut.channels, *_in_groups(layout, cut)}

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(channels=tuple(units))


class StateAxis(Axis):
    """Each group has its own states; in Mamba-1 they are shared by all, because A_log is."""

    name, families = "state", ("mamba1", "mamba2")

    def rows(self, layout: LayerLayout) -> Rows:
        if isinstance(layout, ScanLayout):
            return (tuple(range(layout.dstate)),)
        if isinstance(layout, SSDLayout):
            return tuple(tuple(range(g * layout.dstate, (g + 1) * layout.dstate)) for g in range(layout.ngroups))
        return ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        if not cut.states or not isinstance(layout, (ScanLayout, SSDLayout)):
            return set()
        groups = cut.states[:1] if isinstance(layout, ScanLayout) else cut.states
        return {g * layout.dstate + state for g, states in enumerate(groups) for state in states}

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        assert isinstance(layout, (ScanLayout, SSDLayout))
        if isinstance(layout, ScanLayout):
            return LayerPlan(states=(tuple(units),) * layout.ngroups)
        return LayerPlan(states=tuple(tuple(unit - g * layout.dstate for unit in units if unit // layout.dstate == g)
                                      for g in range(layout.ngroups)))


class GroupAxis(Axis):
    """A B/C group with all heads or channels that read it."""

    name, families = "group", ("mamba1", "mamba2")

    def rows(self, layout: LayerLayout) -> Rows:
        groups = range(getattr(layout, "ngroups", 1))
        return (tuple(groups),) if len(groups) > 1 else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        left = set(Kept.of(layout, cut).units)
        return set(range(getattr(layout, "ngroups", 1))) - {group for unit, group in enumerate(group_of(layout))
                                                             if unit in left}

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(groups=tuple(units))


class MergeAxis(Axis):
    """Pairs of B/C groups that become one; groups that are merged with the same one are merged with each other."""

    name, families, keeps = "merge", ("mamba1", "mamba2"), 0

    def rows(self, layout: LayerLayout) -> Rows:
        count = len(group_pairs(layout))
        return (tuple(range(count)),) if count else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        """Pairs that are one by now, or of which one is gone."""
        new = {old: number for number, sources in enumerate(Kept.of(layout, cut).groups) for old in sources}
        return {pair for pair, (a, b) in enumerate(group_pairs(layout))
                if a not in new or b not in new or new[a] == new[b]}

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        pairs = group_pairs(layout)
        return LayerPlan(merge=joined(pairs[unit] for unit in units))


def group_pairs(layout: LayerLayout) -> list[tuple[int, int]]:
    return list(combinations(range(getattr(layout, "ngroups", 0)), 2))


@dataclass(frozen=True)
class HeadChannelAxis(Axis):
    """Channel p of head h is h * P + p; every head loses as many, alike: the same."""

    alike: bool = False
    name, families = "head_channel", ("mamba2",)

    def rows(self, layout: LayerLayout) -> Rows:
        if not isinstance(layout, (SSDLayout, RemovedSSM)):
            return ()
        return tuple(tuple(range(head * layout.headdim, (head + 1) * layout.headdim)) for head in range(layout.nheads))

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return {row[channel] for row, channels in zip(self.rows(layout), cut.head_channels, strict=False)
                for channel in channels}

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        taken = set(units)
        return LayerPlan(head_channels=tuple(tuple(place for place, unit in enumerate(row) if unit in taken)
                                             for row in self.rows(layout)))


class MLPAxis(Axis):
    """Channels beside the SSM, where d_ssm < d_inner."""

    name, families, keeps = "mlp", ("mamba2",), 0

    def rows(self, layout: LayerLayout) -> Rows:
        channels = getattr(layout, "mlp_channels", 0)
        return (tuple(range(channels)),) if channels else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return set(cut.mlp)

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(mlp=tuple(units))


class RankAxis(Axis):
    """The rank of dt in Mamba-1; unit i is the i-th smallest singular direction."""

    name, families, ordered = "rank", ("mamba1",), True

    def rows(self, layout: LayerLayout) -> Rows:
        return (tuple(range(layout.dt_rank)),) if isinstance(layout, ScanLayout) else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return set(range(cut.ranks))

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(ranks=len(units))


class TapAxis(Axis):
    """Taps of the convolution, the oldest first."""

    name, families, ordered = "tap", ("mamba1", "mamba2"), True

    def rows(self, layout: LayerLayout) -> Rows:
        return () if isinstance(layout, RemovedBlock) else (tuple(range(layout.conv_width)),)

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return set(range(cut.taps))

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(taps=len(units))


class StreamAxis(Axis):
    """Channels of the residual stream: of the embedding, of every norm before a block, in_proj and out_proj."""

    name, families, shared = "d_model", ("mamba1", "mamba2"), True

    def rows(self, layout: LayerLayout) -> Rows:
        return ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return set()

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan()


def _in_groups(layout: LayerLayout, cut: LayerPlan) -> set[int]:
    """The heads or channels that go with their groups."""
    return {unit for unit, group in enumerate(group_of(layout)) if group in cut.groups}


ALL: tuple[Axis, ...] = (BlockAxis(), SSMAxis(), HeadAxis(), ChannelAxis(), StateAxis(), GroupAxis(), MergeAxis(),
                         HeadChannelAxis(), MLPAxis(), RankAxis(), TapAxis(), StreamAxis())
# Of the fields of a plan that can be rounded to multiples.
AXIS_OF_FIELD = {"heads": "head", "channels": "channel", "mlp": "mlp", "states": "state",
                 "head_channels": "head_channel", "d_model": "d_model"}
AXES = {family: tuple(axis.name for axis in ALL if family in axis.families) for family in FAMILIES}
DEFAULT_AXES = {"mamba1": ("block", "ssm", "channel", "state"), "mamba2": ("block", "ssm", "head", "state")}


def axes_named(family: str, names: Sequence[str] | None, group_aware: bool = False) -> tuple[Axis, ...]:
    """The axes of a family that are named, in the order above; None: the default ones.

    Raises:
        ValueError: a name that the family does not have.
    """
    known = AXES[family]
    names = DEFAULT_AXES[family] if names is None else names
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise ValueError(f"axes is {names!r}; a {family} model accepts a list of {known}")
    chosen = {axis.name: axis for axis in ALL if family in axis.families and axis.name in names}
    if group_aware:
        chosen |= {axis.name: axis for axis in (HeadAxis(per_group=True), HeadChannelAxis(alike=True))
                   if axis.name in chosen}
    return tuple(chosen.values())
