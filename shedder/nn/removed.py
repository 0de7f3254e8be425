"""What is left where something was removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shedder.layout import RemovedSSM
from shedder.nn.config import ModelConfig
from shedder.nn.mamba2 import gate_and_norm_probed
from shedder.nn.mixer import (
    Mixer,
    beside,
    convolve,
    empty_conv,
    empty_linear,
    empty_parameter,
    past,
    remember,
    split_mlp,
)
from shedder.nn.norm import GatedRMSNorm
from shedder.nn.precision import wide_dtype
from shedder.nn.state import LayerState, allocate_layer_state
from shedder.ops import linear, mamba_inner_step, removed_ssm, step_mixer


class RemovedSSMMixer(Mixer):
    """y = D silu(conv(x)), gated and normalised as before; no B, C, dt, no state but the convolution's.

    D is None where out_proj has taken it in.
    """

    value_constants = ("D",)                            # expanded to channels, which copies

    def __init__(self, config: ModelConfig, layout: RemovedSSM, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layout = layout
        dtype = dtype or torch.get_default_dtype()
        self.is_mamba1 = config.family == "mamba1"
        self.norm_before_gate = config.norm_before_gate
        self._norm_segments = tuple((segment.channels, segment.eps) for segment in layout.norm_segments) or None
        self.in_proj = empty_linear(config.d_model, layout.in_proj_rows, config.proj_bias, device, dtype)
        self.conv1d = empty_conv(layout.d_inner, layout.conv_width, config.conv_bias, device, dtype)
        self.D = empty_parameter(layout.d_inner if config.d_has_hdim else layout.nheads, device=device,
                                 dtype=wide_dtype(dtype)) if layout.gain else None
        self.norm = (GatedRMSNorm(layout.norm_segments, config.norm_before_gate, device, dtype)
                     if layout.norm_segments else None)
        self.out_proj = empty_linear(layout.out_proj_columns, config.d_model, config.proj_bias, device, dtype)

    def allocate_state(self, batch: int, ssm_dtype: torch.dtype) -> LayerState:
        weight = self.in_proj.weight
        return allocate_layer_state(batch, self.layout.conv_channels, self.layout.conv_width, None,
                                    weight.device, weight.dtype, ssm_dtype)

    def _derive(self) -> tuple[Tensor, Tensor]:
        heads, headdim = self.layout.nheads, self.layout.headdim
        if self.D is None:
            return self.conv1d.weight.squeeze(1), torch.ones(heads * headdim, device=self.conv1d.weight.device,
                                                             dtype=wide_dtype(self.conv1d.weight.dtype))
        D = self.D.view(heads, -1).expand(heads, headdim).reshape(-1)             # one gain per channel
        return self.conv1d.weight.squeeze(1), D

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> Tensor:
        """hidden (B, L, d_model) -> (B, L, d_model), continuing from `state` and updating it."""
        if state is not None and hidden.shape[1] == 1 and self.probe is None:
            return self._step(hidden, state)
        conv_weight, D = self.constants()
        mlp, both = split_mlp(linear(hidden, self.in_proj.weight, self.in_proj.bias), self.layout.mlp_channels)
        first, second = both.chunk(2, dim=-1)
        x, z = (first, second) if self.is_mamba1 else (second, first)
        if self.probe is not None:
            x = convolve(x, conv_weight, self.conv1d.bias, state)                 # (B, L, d_inner)
            return self._finish_probed(mlp, x, z, D)
        y = removed_ssm(
            x, z, conv_weight, self.conv1d.bias, self.D, None if self.norm is None else self.norm.weight,
            norm_segments=self._norm_segments, norm_before_gate=self.norm_before_gate,
            initial_states=None if state is None else past(state.conv, x.dtype))
        if state is not None:
            remember(state.conv, x.transpose(1, 2))
        return linear(beside(mlp, y), self.out_proj.weight, self.out_proj.bias)

    def _step(self, hidden: Tensor, state: LayerState) -> Tensor:
        conv_weight, D = self.constants()
        in_proj, out_proj, norm, layout = self.in_proj, self.out_proj, self.norm, self.layout
        mlp, both = split_mlp(linear(hidden.squeeze(1), in_proj.weight, in_proj.bias), layout.mlp_channels)
        if self.is_mamba1:
            y = mamba_inner_step(both, state.conv, None, conv_weight, self.conv1d.bias, None, None, None, None, D)
        else:
            y = step_mixer(
                both, state.conv, None, conv_weight, self.conv1d.bias,
                None, None, D.view(layout.nheads, layout.headdim), None if norm is None else norm.weight,
                headdim=layout.headdim, dstate=0, norm_segments=self._norm_segments,
                norm_before_gate=self.norm_before_gate)
        return linear(beside(mlp, y), out_proj.weight, out_proj.bias).unsqueeze(1)

    def _finish_probed(self, mlp: Tensor | None, x: Tensor, z: Tensor, D: Tensor) -> Tensor:
        probe = self.probe
        assert probe is not None

        def seen(name: str, tensor: Tensor) -> Tensor:
            if self.is_mamba1:
                return probe(name, tensor.transpose(1, 2)).transpose(1, 2)
            return probe(name, tensor.unflatten(-1, (self.layout.nheads, self.layout.headdim))).flatten(2)

        x = seen("x", x)
        y = seen("y", x if self.D is None else (x * D).to(x.dtype))
        y = probe("inner", beside(mlp, gate_and_norm_probed(y, z, self.norm, probe), probe))
        return probe("out", linear(y, self.out_proj.weight, self.out_proj.bias))


class PassThrough(nn.Module):
    """Nothing: hidden and residual pass. Keeps the index of a removed block taken."""

    def forward(self, hidden: Tensor, residual: Tensor | None, state: LayerState | None = None
                ) -> tuple[Tensor, Tensor | None]:
        return hidden, residual
