"""Why a cut does not fit a layer: every reason, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.prune.kept import Kept
from shedder.prune.layer_plan import INSIDE_SSM, LISTS, NAMES, LayerPlan

# The cuts that a family does not have, and what to use instead ("" where there is nothing like it).
FOREIGN = {"mamba1": {"heads": "channels", "head_channels": "channels", "mlp": ""},
           "mamba2": {"channels": "heads", "ranks": ""}}


def problems(where: str, cut: LayerPlan, layout: LayerLayout, family: str) -> Iterator[str]:
    """All that is wrong with a cut for a layer of this layout, each with its place and what is accepted."""
    if isinstance(layout, RemovedBlock):
        yield f"{where} cuts a block that is already removed; accepted: no entry for this layer"
        return
    if cut.block:
        if cut != LayerPlan(block=True):
            yield (f"{where} removes the block and also {replace(cut, block=False)}; accepted: block alone, "
                   "it takes everything along")
        return
    own = "channels" if family == "mamba1" else "heads"
    sound = True
    for problem in (*_foreign(where, cut, family, own), *_without_ssm(where, cut, layout, own),
                    *_ranges(where, cut, layout, family), *_lists_per_unit(where, cut, layout),
                    *_counts(where, cut, layout)):
        sound = False
        yield problem
    if sound:
        yield from _leftovers(where, cut, layout, own)


def _foreign(where: str, cut: LayerPlan, family: str, own: str) -> Iterator[str]:
    for name, instead in FOREIGN[family].items():
        value = getattr(cut, name)
        if value:
            shown = json.dumps(value)
            yield f"{where}.{name} is {shown}; a {family} layer has {own}, use {own}" if instead else (
                f"{where}.{name} is {shown}; a {family} layer has none, accepted: no {name}")


def _without_ssm(where: str, cut: LayerPlan, layout: LayerLayout, own: str) -> Iterator[str]:
    if isinstance(layout, RemovedSSM):
        for name in ("ssm", "groups", *INSIDE_SSM):
            if getattr(cut, name):
                yield f"{where}.{name} cuts an SSM that is already removed; accepted: {own} or block"
    elif cut.ssm:
        for name in INSIDE_SSM:
            if getattr(cut, name):
                yield (f"{where} removes the ssm and also lists {name}; accepted: ssm without {name}, "
                       f"it takes all {name} along")


def _ranges(where: str, cut: LayerPlan, layout: LayerLayout, family: str) -> Iterator[str]:
    assert not isinstance(layout, RemovedBlock)
    units = layout.d_inner if isinstance(layout, ScanLayout) else layout.nheads
    counts = {"heads": units, "channels": units, "groups": getattr(layout, "ngroups", 0),
              "mlp": getattr(layout, "mlp_channels", 0)}
    for name in LISTS:
        if name not in FOREIGN[family] and not (name == "groups" and isinstance(layout, RemovedSSM)):
            yield from _range(f"{where}.{name}", NAMES[name][:-1], getattr(cut, name), counts[name],
                              None if name == "mlp" else "ssm or block")
    for number, groups in enumerate(cut.merge):
        if isinstance(layout, (ScanLayout, SSDLayout)):
            yield from _range(f"{where}.merge[{number}]", "group", groups, layout.ngroups, None)


def _range(field: str, unit: str, values: Sequence[int], count: int, instead: str | None) -> Iterator[str]:
    beyond = [value for value in values if value >= count]
    if beyond and not count:
        yield f"{field} lists {unit} {beyond[0]}; this layer has no {unit}s"
    elif beyond:
        yield f"{field} lists {unit} {beyond[0]}; this layer has {unit}s 0..{count - 1}"
    elif instead is not None and count and len(values) == count:
        yield (f"{field} lists all {count} {unit}s; accepted: at most {count - 1} of them, "
               f"use {instead} to remove them all")


def _lists_per_unit(where: str, cut: LayerPlan, layout: LayerLayout) -> Iterator[str]:
    if cut.states and isinstance(layout, (ScanLayout, SSDLayout)):
        yield from _equal_lists(f"{where}.states", "state", "B/C group", "group", cut.states, layout.ngroups,
                                layout.dstate, "ssm")
        if isinstance(layout, ScanLayout) and len(set(cut.states)) > 1:
            yield (f"{where}.states differs between groups; accepted for a mamba1 layer: the same states "
                   "in each group, because each column of A_log serves all channels")
    if cut.head_channels and isinstance(layout, (RemovedSSM, SSDLayout)):
        yield from _equal_lists(f"{where}.head_channels", "channel", "head", "head", cut.head_channels, layout.nheads,
                                layout.headdim, "ssm or block")


def _equal_lists(field: str, unit: str, outer: str, short: str, lists: Sequence[Sequence[int]], outers: int,
                 count: int, instead: str) -> Iterator[str]:
    if len(lists) != outers:
        yield f"{field} has {len(lists)} lists; this layer has {outers} {outer}s, accepted: one list per {short}"
        return
    lengths = [len(inner) for inner in lists]
    if len(set(lengths)) > 1:
        yield (f"{field} removes {lengths} {unit}s from {short}s 0..{outers - 1}; "
               f"accepted: the same number from each {short}")
    for index, inner in enumerate(lists):
        yield from _range(f"{field}[{index}]", unit, inner, count, instead)


def _counts(where: str, cut: LayerPlan, layout: LayerLayout) -> Iterator[str]:
    assert not isinstance(layout, RemovedBlock)
    if cut.taps >= layout.conv_width:
        yield (f"{where}.taps is {cut.taps}; the convolution of this layer has {layout.conv_width} taps, accepted: at "
               f"most {layout.conv_width - 1}")
    if isinstance(layout, ScanLayout) and cut.ranks >= layout.dt_rank:
        yield f"{where}.ranks is {cut.ranks}; dt of this layer has rank {layout.dt_rank}, accepted: at most " \
              f"{layout.dt_rank - 1}"


def _leftovers(where: str, cut: LayerPlan, layout: LayerLayout, own: str) -> Iterator[str]:
    kept = Kept.of(layout, cut)
    if not kept.units:
        yield (f"{where} removes all {own}, some by their groups; accepted: some {own[:-1]} stays, "
               "use ssm or block to remove them all")
