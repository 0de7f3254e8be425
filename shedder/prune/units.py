"""What can be removed: for each axis, which units a layer has, which a cut has taken, and the cut that takes some.

Units are numbered within their layer as in scores, flattened: state n of group g is g * N + n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.prune.plan import LayerPlan

Rows = tuple[tuple[int, ...], ...]


class Axis(ABC):
    """One kind of unit."""

    name: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    takes_all: ClassVar[bool] = False                  # whether the last unit of a row may go

    @abstractmethod
    def rows(self, layout: LayerLayout) -> Rows:
        """The units of a layer of this layout, in rows that lose equal numbers; no rows where the axis is missing."""

    @abstractmethod
    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        """The units that the cut takes from a layer of this layout."""

    @abstractmethod
    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        """The cut of a layer of this layout that takes these units."""


class BlockAxis(Axis):
    name, families, takes_all = "block", ("mamba1", "mamba2"), True

    def rows(self, layout: LayerLayout) -> Rows:
        return () if isinstance(layout, RemovedBlock) else ((0,),)

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return {0} if cut.block else set()

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(block=bool(units))


class SSMAxis(Axis):
    name, families, takes_all = "ssm", ("mamba1", "mamba2"), True

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
        return set(cut.heads)

    def cut(self, layout: LayerLayout, units: Collection[int]) -> LayerPlan:
        return LayerPlan(heads=tuple(units))


class ChannelAxis(Axis):
    name, families = "channel", ("mamba1",)

    def rows(self, layout: LayerLayout) -> Rows:
        return (tuple(range(layout.d_inner)),) if isinstance(layout, (ScanLayout, RemovedSSM)) else ()

    def removed(self, layout: LayerLayout, cut: LayerPlan) -> set[int]:
        return set(cut.channels)

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


ALL: tuple[Axis, ...] = (BlockAxis(), SSMAxis(), HeadAxis(), ChannelAxis(), StateAxis())
AXES = {family: tuple(axis.name for axis in ALL if family in axis.families) for family in ("mamba1", "mamba2")}


def axes_named(family: str, names: Sequence[str] | None, per_group: bool = False) -> tuple[Axis, ...]:
    """The axes of a family, or those of them that are named, in the order above.

    Raises:
        ValueError: a name that the family does not have.
    """
    known = AXES[family]
    if names is not None and (isinstance(names, str) or not names or not set(names) <= set(known)):
        raise ValueError(f"axes is {names!r}; a {family} model accepts a list of {known}")
    found = [axis for axis in ALL if family in axis.families and (names is None or axis.name in names)]
    return tuple(HeadAxis(per_group=True) if per_group and axis.name == "head" else axis for axis in found)
