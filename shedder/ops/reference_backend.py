"""The reference backend: shedder.reference behind the signatures that all backends share.

It runs everywhere and takes every case; it is as slow as a Python loop over time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder import reference
from shedder.triton_kernels.rows import empty_in_rows


def available() -> str | None:
    return None


def supports(op: str, **facts: Any) -> str | None:
    return None


def kernel(op: str, **facts: Any) -> str:
    return f"shedder.reference.{op}"


def _into(y: Tensor, value: Tensor) -> Tensor:
    return y.copy_(value) if y.numel() else y


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                   delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                   channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
                   ) -> tuple[Tensor, Tensor | None]:
    y, state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                        initial_state=initial_state, channel_to_group=channel_to_group,
                                        seq_idx=seq_idx)
    return _into(torch.empty_like(u), y), _own(state, initial_state) if return_state else None


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
        initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool = True,
        ) -> tuple[Tensor, Tensor | None]:
    y, states = reference.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, (dt_min, dt_max),
                              head_to_group=head_to_group, initial_states=initial_states, seq_idx=seq_idx)
    y = _into(torch.empty(x.shape, dtype=x.dtype, device=x.device), y)
    return y, _own(states, initial_states) if return_state else None


def state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                 z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, head_to_group: Tensor,
                 state_batch_indices: Tensor | None) -> Tensor:
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    rows, slots = _rows(x.shape[0], state_batch_indices)
    got, new = reference.state_update(state[slots], x[rows], dt[rows], A, B[rows], C[rows], D,
                                      None if z is None else z[rows], dt_bias, dt_softplus,
                                      head_to_group=head_to_group)
    state[slots] = new.to(state.dtype)
    y[rows] = got.to(y.dtype)
    return y


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, initial_states: Tensor | None,
                  seq_idx: Tensor | None, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
    final = torch.zeros(*x.shape[:2], weight.shape[1] - 1, dtype=x.dtype, device=x.device)
    y = empty_in_rows(x)
    if y.numel():
        got, states = reference.causal_conv1d(x, weight, bias, "silu" if silu else None,
                                              initial_states=initial_states, seq_idx=seq_idx)
        y, final = _into(y, got), _into(final, states)
    elif initial_states is not None:
        final = _into(final, initial_states)
    return y, final if return_state else None


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
                         cache_seqlens: Tensor | None, conv_state_indices: Tensor | None) -> Tensor:
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows, slots = _rows(x.shape[0], conv_state_indices)
    got, new = reference.causal_conv1d_update(x[rows], conv_state[slots], weight, bias, "silu" if silu else None,
                                              cache_seqlens=None if cache_seqlens is None else cache_seqlens[rows])
    conv_state[slots] = new
    y[rows] = got.to(y.dtype)
    return y


def step_mixer(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
               conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor,
               norm_weight: Tensor | None, ngroups: int, head_to_group: Tensor, segments: list[int], eps: list[float],
               norm_before_gate: bool, dt_min: float, dt_max: float, cache_seqlens: Tensor | None,
               state_batch_indices: Tensor | None) -> Tensor:
    heads, dstate = D.shape[0], 0 if ssm_state is None else ssm_state.shape[3]
    states = ngroups * dstate
    inner = conv_weight.shape[0] - 2 * states
    headdim = inner // heads
    out = torch.zeros(zxbcdt.shape[0], inner, dtype=zxbcdt.dtype, device=zxbcdt.device)
    rows, slots = _rows(zxbcdt.shape[0], state_batch_indices)
    zxbcdt = zxbcdt[rows]
    if not zxbcdt.numel():
        return out
    if A is None:                                       # a removed SSM is one without states, at any step size
        dt, A = zxbcdt.new_zeros(zxbcdt.shape[0], heads), zxbcdt.new_zeros(heads)
    else:
        dt = zxbcdt[:, 2 * (inner + states):][:, :heads]
    z, xBC = zxbcdt[:, :2 * (inner + states)].split([inner, inner + 2 * states], dim=-1)
    xBC, new_conv = reference.causal_conv1d_update(
        xBC[..., None], conv_state[slots], conv_weight, conv_bias, "silu",
        cache_seqlens=None if cache_seqlens is None else cache_seqlens[rows])
    x, B, C = xBC[..., 0].split([inner, states, states], dim=-1)
    gate = z.unflatten(-1, (heads, headdim))[:, None]
    y, new_ssm = reference.ssd(
        x.unflatten(-1, (heads, headdim))[:, None], dt[:, None], A, B.unflatten(-1, (ngroups, dstate))[:, None],
        C.unflatten(-1, (ngroups, dstate))[:, None], D, gate if norm_weight is None else None, dt_bias, True,
        (dt_min, dt_max), head_to_group=head_to_group,
        initial_states=None if ssm_state is None else ssm_state[slots])
    y = y.flatten(1)
    if norm_weight is not None:
        y = reference.gated_rmsnorm(y, norm_weight, None, z, segments=segments, eps=eps,
                                    norm_before_gate=norm_before_gate)
    conv_state[slots] = new_conv
    if ssm_state is not None:
        ssm_state[slots] = new_ssm.to(ssm_state.dtype)
    out[rows] = y.to(out.dtype)
    return out


def mamba_inner_step(xz: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
                     conv_bias: Tensor | None, x_proj_weight: Tensor | None, dt_proj_weight: Tensor | None,
                     dt_bias: Tensor | None, A: Tensor | None, D: Tensor, channel_to_group: Tensor | None,
                     cache_seqlens: Tensor | None, state_batch_indices: Tensor | None) -> Tensor:
    x, z = xz.chunk(2, dim=-1)
    x = causal_conv1d_update(x[..., None], conv_state, conv_weight, conv_bias, True, cache_seqlens,
                             state_batch_indices)[..., 0]
    if ssm_state is None or x_proj_weight is None or dt_proj_weight is None or A is None:
        return (x * D).to(x.dtype) * F.silu(z)
    rank, states = dt_proj_weight.shape[1], (x_proj_weight.shape[0] - dt_proj_weight.shape[1]) // 2
    if channel_to_group is None:
        channel_to_group = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    ranks, B, C = F.linear(x, x_proj_weight).split([rank, states, states], dim=-1)
    dt = F.linear(ranks, dt_proj_weight)
    B, C = B.unflatten(-1, (-1, A.shape[1])), C.unflatten(-1, (-1, A.shape[1]))
    return state_update(ssm_state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0), B, C, D.unsqueeze(0),
                        z.unsqueeze(1), None if dt_bias is None else dt_bias.unsqueeze(0), True, channel_to_group,
                        state_batch_indices).squeeze(1)


def gated_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, segments: list[int],
                  eps: list[float], norm_before_gate: bool) -> Tensor:
    y = reference.gated_rmsnorm(x, weight, bias, z, segments=segments, eps=eps, norm_before_gate=norm_before_gate)
    return _into(torch.empty(x.shape, dtype=x.dtype, device=x.device), y)


def removed_ssm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor | None,
                norm_weight: Tensor | None, segments: list[int], eps: list[float], norm_before_gate: bool,
                initial_states: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    return _into(out, reference.removed_ssm(x, z, weight, bias, D, norm_weight, segments=segments, eps=eps,
                                            norm_before_gate=norm_before_gate, initial_states=initial_states))


def _own(state: Tensor, initial: Tensor | None) -> Tensor:
    """A state that is no view of an input: an empty sequence hands its initial state back."""
    return state if initial is None else state.clone()


def _rows(batch: int, indices: Tensor | None) -> tuple[Tensor | slice, Tensor | slice]:
    """The batch rows that have a state, and the slots of their states; a negative index has none."""
    if indices is None:
        return slice(0, batch), slice(0, batch)
    rows = torch.nonzero(indices >= 0)[:, 0]
    return rows, indices[rows].long()
