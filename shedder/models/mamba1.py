"""Mamba-1: which rows each unit occupies, and how its checkpoints map onto shedder.nn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shedder.layout import ScanLayout
from shedder.models import state_spaces, transformers
from shedder.models.family import CheckpointError, Family, Source, read
from shedder.models.sections import Sections
from shedder.nn.config import ModelConfig

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
        "norm.weight": (("model",),),
        "mixer.in_proj.weight": (("x", "z"), ("model",)),
        "mixer.in_proj.bias": (("x", "z"),),
        "mixer.conv1d.weight": (("x",), ("one",), ("tap",)),
        "mixer.conv1d.bias": (("x",),),
        "mixer.x_proj.weight": (("rank", "B", "C"), ("x",)),
        "mixer.dt_proj.weight": (("dt",), ("rank",)),
        "mixer.dt_proj.bias": (("dt",),),
        "mixer.A_log": (("dt",), ("A_state",)),
        "mixer.D": (("gain",),),
        "mixer.out_proj.weight": (("model",), ("x",)),
        "mixer.out_proj.bias": (("model",),),
    },
    removed_with_ssm=frozenset({"rank", "B", "C", "dt", "A_state"}),
)


def _read_state_spaces(config: Mapping[str, Any]) -> ModelConfig:
    shared = state_spaces.shared_fields(config)
    ssm = state_spaces.ssm_config(config, frozenset({"d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"}))
    where, d_model = "ssm_cfg.", shared["d_model"]
    rank = read(ssm, "dt_rank", (int, str), "auto", where)
    layout = ScanLayout(d_inner=int(read(ssm, "expand", (int, float), 2, where) * d_model),
                        dstate=read(ssm, "d_state", int, 16, where), dt_rank=_rank(rank, d_model, "ssm_cfg.dt_rank"),
                        conv_width=read(ssm, "d_conv", int, 4, where))
    return ModelConfig(family="mamba1", layers=(layout,) * read(config, "n_layer", int), **shared,
                       conv_bias=read(ssm, "conv_bias", bool, True, where),
                       proj_bias=read(ssm, "bias", bool, False, where))


def _read_transformers(config: Mapping[str, Any]) -> ModelConfig:
    shared = transformers.shared_fields(config, vocab_size=50280, hidden_size=768, tied=True)
    d_model = shared["d_model"]
    d_inner = config.get("intermediate_size")           # derived, but written out and obeyed when it differs
    if d_inner is None:
        d_inner = int(read(config, "expand", (int, float), 2) * d_model)
    layout = ScanLayout(d_inner=d_inner, dstate=read(config, "state_size", int, 16),
                        dt_rank=_rank(read(config, "time_step_rank", (int, str), "auto"), d_model, "time_step_rank"),
                        conv_width=read(config, "conv_kernel", int, 4))
    return ModelConfig(family="mamba1", layers=(layout,) * read(config, "num_hidden_layers", int, 32), **shared)


def _rank(value: int | str, d_model: int, key: str) -> int:
    if isinstance(value, int):
        return value
    if value == "auto":
        return math.ceil(d_model / 16)
    raise CheckpointError(f"config.json: {key} is {value!r}; accepted: an integer or 'auto'")


FAMILY = Family(
    name="mamba1",
    sections=SECTIONS,
    sources=(
        Source("mamba_ssm", lambda config: state_spaces.is_state_spaces(config, "Mamba1"), _read_state_spaces,
               state_spaces.rename),
        Source("transformers", lambda config: config.get("model_type") == "mamba", _read_transformers,
               transformers.rename),
    ),
)
