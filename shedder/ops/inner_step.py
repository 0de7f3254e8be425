"""One decode step of a Mamba-1 mixer between in_proj and out_proj: convolution, x_proj, dt_proj, state and gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder.ops.backend import Explanation, Facts, decide_or_compose
from shedder.ops.checks import (
    FLOATS,
    INTEGERS,
    MAX_STATES,
    OncePerLook,
    check_conv_state,
    check_dtype,
    check_parameter,
    check_same_device,
    check_shape,
    check_size,
)
from shedder.ops.conv1d import causal_conv1d_update, check_slots
from shedder.ops.cpu import linear
from shedder.ops.group_map import GroupMap, as_group_map, check_group_map
from shedder.ops.register import record, register
from shedder.ops.state_update import selective_state_update
from shedder.ops.tracing import is_traced
from shedder.ops.whole import take_whole

PARTS = "causal_conv1d_update, two products, state_update"


def _groups(x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None, A: Tensor | None) -> int:
    if x_proj_weight is None or dt_proj_weight is None or A is None:
        return 1
    return (x_proj_weight.shape[0] - dt_proj_weight.shape[1]) // (2 * A.shape[1])


def _facts(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
           x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None, dt_bias: Tensor | None, A: Tensor | None,
           *_: object) -> Facts:
    return (("device", xz.device.type), ("dtype", xz.dtype), ("batch", xz.shape[0]), ("length", 1),
            ("channels", conv_weight.shape[0]), ("dstate", 0 if A is None else A.shape[1]),
            ("groups", _groups(x_proj_weight, dt_proj_weight, A)),
            ("dt_rank", 0 if dt_proj_weight is None else dt_proj_weight.shape[1]), ("width", conv_weight.shape[1]),
            ("weight_dtype", conv_weight.dtype), ("state_dtype", None if ssm_state is None else ssm_state.dtype))


def _fake(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor, *_: object) -> Tensor:
    return xz.new_empty(xz.shape[0], conv_weight.shape[0])


def _check_values(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
                  conv_bias: Tensor | None, x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None,
                  dt_bias: Tensor | None, A: Tensor | None, D: Tensor, channel_to_group: Tensor | None,
                  cache_seqlens: Tensor | None, state_batch_indices: Tensor | None) -> None:
    check_group_map("channel_to_group", channel_to_group, _groups(x_proj_weight, dt_proj_weight, A))
    check_slots("state_batch_indices", state_batch_indices, "conv_state", conv_state.shape[0])


_mamba_inner_step = register(
    "mamba_inner_step",
    "Tensor xz, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor? x_proj_weight, Tensor? dt_proj_weight, Tensor? dt_bias, Tensor? A, Tensor D, Tensor? channel_to_group, "
    "Tensor? cache_seqlens, Tensor? state_batch_indices", "Tensor",
    facts=_facts, fake=_fake, check_values=_check_values)


def mamba_inner_step(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
                     conv_bias: Tensor | None, x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None,
                     dt_bias: Tensor | None, A: Tensor | None, D: Tensor, *, channel_to_group: GroupMap = None,
                     cache_seqlens: Tensor | None = None, state_batch_indices: Tensor | None = None,
                     backend: str | None = None) -> Tensor:
    """One decode step of mamba_inner_fn without its out_proj; both states move on in place. No gradient.

        [x | z] = xz        x = silu(convolution step of x)        [rank | B | C] = x_proj x
        dt = softplus(dt_proj rank + dt_bias)        h = exp(dt A) h + dt B x        y = (sum_n C h + D x) silu(z)

    A removed SSM has None for ssm_state, x_proj_weight, dt_proj_weight, dt_bias and A: y = D x silu(z).

    One call where a backend has it in one kernel. Elsewhere (explain tells where, and why) causal_conv1d_update, two
    products and selective_state_update run one after another, each on the backend that it would take by itself.

    Args:
        xz: (B, 2D), rows at any distance.
        conv_state: (B or slots, D, K) with K >= W-1 as xz, the last K inputs, oldest first, any strides.
        ssm_state: (B or slots, D, N), fp32, bf16, fp16.
        conv_weight: (D, W) with W from 1 to 4. conv_bias: (D,) as conv_weight.
        x_proj_weight: (R + 2GN, D), rows [rank | B | C]; dt_proj_weight: (D, R); both as xz.
        dt_bias, D: (D,). A: (D, N).
        channel_to_group: (D,) integers, the group of B and C that each channel reads: a tuple, a list or a tensor.
            None gives each group an equal run.
        cache_seqlens: (B,) integers, tokens seen so far: conv_state is then a ring with token i at i mod K.
        state_batch_indices: (B,) integers, the slot of each row in both states; negative: output 0, no state touched.
    Returns:
        (B, D), the dtype of xz.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    tensors = (xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    taken = take_whole(
        "mamba_inner_step", xz, backend,
        lambda: (*tensors, None if channel_to_group is None else as_group_map(
            "channel_to_group", channel_to_group, D.shape[0], _groups(x_proj_weight, dt_proj_weight, A), xz.device,
            "channels"), cache_seqlens, state_batch_indices),
        lambda: (("batch", xz.shape[0]), ("channels", D.shape[0]), ("dstate", 0 if A is None else A.shape[1]),
                 ("dt_rank", 0 if dt_proj_weight is None else dt_proj_weight.shape[1])))
    if taken is not None:
        return taken[0]
    decision, groups = _check_and_decide((*tensors, cache_seqlens, state_batch_indices), backend)
    cache_seqlens, state_batch_indices = (None if indices is None else indices.to(torch.int32)
                                          for indices in (cache_seqlens, state_batch_indices))
    group_map = (None if groups == 1 and channel_to_group is None else
                 as_group_map("channel_to_group", channel_to_group, D.shape[0], groups, xz.device, "channels"))
    if decision.backend == "composed":
        record(decision)
        return _composed(*tensors, groups, group_map, cache_seqlens, state_batch_indices, backend)
    return _mamba_inner_step(*tensors, group_map, cache_seqlens, state_batch_indices, backend or "auto")


@OncePerLook
def _check_and_decide(tensors: tuple[Any, ...], backend: str | None) -> tuple[Explanation, int]:
    """The decision, and G."""
    (xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, cache_seqlens,
     state_batch_indices) = tensors
    check_shape("conv_weight", conv_weight, (None, None), "(D, W)")
    channels, width = conv_weight.shape
    check_size("W (conv_weight.shape[1])", width, 1, 4)
    check_shape("xz", xz, (None, 2 * channels), "(B, 2D)")
    batch = xz.shape[0]
    for name, indices in (("cache_seqlens", cache_seqlens), ("state_batch_indices", state_batch_indices)):
        if indices is not None:
            check_shape(name, indices, (batch,), "(B,)")
            check_dtype(name, indices, INTEGERS)
    slots, letter = (batch, "B") if state_batch_indices is None else (None, "slots")
    check_shape("D", D, (channels,), "(D,)")
    if A is not None:
        check_shape("A", A, (channels, None), "(D, N)")
        dstate = A.shape[1]
        check_size("N (A.shape[1])", dstate, 1, MAX_STATES)
        check_shape("ssm_state", ssm_state, (slots, channels, dstate), f"({letter}, D, N)")
        slots = ssm_state.shape[0]
        check_dtype("ssm_state", ssm_state, FLOATS)
        check_shape("dt_bias", dt_bias, (channels,), "(D,)")
        check_shape("dt_proj_weight", dt_proj_weight, (channels, None), "(D, R)")
        check_shape("x_proj_weight", x_proj_weight, (None, channels), "(R + 2GN, D)")
        rank, states = dt_proj_weight.shape[1], x_proj_weight.shape[0] - dt_proj_weight.shape[1]
        if rank < 1 or states < 1 or states % (2 * dstate):
            raise ValueError(f"x_proj_weight has {x_proj_weight.shape[0]} rows; accepted: R + 2GN with R = {rank}, at "
                             f"least 1, N = {dstate} and G groups of B and C")
        for name, weight in (("x_proj_weight", x_proj_weight), ("dt_proj_weight", dt_proj_weight)):
            check_dtype(name, weight, (xz.dtype,), ", the dtype of xz")
    else:
        for name, value in (("ssm_state", ssm_state), ("x_proj_weight", x_proj_weight),
                            ("dt_proj_weight", dt_proj_weight), ("dt_bias", dt_bias)):
            if value is not None:
                raise ValueError(f"{name} is given, but A is None; accepted: None")
    check_conv_state(conv_state, slots, channels, width, cache_seqlens is not None, f"({letter}, D, K)")
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, (channels,), "(D,)")
        check_dtype("conv_bias", conv_bias, (conv_weight.dtype,), ", the dtype of conv_weight")
    check_dtype("xz", xz, FLOATS)
    check_dtype("conv_state", conv_state, (xz.dtype,), ", the dtype of xz")
    check_parameter("xz", xz, conv_weight=conv_weight, dt_bias=dt_bias, A=A, D=D)
    check_same_device("xz", xz, conv_state=conv_state, ssm_state=ssm_state, conv_weight=conv_weight,
                      conv_bias=conv_bias, x_proj_weight=x_proj_weight, dt_proj_weight=dt_proj_weight,
                      dt_bias=dt_bias, A=A, D=D, cache_seqlens=cache_seqlens, state_batch_indices=state_batch_indices)
    facts = _facts(*tensors[:9])
    if is_traced():                                     # which may keep the batch open
        facts = tuple(("batch", 1) if name == "batch" else (name, value) for name, value in facts)
    return (decide_or_compose("mamba_inner_step", PARTS, backend or "auto", facts),
            _groups(x_proj_weight, dt_proj_weight, A))


def _composed(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
              x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None, dt_bias: Tensor | None, A: Tensor | None,
              D: Tensor, groups: int, channel_to_group: Tensor | None, cache_seqlens: Tensor | None,
              state_batch_indices: Tensor | None, backend: str | None) -> Tensor:
    x, z = xz.chunk(2, dim=-1)
    x = causal_conv1d_update(x, conv_state, conv_weight, conv_bias, "silu", cache_seqlens, state_batch_indices,
                             backend=backend)
    if ssm_state is None or x_proj_weight is None or dt_proj_weight is None or A is None:
        return (x * D).to(x.dtype) * F.silu(z)
    dstate = A.shape[1]
    rank, B, C = linear(x, x_proj_weight).split([dt_proj_weight.shape[1], groups * dstate, groups * dstate], dim=-1)
    if groups > 1:
        B, C = B.unflatten(-1, (groups, dstate)), C.unflatten(-1, (groups, dstate))
    return selective_state_update(ssm_state, x, linear(rank, dt_proj_weight), A, B, C, D, z=z, dt_bias=dt_bias,
                                  dt_softplus=True, state_batch_indices=state_batch_indices,
                                  head_to_group=channel_to_group, backend=backend)
