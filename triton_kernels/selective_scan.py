# Selective scan (Mamba-1), forward.
#
#   delta  = softplus(delta + bias)
#   h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]
#   y[t]   = (sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])
#
# One program owns (batch, tile of channels) and walks along time in tiles of STEPS tokens with its
# N x channels state in registers. What is computed has the shape (STEPS, N, channels), time first:
# Triton then spreads channels and states over the lanes and keeps all steps of a tile in one
# thread, where the scan along time is one product and one sum a step and no exchange. Tiles of
# u, delta, z, B and C are loaded as they lie in memory. B and C are rows (row, n, t): the row is
# the channel's group, or the channel itself where they do not change with time.
"""Triton forward of shedder.ops' selective_scan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed import sequence_runs
from .pointwise import LOG2E, discrete_dt, exp2, silu


@triton.jit
def _then(decay_before, state_before, decay, gain):
    return decay_before * decay, decay * state_before + gain


@triton.jit
def _then_or_afresh(decay_before, state_before, decay, gain):
    """A decay of 0 forgets a state that is infinite or NaN, too: it is another sequence's."""
    return decay_before * decay, tl.where(decay == 0.0, gain, decay * state_before + gain)


@triton.jit
def _later(t_left, left, t_right, right):
    later = t_right > t_left
    return tl.where(later, t_right, t_left), tl.where(later, right, left)


@triton.jit
def _stride(units, IS_UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """A stride of 1, known when compiling, or one that comes in units of ALIGN elements: so loads can be wide."""
    if IS_UNIT:
        stride = tl.full((), 1, tl.int64)
    else:
        stride = units.to(tl.int64) * ALIGN
    return stride


# Strides are named tensor_axis. What differs from layer to layer is not specialised, nor part of a
# tuple (which would be): a model whose layers all differ compiles this kernel for few of them.
_SIZES = ["length", "channels", "dstate", "u_b", "u_c", "u_t", "delta_b", "delta_c", "delta_t", "y_b", "y_c", "y_t",
          "z_b", "z_c", "z_t", "B_b", "B_row", "B_n", "B_t", "C_b", "C_row", "C_n", "C_t"]


@triton.jit(do_not_specialize=_SIZES)
def _selective_scan_kernel(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, runs_ptr,
                           group_ptr, y_ptr, final_ptr, length, channels, dstate,
                           u_b, u_c, u_t, delta_b, delta_c, delta_t, y_b, y_c, y_t, z_b, z_c, z_t,
                           B_b, B_row, B_n, B_t, C_b, C_row, C_n, C_t, A_c, A_n, initial_b, initial_c, initial_n,
                           D_c, bias_c, group_c,
                           SOFTPLUS: tl.constexpr, B_ROWS: tl.constexpr, C_ROWS: tl.constexpr,
                           UNIT_AXES: tl.constexpr, ALIGN: tl.constexpr,
                           BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr):
    length *= ALIGN
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    c = (pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    step = tl.arange(0, STEPS)
    t = step.to(tl.int64)
    in_c, in_n = c < channels, n < dstate
    in_state = in_n[:, None] & in_c[None, :]
    first = (step == 0)[:, None, None]
    place = tl.broadcast_to(step[:, None, None], (STEPS, BLOCK_N, BLOCK_C))

    u_step = _stride(u_t, UNIT_AXES[0] == 2, ALIGN)
    delta_step = _stride(delta_t, UNIT_AXES[1] == 2, ALIGN)
    y_step = _stride(y_t, UNIT_AXES[2] == 2, ALIGN)
    z_step = _stride(z_t, UNIT_AXES[3] == 2, ALIGN)
    B_step = _stride(B_t, UNIT_AXES[4] == 3, ALIGN)
    C_step = _stride(C_t, UNIT_AXES[5] == 3, ALIGN)
    u_ptrs = u_ptr + batch * u_b * ALIGN + t[:, None] * u_step + c[None, :] * _stride(u_c, UNIT_AXES[0] == 1, ALIGN)
    delta_ptrs = (delta_ptr + batch * delta_b * ALIGN + t[:, None] * delta_step
                  + c[None, :] * _stride(delta_c, UNIT_AXES[1] == 1, ALIGN))
    y_ptrs = y_ptr + batch * y_b * ALIGN + t[:, None] * y_step + c[None, :] * _stride(y_c, UNIT_AXES[2] == 1, ALIGN)
    if z_ptr is not None:
        z_ptrs = z_ptr + batch * z_b * ALIGN + t[:, None] * z_step + c[None, :] * _stride(z_c, UNIT_AXES[3] == 1, ALIGN)
    if group_ptr is not None:
        group = tl.load(group_ptr + c * group_c, mask=in_c, other=0).to(tl.int64)
    # ROWS is "shared", "group" or "channel": one row for all channels, or a row for each
    B_ptr += batch * B_b * ALIGN
    B_state = _stride(B_n, UNIT_AXES[4] == 2, ALIGN)
    if B_ROWS == "shared":
        B_ptrs = B_ptr + t[:, None] * B_step + n[None, :] * B_state
    else:
        row = c if B_ROWS == "channel" else group
        B_ptrs = (B_ptr + t[:, None, None] * B_step + n[None, :, None] * B_state
                  + row[None, None, :] * _stride(B_row, UNIT_AXES[4] == 1, ALIGN))
    C_ptr += batch * C_b * ALIGN
    C_state = _stride(C_n, UNIT_AXES[5] == 2, ALIGN)
    if C_ROWS == "shared":
        C_ptrs = C_ptr + t[:, None] * C_step + n[None, :] * C_state
    else:
        row = c if C_ROWS == "channel" else group
        C_ptrs = (C_ptr + t[:, None, None] * C_step + n[None, :, None] * C_state
                  + row[None, None, :] * _stride(C_row, UNIT_AXES[5] == 1, ALIGN))
    if runs_ptr is not None:
        runs_ptr += batch * length

    A = tl.load(A_ptr + c[None, :] * A_c + n[:, None] * A_n, mask=in_state, other=0.0).to(tl.float32)
    A *= LOG2E
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c * bias_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if D_ptr is not None:
        D = tl.load(D_ptr + c * D_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    state = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if initial_ptr is not None:
        state = tl.load(initial_ptr + batch * initial_b + c[None, :] * initial_c + n[:, None] * initial_n,
                        mask=in_state, other=0.0).to(tl.float32)

    for start in range(0, length, STEPS):
        exists = start + step < length
        live = exists
        if runs_ptr is not None:
            run = tl.load(runs_ptr + start + step, mask=exists, other=-1)
            before = tl.load(runs_ptr + start + step - 1, mask=exists & (start + step > 0), other=0)
            live = run >= 0
            fresh = tl.where(run >= 0, run, ~run) != tl.where(before >= 0, before, ~before)
            fresh = (fresh & exists)[:, None, None]
        tile = live[:, None] & in_c[None, :]
        u = tl.load(u_ptrs, mask=tile, other=0.0).to(tl.float32)
        delta = discrete_dt(tl.load(delta_ptrs, mask=tile, other=0.0), bias, SOFTPLUS)
        delta = tl.where(tile, delta, 0.0)                # a token that is not there leaves the state alone
        drive = delta * u
        if B_ROWS == "shared" and C_ROWS == "shared":
            rows = live[:, None] & in_n[None, :]
            B = tl.load(B_ptrs, mask=rows, other=0.0).to(tl.float32)
            C = tl.load(C_ptrs, mask=rows, other=0.0).to(tl.float32)
            # join and split: what follows takes the fp32 values of other threads, and computes none of them again
            B, C = tl.split(tl.join(B, C))
            delta, drive = tl.split(tl.join(delta, drive))
            B, C = B[:, :, None], C[:, :, None]
        else:
            rows = live[:, None, None] & in_n[None, :, None]
            every = rows & in_c[None, None, :]
            if B_ROWS == "shared":
                B = tl.load(B_ptrs[:, :, None], mask=rows, other=0.0).to(tl.float32)
            else:
                B = tl.load(B_ptrs, mask=every, other=0.0).to(tl.float32)
            if C_ROWS == "shared":
                C = tl.load(C_ptrs[:, :, None], mask=rows, other=0.0).to(tl.float32)
            else:
                C = tl.load(C_ptrs, mask=every, other=0.0).to(tl.float32)

        decay = exp2(delta[:, None, :] * A[None, :, :])
        gain = drive[:, None, :] * B
        if runs_ptr is not None:
            decay = tl.where(fresh, 0.0, decay)
            gain = tl.where(first & (decay != 0.0), decay * state[None, :, :] + gain, gain)
            _, states = tl.associative_scan((decay, gain), 0, _then_or_afresh)
        else:
            gain = tl.where(first, decay * state[None, :, :] + gain, gain)
            _, states = tl.associative_scan((decay, gain), 0, _then)
        y = tl.sum(states * C, 1)
        _, state = tl.reduce((place, states), 0, _later)

        if D_ptr is not None:
            y += D * u
        if z_ptr is not None:
            y *= silu(tl.load(z_ptrs, mask=tile, other=0.0).to(tl.float32))
            z_ptrs += STEPS * z_step
        if runs_ptr is not None:
            y = tl.where(live[:, None], y, 0.0)
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=exists[:, None] & in_c[None, :])
        u_ptrs += STEPS * u_step
        delta_ptrs += STEPS * delta_step
        y_ptrs += STEPS * y_step
        B_ptrs += STEPS * B_step
        C_ptrs += STEPS * C_step

    if final_ptr is not None:
        tl.store(final_ptr + (batch * channels + c[None, :]) * dstate + n[:, None], state, mask=in_state)


def _blocks(dstate: int, shared: bool, align: int) -> dict[str, int]:
    """Eight states to a thread; a warp for 256 states, so that a warp has 16 channels where N is 16, and at most 32.

    Loads of single elements hold an address for each: half the steps. With rows for each channel every state
    takes two addresses for each step: a quarter of the steps, and half the states.
    """
    block_n = max(4, triton.next_power_of_2(dstate))
    states, steps = (256, max(align, 4)) if shared else (128, 2)
    block_c = max(4, min(32, states // block_n))
    return {"BLOCK_C": block_c, "BLOCK_N": block_n, "STEPS": steps,
            "num_warps": max(1, block_c * block_n // states)}


def _rows(M: Tensor) -> tuple[str, tuple[int, ...]]:
    """How B or C is indexed, and its strides over (batch, row, n, t)."""
    if M.dim() == 2:                                      # (D, N), the same at every token
        return "channel", (0, M.stride(0), M.stride(1), 0)
    return ("shared" if M.shape[1] == 1 else "group"), M.stride()


def _unit_axis(strides: tuple[int, ...]) -> int:
    """The axis other than the batch whose elements are adjacent, the last of them; 0 if there is none."""
    return next((axis for axis in range(len(strides) - 1, 0, -1) if strides[axis] == 1), 0)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
                   ) -> tuple[Tensor, Tensor | None]:
    """u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L) or (D, N) -> y (B, D, L), final state (B, D, N) fp32."""
    batch, channels, length = u.shape
    dstate = A.shape[1]
    y = torch.empty_like(u)
    final_state = torch.empty(batch, channels, dstate, dtype=torch.float32, device=u.device) if return_state else None
    runs = None if seq_idx is None else sequence_runs(seq_idx)
    (B_rows, B_strides), (C_rows, C_strides) = _rows(B), _rows(C)
    if "group" not in (B_rows, C_rows):
        channel_to_group = None
    strides = [u.stride(), delta.stride(), y.stride(), (0, 0, 0) if z is None else z.stride(), B_strides, C_strides]
    unit_axes = tuple(map(_unit_axis, strides))
    others = [s for one, unit in zip(strides, unit_axes, strict=True) for axis, s in enumerate(one) if axis != unit]
    align = 8 if all(size % 8 == 0 for size in (length, *others)) else 1
    blocks = _blocks(dstate, B_rows == C_rows == "shared", align)
    _selective_scan_kernel[(batch * triton.cdiv(channels, blocks["BLOCK_C"]),)](
        u, delta, A, B, C, D, z, delta_bias, initial_state, runs, channel_to_group, y, final_state,
        length // align, channels, dstate, *(size // align for one in strides for size in one),
        *A.stride(), *((0, 0, 0) if initial_state is None else initial_state.stride()),
        0 if D is None else D.stride(0), 0 if delta_bias is None else delta_bias.stride(0),
        0 if channel_to_group is None else channel_to_group.stride(0),
        SOFTPLUS=delta_softplus, B_ROWS=B_rows, C_ROWS=C_rows, UNIT_AXES=unit_axes, ALIGN=align, **blocks)
    return y, final_state
