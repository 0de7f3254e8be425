"""RMS norms: before each block, and gated inside a mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shedder.layout import NormSegment
from shedder.nn.precision import wide_dtype
from shedder.ops import rmsnorm_fn


class RMSNorm(nn.Module):
    """x / rms(x) * weight * scale. Reads the (fp32) residual, returns the dtype of its weight."""

    def __init__(self, channels: int, eps: float, scale: float, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.eps, self.scale = eps, scale

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.scale != 1.0:
            weight = weight.to(wide_dtype(weight.dtype)) * self.scale
        return rmsnorm_fn(x, weight, None, eps=self.eps).to(self.weight.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm over segments of channels, gated by silu(z) before or after the norm."""

    def __init__(self, segments: tuple[NormSegment, ...], norm_before_gate: bool,
                 device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.segments = [segment.channels for segment in segments]
        self.eps = [segment.eps for segment in segments]
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(sum(self.segments), device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z=z, norm_before_gate=self.norm_before_gate,
                          segments=self.segments, segment_eps=self.eps)
