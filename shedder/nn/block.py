"""A block: residual add, norm, mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shedder.layout import RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn.config import ModelConfig
from shedder.nn.mamba1 import Mamba1Mixer
from shedder.nn.mamba2 import Mamba2Mixer
from shedder.nn.mixer import Mixer
from shedder.nn.norm import RMSNorm
from shedder.nn.precision import wide_dtype
from shedder.nn.removed import PassThrough, RemovedSSMMixer
from shedder.nn.state import LayerState


class Block(nn.Module):
    """residual = hidden + residual; hidden = mixer(norm(residual)).

    The sum is kept apart from the mixer's output, as in mamba_ssm: hidden is what the residual
    still lacks. With residual_in_fp32 the residual is fp32 whatever the weights are.
    """

    def __init__(self, config: ModelConfig, mixer: Mixer, device: torch.device | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.norm_scale, device, dtype)
        self.mixer = mixer

    def forward(self, hidden: Tensor, residual: Tensor | None, state: LayerState | None = None
                ) -> tuple[Tensor, Tensor]:
        residual = add_residual(hidden, residual, self.residual_in_fp32)
        return self.mixer(self.norm(residual), state), residual


def add_residual(hidden: Tensor, residual: Tensor | None, in_fp32: bool) -> Tensor:
    if residual is None:
        return hidden.to(wide_dtype(hidden.dtype)) if in_fp32 else hidden
    return hidden + residual                            # an fp32 residual makes the sum fp32


def build_block(config: ModelConfig, index: int, device: torch.device | str | None = None,
                dtype: torch.dtype | None = None) -> nn.Module:
    """The block that config.layers[index] describes, its parameters not yet written."""
    layout = config.layers[index]
    device = torch.get_default_device() if device is None else torch.device(device)
    if isinstance(layout, RemovedBlock):
        return PassThrough()
    mixer: Mixer
    if isinstance(layout, ScanLayout):
        mixer = Mamba1Mixer(config, layout, device, dtype)
    elif isinstance(layout, SSDLayout):
        mixer = Mamba2Mixer(config, layout, device, dtype)
    else:
        assert isinstance(layout, RemovedSSM)
        mixer = RemovedSSMMixer(config, layout, device, dtype)
    return Block(config, mixer, device, dtype)
