"""Causal depthwise convolution along time, whole sequences and steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shedder import reference
from shedder.ops.backend import Facts
from shedder.ops.checks import (
    FLOATS,
    check_activation,
    check_conv_state,
    check_dtype,
    check_parameter,
    check_same_device,
    check_shape,
    check_size,
    integers,
)
from shedder.ops.register import register
from shedder.ops.whole import take_whole
from shedder.triton_kernels.rows import empty_in_rows


def _facts(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
           seq_idx: Tensor | None, return_state: bool) -> Facts:
    return (("device", x.device.type), ("dtype", x.dtype), ("batch", x.shape[0]), ("length", x.shape[2]),
            ("channels", x.shape[1]), ("width", weight.shape[1]), ("weight_dtype", weight.dtype),
            ("channel_last", x.stride(1) == 1 and x.stride(2) != 1), ("initial_states", initial_states is not None),
            ("seq_idx", seq_idx is not None))


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    return_state = rest[-1]
    return empty_in_rows(x), x.new_empty(*x.shape[:2], weight.shape[1] - 1) if return_state else None


def _recompute(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
               seq_idx: Tensor | None, return_state: bool) -> tuple[Tensor, Tensor | None]:
    if x.shape[2] == 0:
        y = x * 1
        final = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if initial_states is None else initial_states * 1
    else:
        y, final = reference.causal_conv1d(x, weight, bias, "silu" if silu else None, initial_states=initial_states,
                                           seq_idx=seq_idx)
    return y, final if return_state else None


_causal_conv1d = register(
    "causal_conv1d",
    "Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_states, Tensor? seq_idx, bool return_state",
    "(Tensor, Tensor)",
    facts=_facts, fake=_fake, recompute=_recompute)


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype("x", x, FLOATS)
    check_shape("weight", weight, (x.shape[1], None), "(D, W)")
    check_size("W (weight.shape[1])", weight.shape[1], 1, 4)
    check_parameter("x", x, weight=weight)
    if bias is not None:
        check_shape("bias", bias, (x.shape[1],), "(D,)")
        if bias.dtype != weight.dtype:
            raise ValueError(f"bias is {bias.dtype} but weight is {weight.dtype}; accepted: the dtype of weight")
    check_same_device("x", x, weight=weight, bias=bias)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
                     initial_states: Tensor | None = None, return_final_states: bool = False,
                     final_states_out: Tensor | None = None, activation: str | None = None, *,
                     backend: str | None = None) -> Any:
    """y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w]), over any number of channels.

    Args:
        x: (B, D, L), channel-first, channel-last or any other strides.
        weight: (D, W) with W from 1 to 4, any float dtype. bias: (D,) as weight.
        seq_idx: (B, L) integers, the sequence of each token; taps never reach into another one.
            A negative token is padding: its output is zero.
        initial_states: (B, D, W-1), the inputs before t = 0.
        return_final_states: also return (B, D, W-1), the last inputs. final_states_out: write them here.
        activation: None, "silu" or "swish".
    Returns:
        y (B, D, L) as x, with channels adjacent in memory where they are in x, each token's from a multiple of 128
        bytes on; then the final states if asked for.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    silu = check_activation(activation)
    if final_states_out is None:
        taken = take_whole("causal_conv1d_fn", x, backend, lambda: (
            x, weight, bias, seq_idx, initial_states, return_final_states, silu))
        if taken is not None:
            return taken if return_final_states else taken[0]
    check_shape("x", x, (None, None, None), "(B, D, L)")
    _check_weight(x, weight, bias)
    batch, channels, length = x.shape
    states = (batch, channels, weight.shape[1] - 1)
    if seq_idx is not None:
        seq_idx = integers("seq_idx", seq_idx, (batch, length), "(B, L)")
    if initial_states is not None:
        check_shape("initial_states", initial_states, states, "(B, D, W-1)")
        check_dtype("initial_states", initial_states, (x.dtype,), ", the dtype of x")
    check_same_device("x", x, seq_idx=seq_idx, initial_states=initial_states, final_states_out=final_states_out)
    if final_states_out is not None:
        if not return_final_states:
            raise ValueError("final_states_out came with return_final_states=False; accepted: only with True")
        check_shape("final_states_out", final_states_out, states, "(B, D, W-1)")
        check_dtype("final_states_out", final_states_out, (x.dtype,), ", the dtype of x")
    y, final_states = _causal_conv1d(x, weight, bias, silu, initial_states, seq_idx, return_final_states,
                                     backend or "auto")
    if not return_final_states:
        return y
    return y, (final_states if final_states_out is None else final_states_out.copy_(final_states))


def _update_facts(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                  cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> Facts:
    return (("device", x.device.type), ("dtype", x.dtype), ("batch", x.shape[0]), ("length", x.shape[2]),
            ("channels", x.shape[1]), ("width", weight.shape[1]), ("weight_dtype", weight.dtype),
            ("ring", cache_seqlens is not None), ("indexed", conv_state_indices is not None))


def _update_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _update_values(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                   cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> None:
    check_slots("conv_state_indices", conv_state_indices, "conv_state", conv_state.shape[0])


def check_slots(name: str, indices: Tensor | None, state_name: str, slots: int) -> None:
    """Raise if an index on the CPU names a slot that does not exist; on a GPU the host would have to wait for it."""
    if indices is not None and indices.device.type == "cpu" and indices.numel():
        highest = int(indices.max())
        if highest >= slots:
            raise ValueError(f"{name} has value {highest} but {state_name} has {slots} slots; "
                             f"accepted: values below {slots}, negative ones for padding")


_causal_conv1d_update = register(
    "causal_conv1d_update",
    "Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, "
    "Tensor? conv_state_indices", "Tensor",
    facts=_update_facts, fake=_update_fake, check_values=_update_values)


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                         activation: str | None = None, cache_seqlens: Tensor | None = None,
                         conv_state_indices: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """One or several decode steps of the convolution; conv_state is updated in place. No gradient.

    Args:
        x: (B, D) or (B, D, S).
        conv_state: (B or slots, D, K) with K >= W-1 as x, the last K inputs, oldest first, any strides.
        weight: (D, W) with W from 1 to 4. bias: (D,) as weight. activation: None, "silu" or "swish".
        cache_seqlens: (B,) integers, tokens seen so far: conv_state is then a ring with token i at i mod K.
        conv_state_indices: (B,) integers, the slot of each row; negative: output 0, no state touched.
    Returns:
        y of the shape and dtype of x.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    silu = check_activation(activation)
    taken = take_whole("causal_conv1d_update", x, backend, lambda: (
        x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices))
    if taken is not None:
        return taken[0]
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(getattr(x, 'shape', ()))}; accepted: (B, D) or (B, D, S)")
    is_single = x.dim() == 2
    if is_single:
        x = x.unsqueeze(-1)
    _check_weight(x, weight, bias)
    batch, channels, _ = x.shape
    check_conv_state(conv_state, None if conv_state_indices is not None else batch, channels, weight.shape[1],
                     cache_seqlens is not None, "(B or slots, D, K)")
    check_dtype("conv_state", conv_state, (x.dtype,), ", the dtype of x")
    if cache_seqlens is not None:
        cache_seqlens = integers("cache_seqlens", cache_seqlens, (batch,), "(B,)")
    if conv_state_indices is not None:
        conv_state_indices = integers("conv_state_indices", conv_state_indices, (batch,), "(B,)")
    check_same_device("x", x, conv_state=conv_state, cache_seqlens=cache_seqlens,
                      conv_state_indices=conv_state_indices)
    y = _causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices, backend or "auto")
    return y.squeeze(-1) if is_single else y
