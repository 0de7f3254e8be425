# One decode step of either family.
#
#   dt = softplus(dt + bias)      h = exp(dt A) h + dt B x      y = (sum_n C h + D x) silu(z)
#
# One program owns (batch, head, tile of P) and reads and writes its part of the state once.
# Mamba-2 has one dt and one A for a head (stride 0 over P and N): one exponential serves the
# tile. Mamba-1 is one head whose channels are P, each with its own group. Bound: state bytes.
"""Triton step of shedder.ops' state_update."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import discrete_dt, silu


@triton.jit(do_not_specialize=["heads"])
def _state_update_kernel(state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, head_to_group_ptr,
                         slot_ptr, y_ptr, heads, headdim, dstate,
                         state_strides, x_strides, dt_strides, A_strides, B_strides, C_strides, D_strides, z_strides,
                         dt_bias_strides, head_to_group_stride, slot_stride,
                         DT_SOFTPLUS: tl.constexpr, TIED: tl.constexpr, GROUP_PER_CHANNEL: tl.constexpr,
                         BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    tiles = tl.cdiv(headdim, BLOCK_P)
    pid = tl.program_id(0)
    head = (pid // tiles % heads).to(tl.int64)
    batch = (pid // tiles // heads).to(tl.int64)
    p = (pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_p, in_n = p < headdim, n < dstate
    in_state = in_p[:, None] & in_n[None, :]
    y_ptr += (batch * heads + head) * headdim + p

    slot = batch
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + batch * slot_stride).to(tl.int64)
        if slot < 0:                                      # a padding row of the batch
            tl.store(y_ptr, tl.zeros((BLOCK_P,), y_ptr.dtype.element_ty), mask=in_p)
            return

    x_ptr += batch * x_strides[0] + head * x_strides[1]
    x = tl.load(x_ptr + p * x_strides[2], mask=in_p, other=0.0).to(tl.float32)
    state_ptrs = (state_ptr + slot * state_strides[0] + head * state_strides[1]
                  + p[:, None] * state_strides[2] + n[None, :] * state_strides[3])
    state = tl.load(state_ptrs, mask=in_state, other=0.0).to(tl.float32)

    dt_ptr += batch * dt_strides[0] + head * dt_strides[1]
    A_ptr += head * A_strides[0]
    bias = None
    if TIED:
        if dt_bias_ptr is not None:
            bias = tl.load(dt_bias_ptr + head * dt_bias_strides[0]).to(tl.float32)
        dt = discrete_dt(tl.load(dt_ptr), bias, DT_SOFTPLUS)
        state *= tl.exp(dt * tl.load(A_ptr).to(tl.float32))
    else:
        if dt_bias_ptr is not None:
            bias = tl.load(dt_bias_ptr + head * dt_bias_strides[0] + p * dt_bias_strides[1],
                           mask=in_p, other=0.0).to(tl.float32)
        dt = discrete_dt(tl.load(dt_ptr + p * dt_strides[2], mask=in_p, other=0.0), bias, DT_SOFTPLUS)
        A = tl.load(A_ptr + p[:, None] * A_strides[1] + n[None, :] * A_strides[2], mask=in_state, other=0.0)
        state *= tl.exp(dt[:, None] * A.to(tl.float32))

    B_ptr += batch * B_strides[0]
    C_ptr += batch * C_strides[0]
    if GROUP_PER_CHANNEL:
        group = tl.load(head_to_group_ptr + p * head_to_group_stride, mask=in_p, other=0).to(tl.int64)
        B = tl.load(B_ptr + group[:, None] * B_strides[1] + n[None, :] * B_strides[2], mask=in_state, other=0.0)
        C = tl.load(C_ptr + group[:, None] * C_strides[1] + n[None, :] * C_strides[2], mask=in_state, other=0.0)
    else:
        group = tl.load(head_to_group_ptr + head * head_to_group_stride).to(tl.int64)
        B = tl.load(B_ptr + group * B_strides[1] + n * B_strides[2], mask=in_n, other=0.0)[None, :]
        C = tl.load(C_ptr + group * C_strides[1] + n * C_strides[2], mask=in_n, other=0.0)[None, :]

    state += (dt * x)[:, None] * B.to(tl.float32)
    y = tl.sum(state * C.to(tl.float32), 1)
    tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=in_state)
    if D_ptr is not None:
        y += x * tl.load(D_ptr + head * D_strides[0] + p * D_strides[1], mask=in_p, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_strides[0] + head * z_strides[1] + p * z_strides[2], mask=in_p, other=0.0)
        y *= silu(z.to(tl.float32))
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=in_p)


def _blocks(headdim: int, dstate: int) -> dict[str, int]:
    """One warp and up to 1024 state numbers: 32 in each thread, many programs in flight."""
    block_n = max(4, triton.next_power_of_2(dstate))
    block_p = max(4, min(triton.next_power_of_2(headdim), 1024 // block_n))
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": 1}


def state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor,
                 state_batch_indices: Tensor | None) -> Tensor:
    """state (slots, H, P, N), updated in place; x, dt, z (B, H, P); A (H, P, N); B, C (B, G, N) -> y (B, H, P)."""
    batch, heads, headdim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tied = A.stride()[1:] == (0, 0) and dt.stride(2) == 0 and (dt_bias is None or dt_bias.stride(1) == 0)
    blocks = _blocks(headdim, state.shape[-1])
    # Unfused: lanes with the same channel sum up the same products in another order, and must come to the same.
    _state_update_kernel[(batch * heads * triton.cdiv(headdim, blocks["BLOCK_P"]),)](
        state, x, dt, A, B, C, D, z, dt_bias, head_to_group, state_batch_indices, y, heads, headdim, state.shape[-1],
        state.stride(), x.stride(), dt.stride(), A.stride(), B.stride(), C.stride(),
        None if D is None else D.stride(), None if z is None else z.stride(),
        None if dt_bias is None else dt_bias.stride(), head_to_group.stride(0),
        None if state_batch_indices is None else state_batch_indices.stride(0),
        DT_SOFTPLUS=dt_softplus, TIED=tied, GROUP_PER_CHANNEL=heads == 1 and head_to_group.shape[0] == headdim,
        **blocks, enable_fp_fusion=False)
    return y
