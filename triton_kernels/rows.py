"""Rows in memory that begin with a line of the caches, however many elements they have."""

import torch
from torch import Tensor

LINE_BYTES = 128


def empty_in_rows(x: Tensor) -> Tensor:
    """Uninitialised, with the shape of x (B, D, L) and its order in memory.

    Where channels are adjacent in x, each token's begin with a line: what reads them next, a scan or a product, then
    needs no kernel for odd rows.
    """
    _, channels, length = x.shape
    if x.stride(1) != 1 or x.stride(2) == 1:
        return torch.empty_like(x)
    multiple = LINE_BYTES // x.element_size()
    pitch = (channels + multiple - 1) // multiple * multiple
    return torch.empty_strided(x.shape, (length * pitch, 1, pitch), dtype=x.dtype, device=x.device)
