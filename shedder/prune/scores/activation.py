"""Activation norms of Minitron-SSM (Taghibakhshi et al., 2025, eq. 16-25). One forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from shedder.layout import RemovedBlock, RemovedSSM, ScanLayout, SSDLayout
from shedder.nn import LanguageModel
from shedder.nn.block import Block
from shedder.ops import linear
from shedder.prune.calibration import Calibration
from shedder.prune.removal import STREAM
from shedder.prune.scores.observe import live_mixers
from shedder.prune.scores.table import Found


@torch.no_grad()
def activation(model: LanguageModel, calibration: Calibration) -> Found:
    """Squared norms of the x branch before the convolution, s = norm(input) W_x^T; of d_model, of the norms' outputs.

    |s| is averaged over time and squared over sequences, as Minitron takes it. A head counts for the sum over its
    channels: its norm, squared. A channel of d_model for the sum over the norms before all blocks.
    """
    config = model.config
    sums: dict[int, Tensor] = {}

    def add(index: int, value: Tensor) -> None:
        energy = value.double().abs().mean(1).square().sum(0).cpu()
        sums[index] = sums[index] + energy if index in sums else energy

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        layout = config.layers[index]
        assert not isinstance(layout, RemovedBlock)
        first = 0                                      # in_proj is [x z], or [MLP z x ...]
        if not isinstance(layout, ScanLayout) and config.family == "mamba2":
            first = 2 * layout.mlp_channels + layout.d_inner
        weight = live_mixers(model)[index].in_proj.weight[first:first + layout.d_inner]

        def see(module: nn.Module, inputs: tuple[Tensor, ...], hidden: Tensor) -> None:
            add(index, linear(hidden, weight))
            add(STREAM, hidden)
        return see

    handles = [cast(Block, model.layers[index]).norm.register_forward_hook(hook(index)) for index in live_mixers(model)]
    try:
        for tokens in calibration.inputs:
            model(tokens, last_only=True)
    finally:
        for handle in handles:
            handle.remove()

    scores: Found = {index: {} for index in range(len(config.layers))}
    scores[STREAM] = {"d_model": sums.pop(STREAM)}
    for index, channels in sums.items():
        layout = config.layers[index]
        if config.family == "mamba1":
            scores[index] = {"channel": channels}
        else:
            assert isinstance(layout, (SSDLayout, RemovedSSM))
            of_heads = channels.unflatten(0, (-1, layout.headdim))
            scores[index] = {"head": of_heads.sum(1), "head_channel": of_heads}
    return scores
