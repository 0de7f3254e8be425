# State-space duality (Mamba-2), forward.
#
#   dt       = clamp(softplus(dt + bias), dt_min, dt_max)
#   h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
#   y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])
#
# In chunks of Q tokens, with s[t] = sum of dt A from the chunk's first token to t:
#
#   y[t] = sum_{j <= t} (C[t] . B[j]) exp(s[t] - s[j]) dt[j] x[j]  +  exp(s[t]) C[t] h_in
#   h_out = exp(s[Q-1]) h_in + sum_j exp(s[Q-1] - s[j]) dt[j] x[j] B[j]
#
# One program owns (batch, head, tile of P) and walks along the chunks with its P x N state in
# registers; C B^T is built again by every program. Exponents are differences of s taken before
# exp, so nothing overflows that the recurrence would not; s is summed in fp64 and kept as two
# fp32 numbers, so a strong decay early in a chunk costs the later tokens no digits.
"""Triton forward of shedder.ops' ssd."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import sequence_runs
from .pointwise import discrete_dt, silu


@triton.jit(do_not_specialize=["length", "heads"])
def _ssd_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, head_to_group_ptr, initial_ptr, runs_ptr,
                y_ptr, final_ptr, length, heads, headdim, dstate, dt_min, dt_max,
                x_strides, dt_strides, B_strides, C_strides, D_strides, z_strides, initial_strides,
                A_stride, dt_bias_stride, head_to_group_stride,
                DT_SOFTPLUS: tl.constexpr, DT_LIMITED: tl.constexpr,
                BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, Q: tl.constexpr):
    operand = x_ptr.dtype.element_ty                      # of the matrix products
    tiles = tl.cdiv(headdim, BLOCK_P)
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads).to(tl.int64)
    p = (pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    q = tl.arange(0, Q)
    in_p, in_n = p < headdim, n < dstate
    group = tl.load(head_to_group_ptr + head * head_to_group_stride).to(tl.int64)

    x_ptr += batch * x_strides[0] + head * x_strides[2]
    dt_ptr += batch * dt_strides[0] + head * dt_strides[2]
    B_ptr += batch * B_strides[0] + group * B_strides[2]
    C_ptr += batch * C_strides[0] + group * C_strides[2]
    y_ptr += (batch * length * heads + head) * headdim
    final_ptr += (batch * heads + head) * headdim * dstate
    A = tl.load(A_ptr + head * A_stride).to(tl.float32)
    bias = None
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + head * dt_bias_stride).to(tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask=in_p, other=0.0).to(tl.float32)

    in_state = in_p[:, None] & in_n[None, :]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        initial_ptr += batch * initial_strides[0] + head * initial_strides[1]
        state = tl.load(initial_ptr + p[:, None] * initial_strides[2] + n[None, :] * initial_strides[3],
                        mask=in_state, other=0.0).to(tl.float32)
    run_in = tl.zeros((), tl.int32)                       # the run that the state belongs to

    for start in range(0, length, Q):
        t = (start + q).to(tl.int64)
        live = t < length
        dt = discrete_dt(tl.load(dt_ptr + t * dt_strides[1], mask=live, other=0.0), bias, DT_SOFTPLUS)
        if DT_LIMITED:                                    # comparisons, so that NaN stays NaN
            dt = tl.where(dt < dt_min, dt_min, dt)
            dt = tl.where(dt > dt_max, dt_max, dt)
        shown = live
        if runs_ptr is not None:
            run = tl.load(runs_ptr + batch * length + tl.minimum(t, length - 1))
            shown = live & (run >= 0)
            run = tl.where(run >= 0, run, ~run)
            run_out = tl.max(run, 0)                      # runs never decrease
        dt = tl.where(shown, dt, 0.0)

        decay = (dt * A).to(tl.float64)
        s = tl.cumsum(decay, 0)
        remaining = (tl.sum(decay, 0) - s).to(tl.float32)
        total = tl.sum(decay, 0).to(tl.float32)
        s_high = s.to(tl.float32)
        s_low = (s - s_high.to(tl.float64)).to(tl.float32)
        segment = (s_high[:, None] - s_high[None, :]) + (s_low[:, None] - s_low[None, :])
        seen = q[:, None] >= q[None, :]
        from_state, to_state = tl.exp(s_high), tl.exp(remaining) * dt
        keep_state = tl.exp(total)
        if runs_ptr is not None:
            seen &= run[:, None] == run[None, :]
            from_state = tl.where(run == run_in, from_state, 0.0)
            to_state = tl.where(run == run_out, to_state, 0.0)
            keep_state = tl.where(run_in == run_out, keep_state, 0.0)
            run_in = run_out
        weights = tl.exp(tl.where(seen, segment, float("-inf"))) * dt[None, :]

        rows = live[:, None] & in_n[None, :]
        B = tl.load(B_ptr + t[:, None] * B_strides[1] + n[None, :] * B_strides[3], mask=rows, other=0.0).to(operand)
        C = tl.load(C_ptr + t[:, None] * C_strides[1] + n[None, :] * C_strides[3], mask=rows, other=0.0).to(operand)
        tile = live[:, None] & in_p[None, :]
        x = tl.load(x_ptr + t[:, None] * x_strides[1] + p[None, :] * x_strides[3], mask=tile, other=0.0)

        y = tl.dot(C, tl.trans(state.to(operand)), input_precision="tf32x3") * from_state[:, None]
        scores = tl.dot(C, tl.trans(B), input_precision="tf32x3") * weights
        y = tl.dot(scores.to(operand), x, y, input_precision="tf32x3")
        inputs = (x.to(tl.float32) * to_state[:, None]).to(operand)
        state = tl.dot(tl.trans(inputs), B, state * keep_state, input_precision="tf32x3")

        if D_ptr is not None:
            y += D[None, :] * x.to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + batch * z_strides[0] + t[:, None] * z_strides[1] + head * z_strides[2]
                        + p[None, :] * z_strides[3], mask=tile, other=0.0).to(tl.float32)
            y *= silu(z)
        y = tl.where(shown[:, None], y, 0.0)
        tl.store(y_ptr + t[:, None] * heads * headdim + p[None, :], y.to(operand), mask=tile)

    tl.store(final_ptr + p[:, None] * dstate + n[None, :], state, mask=in_state)


def _blocks(headdim: int, dstate: int, itemsize: int) -> dict[str, int]:
    """Tile sizes: a program's state is at most 8192 fp32 numbers, 64 registers of each of 128 threads.

    fp32 operands take three TF32 products and twice the shared memory, hence half of everything.
    """
    block_n = max(16, triton.next_power_of_2(dstate))
    small = itemsize == 4
    block_p = max(16, min(triton.next_power_of_2(headdim), 32 if small else 64, (4096 if small else 8192) // block_n))
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "Q": 32 if small else 64, "num_warps": 4, "num_stages": 1}


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
        initial_states: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, z (B, L, H, P); dt (B, L, H); B, C (B, L, G, N) -> y (B, L, H, P), final states (B, H, P, N) fp32."""
    batch, length, heads, headdim = x.shape
    dstate = B.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_states = torch.empty(batch, heads, headdim, dstate, dtype=torch.float32, device=x.device)
    runs = None if seq_idx is None else sequence_runs(seq_idx)
    blocks = _blocks(headdim, dstate, x.element_size())
    D_strides = None if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    _ssd_kernel[(batch * heads * triton.cdiv(headdim, blocks["BLOCK_P"]),)](
        x, dt, A, B, C, D, z, dt_bias, head_to_group, initial_states, runs, y, final_states,
        length, heads, headdim, dstate, dt_min, dt_max,
        x.stride(), dt.stride(), B.stride(), C.stride(), D_strides, None if z is None else z.stride(),
        None if initial_states is None else initial_states.stride(),
        A.stride(0), None if dt_bias is None else dt_bias.stride(0), head_to_group.stride(0),
        DT_SOFTPLUS=dt_softplus, DT_LIMITED=(dt_min, dt_max) != (0.0, float("inf")), **blocks)
    return y, final_states
