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
from .variants import compile_side_by_side


# No size or address is specialised: a model whose layers all differ compiles this kernel for few of them.
@triton.jit(do_not_specialize=["x_ptr", "weight_ptr", "bias_ptr", "z_ptr", "width", "segments", "x_row", "x_column",
                               "z_row", "z_column", "weight_stride", "bias_stride"])
def _gated_rmsnorm_kernel(x_ptr, weight_ptr, bias_ptr, z_ptr, bounds_ptr, eps_ptr, y_ptr, width, segments,
                          x_row, x_column, z_row, z_column, weight_stride, bias_stride,
                          NORM_BEFORE_GATE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    # ALIGN is 0 where columns are strided. Else the width and the distances of rows come in units of ALIGN elements, of
    # which segments are multiples too, and so are addresses.
    UNIT: tl.constexpr = ALIGN if ALIGN > 0 else 1
    UNIT_BYTES: tl.constexpr = UNIT * x_ptr.dtype.element_ty.primitive_bitwidth // 8
    WEIGHT_BYTES: tl.constexpr = UNIT * weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    pid = tl.program_id(0)
    row = (pid // segments).to(tl.int64)
    segment = pid % segments
    first = tl.multiple_of(tl.load(bounds_ptr + segment), UNIT)
    last = tl.multiple_of(tl.load(bounds_ptr + segment + 1), UNIT)
    x_ptr = tl.multiple_of(x_ptr + row * x_row * UNIT, UNIT_BYTES)
    y_ptr = tl.multiple_of(y_ptr + row * width * UNIT, UNIT_BYTES)
    weight_ptr = tl.multiple_of(weight_ptr, WEIGHT_BYTES)
    if z_ptr is not None:
        z_ptr = tl.multiple_of(z_ptr + row * z_row * UNIT, UNIT_BYTES)

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        c = tl.multiple_of(start, UNIT) + tl.arange(0, BLOCK)
        x_place, z_place = c, c
        if ALIGN == 0:
            x_place, z_place = c.to(tl.int64) * x_column, c.to(tl.int64) * z_column
        v = tl.load(x_ptr + x_place, mask=c < last, other=0.0).to(tl.float32)
        if z_ptr is not None and not NORM_BEFORE_GATE:
            v *= silu(tl.load(z_ptr + z_place, mask=c < last, other=0.0).to(tl.float32))
        squares += v * v
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / (last - first).to(tl.float32) + tl.load(eps_ptr + segment))

    for start in range(first, last, BLOCK):
        c = tl.multiple_of(start, UNIT) + tl.arange(0, BLOCK)
        x_place, z_place, weight_place, bias_place = c, c, c, c
        if ALIGN == 0:
            x_place, z_place = c.to(tl.int64) * x_column, c.to(tl.int64) * z_column
            weight_place, bias_place = c.to(tl.int64) * weight_stride, c.to(tl.int64) * bias_stride
        v = tl.load(x_ptr + x_place, mask=c < last, other=0.0).to(tl.float32)
        if z_ptr is not None:
            gate = silu(tl.load(z_ptr + z_place, mask=c < last, other=0.0).to(tl.float32))
            if not NORM_BEFORE_GATE:
                v *= gate
        y = v * scale * tl.load(weight_ptr + weight_place, mask=c < last, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + bias_place, mask=c < last, other=0.0).to(tl.float32)
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
    tensors = [t for t in (x, z, weight, bias) if t is not None]
    sizes = [width, x.stride(0), x.stride(0) if z is None else z.stride(0), *accumulate(segments),
             *(t.data_ptr() // t.element_size() for t in tensors)]
    align = 0
    if all(t.stride(-1) == 1 for t in tensors):
        align = 8 if all(size % 8 == 0 for size in sizes) else 1
    unit = max(align, 1)
    narrow, wide = {"BLOCK": 512, "num_warps": 4}, {"BLOCK": 2048, "num_warps": 8}
    arguments = (
        x, weight, bias, z, bounds, eps_table, y, width // unit, len(segments),
        x.stride(0) // unit, x.stride(1), *((0, 0) if z is None else (z.stride(0) // unit, z.stride(1))),
        weight.stride(0), 0 if bias is None else bias.stride(0))
    if align > 0:
        kind = (x.device, norm_before_gate, *(None if t is None else t.dtype for t in (x, weight, bias, z)))
        compile_side_by_side(_gated_rmsnorm_kernel, kind, arguments,
                             [{"ALIGN": a, **block} for a in (1, 8) for block in (narrow, wide)],
                             NORM_BEFORE_GATE=norm_before_gate)
    _gated_rmsnorm_kernel[(x.shape[0] * len(segments),)](
        *arguments, NORM_BEFORE_GATE=norm_before_gate, ALIGN=align, **(narrow if max(segments) <= 512 else wide))
    return y
