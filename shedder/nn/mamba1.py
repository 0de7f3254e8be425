"""The Mamba-1 mixer, for any ScanLayout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shedder.layout import ScanLayout
from shedder.nn.config import ModelConfig
from shedder.nn.mixer import Mixer, convolve, empty_conv, empty_linear, empty_parameter, overwrite, past
from shedder.nn.precision import wide_dtype
from shedder.nn.state import LayerState, allocate_layer_state
from shedder.ops import linear, mamba_inner_step, selective_scan_fn, selective_state_update
from shedder.reference import discrete_dt


class Mamba1Mixer(Mixer):
    """in_proj -> [x | z]; conv + SiLU over x; x_proj -> [rank | B | C]; dt_proj; selective scan; gate; out_proj."""

    D: nn.Parameter
    channel_to_group: Tensor | None
    value_constants = ("A_log",)

    def __init__(self, config: ModelConfig, layout: ScanLayout, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layout = layout
        dtype = dtype or torch.get_default_dtype()
        wide = wide_dtype(dtype)
        channels = layout.d_inner
        self.in_proj = empty_linear(config.d_model, layout.in_proj_rows, config.proj_bias, device, dtype)
        self.conv1d = empty_conv(channels, layout.conv_width, config.conv_bias, device, dtype)
        self.x_proj = empty_linear(channels, layout.x_proj_rows, False, device, dtype)
        self.dt_proj = empty_linear(layout.dt_rank, channels, True, device, dtype)
        self.dt_proj.bias = empty_parameter(channels, device=device, dtype=wide)
        self.A_log = empty_parameter(channels, layout.dstate, device=device, dtype=wide)
        self.D = empty_parameter(channels, device=device, dtype=wide)
        self.out_proj = empty_linear(channels, config.d_model, config.proj_bias, device, dtype)
        groups = (None if layout.channel_to_group is None else
                  torch.tensor(layout.channel_to_group, dtype=torch.int32, device=device))
        self.register_buffer("channel_to_group", groups, persistent=False)
        bc = layout.ngroups * layout.dstate
        self._x_split = [layout.dt_rank, bc, bc]

    def allocate_state(self, batch: int, ssm_dtype: torch.dtype) -> LayerState:
        layout, weight = self.layout, self.in_proj.weight
        return allocate_layer_state(batch, layout.d_inner, layout.conv_width, (layout.d_inner, layout.dstate),
                                    weight.device, weight.dtype, ssm_dtype)

    def _derive(self) -> tuple[Tensor, ...]:
        return self.conv1d.weight.squeeze(1), -torch.exp(self.A_log)

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> Tensor:
        """hidden (B, L, d_model) -> (B, L, d_model), continuing from `state` and updating it."""
        if state is not None and hidden.shape[1] == 1 and self.probe is None:
            return self._step(hidden, state)
        layout, probe = self.layout, self.probe
        conv_weight, A = self.constants()
        groups = (layout.ngroups, layout.dstate)

        x, z = linear(hidden, self.in_proj.weight, self.in_proj.bias).chunk(2, dim=-1)
        x = convolve(x, conv_weight, self.conv1d.bias, state)                     # (B, L, D)
        if probe is not None:
            x = probe("x", x.transpose(1, 2)).transpose(1, 2)
        rank, B, C = linear(x, self.x_proj.weight).split(self._x_split, dim=-1)
        dt = linear(rank, self.dt_proj.weight).transpose(1, 2)                  # (B, D, L)
        x, z = x.transpose(1, 2), z.transpose(1, 2)
        B = B.unflatten(-1, groups).permute(0, 2, 3, 1)                           # (B, G, N, L)
        C = C.unflatten(-1, groups).permute(0, 2, 3, 1)
        if probe is None:
            y = self._scan(x, dt, A, B, C, z, self.dt_proj.bias, True, state)
            return linear(y.transpose(1, 2), self.out_proj.weight, self.out_proj.bias)

        dtype, wide = x.dtype, self.A_log.dtype
        B, C = probe("B", B), probe("C", C)
        dt = probe("dt", discrete_dt(dt, self.dt_proj.bias[:, None], True, (0.0, float("inf")), wide))
        # dt is no longer of the activations' dtype, so all inputs go wide: the scan takes one dtype.
        x, B, C = x.to(wide), B.to(wide), C.to(wide)
        if state is not None and state.ssm is not None and hidden.shape[1] == 1:
            shared = layout.ngroups == 1
            y = selective_state_update(state.ssm, x[..., 0], dt[..., 0], A, B[:, 0, :, 0] if shared else B[..., 0],
                                       C[:, 0, :, 0] if shared else C[..., 0], self.D,
                                       head_to_group=self.channel_to_group)[..., None]
        else:
            y = self._scan(x, dt, A, B, C, None, None, False, state)
        y = probe("y", y.to(dtype))
        gated = (y.to(wide) * F.silu(z.to(wide))).to(dtype).transpose(1, 2)
        inner = probe("inner", probe("gated", gated))
        return probe("out", linear(inner, self.out_proj.weight, self.out_proj.bias))

    def _scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, bias: Tensor | None,
              softplus: bool, state: LayerState | None) -> Tensor:
        if state is None or state.ssm is None:
            return selective_scan_fn(x, dt, A, B, C, self.D, z=z, delta_bias=bias, delta_softplus=softplus,
                                     channel_to_group=self.channel_to_group)
        y, final = selective_scan_fn(x, dt, A, B, C, self.D, z=z, delta_bias=bias, delta_softplus=softplus,
                                     return_last_state=True, initial_state=past(state.ssm, A.dtype),
                                     channel_to_group=self.channel_to_group)
        overwrite(state.ssm, final)
        return y

    def _step(self, hidden: Tensor, state: LayerState) -> Tensor:
        conv_weight, A = self.constants()
        xz = linear(hidden.squeeze(1), self.in_proj.weight, self.in_proj.bias)
        y = mamba_inner_step(xz, state.conv, state.ssm, conv_weight, self.conv1d.bias, self.x_proj.weight,
                             self.dt_proj.weight, self.dt_proj.bias, A, self.D, channel_to_group=self.channel_to_group)
        return linear(y, self.out_proj.weight, self.out_proj.bias).unsqueeze(1)
