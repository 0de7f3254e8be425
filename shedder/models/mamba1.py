"""Mamba-1: which rows each unit occupies, and how its checkpoints map onto shedder.nn."""

from __future__ import annotations

from shedder.models.sections import Sections

SECTIONS = Sections(
    axes={
        "z": ("channel",),
        "x": ("channel",),
        "rank": ("rank",),
        "B": ("group", "state"),
        "C": ("group", "state"),
        "dt": ("channel",),
        "A_state": ("state",),
        "gain": ("channel",),                           # D, kept when the SSM is removed
        "model": ("model",),
        "one": ("one",),
        "tap": ("tap",),
    },
    tensors={
        "in_proj.weight": (("x", "z"), ("model",)),
        "in_proj.bias": (("x", "z"),),
        "conv1d.weight": (("x",), ("one",), ("tap",)),
        "conv1d.bias": (("x",),),
        "x_proj.weight": (("rank", "B", "C"), ("x",)),
        "dt_proj.weight": (("dt",), ("rank",)),
        "dt_proj.bias": (("dt",),),
        "A_log": (("dt",), ("A_state",)),
        "D": (("gain",),),
        "out_proj.weight": (("model",), ("x",)),
        "out_proj.bias": (("model",),),
    },
    removed_with_ssm=frozenset({"rank", "B", "C", "dt", "A_state"}),
)
