"""What a model remembers between calls: for each layer the last inputs of the convolution and the SSM state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerState:
    """conv: the last W - 1 inputs of each conv channel, oldest first, (B, C, W - 1).

    ssm: (B, D, N) in Mamba-1, (B, H, P, N) in Mamba-2; None where the SSM is removed.
    """

    conv: Tensor
    ssm: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [self.conv] if self.ssm is None else [self.conv, self.ssm]


@dataclass
class ModelState:
    """One LayerState per block; None where the block is removed. Calls of the model update it in place."""

    layers: list[LayerState | None]
    batch: int

    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers if layer is not None for tensor in layer.tensors()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def zero_(self) -> ModelState:
        """Forget everything, in place."""
        for tensor in self.tensors():
            tensor.zero_()
        return self

    def copy_(self, other: ModelState) -> ModelState:
        """Take over the contents of a state of the same shape, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)
        return self

    def clone(self) -> ModelState:
        return ModelState([None if layer is None else
                           LayerState(layer.conv.clone(), None if layer.ssm is None else layer.ssm.clone())
                           for layer in self.layers], self.batch)


def allocate_layer_state(batch: int, conv_channels: int, conv_width: int, ssm_shape: tuple[int, ...] | None,
                         device: torch.device, conv_dtype: torch.dtype, ssm_dtype: torch.dtype) -> LayerState:
    # Channels lie side by side, as in the activations that are written here.
    conv = torch.zeros(batch, conv_width - 1, conv_channels, device=device, dtype=conv_dtype).transpose(1, 2)
    ssm = None if ssm_shape is None else torch.zeros(batch, *ssm_shape, device=device, dtype=ssm_dtype)
    return LayerState(conv, ssm)
