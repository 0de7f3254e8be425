"""One decode step of Mamba-1 or Mamba-2: the state moves on in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shedder.ops.backend import Facts
from shedder.ops.checks import (
    FLOATS,
    INTEGERS,
    MAX_STATES,
    OncePerLook,
    check_dtype,
    check_parameter,
    check_same_device,
    check_shape,
    check_size,
    parameter,
)
from shedder.ops.conv1d import check_slots
from shedder.ops.group_map import GroupMap, as_group_map, check_group_map
from shedder.ops.register import register
from shedder.ops.whole import take_whole


def _facts(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
           dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor,
           state_batch_indices: Tensor | None) -> Facts:
    batch, heads, headdim = x.shape
    return (("device", x.device.type), ("dtype", x.dtype), ("batch", batch), ("length", 1), ("heads", heads),
            ("headdim", headdim), ("dstate", B.shape[2]), ("groups", B.shape[1]), ("slots", state.shape[0]),
            ("state_dtype", state.dtype), ("dt_dtype", dt.dtype), ("indexed", state_batch_indices is not None))


def _fake(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check_values(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                  z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor,
                  state_batch_indices: Tensor | None) -> None:
    check_group_map("head_to_group", head_to_group, B.shape[1])
    check_slots("state_batch_indices", state_batch_indices, "state", state.shape[0])


_state_update = register(
    "state_update",
    "Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, Tensor head_to_group, Tensor? state_batch_indices", "Tensor",
    facts=_facts, fake=_fake, check_values=_check_values)


def selective_state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
                           D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
                           dt_softplus: bool = False, state_batch_indices: Tensor | None = None, *,
                           head_to_group: GroupMap = None, backend: str | None = None) -> Tensor:
    """One decode step: h = exp(dt A) h + dt B x, y = (sum_n C h + D x) silu(z). No gradient.

    Shapes of Mamba-2, and in brackets of Mamba-1, whose channels are one head:
        state: (B or slots, H, P, N) [(B or slots, D, N)], fp32, bf16, fp16; updated in place.
        x, dt, z: (B, H, P) [(B, D)]; x and z one dtype. A: (H, P, N) [(D, N)]. D, dt_bias: (H, P) [(D,)].
            dt, A, D and dt_bias may be expanded views (tied over P), which is faster.
        B, C: (B, G, N), or (B, N) for one group.
        state_batch_indices: (B,) integers, the slot of each row; negative: output 0, no state touched.
        head_to_group: (H,) [(D,)] integers, the group that each head [channel] reads: a tuple, a list or a
            tensor. None gives each group an equal run.
    Returns:
        y, of the shape and dtype of x.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    taken = take_whole(
        "selective_state_update", state, backend,
        lambda: (state, x, dt, parameter(A, x), B, C, parameter(D, x), z, parameter(dt_bias, x), dt_softplus,
                 _map_if_needed(head_to_group, state, B), state_batch_indices),
        lambda: (("dtype", x.dtype), ("batch", x.shape[0]), ("heads", 1 if state.dim() == 3 else state.shape[1]),
                 ("dstate", state.shape[-1]), ("groups", 1 if B.dim() == 2 else B.shape[1]),
                 ("state_dtype", state.dtype), ("dt_dtype", dt.dtype)))
    if taken is not None:
        return taken[0]
    groups, mapped = _check((state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices))
    if state_batch_indices is not None and state_batch_indices.dtype != torch.int32:
        state_batch_indices = state_batch_indices.to(torch.int32)
    A, D, dt_bias = parameter(A, x), parameter(D, x), parameter(dt_bias, x)
    is_single_head = state.dim() == 3
    unit = "channels" if is_single_head else "heads"
    B, C = (M.unsqueeze(1) if M.dim() == 2 else M for M in (B, C))
    group_map = as_group_map("head_to_group", head_to_group, mapped, groups, x.device, unit)
    if is_single_head:
        y = _state_update(state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0), B, C, _as_head(D, 0),
                          _as_head(z, 1), _as_head(dt_bias, 0), dt_softplus, group_map, state_batch_indices,
                          backend or "auto")
        return y.squeeze(1)
    if mapped == 1:                                                # one head: the op numbers its channels instead
        group_map = group_map.expand(x.shape[2]).contiguous()
    return _state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, group_map, state_batch_indices,
                         backend or "auto")


def _map_if_needed(head_to_group: GroupMap, state: Tensor, B: Tensor) -> Tensor | None:
    """The map for the native op, which needs none for one group."""
    groups = 1 if B.dim() == 2 else B.shape[1]
    if groups == 1 and head_to_group is None:
        return None
    return as_group_map("head_to_group", head_to_group, state.shape[1], groups, state.device, "heads")


@OncePerLook
def _check(tensors: tuple[Any, ...]) -> tuple[int, int]:
    """G, and the number of heads [channels] that a map numbers."""
    state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices = tensors
    if not isinstance(state, Tensor) or state.dim() not in (3, 4):
        raise ValueError(f"state has shape {tuple(getattr(state, 'shape', ()))}; accepted: (B or slots, D, N) or "
                         "(B or slots, H, P, N)")
    is_single_head = state.dim() == 3
    units = tuple(state.shape[1:-1])                               # (D,) or (H, P)
    dstate = state.shape[-1]
    unit_letters = "D" if is_single_head else "H, P"
    check_shape("x", x, (None, *units), f"(B, {unit_letters})")
    batch = x.shape[0]
    if state_batch_indices is None:
        check_shape("state", state, (batch, *units, None), f"(B, {unit_letters}, N)")
    else:
        check_shape("state_batch_indices", state_batch_indices, (batch,), "(B,)")
        check_dtype("state_batch_indices", state_batch_indices, INTEGERS)
    check_size("N (state.shape[-1])", dstate, 1, MAX_STATES)
    check_shape("dt", dt, (batch, *units), f"(B, {unit_letters})")
    check_shape("A", A, (*units, dstate), f"({unit_letters}, N)")
    for name, optional in (("D", D), ("dt_bias", dt_bias)):
        if optional is not None:
            check_shape(name, optional, units, f"({unit_letters})")
    if z is not None:
        check_shape("z", z, (batch, *units), f"(B, {unit_letters})")
    groups = _groups("B", B, batch, dstate)
    if _groups("C", C, batch, dstate) != groups:
        check_shape("C", C, tuple(B.shape), "the shape of B")
    for name, tensor in (("x", x), ("state", state)):
        check_dtype(name, tensor, FLOATS)
    check_parameter("state or x", state if state.dtype == torch.float64 else x, dt=dt, A=A, B=B, C=C, D=D, z=z,
                    dt_bias=dt_bias)
    for name, own in (("B", B), ("C", C), ("z", z)):
        if own is not None and own.dtype != x.dtype:
            raise ValueError(f"{name} is {own.dtype} but x is {x.dtype}; accepted: the dtype of x")
    check_same_device("state", state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias,
                      state_batch_indices=state_batch_indices)
    return groups, units[0]


def _as_head(tensor: Tensor | None, dim: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(dim)


def _groups(name: str, tensor: Tensor, batch: int, dstate: int) -> int:
    """G of B or C."""
    if isinstance(tensor, Tensor) and tensor.dim() == 2:
        check_shape(name, tensor, (batch, dstate), "(B, N)")
        return 1
    check_shape(name, tensor, (batch, None, dstate), "(B, N) or (B, G, N)")
    return tensor.shape[1]
