"""Random values for a new model, as mamba_ssm draws them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shedder.nn.mamba1 import Mamba1Mixer
from shedder.nn.mamba2 import Mamba2Mixer
from shedder.nn.mixer import Mixer
from shedder.nn.norm import GatedRMSNorm, RMSNorm

DT_MIN, DT_MAX, DT_FLOOR = 0.001, 0.1, 1e-4             # softplus(dt_bias) is log-uniform in [DT_MIN, DT_MAX]
A_RANGE = (1.0, 16.0)                                   # of -A in Mamba-2
EMBEDDING_STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, n_layers: int) -> None:
    """Write every parameter. n_layers scales out_proj by 1 / sqrt(n_layers), as GPT-2 does."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.reset_parameters()
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=EMBEDDING_STD)
        elif isinstance(module, (RMSNorm, GatedRMSNorm)):
            module.weight.fill_(1.0)
    for module in model.modules():                      # after the Linears inside them
        if isinstance(module, Mixer):
            _initialise_mixer(module, n_layers)


def _initialise_mixer(mixer: Mixer, n_layers: int) -> None:
    nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
    mixer.out_proj.weight /= math.sqrt(n_layers)
    if mixer.D is not None:
        mixer.D.fill_(1.0)
    if isinstance(mixer, Mamba1Mixer):
        bound = mixer.layout.dt_rank ** -0.5
        mixer.dt_proj.weight.uniform_(-bound, bound)
        mixer.dt_proj.bias.copy_(_random_dt_bias(mixer.dt_proj.bias))
        mixer.A_log.copy_(torch.arange(1, mixer.layout.dstate + 1, device=mixer.A_log.device).log())
    elif isinstance(mixer, Mamba2Mixer):
        mixer.dt_bias.copy_(_random_dt_bias(mixer.dt_bias))
        mixer.A_log.copy_(torch.empty_like(mixer.A_log).uniform_(*A_RANGE).log())
        padding = mixer.layout.row_padding
        if padding:
            mixer.in_proj.weight[-padding:].zero_()


def _random_dt_bias(like: Tensor) -> Tensor:
    """Values whose softplus is log-uniform in [DT_MIN, DT_MAX]."""
    dt = torch.empty_like(like).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
    return dt + torch.log(-torch.expm1(-dt))            # the inverse of softplus
