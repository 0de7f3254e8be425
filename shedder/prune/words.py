"""Plans in words: what a layer is, what goes, what two plans do differently, which shapes are slow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from shedder.layout import LayerLayout, RemovedBlock, RemovedSSM, ScanLayout
from shedder.nn.config import ModelConfig
from shedder.prune.layer_plan import COUNTS, FLAGS, LISTS, LISTS_PER, NAMES, LayerPlan, runs

VECTOR = 8                          # bf16 values in 16 bytes


def describe_layout(layout: LayerLayout, family: str) -> str:
    """One layer in a few words."""
    if isinstance(layout, RemovedBlock):
        return "no block"
    taps = "" if layout.conv_width == 4 else f", {layout.conv_width} taps"
    if isinstance(layout, ScanLayout):
        groups = f", {layout.ngroups} groups" if layout.ngroups > 1 else ""
        return f"{layout.d_inner} channels{groups}, {layout.dstate} states, dt of rank {layout.dt_rank}{taps}"
    units = f"{layout.d_inner} channels" if family == "mamba1" else f"{layout.nheads} heads of {layout.headdim}"
    units += f", {layout.mlp_channels} MLP channels" if layout.mlp_channels else ""
    if isinstance(layout, RemovedSSM):
        return f"{units}, no SSM{taps}"
    sizes = [layout.head_to_group.count(g) for g in range(layout.ngroups)]
    spread = f" ({', '.join(map(str, sizes))} heads each)" if len(set(sizes)) > 1 else ""
    groups = f", {layout.ngroups} groups{spread}" if layout.ngroups > 1 else ""
    return f"{units}{groups}, {layout.dstate} states{taps}"


def slow_shapes(config: ModelConfig) -> Iterator[str]:
    """Legal sizes that vector loads and tensor cores do not like, and `Plan.round_to` avoids."""
    if config.d_model % VECTOR:
        yield f"d_model {config.d_model} is no multiple of {VECTOR}: rows of every activation lie at odd addresses"
    for index, layout in enumerate(config.layers):
        if isinstance(layout, RemovedBlock):
            continue
        if layout.d_inner % VECTOR:
            yield f"layer {index}: {layout.d_inner} channels are no multiple of {VECTOR}"
        elif getattr(layout, "dstate", VECTOR) % VECTOR:
            yield f"layer {index}: {layout.dstate} states are no multiple of {VECTOR}"      # type: ignore[union-attr]


def difference(index: int, mine: LayerPlan, other: LayerPlan) -> Iterator[str]:
    """What `other` removes from a layer that `mine` does not, and the reverse."""
    for name in FLAGS:
        if getattr(mine, name) != getattr(other, name):
            sign = "+" if getattr(other, name) else "-"
            yield f"layer {index}: {sign} the {'SSM' if name == 'ssm' else name}"
    for name in LISTS:
        yield from lists_differ(f"layer {index}: {{}} {NAMES[name]}", getattr(mine, name), getattr(other, name))
    for name, outer in LISTS_PER.items():
        pairs = list(zip_longest(getattr(mine, name), getattr(other, name), fillvalue=()))
        if len(pairs) > 1 and len(set(pairs)) == 1:
            yield from lists_differ(f"layer {index}, each {outer}: {{}} {NAMES[name]}", *pairs[0])
            continue
        for unit, (a, b) in enumerate(pairs):
            yield from lists_differ(f"layer {index}, {outer} {unit}: {{}} {NAMES[name]}", a, b)
    for sign, only in (("+", set(other.merge) - set(mine.merge)), ("-", set(mine.merge) - set(other.merge))):
        for groups in sorted(only):
            yield f"layer {index}: {sign} merge groups {runs(groups)}"
    for name in COUNTS:
        if getattr(mine, name) != getattr(other, name):
            yield f"layer {index}: {name} {getattr(mine, name)} -> {getattr(other, name)}"


def lists_differ(text: str, mine: tuple[int, ...], other: tuple[int, ...]) -> Iterator[str]:
    for sign, only in (("+", set(other) - set(mine)), ("-", set(mine) - set(other))):
        if only:
            yield f"{text.format(sign)} {runs(sorted(only))}"
