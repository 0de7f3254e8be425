"""What a cut leaves of a layer: the units that stay, and the layout that they make."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from shedder.layout import LayerLayout, NormSegment, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.prune.layer_plan import LayerPlan

ROW_MULTIPLE = 8                    # rows of a cut in_proj: 16 bytes of bf16, so that z, x, B, C stay aligned


@dataclass(frozen=True)
class Kept:
    """The units that stay in one layer, in the numbering before the cut.

    units are heads in Mamba-2, channels in Mamba-1. groups lists for each new B/C group the old ones
    that it is the mean of; groups that nobody reads any more are gone. states[g] and head_channels[h] belong
    to group g and head h of the layer before the cut.
    """

    units: tuple[int, ...] = ()
    head_channels: tuple[tuple[int, ...], ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    states: tuple[tuple[int, ...], ...] = ()
    mlp: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    ranks: int = 0

    @classmethod
    def of(cls, layout: LayerLayout, cut: LayerPlan) -> Kept:
        if cut.block or isinstance(layout, RemovedBlock):
            return cls()
        taps = tuple(range(cut.taps, layout.conv_width))
        count = layout.d_inner if isinstance(layout, ScanLayout) else layout.nheads
        reads = group_of(layout)
        units = tuple(unit for unit in rest(count, cut.heads or cut.channels)
                      if not reads or reads[unit] not in cut.groups)
        if isinstance(layout, ScanLayout):
            return cls(units, groups=_groups_read(reads, units, cut), states=_states(layout, cut), taps=taps,
                       ranks=layout.dt_rank - cut.ranks)
        removed = cut.head_channels or ((),) * layout.nheads
        head_channels = tuple(rest(layout.headdim, channels) for channels in removed)
        mlp = rest(layout.mlp_channels, cut.mlp)
        if isinstance(layout, RemovedSSM):
            return cls(units, head_channels, mlp=mlp, taps=taps)
        return cls(units, head_channels, _groups_read(reads, units, cut), _states(layout, cut), mlp, taps)

    def new_group(self, old: int) -> int:
        """The number that an old group which stays has after the cut."""
        return next(new for new, sources in enumerate(self.groups) if old in sources)


def group_of(layout: LayerLayout) -> tuple[int, ...]:
    """The B/C group that each head or channel reads; empty without an SSM."""
    if isinstance(layout, SSDLayout):
        return layout.head_to_group
    if isinstance(layout, ScanLayout):
        return layout.channel_to_group or (0,) * layout.d_inner
    return ()


def rest(count: int, removed: Collection[int]) -> tuple[int, ...]:
    gone = set(removed)
    return tuple(i for i in range(count) if i not in gone)


def _groups_read(reads: tuple[int, ...], units: tuple[int, ...], cut: LayerPlan) -> tuple[tuple[int, ...], ...]:
    set_of = {group: groups for groups in cut.merge for group in groups}
    return tuple(sorted({set_of.get(reads[unit], (reads[unit],)) for unit in units}))


def _states(layout: ScanLayout | SSDLayout, cut: LayerPlan) -> tuple[tuple[int, ...], ...]:
    return tuple(rest(layout.dstate, removed) for removed in cut.states or ((),) * layout.ngroups)


def compacted_layout(layout: LayerLayout, cut: LayerPlan, norm_repair: str) -> LayerLayout:
    """The layout of a layer after a cut that `Plan.validate` accepts."""
    if cut.block or isinstance(layout, RemovedBlock):
        return RemovedBlock()
    if cut.empty:
        return layout
    kept = Kept.of(layout, cut)
    width = len(kept.taps)
    if isinstance(layout, ScanLayout):
        if cut.ssm:                                    # no norm after it: out_proj takes D in
            return RemovedSSM(nheads=len(kept.units), headdim=1, conv_width=width, gain=False)
        reads = group_of(layout)
        return ScanLayout(d_inner=len(kept.units), dstate=len(kept.states[0]), dt_rank=kept.ranks, conv_width=width,
                          channel_to_group=None if len(kept.groups) == 1 else
                          tuple(kept.new_group(reads[unit]) for unit in kept.units))
    segments = tuple(segment for segment, _ in kept_segments(layout, kept, norm_repair))
    headdim = len(kept.head_channels[kept.units[0]])
    if isinstance(layout, RemovedSSM):
        return replace(layout, nheads=len(kept.units), headdim=headdim, norm_segments=segments, conv_width=width,
                       mlp_channels=len(kept.mlp))
    if cut.ssm:
        return RemovedSSM(len(kept.units), headdim, segments, width, len(kept.mlp), gain=bool(segments))
    compacted = SSDLayout(
        headdim=headdim, dstate=len(kept.states[kept.groups[0][0]]), ngroups=len(kept.groups),
        head_to_group=tuple(kept.new_group(layout.head_to_group[unit]) for unit in kept.units),
        norm_segments=segments, conv_width=width, mlp_channels=len(kept.mlp))
    return replace(compacted, row_padding=-compacted.in_proj_rows % ROW_MULTIPLE)


def kept_segments(layout: SSDLayout | RemovedSSM, kept: Kept,
                  norm_repair: str) -> list[tuple[NormSegment, tuple[int, ...]]]:
    """The norm segments that stay, each with its channels in the numbering before the cut.

    With K of d channels kept, the mean of squares grows by d/K over that of the masked layer; weights times
    sqrt(d/K) and eps times d/K undo it exactly. Other repairs leave eps, which is far below the mean of squares.
    """
    channels = [unit * layout.headdim + channel for unit in kept.units for channel in kept.head_channels[unit]]
    segments, start = [], 0
    for segment in layout.norm_segments:
        stay = tuple(channel for channel in channels if start <= channel < start + segment.channels)
        start += segment.channels
        if stay:
            ratio = segment.channels / len(stay) if norm_repair == "exact" else 1.0
            segments.append((NormSegment(len(stay), segment.eps * ratio), stay))
    return segments
