"""Outputs that nobody writes show: what torch allocates starts as NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty or torch.empty_like, whose tensors of floats are NaN."""
    def poison(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor
    return poison
