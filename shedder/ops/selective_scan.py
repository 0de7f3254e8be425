"""Selective scan of Mamba-1, alone and with the projections around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder import reference
from shedder.ops.backend import Facts
from shedder.ops.checks import (
    FLOATS,
    MAX_STATES,
    OncePerLook,
    check_dtype,
    check_parameter,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_size,
    integers,
    parameter,
)
from shedder.ops.conv1d import causal_conv1d_fn
from shedder.ops.gated_norm import rmsnorm_fn
from shedder.ops.group_map import GroupMap, as_group_map, check_group_map
from shedder.ops.register import register
from shedder.ops.whole import take_whole


def _facts(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
           delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
           channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool) -> Facts:
    groups = max([M.shape[1] for M in (B, C) if M.dim() == 4], default=1)
    return (("device", u.device.type), ("dtype", u.dtype), ("batch", u.shape[0]), ("length", u.shape[2]),
            ("channels", u.shape[1]), ("dstate", A.shape[1]), ("groups", groups), ("complex", A.is_complex()),
            ("constant_B", B.dim() == 2), ("constant_C", C.dim() == 2), ("initial_state", initial_state is not None),
            ("seq_idx", seq_idx is not None))


def _fake(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    state = A.dtype if A.is_complex() else torch.float32
    if u.dtype == torch.float64:
        state = torch.promote_types(state, torch.float64)
    return_state = rest[-1]
    return (torch.empty_like(u),
            torch.empty(u.shape[0], *A.shape, dtype=state, device=u.device) if return_state else None)


def _recompute(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
               delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
               channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool,
               ) -> tuple[Tensor, Tensor | None]:
    y, state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                        initial_state=initial_state, channel_to_group=channel_to_group, seq_idx=seq_idx)
    return y, state if return_state else None


def _check_values(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                  delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
                  channel_to_group: Tensor | None, seq_idx: Tensor | None, return_state: bool) -> None:
    check_group_map("channel_to_group", channel_to_group, max(M.shape[1] if M.dim() == 4 else 1 for M in (B, C)))


_selective_scan = register(
    "selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, Tensor? channel_to_group, Tensor? seq_idx, bool return_state",
    "(Tensor, Tensor)",
    facts=_facts, fake=_fake, recompute=_recompute, check_values=_check_values)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                      z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                      return_last_state: bool = False, *, initial_state: Tensor | None = None,
                      channel_to_group: GroupMap = None, seq_idx: Tensor | None = None,
                      backend: str | None = None) -> Any:
    """Selective scan of Mamba (Gu and Dao, 2023, eq. 2), over any number of channels.

        delta  = softplus(delta + bias)
        h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]
        y[t]   = (sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])         (complex A: 2 Re of the sum)

    Args:
        u, delta, z: (B, D, L), any strides, one dtype of fp32, fp16, bf16, fp64.
        A: (D, N) fp32 or complex64 (fp64 or complex128 where u is fp64), N from 1 to 256.
        B, C: (B, N, L) or (B, G, N, L) as u, for complex A with last dim 2L (real, imaginary interleaved);
            or (D, N) as A when they do not change with time.
        D, delta_bias: (D,), fp32.
        initial_state: (B, D, N).
        channel_to_group: (D,) integers in [0, G), the group that each channel reads: a tuple, a list or a
            tensor. None gives each group an equal run of channels.
        seq_idx: (B, L) integers, the sequence of each token: the state starts from zero where it changes; a
            negative token is padding: its output is zero and the state passes by it.
    Returns:
        y (B, D, L) as u; with return_last_state also the state after the last token, (B, D, N) fp32 or complex64.
        Both are differentiable.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    taken = take_whole("selective_scan_fn", u, backend, lambda: (
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, initial_state, channel_to_group,
        seq_idx))
    if taken is not None:
        return taken if return_last_state else taken[0]
    check_shape("u", u, (None, None, None), "(B, D, L)")
    check_dtype("u", u, FLOATS)
    batch, channels, length = u.shape
    check_shape("delta", delta, (batch, channels, length), "(B, D, L)")
    check_shape("A", A, (channels, None), "(D, N)")
    dstate = A.shape[1]
    check_size("N (A.shape[1])", dstate, 1, MAX_STATES)
    if z is not None:
        check_shape("z", z, (batch, channels, length), "(B, D, L)")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(name, vector, (channels,), "(D,)")
    is_complex = isinstance(A, Tensor) and A.is_complex()
    B, C = (_as_varying(name, M, A, u, 2 * length if is_complex else length) for name, M in (("B", B), ("C", C)))
    check_same_dtype("u", u, delta=delta, z=z)
    accepted = {torch.float64: (torch.float32, torch.float64, torch.complex64, torch.complex128)}
    check_dtype("A", A, accepted.get(u.dtype, (torch.float32, torch.complex64)))
    check_parameter("u", u, D=D, delta_bias=delta_bias)
    check_same_device("u", u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
                      initial_state=initial_state, seq_idx=seq_idx)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (batch, channels, dstate), "(B, D, N)")
        if not is_complex:
            check_parameter("u", u, initial_state=initial_state)
    if seq_idx is not None:
        seq_idx = integers("seq_idx", seq_idx, (batch, length), "(B, L)")
    groups = {M.shape[1] for M in (B, C) if M.dim() == 4}
    if len(groups) > 1:
        raise ValueError(f"B has {B.shape[1]} groups but C has {C.shape[1]}; accepted: the same number")
    ngroups = groups.pop() if groups else 1
    group_map = None
    if ngroups > 1 or channel_to_group is not None:
        group_map = as_group_map("channel_to_group", channel_to_group, channels, ngroups, u.device, "channels")
    y, state = _selective_scan(u, delta, A, B, C, parameter(D, u), z, parameter(delta_bias, u), delta_softplus,
                               initial_state, group_map, seq_idx, return_last_state, backend or "auto")
    return (y, state) if return_last_state else y


def _as_varying(name: str, M: Tensor, A: Tensor, u: Tensor, last: int) -> Tensor:
    """B or C as (B, G, N, L), or unchanged as (D, N)."""
    batch, dstate = u.shape[0], A.shape[1]
    dim = M.dim() if isinstance(M, Tensor) else 0
    if dim == 2:
        check_shape(name, M, tuple(A.shape), "(D, N)")
        check_dtype(name, M, (A.dtype,), ", the dtype of A, for a constant")
        return M
    if dim == 4:
        check_shape(name, M, (batch, None, dstate, last), "(B, G, N, L)" if last == u.shape[2] else "(B, G, N, 2L)")
    else:
        check_shape(name, M, (batch, dstate, last), "(B, N, L), (B, G, N, L), with 2L for complex A, or (D, N)")
        M = M.unsqueeze(1)
    check_dtype(name, M, (u.dtype,), ", the dtype of u")
    return M


def mamba_inner_fn(xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
                   delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
                   B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
                   delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
                   C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
                   b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
                   dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-6, *,
                   channel_to_group: GroupMap = None, backend: str | None = None) -> Tensor:
    """A Mamba-1 mixer between its input projection and its end: convolution, projections, scan, output projection.

    Args:
        xz: (B, 2D, L), rows [x | z].
        conv1d_weight: (D, 1, W) or (D, W). conv1d_bias: (D,).
        x_proj_weight: (R + 2GN, D), rows [dt | B | C], a group after the other. delta_proj_weight: (D, R).
        out_proj_weight: (out, D). out_proj_bias: (out,).
        A, D, delta_bias: as selective_scan_fn. For complex A a state takes two rows of B and of C.
        B, C: as selective_scan_fn where they are not projected from x: their rows of x_proj are then not there.
        B_proj_bias, C_proj_bias: (GN,), added to projected B and C.
        b_rms_weight, c_rms_weight, dt_rms_weight: RMSNorm weights over B (GN,), C (GN,) and dt (R,).
        checkpoint_lvl: 0 or 1. Either way only the inputs of each step are kept for the gradient.
        channel_to_group: as selective_scan_fn.
    Returns:
        (B, L, out).
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl is {checkpoint_lvl!r}; accepted: 0 or 1")
    rank, rows, group_rows = _inner_rows((xz, conv1d_weight, x_proj_weight, delta_proj_weight, out_proj_weight,
                                          A), B is None, C is None)
    if conv1d_weight.dim() == 3:
        conv1d_weight = conv1d_weight.squeeze(1)
    projected = (B is None) + (C is None)

    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight, conv1d_bias, activation="silu", backend=backend)
    projections = _project(x_proj_weight, x)                        # (B, R + 2GN, L): B and C come with time adjacent
    dt, *rest = projections.split([rank] + [group_rows] * projected, dim=1)
    if dt_rms_weight is not None:
        dt = _norm_rows(dt, dt_rms_weight, b_c_dt_rms_eps, backend)
    delta = _project(delta_proj_weight.to(dt.dtype), dt)

    def finish(M: Tensor, bias: Tensor | None, rms_weight: Tensor | None) -> Tensor:
        """(B, G, N, L), or (B, N, L) for one group, from the rows of a projection, (B, GN, L)."""
        if bias is not None:
            M = M + bias.to(M.dtype)[:, None]
        if rms_weight is not None:
            M = _norm_rows(M, rms_weight, b_c_dt_rms_eps, backend)
        if A.is_complex():
            M = M.unflatten(1, (-1, A.shape[1], 2)).transpose(3, 4).flatten(3)   # (B, G, N, 2L)
        elif group_rows > rows:
            M = M.unflatten(1, (-1, rows))
        return M.to(x.dtype)

    if B is None:
        B = finish(rest.pop(0), B_proj_bias, b_rms_weight)
    if C is None:
        C = finish(rest.pop(0), C_proj_bias, c_rms_weight)
    y = selective_scan_fn(x, delta.to(x.dtype), A, B, C, D, z, delta_bias, delta_softplus,
                          channel_to_group=channel_to_group, backend=backend)
    return F.linear(y.transpose(1, 2), _uncopied(out_proj_weight), out_proj_bias)


@OncePerLook
def _inner_rows(tensors: tuple[Any, ...], projects_B: bool, projects_C: bool) -> tuple[int, int, int]:
    """Rows of x_proj: R, those of one group of B or C, and those of all groups."""
    xz, conv1d_weight, x_proj_weight, delta_proj_weight, out_proj_weight, A = tensors
    check_shape("delta_proj_weight", delta_proj_weight, (None, None), "(D, R)")
    channels, rank = delta_proj_weight.shape
    check_shape("xz", xz, (None, 2 * channels, None), "(B, 2D, L)")
    if isinstance(conv1d_weight, Tensor) and conv1d_weight.dim() == 3:
        check_shape("conv1d_weight", conv1d_weight, (channels, 1, None), "(D, 1, W)")
    else:
        check_shape("conv1d_weight", conv1d_weight, (channels, None), "(D, 1, W) or (D, W)")
    check_shape("A", A, (channels, None), "(D, N)")
    check_shape("x_proj_weight", x_proj_weight, (None, channels), "(R + 2GN, D)")
    check_shape("out_proj_weight", out_proj_weight, (None, channels), "(out, D)")
    rows = A.shape[1] * (2 if A.is_complex() else 1)
    projected = projects_B + projects_C
    left = x_proj_weight.shape[0] - rank
    if left < 0 or (projected and (left == 0 or left % (projected * rows))) or (not projected and left):
        raise ValueError(f"x_proj_weight has {x_proj_weight.shape[0]} rows; accepted: R = {rank} and a multiple of "
                         f"{rows} for each of B and C that is None")
    return rank, rows, left // projected if projected else 0


def _project(weight: Tensor, rows: Tensor) -> Tensor:
    """weight (out, in) times rows (B, in, L), time adjacent in both: (B, out, L)."""
    return _uncopied(weight) @ rows


def _uncopied(weight: Tensor) -> Tensor:
    """A weight that matmul takes batch by batch where it learns nothing: for one that does it copies the other side."""
    return weight if torch.is_grad_enabled() else weight.detach()


def _norm_rows(rows: Tensor, weight: Tensor, eps: float, backend: str | None) -> Tensor:
    """RMSNorm over the rows of (B, rows, L)."""
    return rmsnorm_fn(rows.transpose(1, 2), weight, None, eps=eps, backend=backend).transpose(1, 2)
