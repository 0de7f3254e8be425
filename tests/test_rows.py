"""Outputs whose rows begin with a line of the caches."""

from __future__ import annotations

import pytest
import torch

from shedder.triton_kernels.rows import empty_in_rows


@pytest.mark.parametrize(("dtype", "pitch"), [(torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 96)])
def test_adjacent_channels_begin_with_a_line(dtype: torch.dtype, pitch: int) -> None:
    x = torch.zeros(3, 5, 67, dtype=dtype).transpose(1, 2)
    y = empty_in_rows(x)
    assert y.shape == x.shape and y.dtype == dtype
    assert y.stride() == (5 * pitch, 1, pitch)


@pytest.mark.parametrize("x", [torch.zeros(3, 67, 5), torch.zeros(3, 5, 64).transpose(1, 2), torch.zeros(2, 0, 5),
                               torch.zeros(67, 3, 5).transpose(0, 1)])
def test_other_orders_and_whole_rows_stay_as_they_are(x: torch.Tensor) -> None:
    assert empty_in_rows(x).stride() == torch.empty_like(x).stride()
