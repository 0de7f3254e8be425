"""What the memory-bound CUDA kernels have in common in tests: the cases of triton_cases, on memory of either kind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton_cases as cases
from torch import Tensor

from shedder.ops import cuda

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

needs_gpu = [pytest.mark.gpu,
             pytest.mark.skipif(cuda.available() is not None, reason=f"no CUDA backend: {cuda.available()}")]


class Contiguous(cases.Random):
    """Tensors that start on the 16-byte grid and have no gaps: what the 16-byte accesses take where sizes allow."""

    def inside(self, values: Tensor, dtype: torch.dtype, order: Sequence[int] | None = None) -> Tensor:
        order = list(order or range(values.dim()))
        stored = values.to(dtype).permute(order).contiguous().to(self.device)
        return stored.permute([order.index(d) for d in range(values.dim())])


@pytest.fixture(params=["views", "contiguous"], autouse=True)
def memory(request, monkeypatch):
    """The cases run the CUDA backend, on views off the 16-byte grid inside NaN, and on contiguous tensors."""
    monkeypatch.setattr(cases, "backend", cuda)
    if request.param == "contiguous":
        monkeypatch.setattr(cases, "Random", Contiguous)
