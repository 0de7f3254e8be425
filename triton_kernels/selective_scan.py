# Selective scan (Mamba-1), forward.
#
#   delta  = softplus(delta + bias)
#   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]
#   y[t]   = (sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])
#
# One program owns (batch, tile of channels) and walks along time with its channels x N state in
# registers. STEPS tokens are unrolled and their outputs stored together, so that the loads of
# later tokens do not wait behind the store of an earlier one. B and C are rows (row, n, t): the
# row is the channel's group, or the channel itself where they do not change with time.
"""Triton forward of shedder.ops' selective_scan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import sequence_runs
from .pointwise import discrete_dt, silu


@triton.jit(do_not_specialize=["length", "channels"])
def _selective_scan_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, runs_ptr,
                           group_ptr, y_ptr, final_ptr, length, channels, dstate,
                           u_strides, delta_strides, A_strides, B_strides, C_strides, z_strides,
                           initial_strides, y_strides, D_stride, bias_stride, group_stride,
                           SOFTPLUS: tl.constexpr, B_ROWS: tl.constexpr, C_ROWS: tl.constexpr,
                           BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr):
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    c = (pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    steps = tl.arange(0, STEPS)
    in_c, in_n = c < channels, n < dstate
    in_state = in_c[:, None] & in_n[None, :]

    u_ptr += batch * u_strides[0] + c * u_strides[1]
    delta_ptr += batch * delta_strides[0] + c * delta_strides[1]
    B_ptr += batch * B_strides[0]
    C_ptr += batch * C_strides[0]
    if group_ptr is not None:
        group = tl.load(group_ptr + c * group_stride, mask=in_c, other=0).to(tl.int64)
    # ROWS is "shared", "group" or "channel": one row for all channels, or a row for each
    if B_ROWS == "shared":
        B_ptrs, B_mask = B_ptr + n * B_strides[2], in_n
    else:
        B_row = c if B_ROWS == "channel" else group
        B_ptrs, B_mask = B_ptr + B_row[:, None] * B_strides[1] + n[None, :] * B_strides[2], in_state
    if C_ROWS == "shared":
        C_ptrs, C_mask = C_ptr + n * C_strides[2], in_n
    else:
        C_row = c if C_ROWS == "channel" else group
        C_ptrs, C_mask = C_ptr + C_row[:, None] * C_strides[1] + n[None, :] * C_strides[2], in_state

    A = tl.load(A_ptr + c[:, None] * A_strides[0] + n[None, :] * A_strides[1], mask=in_state, other=0.0).to(tl.float32)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c * bias_stride, mask=in_c, other=0.0).to(tl.float32)
    if D_ptr is not None:
        D = tl.load(D_ptr + c * D_stride, mask=in_c, other=0.0).to(tl.float32)
    state = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + batch * initial_strides[0] + c[:, None] * initial_strides[1]
                        + n[None, :] * initial_strides[2], mask=in_state, other=0.0).to(tl.float32)
    run_in = tl.zeros((), tl.int32)                       # the run that the state belongs to

    for start in range(0, length, STEPS):
        y_tile = tl.zeros((BLOCK_C, STEPS), tl.float32)
        for i in tl.static_range(STEPS):
            live = start + i < length
            t = tl.minimum(start + i, length - 1).to(tl.int64)
            u = tl.load(u_ptr + t * u_strides[2], mask=in_c, other=0.0).to(tl.float32)
            delta = tl.load(delta_ptr + t * delta_strides[2], mask=in_c, other=0.0)
            B = tl.load(B_ptrs + t * B_strides[3], mask=B_mask, other=0.0).to(tl.float32)
            C = tl.load(C_ptrs + t * C_strides[3], mask=C_mask, other=0.0).to(tl.float32)
            delta = discrete_dt(delta, bias, SOFTPLUS)
            if runs_ptr is not None:
                run = tl.load(runs_ptr + batch * length + t)
                live = live & (run >= 0)
                run = tl.where(run >= 0, run, ~run)
                state = tl.where(run == run_in, state, 0.0)
                run_in = run
            delta = tl.where(live, delta, 0.0)            # a token that is not there leaves the state alone
            if B_ROWS == "shared":
                B = B[None, :]
            if C_ROWS == "shared":
                C = C[None, :]
            state = tl.exp(delta[:, None] * A) * state + (delta * u)[:, None] * B
            y = tl.sum(state * C, 1)
            if D_ptr is not None:
                y += D * u
            y = tl.where(live, y, 0.0)
            y_tile = tl.where(steps[None, :] == i, y[:, None], y_tile)

        t = (start + steps).to(tl.int64)
        tile = in_c[:, None] & (t < length)[None, :]
        if z_ptr is not None:
            z = tl.load(z_ptr + batch * z_strides[0] + c[:, None] * z_strides[1] + t[None, :] * z_strides[2],
                        mask=tile, other=0.0).to(tl.float32)
            y_tile *= silu(z)
        if runs_ptr is not None:                          # a NaN gate must not show at padding
            run = tl.load(runs_ptr + batch * length + t, mask=t < length, other=-1)
            y_tile = tl.where(run[None, :] >= 0, y_tile, 0.0)
        tl.store(y_ptr + batch * y_strides[0] + c[:, None] * y_strides[1] + t[None, :] * y_strides[2],
                 y_tile.to(y_ptr.dtype.element_ty), mask=tile)

    final_ptr += batch * channels * dstate
    tl.store(final_ptr + c[:, None] * dstate + n[None, :], state, mask=in_state)


def _blocks(dstate: int, shared: bool) -> dict[str, int]:
    """One warp with at most 512 state numbers, 16 in each thread; rows for each channel take more registers."""
    block_n = max(4, triton.next_power_of_2(dstate))
    return {"BLOCK_C": max(2, min(32, 512 // block_n)), "BLOCK_N": block_n, "STEPS": 8 if shared else 4, "num_warps": 1}


def _rows(M: Tensor) -> tuple[str, tuple[int, ...]]:
    """How B or C is indexed, and its strides over (batch, row, n, t)."""
    if M.dim() == 2:                                      # (D, N), the same at every token
        return "channel", (0, M.stride(0), M.stride(1), 0)
    return ("shared" if M.shape[1] == 1 else "group"), M.stride()


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L) or (D, N) -> y (B, D, L), final state (B, D, N) fp32."""
    batch, channels, length = u.shape
    dstate = A.shape[1]
    y = torch.empty_like(u)
    final_state = torch.empty(batch, channels, dstate, dtype=torch.float32, device=u.device)
    runs = None if seq_idx is None else sequence_runs(seq_idx)
    (B_rows, B_strides), (C_rows, C_strides) = _rows(B), _rows(C)
    if "group" not in (B_rows, C_rows):
        channel_to_group = None
    blocks = _blocks(dstate, shared=B_rows == C_rows == "shared")
    _selective_scan_kernel[(batch * triton.cdiv(channels, blocks["BLOCK_C"]),)](
        u, delta, A, B, C, D, z, delta_bias, initial_state, runs, channel_to_group, y, final_state,
        length, channels, dstate,
        u.stride(), delta.stride(), A.stride(), B_strides, C_strides, None if z is None else z.stride(),
        None if initial_state is None else initial_state.stride(), y.stride(),
        None if D is None else D.stride(0), None if delta_bias is None else delta_bias.stride(0),
        None if channel_to_group is None else channel_to_group.stride(0),
        SOFTPLUS=delta_softplus, B_ROWS=B_rows, C_ROWS=C_rows, **blocks)
    return y, final_state
