# RMSNorm over segments of a row, gated before or after.
#
#   norm(v)_c = v_c / sqrt(mean of v^2 over the segment of c + eps of the segment) * weight_c + bias_c
#   y = norm(x) silu(z)   or   norm(x silu(z))
#
# One program owns (row, segment) and passes over it twice in blocks: once for the sum of squares,
# once (from L1 or L2) for the output. Bound: bytes of x, z and y.
"""Triton forward of shedder.ops' gated_rmsnorm."""

import functools
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import silu


@triton.jit
def _gated_rmsnorm_kernel(x_ptr, weight_ptr, bias_ptr, z_ptr, bounds_ptr, eps_ptr, y_ptr, width, segments,
                          x_strides, z_strides, weight_stride, bias_stride,
                          NORM_BEFORE_GATE: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    row = (pid // segments).to(tl.int64)
    segment = pid % segments
    first = tl.load(bounds_ptr + segment)
    last = tl.load(bounds_ptr + segment + 1)
    x_ptr += row * x_strides[0]
    y_ptr += row * width
    if z_ptr is not None:
        z_ptr += row * z_strides[0]

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        c = (start + tl.arange(0, BLOCK)).to(tl.int64)
        v = tl.load(x_ptr + c * x_strides[1], mask=c < last, other=0.0).to(tl.float32)
        if z_ptr is not None and not NORM_BEFORE_GATE:
            v *= silu(tl.load(z_ptr + c * z_strides[1], mask=c < last, other=0.0).to(tl.float32))
        squares += v * v
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / (last - first).to(tl.float32) + tl.load(eps_ptr + segment))

    for start in range(first, last, BLOCK):
        c = (start + tl.arange(0, BLOCK)).to(tl.int64)
        v = tl.load(x_ptr + c * x_strides[1], mask=c < last, other=0.0).to(tl.float32)
        if z_ptr is not None:
            gate = silu(tl.load(z_ptr + c * z_strides[1], mask=c < last, other=0.0).to(tl.float32))
            if not NORM_BEFORE_GATE:
                v *= gate
        y = v * scale * tl.load(weight_ptr + c * weight_stride, mask=c < last, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c * bias_stride, mask=c < last, other=0.0).to(tl.float32)
        if z_ptr is not None and NORM_BEFORE_GATE:
            y *= gate
        tl.store(y_ptr + c, y.to(y_ptr.dtype.element_ty), mask=c < last)


@functools.cache       # never evicted: a captured CUDA graph keeps reading these addresses
def _segment_table(segments: tuple[int, ...], eps: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)
    return bounds, torch.tensor(eps, dtype=torch.float32, device=device)


def gated_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: list[int],
                  eps: list[float], norm_before_gate: bool) -> Tensor:
    """x, z (..., D) with rows of any stride; one eps for each segment -> y (..., D), contiguous."""
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = x.reshape(-1, width)
    z = None if z is None else z.reshape(-1, width)
    bounds, eps_table = _segment_table(tuple(segments), tuple(eps), x.device)
    block = min(4096, max(16, triton.next_power_of_2(max(segments))))
    _gated_rmsnorm_kernel[(x.shape[0] * len(segments),)](
        x, weight, bias, z, bounds, eps_table, y, width, len(segments),
        x.stride(), None if z is None else z.stride(), weight.stride(0), None if bias is None else bias.stride(0),
        NORM_BEFORE_GATE=norm_before_gate, BLOCK=block, num_warps=8 if block >= 2048 else 4)
    return y
