"""Exponentials, softplus, SiLU and the clamp of dt, as every kernel here computes them."""

import torch
import triton
import triton.language as tl

if torch.version.hip is None and not triton.knobs.runtime.interpret:

    # The instruction that tl.exp2 comes to as well, but by way of a library that is linked to each kernel first: a
    # tenth of its compilation.
    @triton.jit
    def exp2(x):
        """2^x in fp32; subnormals become 0."""
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True,
                                         pack=1)
else:

    @triton.jit
    def exp2(x):
        return tl.exp2(x)

LOG2E = tl.constexpr(1.4426950408889634)       # exp2(x LOG2E) is exp(x) in one instruction: subnormals become 0


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with full relative accuracy at both ends.

    log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3: the first term left out is below 2e-8 of the sum.
    """
    e = exp2(tl.abs(x) * -LOG2E)
    s = e / (2.0 + e)
    w = s * s
    series = 1.0 / 13
    series = series * w + 1.0 / 11
    series = series * w + 1.0 / 9
    series = series * w + 1.0 / 7
    series = series * w + 1.0 / 5
    series = series * w + 1.0 / 3
    series = series * w + 1.0
    return tl.where(x > 0.0, x, 0.0) + 2.0 * s * series


@triton.jit
def silu(x):
    return x / (1.0 + exp2(x * -LOG2E))


@triton.jit
def discrete_dt(dt, bias, SOFTPLUS: tl.constexpr):
    """softplus(dt + bias) in fp32; bias may be None."""
    dt = dt.to(tl.float32)
    if bias is not None:
        dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    return dt
