"""How a family describes which parts of each tensor belong to which unit: data for the slicer.

A *section* is a run of rows that is laid out over one or more axes, outermost first: the
section x of Mamba-2 runs over ("head", "channel"), so that row h * P + p belongs to channel
p of head h. A *tensor* is described dimension by dimension: each dimension is a sequence of
sections, one after the other. A cut keeps a set of indices on each axis; the slicer turns
that into indices of every tensor through these two tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass

Section = str
Axis = str


@dataclass(frozen=True)
class Sections:
    """The tables of one family; parameter names are relative to the block."""

    axes: dict[Section, tuple[Axis, ...]]
    tensors: dict[str, tuple[tuple[Section, ...], ...]]
    removed_with_ssm: frozenset[Section]                # sections that vanish when the SSM is removed


# What every family has outside its blocks.
MODEL_SECTIONS = Sections(
    axes={"vocabulary": ("vocabulary",), "model": ("model",)},
    tensors={
        "backbone.embedding.weight": (("vocabulary",), ("model",)),
        "backbone.norm_f.weight": (("model",),),
        "lm_head.weight": (("vocabulary",), ("model",)),
    },
    removed_with_ssm=frozenset(),
)
