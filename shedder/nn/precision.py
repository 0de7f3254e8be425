"""Which parameters stay in float32 when a model is cast to a smaller type.

A_log, dt_bias and D set how long a state remembers; rounded to bf16 they change the model's
long-range behaviour, and they are too few to matter for size or speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and of wide parameters in a model of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class WideParameters(nn.Module):
    """A module whose parameters named in `wide` never become half precision.

    `.to(torch.bfloat16)` and `.half()` leave them in float32; `.double()` and moves between
    devices apply as usual.
    """

    wide: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept: list[Tensor] = []
        for name in self.wide:
            parameter = _find(self, name)
            if parameter is not None:
                kept.append(parameter)
                if parameter.grad is not None:
                    kept.append(parameter.grad)

        def guarded(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in HALF and any(tensor is t for t in kept):
                return tensor.to(device=result.device, dtype=torch.float32)
            return result

        return super()._apply(guarded, recurse)


def _find(module: nn.Module, name: str) -> Tensor | None:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
