# State-space duality (Mamba-2), forward in one launch, for 16-bit operands and N up to 128.
#
# The recurrence and its form in chunks are those of ssd.py. One program owns a head (or a tile of
# its P) and walks along the chunks with the state in the accumulators of its last product; only
# the final state goes to memory. y and the scores C . B are computed transposed: so the state is
# an operand of the next product from the registers that hold it.
# Bound: latency. A chunk takes some 5 us, whether one program or two share a multiprocessor.
"""Triton forward of shedder.ops' ssd where the whole state of a head fits in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import sequence_runs
from .pointwise import LOG2E, discrete_dt, exp2, silu
from .variants import compile_side_by_side

Q, BLOCK_P = 64, 64                    # wgmma takes 64 rows: tokens for the scores, channels for y and the state
# Strides are named tensor_axis. No size or address is specialised, nor part of a tuple (which would
# be): a model whose layers all differ compiles this kernel for few of them.
_SIZES = ["x_ptr", "dt_ptr", "A_ptr", "B_ptr", "C_ptr", "D_ptr", "z_ptr", "dt_bias_ptr", "head_to_group_ptr",
          "length", "heads", "headdim", "dstate",
          "x_b", "x_t", "x_h", "x_p", "B_b", "B_t", "B_g", "B_n", "C_b", "C_t", "C_g", "C_n", "z_b", "z_t", "z_h",
          "z_p", "dt_b", "dt_t", "dt_h", "D_h", "D_p", "initial_b", "initial_h", "initial_p", "initial_n", "A_h",
          "dt_bias_h", "head_to_group_h"]


@triton.jit(do_not_specialize=_SIZES)
def _ssd_fused_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, head_to_group_ptr, initial_ptr,
                      runs_ptr, y_ptr, final_ptr, length, heads, headdim, dstate, dt_min, dt_max,
                      x_b, x_t, x_h, x_p, B_b, B_t, B_g, B_n, C_b, C_t, C_g, C_n, z_b, z_t, z_h, z_p, dt_b, dt_t, dt_h,
                      D_h, D_p, initial_b, initial_h, initial_p, initial_n, A_h, dt_bias_h, head_to_group_h,
                      DT_SOFTPLUS: tl.constexpr, DT_LIMITED: tl.constexpr, ALIGN: tl.constexpr, FAR: tl.constexpr,
                      Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    # ALIGN is 0 where P or N is strided. Else sizes and strides of x, z, B and C come in units of ALIGN elements, and
    # their addresses are multiples of so many.
    operand = x_ptr.dtype.element_ty                      # of the matrix products
    UNIT: tl.constexpr = ALIGN if ALIGN > 0 else 1
    UNIT_BYTES: tl.constexpr = UNIT * operand.primitive_bitwidth // 8
    headdim *= UNIT
    dstate *= UNIT
    p_tiles = tl.cdiv(headdim, BLOCK_P)
    pid = tl.program_id(0)
    head = (pid // p_tiles % heads).to(tl.int64)
    batch = (pid // p_tiles // heads).to(tl.int64)
    group = tl.load(head_to_group_ptr + head * head_to_group_h).to(tl.int64)
    p = pid % p_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    q = tl.arange(0, Q)
    in_p, in_n = p < headdim, n < dstate
    causal = q[:, None] <= q[None, :]

    # 32-bit offsets inside a tile, where they reach: addresses of 64 bits would take twice the registers
    row, p_column, n_column = q, p, n
    if FAR:
        row, p_column, n_column = q.to(tl.int64), p.to(tl.int64), n.to(tl.int64)
        x_t, B_t, C_t, z_t = x_t.to(tl.int64), B_t.to(tl.int64), C_t.to(tl.int64), z_t.to(tl.int64)
    x_step, B_step, C_step = x_t * UNIT, B_t * UNIT, C_t * UNIT
    if ALIGN > 0:
        x_place = row[:, None] * x_step + p_column[None, :]
        B_place = row[:, None] * B_step + n_column[None, :]
        C_place = row[:, None] * C_step + n_column[None, :]
    else:
        x_place = row[:, None] * x_step + p_column[None, :] * x_p
        B_place = row[:, None] * B_step + n_column[None, :] * B_n
        C_place = row[:, None] * C_step + n_column[None, :] * C_n
    y_place = q[:, None] * (heads * headdim) + p[None, :]
    x_ptr = tl.multiple_of(x_ptr + (batch * x_b + head * x_h) * UNIT, UNIT_BYTES)
    B_ptr = tl.multiple_of(B_ptr + (batch * B_b + group * B_g) * UNIT, UNIT_BYTES)
    C_ptr = tl.multiple_of(C_ptr + (batch * C_b + group * C_g) * UNIT, UNIT_BYTES)
    dt_ptr += batch * dt_b + head * dt_h
    y_ptr += (batch * length * heads + head) * headdim
    if z_ptr is not None:
        z_ptr = tl.multiple_of(z_ptr + (batch * z_b + head * z_h) * UNIT, UNIT_BYTES)
        if ALIGN > 0:
            z_place = row[:, None] * (z_t * UNIT) + p_column[None, :]
        else:
            z_place = row[:, None] * z_t + p_column[None, :] * z_p

    A = tl.load(A_ptr + head * A_h).to(tl.float32) * LOG2E
    bias = None
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + head * dt_bias_h).to(tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_h + p * D_p, mask=in_p, other=0.0).to(tl.float32)
    in_state = in_p[:, None] & in_n[None, :]
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + batch * initial_b + head * initial_h
                        + p[:, None].to(tl.int64) * initial_p + n[None, :].to(tl.int64) * initial_n,
                        mask=in_state, other=0.0).to(tl.float32)
    if runs_ptr is not None:
        runs_ptr += batch * length
    run_in = tl.zeros((), tl.int32)                       # the run that the state belongs to

    dt_next = tl.load(dt_ptr + q.to(tl.int64) * dt_t, mask=q < length, other=0.0)
    for start in range(0, length, Q):
        live = start + q < length
        dt = discrete_dt(dt_next, bias, DT_SOFTPLUS)
        dt_next = tl.load(dt_ptr + (start + Q + q).to(tl.int64) * dt_t, mask=start + Q + q < length, other=0.0)
        x = tl.load(x_ptr + x_place, mask=live[:, None] & in_p[None, :], other=0.0)
        B = tl.load(B_ptr + B_place, mask=live[:, None] & in_n[None, :], other=0.0).to(operand)
        C = tl.load(C_ptr + C_place, mask=live[:, None] & in_n[None, :], other=0.0).to(operand)
        if DT_LIMITED:                                    # comparisons, so that NaN stays NaN
            dt = tl.where(dt < dt_min, dt_min, dt)
            dt = tl.where(dt > dt_max, dt_max, dt)
        shown = live
        if runs_ptr is not None:
            run = tl.load(runs_ptr + tl.minimum(start + q, length - 1))
            shown = live & (run >= 0)
            run = tl.where(run >= 0, run, ~run)
            run_out = tl.max(run, 0)                      # runs never decrease
        dt = tl.where(shown, dt, 0.0)                     # a token that is not there leaves the state alone
        decay = dt * A
        s = tl.cumsum(decay, 0)
        total = tl.sum(decay, 0)
        to_state = exp2(total - s) * dt
        keep = exp2(total)
        from_state = exp2(s)
        seen = causal
        if runs_ptr is not None:
            to_state = tl.where(run == run_out, to_state, 0.0)
            keep = tl.where(run_in == run_out, keep, 0.0)
            from_state = tl.where(run == run_in, from_state, 0.0)
            seen = causal & (run[:, None] == run[None, :])
            run_in = run_out
        segment = s[None, :] - s[:, None]

        y = tl.dot(state.to(operand), C.T)
        y *= from_state[None, :]
        scores = tl.dot(B, C.T)
        scores *= exp2(tl.where(seen, segment, float("-inf"))) * dt[:, None]
        y = tl.dot(x.T, scores.to(operand), y)
        if D_ptr is not None:
            y += D[:, None] * x.T.to(tl.float32)
        y = y.T
        if z_ptr is not None:
            y *= silu(tl.load(z_ptr + z_place, mask=live[:, None] & in_p[None, :], other=0.0).to(tl.float32))
            z_ptr += (tl.zeros((), tl.int64) + Q) * z_t * UNIT
        if runs_ptr is not None:
            y = tl.where(shown[:, None], y, 0.0)
        tl.store(y_ptr + y_place, y.to(operand), mask=live[:, None] & in_p[None, :])
        state *= keep
        state = tl.dot((x.T.to(tl.float32) * to_state[None, :]).to(operand), B, state)

        x_ptr += (tl.zeros((), tl.int64) + Q) * x_step
        B_ptr += (tl.zeros((), tl.int64) + Q) * B_step
        C_ptr += (tl.zeros((), tl.int64) + Q) * C_step
        y_ptr += (tl.zeros((), tl.int64) + Q) * heads * headdim

    if final_ptr is not None:
        tl.store(final_ptr + (batch * heads + head) * headdim * dstate + p[:, None] * dstate + n[None, :], state,
                 mask=in_state)


def ssd_fused(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
              z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float,
              head_to_group: Tensor, initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
              ) -> tuple[Tensor, Tensor | None]:
    """x, z (B, L, H, P); dt (B, L, H); B, C (B, L, G, N) -> y (B, L, H, P), final states (B, H, P, N) fp32."""
    batch, length, heads, headdim = x.shape
    dstate = B.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_states = None
    if return_state:
        final_states = torch.empty(batch, heads, headdim, dstate, dtype=torch.float32, device=x.device)
    runs = None if seq_idx is None else sequence_runs(seq_idx)
    inputs = [x, B, C, x if z is None else z]
    strides = [t.stride() for t in inputs]
    sizes = [headdim, dstate, *(size for one in strides for size in one[:3]), *(t.data_ptr() // 2 for t in inputs)]
    align = next((a for a in (8, 4, 1) if all(size % a == 0 for size in sizes)), 1)
    if any(one[3] != 1 for one in strides):
        align = 0
    unit = max(align, 1)
    given = (x, dt, A, B, C, D, z, dt_bias, head_to_group, initial_states, runs)
    arguments = (
        *given, y, final_states, length, heads, headdim // unit, dstate // unit, dt_min, dt_max,
        *(size for one in strides for size in (*(size // unit for size in one[:3]), one[3])), *dt.stride(),
        *((0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)),
        *((0, 0, 0, 0) if initial_states is None else initial_states.stride()),
        A.stride(0), 0 if dt_bias is None else dt_bias.stride(0), head_to_group.stride(0))
    limited = (dt_min, dt_max) != (0.0, float("inf"))
    far = max(Q * one[1] + 256 * one[3] for one in strides) >= 2 ** 31
    options = {"DT_SOFTPLUS": dt_softplus, "DT_LIMITED": limited, "FAR": far, "Q": Q, "BLOCK_P": BLOCK_P,
               "num_warps": 4, "num_stages": 2}
    if align > 0:
        kind = (x.device, dt_softplus, limited, far, return_state, *(None if t is None else t.dtype for t in given))
        compile_side_by_side(_ssd_fused_kernel, kind, arguments,
                             [{"ALIGN": a, "BLOCK_N": n} for n in (128, 64) for a in (1, 4, 8)], **options)
    _ssd_fused_kernel[(batch * heads * triton.cdiv(headdim, BLOCK_P),)](
        *arguments, ALIGN=align, BLOCK_N=64 if dstate <= 64 else 128, **options)
    return y, final_states
