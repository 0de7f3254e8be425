# Depthwise causal convolution along time, forward and decode step.
#
#   y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w])
#
# Forward: one program owns (batch, tile of channels, tile of time) and reads its tile of x once
# for each tap (from L1 after the first). Step: one program owns (batch, tile of channels) with all
# its new tokens and its whole conv state. Bound: bytes of x and y.
"""Triton forward and step of shedder.ops' causal_conv1d and causal_conv1d_update."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointwise import silu
from .rows import empty_in_rows
from .variants import compile_side_by_side


# x may be part of wider rows, whose size and address are not specialised: layers that all differ compile few kernels.
@triton.jit(do_not_specialize=["x_ptr", "channels", "x_batch", "x_channel", "x_time"])
def _causal_conv1d_kernel(x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_idx_ptr, y_ptr, final_ptr, length, channels,
                          x_batch, x_channel, x_time, weight_strides, initial_strides, seq_idx_strides, y_strides,
                          bias_stride, ADJACENT: tl.constexpr, ALIGN: tl.constexpr, SILU: tl.constexpr,
                          WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    # ADJACENT: the axis of x with stride 1 ("channel", "time") or "none". The other strides of x come in units of ALIGN
    # elements, and its address is a multiple of so many.
    history: tl.constexpr = WIDTH - 1
    time_tiles = tl.maximum(tl.cdiv(length, BLOCK_T), 1)
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    time_tile = pid % time_tiles
    batch = (pid // time_tiles // tiles).to(tl.int64)
    c = (pid // time_tiles % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
    t = (time_tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    in_c = c < channels
    live = in_c & (t < length)
    x_ptr = tl.multiple_of(x_ptr + batch * x_batch * ALIGN, ALIGN * x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    x_step = x_time * ALIGN
    if ADJACENT == "channel":
        x_ptr += c
    else:
        x_ptr += c * x_channel * ALIGN
        if ADJACENT == "time":
            x_step = 1
    if initial_ptr is not None:
        initial_ptr += batch * initial_strides[0] + c * initial_strides[1]
    if seq_idx_ptr is not None:
        seq_idx_ptr += batch * seq_idx_strides[0]
        name = tl.load(seq_idx_ptr + t * seq_idx_strides[1], mask=t < length, other=-1)

    y = tl.zeros((BLOCK_C, BLOCK_T), tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c * bias_stride, mask=in_c, other=0.0).to(tl.float32)
    for w in tl.static_range(WIDTH):
        source = t - history + w
        reach = live & (source >= 0)
        before = live & (source < 0)
        if seq_idx_ptr is not None:                       # tokens before the row count as its first sequence
            same = tl.load(seq_idx_ptr + tl.maximum(source, 0) * seq_idx_strides[1], mask=t < length, other=-1) == name
            reach &= same
            before &= same
        tap = tl.load(x_ptr + source * x_step, mask=reach, other=0.0).to(tl.float32)
        if initial_ptr is not None:
            tap += tl.load(initial_ptr + (source + history) * initial_strides[2], mask=before, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c * weight_strides[0] + w * weight_strides[1], mask=in_c, other=0.0)
        y += weight.to(tl.float32) * tap
    if SILU:
        y = silu(y)
    if seq_idx_ptr is not None:
        y = tl.where(name >= 0, y, 0.0)
    y_ptr += batch * y_strides[0]
    tl.store(y_ptr + c * y_strides[1] + t * y_strides[2], y.to(y_ptr.dtype.element_ty), mask=live)

    if final_ptr is not None and time_tile == time_tiles - 1:
        for k in tl.static_range(history):
            place = tl.zeros((), tl.int64) + length - history + k
            last = tl.load(x_ptr + place * x_step, mask=in_c & (place >= 0), other=0.0)
            if initial_ptr is not None:
                first = tl.load(initial_ptr + (place + history) * initial_strides[2],
                                mask=in_c & (place < 0), other=0.0)
                last = tl.where(place >= 0, last, first.to(last.dtype))
            tl.store(final_ptr + (batch * channels + c) * history + k, last, mask=in_c)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
                  seq_idx: Tensor | None, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
    """x (B, D, L) in any memory order; weight (D, W) -> y (B, D, L) in x's order, final states (B, D, W-1)."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    y = empty_in_rows(x)
    final_states = torch.empty(batch, channels, width - 1, dtype=x.dtype, device=x.device) if return_state else None
    block_c, block_t = (64, 32) if x.stride(1) == 1 else (8, 256)        # long along what is contiguous
    if length < block_t:
        block_t = max(4, triton.next_power_of_2(length))
    grid = batch * triton.cdiv(channels, block_c) * max(triton.cdiv(length, block_t), 1)
    adjacent = "channel" if x.stride(1) == 1 else "time" if x.stride(2) == 1 else "none"
    outer = [stride for stride, axis in zip(x.stride(), ("batch", "channel", "time"), strict=True) if axis != adjacent]
    align = 8 if all(size % 8 == 0 for size in (*outer, x.data_ptr() // x.element_size())) else 1
    arguments = (
        x, weight, bias, initial_states, seq_idx, y, final_states, length, channels,
        *(stride // align for stride in x.stride()), weight.stride(),
        None if initial_states is None else initial_states.stride(),
        None if seq_idx is None else seq_idx.stride(), y.stride(), None if bias is None else bias.stride(0))
    options = {"ADJACENT": adjacent, "SILU": silu, "WIDTH": width, "BLOCK_C": block_c, "BLOCK_T": block_t,
               "num_warps": 4}
    kind = (x.device, *options.values(), return_state,
            *(None if t is None else t.dtype for t in (x, weight, bias, initial_states, seq_idx)))
    compile_side_by_side(_causal_conv1d_kernel, kind, arguments, [{"ALIGN": a} for a in (1, 8)], **options)
    _causal_conv1d_kernel[(grid,)](*arguments, ALIGN=align, **options)
    return y, final_states


@triton.jit(do_not_specialize=["channels", "tokens"])
def _causal_conv1d_update_kernel(x_ptr, state_ptr, weight_ptr, bias_ptr, seen_ptr, slot_ptr, y_ptr,
                                 channels, tokens, kept, x_strides, state_strides, weight_strides, y_strides,
                                 bias_stride, seen_stride, slot_stride,
                                 SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    tiles = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    c = (pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    in_c = c < channels
    x_ptr += batch * x_strides[0]
    y_ptr += batch * y_strides[0]
    slot = batch
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + batch * slot_stride).to(tl.int64)
        if slot < 0:                                      # a padding row of the batch
            for token in range(tokens):
                t = tl.zeros((), tl.int64) + token
                tl.store(y_ptr + c * y_strides[1] + t * y_strides[2],
                         tl.zeros((BLOCK_C,), y_ptr.dtype.element_ty), mask=in_c)
            return
    state_ptr += slot * state_strides[0]
    end = tl.zeros((), tl.int64) + kept                   # token t sits at (end + t) mod kept (no ring: t < 0 only)
    if seen_ptr is not None:
        end = tl.load(seen_ptr + batch * seen_stride).to(tl.int64) % kept + kept

    for token in range(tokens):
        t = tl.zeros((), tl.int64) + token
        y = tl.zeros((BLOCK_C,), tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c * bias_stride, mask=in_c, other=0.0).to(tl.float32)
        for w in tl.static_range(WIDTH):
            source = t - (WIDTH - 1) + w
            new = tl.load(x_ptr + c * x_strides[1] + source * x_strides[2], mask=in_c & (source >= 0), other=0.0)
            place = (end + source) % kept
            old = tl.load(state_ptr + c * state_strides[1] + place * state_strides[2],
                          mask=in_c & (source < 0), other=0.0)
            weight = tl.load(weight_ptr + c * weight_strides[0] + w * weight_strides[1], mask=in_c, other=0.0)
            y += weight.to(tl.float32) * (new.to(tl.float32) + old.to(tl.float32))
        if SILU:
            y = silu(y)
        tl.store(y_ptr + c * y_strides[1] + t * y_strides[2], y.to(y_ptr.dtype.element_ty), mask=in_c)

    # What each place of the state holds next: a token of x, or what the state held at `place`.
    k = tl.arange(0, BLOCK_K).to(tl.int64)[None, :]
    in_state = in_c[:, None] & (k < kept)
    if seen_ptr is not None:
        source = tokens - 1 - (end + tokens - 1 - k) % kept     # the newest token that falls on place k
        place = k
    else:
        source = k + tokens - kept
        place = k + tokens
    new = tl.load(x_ptr + c[:, None] * x_strides[1] + source * x_strides[2], mask=in_state & (source >= 0), other=0.0)
    old = tl.load(state_ptr + c[:, None] * state_strides[1] + place * state_strides[2],
                  mask=in_state & (source < 0), other=0.0)
    value = tl.where(source >= 0, new.to(old.dtype), old)
    tl.debug_barrier()                                    # every read of the state comes before the first write
    tl.store(state_ptr + c[:, None] * state_strides[1] + k * state_strides[2], value, mask=in_state)


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                         cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> Tensor:
    """x (B, D, S); conv_state (slots, D, K), updated in place; weight (D, W) -> y (B, D, S) in x's memory order."""
    batch, channels, tokens = x.shape
    kept = conv_state.shape[2]
    y = torch.empty_like(x)
    block_k = max(2, triton.next_power_of_2(kept))
    block_c = max(4, min(128, 1024 // block_k))
    _causal_conv1d_update_kernel[(batch * triton.cdiv(channels, block_c),)](
        x, conv_state, weight, bias, cache_seqlens, conv_state_indices, y, channels, tokens, kept,
        x.stride(), conv_state.stride(), weight.stride(), y.stride(), None if bias is None else bias.stride(0),
        None if cache_seqlens is None else cache_seqlens.stride(0),
        None if conv_state_indices is None else conv_state_indices.stride(0),
        SILU=silu, WIDTH=weight.shape[1], BLOCK_C=block_c, BLOCK_K=block_k, num_warps=4)
    return y
