"""Mamba-2: which rows each unit occupies, and how its checkpoints map onto shedder.nn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shedder.layout import NormSegment, SSDLayout
from shedder.models import state_spaces, transformers
from shedder.models.family import CheckpointError, Family, Source, read
from shedder.models.sections import Sections
from shedder.nn.config import ModelConfig

SECTIONS = Sections(
    axes={
        "mlp_gate": ("mlp",),                           # beside the SSM, where d_ssm < d_inner
        "mlp_value": ("mlp",),
        "mlp": ("mlp",),
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
        "norm.weight": (("model",),),
        "mixer.in_proj.weight": (("mlp_gate", "mlp_value", "z", "x", "B", "C", "dt", "padding"), ("model",)),
        "mixer.in_proj.bias": (("mlp_gate", "mlp_value", "z", "x", "B", "C", "dt", "padding"),),
        "mixer.conv1d.weight": (("x", "B", "C"), ("one",), ("tap",)),
        "mixer.conv1d.bias": (("x", "B", "C"),),
        "mixer.dt_bias": (("dt",),),
        "mixer.A_log": (("dt",),),
        "mixer.D": (("gain",),),
        "mixer.norm.weight": (("x",),),
        "mixer.out_proj.weight": (("model",), ("mlp", "x")),
        "mixer.out_proj.bias": (("model",),),
    },
    removed_with_ssm=frozenset({"B", "C", "dt", "padding"}),
)

GATED_NORM_EPS = 1e-5                                   # in mamba_ssm's code, not in its config
MAX_HEADS = 1 << 16


def _layout(d_inner: int, headdim: int, dstate: int, ngroups: int, conv_width: int, norm_eps: float | None,
            where: str) -> SSDLayout:
    """A dense layer: equal runs of heads per group, the norm over the channels of each group."""
    if headdim < 1 or d_inner % headdim:
        raise CheckpointError(f"config.json: {where} gives {d_inner} channels in heads of {headdim}; "
                              "accepted: a head size that divides the channels")
    heads = d_inner // headdim
    if heads > MAX_HEADS:
        raise CheckpointError(f"config.json: {where} gives {heads} heads; accepted: up to {MAX_HEADS}")
    if ngroups < 1 or heads % ngroups:
        raise CheckpointError(f"config.json: {where} gives {heads} heads in {ngroups} groups; "
                              "accepted: a number of groups that divides the heads")
    segments = () if norm_eps is None else (NormSegment(d_inner // ngroups, norm_eps),) * ngroups
    return SSDLayout(headdim=headdim, dstate=dstate, ngroups=ngroups, conv_width=conv_width,
                     head_to_group=tuple(head * ngroups // heads for head in range(heads)), norm_segments=segments)


def _dt_limit(value: Any, key: str) -> tuple[float, float]:
    def number(v: Any) -> float:
        # Infinity is no JSON; transformers 5 writes it as an object.
        infinite = {"__float__": "Infinity"}
        if v != infinite and (not isinstance(v, (int, float)) or isinstance(v, bool)):
            raise CheckpointError(f"config.json: {key} is {value!r}; accepted: two numbers, or {infinite} for no limit")
        return math.inf if v == infinite else float(v)

    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise CheckpointError(f"config.json: {key} is {value!r}; accepted: two numbers")
    return number(value[0]), number(value[1])


def _read_state_spaces(config: Mapping[str, Any]) -> ModelConfig:
    shared = state_spaces.shared_fields(config)
    ssm = state_spaces.ssm_config(config, frozenset({
        "d_state", "d_conv", "expand", "headdim", "d_ssm", "ngroups", "D_has_hdim", "rmsnorm", "norm_before_gate",
        "dt_limit", "bias", "conv_bias"}))
    where = "ssm_cfg."
    d_inner = int(read(ssm, "expand", (int, float), 2, where) * shared["d_model"])
    d_ssm = read(ssm, "d_ssm", (int, type(None)), None, where)
    d_ssm = d_inner if d_ssm is None else d_ssm
    if not 1 <= d_ssm <= d_inner:
        raise CheckpointError(f"config.json: ssm_cfg.d_ssm is {d_ssm}; accepted: up to expand * d_model = {d_inner}")
    has_norm = read(ssm, "rmsnorm", bool, True, where)
    layout = _layout(d_ssm, read(ssm, "headdim", int, 64, where), read(ssm, "d_state", int, 128, where),
                     read(ssm, "ngroups", int, 1, where), read(ssm, "d_conv", int, 4, where),
                     GATED_NORM_EPS if has_norm else None, "ssm_cfg")
    layout = replace(layout, mlp_channels=d_inner - d_ssm)
    return ModelConfig(family="mamba2", layers=(layout,) * read(config, "n_layer", int), **shared,
                       conv_bias=read(ssm, "conv_bias", bool, True, where),
                       proj_bias=read(ssm, "bias", bool, False, where),
                       d_has_hdim=read(ssm, "D_has_hdim", bool, False, where),
                       norm_before_gate=read(ssm, "norm_before_gate", bool, False, where),
                       dt_limit=_dt_limit(ssm.get("dt_limit", (0.0, math.inf)), "ssm_cfg.dt_limit"))


def _read_transformers(config: Mapping[str, Any]) -> ModelConfig:
    shared = transformers.shared_fields(config, vocab_size=32768, hidden_size=4096, tied=False)
    headdim = read(config, "head_dim", int, 64)
    layout = _layout(read(config, "num_heads", int, 128) * headdim, headdim, read(config, "state_size", int, 128),
                     read(config, "n_groups", int, 8), read(config, "conv_kernel", int, 4), shared["norm_eps"],
                     "num_heads, head_dim, n_groups")
    return ModelConfig(family="mamba2", layers=(layout,) * read(config, "num_hidden_layers", int, 64), **shared,
                       dt_limit=_dt_limit(config.get("time_step_limit", (0.0, math.inf)), "time_step_limit"))


FAMILY = Family(
    name="mamba2",
    sections=SECTIONS,
    sources=(
        Source("mamba_ssm", lambda config: state_spaces.is_state_spaces(config, "Mamba2"), _read_state_spaces,
               state_spaces.rename),
        Source("transformers", lambda config: config.get("model_type") == "mamba2", _read_transformers,
               transformers.rename),
    ),
)
