"""Mamba-2: which rows each unit occupies, and how its checkpoints map onto shedder.nn."""

from __future__ import annotations

from shedder.models.sections import Sections

SECTIONS = Sections(
    axes={
        "z": ("head", "channel"),
        "x": ("head", "channel"),
        "B": ("group", "state"),
        "C": ("group", "state"),
        "dt": ("head",),
        "padding": ("padding",),
        "gain": ("head",),                              # D, kept when the SSM is removed
        "channel_gain": ("head", "channel"),            # D when there is one per channel (D_has_hdim)
        "model": ("model",),
        "one": ("one",),
        "tap": ("tap",),
    },
    tensors={
        "in_proj.weight": (("z", "x", "B", "C", "dt", "padding"), ("model",)),
        "in_proj.bias": (("z", "x", "B", "C", "dt", "padding"),),
        "conv1d.weight": (("x", "B", "C"), ("one",), ("tap",)),
        "conv1d.bias": (("x", "B", "C"),),
        "dt_bias": (("dt",),),
        "A_log": (("dt",),),
        "D": (("gain",),),
        "norm.weight": (("x",),),
        "out_proj.weight": (("model",), ("x",)),
        "out_proj.bias": (("model",),),
    },
    removed_with_ssm=frozenset({"B", "C", "dt", "padding"}),
)
