# State-space duality (Mamba-2), forward.
#
#   dt       = clamp(softplus(dt + bias), dt_min, dt_max)
#   h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
#   y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])
#
# In chunks of Q tokens, with s[t] = sum of dt A from the chunk's first token to t:
#
#   h_out = exp(s[Q-1]) h_in + sum_j exp(s[Q-1] - s[j]) dt[j] x[j] B[j]
#   y[t]  = sum_{j <= t} (C[t] . B[j]) exp(s[t] - s[j]) dt[j] x[j]  +  exp(s[t]) C[t] h_in
#
# 16-bit operands with N up to 128 take the one launch of ssd_fused.py, the others two launches. States:
# one program owns a tile of P x N of one head and walks along the chunks, leaving the state
# before each of them. Outputs: one program owns (chunk, head, tile of P).
# Exponents are differences of s taken before exp, so nothing overflows that the recurrence
# would not; s is summed in fp64 and its differences are taken with two fp32 numbers, so a
# strong decay early in a chunk costs the later tokens no digits.
"""Triton forward of shedder.ops' ssd."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import sequence_runs
from .pointwise import LOG2E, discrete_dt, silu
from .ssd_fused import ssd_fused


@triton.jit
def _chunk_dt(dt_ptr, runs_ptr, t, length, dt_stride, bias, dt_min, dt_max,
              DT_SOFTPLUS: tl.constexpr, DT_LIMITED: tl.constexpr):
    """(dt, shown, run) at tokens t. Without a token, or at padding, dt is 0 and shown is false."""
    shown = t < length
    dt = discrete_dt(tl.load(dt_ptr + t * dt_stride, mask=shown, other=0.0), bias, DT_SOFTPLUS)
    if DT_LIMITED:                                        # comparisons, so that NaN stays NaN
        dt = tl.where(dt < dt_min, dt_min, dt)
        dt = tl.where(dt > dt_max, dt_max, dt)
    run = tl.zeros_like(t)
    if runs_ptr is not None:
        run = tl.load(runs_ptr + tl.minimum(t, length - 1))
        shown = shown & (run >= 0)
        run = tl.where(run >= 0, run, ~run)
    return tl.where(shown, dt, 0.0), shown, run


@triton.jit(do_not_specialize=["length", "heads"])
def _ssd_states_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, dt_bias_ptr, head_to_group_ptr, initial_ptr, runs_ptr,
                       states_ptr, final_ptr, length, heads, headdim, dstate, dt_min, dt_max,
                       x_strides, dt_strides, B_strides, initial_strides,
                       A_stride, dt_bias_stride, head_to_group_stride,
                       DT_SOFTPLUS: tl.constexpr, DT_LIMITED: tl.constexpr,
                       Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    operand = x_ptr.dtype.element_ty                      # of the matrix products
    p_tiles, n_tiles = tl.cdiv(headdim, BLOCK_P), tl.cdiv(dstate, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    p = (pid // n_tiles % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    head = (pid // n_tiles // p_tiles % heads).to(tl.int64)
    batch = (pid // n_tiles // p_tiles // heads).to(tl.int64)
    group = tl.load(head_to_group_ptr + head * head_to_group_stride).to(tl.int64)
    in_p, in_n = p < headdim, n < dstate
    tile = in_p[:, None] & in_n[None, :]
    place = p[:, None] * dstate + n[None, :]              # in one head of the states

    x_ptr += batch * x_strides[0] + head * x_strides[2]
    dt_ptr += batch * dt_strides[0] + head * dt_strides[2]
    B_ptr += batch * B_strides[0] + group * B_strides[2]
    states_ptr += (batch * tl.cdiv(length, Q) * heads + head) * headdim * dstate
    A = tl.load(A_ptr + head * A_stride).to(tl.float32) * LOG2E
    bias = None
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + head * dt_bias_stride).to(tl.float32)
    if runs_ptr is not None:
        runs_ptr += batch * length

    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + batch * initial_strides[0] + head * initial_strides[1]
                        + p[:, None] * initial_strides[2] + n[None, :] * initial_strides[3],
                        mask=tile, other=0.0).to(tl.float32)
    run_in = tl.zeros((), tl.int32)                       # the run that the state belongs to

    for start in range(0, length, Q):
        tl.store(states_ptr + place, state.to(operand), mask=tile)
        states_ptr += (tl.zeros((), tl.int64) + heads) * headdim * dstate
        t = (start + tl.arange(0, Q)).to(tl.int64)
        dt, _, run = _chunk_dt(dt_ptr, runs_ptr, t, length, dt_strides[1], bias, dt_min, dt_max,
                               DT_SOFTPLUS, DT_LIMITED)
        decay = (dt * A).to(tl.float64)
        total = tl.sum(decay, 0)
        to_state = tl.exp2((total - tl.cumsum(decay, 0)).to(tl.float32)) * dt
        keep = tl.exp2(total.to(tl.float32))
        if runs_ptr is not None:
            run_out = tl.max(run, 0)                      # runs never decrease
            to_state = tl.where(run == run_out, to_state, 0.0)
            keep = tl.where(run_in == run_out, keep, 0.0)
            run_in = run_out
        live = t < length
        x = tl.load(x_ptr + p[:, None] * x_strides[3] + t[None, :] * x_strides[1],
                    mask=in_p[:, None] & live[None, :], other=0.0).to(tl.float32)
        B = tl.load(B_ptr + t[:, None] * B_strides[1] + n[None, :] * B_strides[3],
                    mask=live[:, None] & in_n[None, :], other=0.0).to(operand)
        state = tl.dot((x * to_state[None, :]).to(operand), B, state * keep, input_precision="tf32x3")

    if final_ptr is not None:
        tl.store(final_ptr + (batch * heads + head) * headdim * dstate + place, state, mask=tile)


@triton.jit(do_not_specialize=["length", "heads"])
def _ssd_outputs_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, head_to_group_ptr, runs_ptr,
                        states_ptr, y_ptr, length, heads, headdim, dstate, dt_min, dt_max,
                        x_strides, dt_strides, B_strides, C_strides, D_strides, z_strides,
                        A_stride, dt_bias_stride, head_to_group_stride,
                        DT_SOFTPLUS: tl.constexpr, DT_LIMITED: tl.constexpr,
                        Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    operand = x_ptr.dtype.element_ty
    p_tiles, chunks = tl.cdiv(headdim, BLOCK_P), tl.cdiv(length, Q)
    pid = tl.program_id(0)
    p = (pid % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    head = (pid // p_tiles % heads).to(tl.int64)
    chunk = pid // p_tiles // heads % chunks
    batch = (pid // p_tiles // heads // chunks).to(tl.int64)
    group = tl.load(head_to_group_ptr + head * head_to_group_stride).to(tl.int64)
    q = tl.arange(0, Q)
    t = (chunk * Q + q).to(tl.int64)
    live, in_p = t < length, p < headdim

    B_ptr += batch * B_strides[0] + group * B_strides[2]
    C_ptr += batch * C_strides[0] + group * C_strides[2]
    states_ptr += ((batch * chunks + chunk) * heads + head) * headdim * dstate
    y = tl.zeros((Q, BLOCK_P), tl.float32)
    scores = tl.zeros((Q, Q), tl.float32)
    for first in range(0, dstate, BLOCK_N):
        n = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = n < dstate
        C = tl.load(C_ptr + t[:, None] * C_strides[1] + n[None, :] * C_strides[3],
                    mask=live[:, None] & in_n[None, :], other=0.0).to(operand)
        B = tl.load(B_ptr + n[:, None] * B_strides[3] + t[None, :] * B_strides[1],
                    mask=in_n[:, None] & live[None, :], other=0.0).to(operand)
        state = tl.load(states_ptr + n[:, None] + p[None, :] * dstate, mask=in_n[:, None] & in_p[None, :], other=0.0)
        scores = tl.dot(C, B, scores, input_precision="tf32x3")
        y = tl.dot(C, state, y, input_precision="tf32x3")

    A = tl.load(A_ptr + head * A_stride).to(tl.float32) * LOG2E
    bias = None
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + head * dt_bias_stride).to(tl.float32)
    if runs_ptr is not None:
        runs_ptr += batch * length
    dt_ptr += batch * dt_strides[0] + head * dt_strides[2]
    dt, shown, run = _chunk_dt(dt_ptr, runs_ptr, t, length, dt_strides[1], bias, dt_min, dt_max,
                               DT_SOFTPLUS, DT_LIMITED)
    s = tl.cumsum((dt * A).to(tl.float64), 0)
    s_high = s.to(tl.float32)
    s_low = (s - s_high.to(tl.float64)).to(tl.float32)
    segment = (s_high[:, None] - s_high[None, :]) + (s_low[:, None] - s_low[None, :])
    seen = q[:, None] >= q[None, :]
    from_state = tl.exp2(s_high)
    if runs_ptr is not None:
        run_in = tl.load(runs_ptr + chunk * Q - 1, mask=chunk > 0, other=0)
        run_in = tl.where(run_in >= 0, run_in, ~run_in)
        seen &= run[:, None] == run[None, :]
        from_state = tl.where(run == run_in, from_state, 0.0)
    scores *= tl.exp2(tl.where(seen, segment, float("-inf"))) * dt[None, :]

    tile = live[:, None] & in_p[None, :]
    x = tl.load(x_ptr + batch * x_strides[0] + t[:, None] * x_strides[1] + head * x_strides[2]
                + p[None, :] * x_strides[3], mask=tile, other=0.0)
    y = tl.dot(scores.to(operand), x, y * from_state[:, None], input_precision="tf32x3")
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask=in_p, other=0.0).to(tl.float32)
        y += D[None, :] * x.to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_strides[0] + t[:, None] * z_strides[1] + head * z_strides[2]
                    + p[None, :] * z_strides[3], mask=tile, other=0.0).to(tl.float32)
        y *= silu(z)
    y = tl.where(shown[:, None], y, 0.0)
    tl.store(y_ptr + ((batch * length + t[:, None]) * heads + head) * headdim + p[None, :], y.to(operand), mask=tile)


def _blocks(dstate: int, itemsize: int) -> dict[str, int]:
    """Tile sizes. fp32 operands take three TF32 products and twice the room, hence half of everything.

    8 warps of 64 x 64 tiles: with 4, sizes that are no multiple of 16 spill.
    """
    largest = 32 if itemsize == 4 else 64
    return {"Q": largest,
            "BLOCK_P": largest,
            "BLOCK_N": max(16, min(triton.next_power_of_2(dstate), largest)),
            "num_warps": 4 if itemsize == 4 else 8, "num_stages": 1}


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
        initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
        ) -> tuple[Tensor, Tensor | None]:
    """x, z (B, L, H, P); dt (B, L, H); B, C (B, L, G, N) -> y (B, L, H, P), final states (B, H, P, N) fp32."""
    batch, length, heads, headdim = x.shape
    dstate = B.shape[-1]
    if x.element_size() == 2 and dstate <= 128:
        return ssd_fused(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, head_to_group, initial_states,
                         seq_idx, return_state)
    blocks = _blocks(dstate, x.element_size())
    chunks, p_tiles = triton.cdiv(length, blocks["Q"]), triton.cdiv(headdim, blocks["BLOCK_P"])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = torch.empty(batch, chunks, heads, headdim, dstate, dtype=x.dtype, device=x.device)    # before each chunk
    final_states = None
    if return_state:
        final_states = torch.empty(batch, heads, headdim, dstate, dtype=torch.float32, device=x.device)
    runs = None if seq_idx is None else sequence_runs(seq_idx)
    dt_bias_stride = None if dt_bias is None else dt_bias.stride(0)
    limited = (dt_min, dt_max) != (0.0, float("inf"))
    _ssd_states_kernel[(batch * heads * p_tiles * triton.cdiv(dstate, blocks["BLOCK_N"]),)](
        x, dt, A, B, dt_bias, head_to_group, initial_states, runs, states, final_states,
        length, heads, headdim, dstate, dt_min, dt_max,
        x.stride(), dt.stride(), B.stride(), None if initial_states is None else initial_states.stride(),
        A.stride(0), dt_bias_stride, head_to_group.stride(0),
        DT_SOFTPLUS=dt_softplus, DT_LIMITED=limited, **blocks)
    _ssd_outputs_kernel[(batch * chunks * heads * p_tiles,)](
        x, dt, A, B, C, D, z, dt_bias, head_to_group, runs, states, y,
        length, heads, headdim, dstate, dt_min, dt_max,
        x.stride(), dt.stride(), B.stride(), C.stride(),
        None if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0), None if z is None else z.stride(),
        A.stride(0), dt_bias_stride, head_to_group.stride(0),
        DT_SOFTPLUS=dt_softplus, DT_LIMITED=limited, **blocks)
    return y, final_states
