"""The Mamba-2 mixer, for any SSDLayout."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shedder.layout import SSDLayout
from shedder.nn.config import ModelConfig
from shedder.nn.mixer import (
    Mixer,
    beside,
    convolve,
    empty_conv,
    empty_linear,
    empty_parameter,
    overwrite,
    past,
    split_mlp,
)
from shedder.nn.norm import GatedRMSNorm
from shedder.nn.precision import wide_dtype
from shedder.nn.state import LayerState, allocate_layer_state
from shedder.ops import linear, mamba_chunk_scan_combined, selective_state_update, step_mixer
from shedder.reference import discrete_dt

CHUNK = 128                                             # a hint of the drop-in signature; backends choose their own


class Mamba2Mixer(Mixer):
    """in_proj -> [z | x | B | C | dt | padding]; conv + SiLU over x, B, C; SSD; gated norm; out_proj.

    With MLP channels their gate and value come first in in_proj, and their product first in out_proj.
    """

    D: nn.Parameter
    head_to_group: Tensor
    value_constants = ("A_log",)
    view_constants = ("D", "dt_bias")

    def __init__(self, config: ModelConfig, layout: SSDLayout, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layout = layout
        dtype = dtype or torch.get_default_dtype()
        wide = wide_dtype(dtype)
        self.dt_limit = config.dt_limit
        self.d_has_hdim = config.d_has_hdim
        self.in_proj = empty_linear(config.d_model, layout.in_proj_rows, config.proj_bias, device, dtype)
        self.conv1d = empty_conv(layout.conv_channels, layout.conv_width, config.conv_bias, device, dtype)
        self.dt_bias = empty_parameter(layout.nheads, device=device, dtype=wide)
        self.A_log = empty_parameter(layout.nheads, device=device, dtype=wide)
        self.D = empty_parameter(layout.d_inner if config.d_has_hdim else layout.nheads, device=device, dtype=wide)
        self.norm = (GatedRMSNorm(layout.norm_segments, config.norm_before_gate, device, dtype)
                     if layout.norm_segments else None)
        self.out_proj = empty_linear(layout.out_proj_columns, config.d_model, config.proj_bias, device, dtype)
        self.register_buffer("head_to_group", torch.tensor(layout.head_to_group, dtype=torch.int32, device=device),
                             persistent=False)
        bc = layout.ngroups * layout.dstate
        padding = [layout.row_padding] if layout.row_padding else []
        self._in_split = [layout.d_inner, layout.conv_channels, layout.nheads, *padding]
        self._conv_split = [layout.d_inner, bc, bc]
        self._norm_segments = tuple((segment.channels, segment.eps) for segment in layout.norm_segments) or None
        self.norm_before_gate = config.norm_before_gate

    def allocate_state(self, batch: int, ssm_dtype: torch.dtype) -> LayerState:
        layout, weight = self.layout, self.in_proj.weight
        return allocate_layer_state(batch, layout.conv_channels, layout.conv_width,
                                    (layout.nheads, layout.headdim, layout.dstate), weight.device, weight.dtype,
                                    ssm_dtype)

    def _derive(self) -> tuple[Tensor, ...]:
        heads, headdim, dstate = self.layout.nheads, self.layout.headdim, self.layout.dstate
        A = -torch.exp(self.A_log)
        D = self.D.view(heads, headdim) if self.d_has_hdim else self.D
        return (self.conv1d.weight.squeeze(1), A, A[:, None, None].expand(heads, headdim, dstate),
                D, D[:, None].expand(heads, headdim) if D.dim() == 1 else D)

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> Tensor:
        """hidden (B, L, d_model) -> (B, L, d_model), continuing from `state` and updating it."""
        if state is not None and hidden.shape[1] == 1 and self.probe is None:
            return self._step(hidden, state)
        layout, probe = self.layout, self.probe
        conv_weight, A, A_full, D, D_full = self.constants()

        mlp, zxbcdt = split_mlp(linear(hidden, self.in_proj.weight, self.in_proj.bias), layout.mlp_channels)
        z, xBC, dt = zxbcdt.split(self._in_split, dim=-1)[:3]
        x, B, C = convolve(xBC, conv_weight, self.conv1d.bias, state).split(self._conv_split, dim=-1)
        x = x.unflatten(-1, (layout.nheads, layout.headdim))
        B = B.unflatten(-1, (layout.ngroups, layout.dstate))
        C = C.unflatten(-1, (layout.ngroups, layout.dstate))
        softplus, dt_bias, dt_limit = True, cast(Tensor | None, self.dt_bias), self.dt_limit
        if probe is not None:
            x, B, C = probe("x", x), probe("B", B), probe("C", C)
            dt = probe("dt", discrete_dt(dt, self.dt_bias, True, self.dt_limit, self.dt_bias.dtype))
            softplus, dt_bias, dt_limit = False, None, (0.0, math.inf)
        gate_in_scan = z.unflatten(-1, x.shape[2:]) if self.norm is None and probe is None else None

        ssm = None if state is None else state.ssm
        if ssm is not None and hidden.shape[1] == 1:
            y = selective_state_update(ssm, x[:, 0], dt[:, 0, :, None].expand(-1, -1, layout.headdim), A_full,
                                       B[:, 0], C[:, 0], D_full, dt_softplus=False,
                                       head_to_group=self.head_to_group)[:, None]
        else:
            y = mamba_chunk_scan_combined(
                x, dt, A, B, C, CHUNK, D=D, z=gate_in_scan, dt_bias=dt_bias, dt_softplus=softplus,
                dt_limit=dt_limit, initial_states=None if ssm is None else past(ssm, A.dtype),
                return_final_states=ssm is not None, head_to_group=self.head_to_group)
            if ssm is not None:
                y, final = y
                overwrite(ssm, final)

        if probe is None:
            y = y.flatten(2)
            if self.norm is not None:
                y = self.norm(y, z)
            return linear(beside(mlp, y), self.out_proj.weight, self.out_proj.bias)
        y = gate_and_norm_probed(probe("y", y).flatten(2), z, self.norm, probe)
        y = probe("inner", beside(mlp, y, probe))
        return probe("out", linear(y, self.out_proj.weight, self.out_proj.bias))

    def _step(self, hidden: Tensor, state: LayerState) -> Tensor:
        conv_weight, A, _, D, _ = self.constants()
        in_proj, out_proj, norm, layout = self.in_proj, self.out_proj, self.norm, self.layout
        assert state.ssm is not None
        mlp, zxbcdt = split_mlp(linear(hidden.squeeze(1), in_proj.weight, in_proj.bias), layout.mlp_channels)
        y = step_mixer(
            zxbcdt, state.conv, state.ssm, conv_weight,
            self.conv1d.bias, self.dt_bias, A, D, None if norm is None else norm.weight, headdim=layout.headdim,
            ngroups=layout.ngroups, dstate=layout.dstate, head_to_group=self.head_to_group,
            norm_segments=self._norm_segments, norm_before_gate=self.norm_before_gate, dt_limit=self.dt_limit,
            row_padding=layout.row_padding)
        return linear(beside(mlp, y), out_proj.weight, out_proj.bias).unsqueeze(1)


def gate_and_norm_probed(y: Tensor, z: Tensor, norm: GatedRMSNorm | None, probe) -> Tensor:
    """The gate and the norm apart, so that the probe can stand between them. y, z: (B, L, d_inner)."""
    if norm is not None and norm.norm_before_gate:
        return norm(probe("gated", y), z)
    gated = (y.to(wide_dtype(y.dtype)) * F.silu(z.to(wide_dtype(y.dtype)))).to(y.dtype)
    gated = probe("gated", gated)
    return gated if norm is None else norm(gated, None)
