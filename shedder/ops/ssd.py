"""State-space duality layer of Mamba-2, alone and with the convolution, norm and projection around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder.ops import chunked
from shedder.ops.backend import Facts
from shedder.ops.checks import (
    INTEGERS,
    MAX_STATES,
    check_activation,
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
from shedder.ops.first_call import compiles_first, run_side_by_side
from shedder.ops.gated_norm import rmsnorm_fn
from shedder.ops.group_map import GroupMap, as_group_map, check_group_map
from shedder.ops.register import register
from shedder.ops.whole import take_whole
from shedder.triton_kernels.rows import empty_in_rows

MAX_HEADDIM = 256


def _facts(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
           dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
           initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool) -> Facts:
    return (("device", x.device.type), ("dtype", x.dtype), ("batch", x.shape[0]), ("length", x.shape[1]),
            ("heads", x.shape[2]), ("headdim", x.shape[3]), ("dstate", B.shape[3]), ("groups", B.shape[2]),
            ("dt_dtype", dt.dtype), ("initial_states", initial_states is not None), ("seq_idx", seq_idx is not None))


def _fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    batch, _length, heads, headdim = x.shape
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    return_state = rest[-1]
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),
            torch.empty(batch, heads, headdim, B.shape[3], dtype=state, device=x.device) if return_state else None)


def _recompute(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
               dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
               initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool,
               ) -> tuple[Tensor, Tensor | None]:
    y, states = chunked.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, (dt_min, dt_max), head_to_group,
                            initial_states, seq_idx)
    return y, states if return_state else None


def _check_values(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
                  dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, head_to_group: Tensor,
                  initial_states: Tensor | None, seq_idx: Tensor | None, return_state: bool) -> None:
    check_group_map("head_to_group", head_to_group, B.shape[2])


_ssd = register(
    "ssd",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float dt_min, float dt_max, Tensor head_to_group, Tensor? initial_states, Tensor? seq_idx, "
    "bool return_state", "(Tensor, Tensor)",
    facts=_facts, fake=_fake, recompute=_recompute, check_values=_check_values)


def mamba_chunk_scan_combined(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None, cu_seqlens: Tensor | Sequence[int] | None = None, dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf), return_final_states: bool = False,
        return_varlen_states: bool = False, state_dtype: torch.dtype | None = None, *,
        head_to_group: GroupMap = None, backend: str | None = None) -> Any:
    """State-space duality layer of Mamba-2 (Dao and Gu, 2024, eq. 1), any number of heads on any groups.

        dt       = clamp(softplus(dt + bias), *dt_limit)
        h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
        y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])

    Args:
        x, z: (B, L, H, P), any strides, one dtype of fp32, fp16, bf16, fp64; P and N from 1 to 256.
        dt: (B, L, H), any float dtype. A, dt_bias: (H,). D: (H,) or (H, P). B, C: (B, L, G, N) as x.
        chunk_size: of the peer's kernels; the result does not depend on it, backends choose their own.
        initial_states: (B, H, P, N), the state before the first sequence of each row; with cu_seqlens also
            (n, H, P, N), one for each sequence.
        seq_idx: (B, L) integers, the sequence of each token: the state starts from zero where it changes; a
            negative token is padding: its output is zero and the state passes by it.
        cu_seqlens: (n+1,) integers from 0 to L, for B = 1: where each sequence starts, and the end. A list
            or a CPU tensor spares the host a wait.
        head_to_group: (H,) integers in [0, G), the group that each head reads: a tuple, a list or a tensor.
            None gives each group an equal run of heads.
        state_dtype: of the returned states; None is fp32 for final states and the dtype of C for varlen states.
    Returns:
        out (B, L, H, P) as x; with return_final_states also (B, H, P, N); with return_varlen_states
        (cu_seqlens needed) also (n, H, P, N). All are differentiable.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    if seq_idx is None and cu_seqlens is None and not return_varlen_states and state_dtype is None:
        taken = take_whole("mamba_chunk_scan_combined", x, backend, lambda: (
            x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, *dt_limit, return_final_states,
            as_group_map("head_to_group", head_to_group, x.shape[2], B.shape[2], x.device, "heads")))
        if taken is not None:
            return taken if return_final_states else taken[0]
    check_shape("x", x, (None, None, None, None), "(B, L, H, P)")
    batch, length, heads, headdim = x.shape
    check_size("chunk_size", chunk_size, 1, 1 << 20)
    check_size("H (x.shape[2])", heads, 1, 1 << 20)
    check_size("P (x.shape[3])", headdim, 1, MAX_HEADDIM)
    check_shape("dt", dt, (batch, length, heads), "(B, L, H)")
    check_shape("A", A, (heads,), "(H,)")
    check_shape("B", B, (batch, length, None, None), "(B, L, G, N)")
    groups, dstate = B.shape[2:]
    check_size("N (B.shape[3])", dstate, 1, MAX_STATES)
    check_shape("C", C, (batch, length, groups, dstate), "(B, L, G, N), the shape of B")
    if z is not None:
        check_shape("z", z, (batch, length, heads, headdim), "(B, L, H, P), the shape of x")
    if D is not None and not (isinstance(D, Tensor) and tuple(D.shape) in ((heads,), (heads, headdim))):
        raise ValueError(f"D has shape {tuple(getattr(D, 'shape', ()))}; accepted: (H,) = ({heads},) or "
                         f"(H, P) = ({heads}, {headdim})")
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (heads,), "(H,)")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit is {dt_limit}; accepted: (low, high) with low <= high")
    check_same_dtype("x", x, B=B, C=C, z=z)
    check_parameter("x", x, dt=dt, A=A, D=D, dt_bias=dt_bias, initial_states=initial_states)
    check_same_device("x", x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
                      seq_idx=seq_idx)
    if seq_idx is not None:
        seq_idx = integers("seq_idx", seq_idx, (batch, length), "(B, L)")
    if return_varlen_states and cu_seqlens is None:
        raise ValueError("cu_seqlens is None with return_varlen_states=True; accepted: (n+1,) integers")
    group_map = as_group_map("head_to_group", head_to_group, heads, groups, x.device, "heads")
    A, D, dt_bias = parameter(A, x), parameter(D, x), parameter(dt_bias, x)
    low, high = float(dt_limit[0]), float(dt_limit[1])
    backend = backend or "auto"

    if cu_seqlens is None:
        if initial_states is not None:
            check_shape("initial_states", initial_states, (batch, heads, headdim, dstate), "(B, H, P, N)")
        out, states = _ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, group_map, initial_states, seq_idx,
                           return_final_states, backend)
        if not return_final_states:
            return out
        return out, states if state_dtype is None else states.to(state_dtype)

    bounds = _bounds(cu_seqlens, x)
    count = len(bounds) - 1
    if initial_states is not None:
        check_shape("initial_states", initial_states, (None, heads, headdim, dstate), "(n or 1, H, P, N)")
        if initial_states.shape[0] not in (1, count):
            raise ValueError(f"initial_states has shape {tuple(initial_states.shape)}; accepted: (n, H, P, N) with "
                             f"n = {count} sequences, or (1, H, P, N), the state before the first one")
    outs, ends = [], []
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = None
        if initial_states is not None and i < initial_states.shape[0]:
            own = initial_states[i:i + 1]
        part = slice(start, end)
        out, states = _ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, None if z is None else z[:, part],
                           dt_bias, dt_softplus, low, high, group_map, own,
                           None if seq_idx is None else seq_idx[:, part], True, backend)
        outs.append(out)
        ends.append(states)
    result: tuple[Tensor, ...] = (torch.cat(outs, dim=1),)
    if return_final_states:
        result += (ends[-1] if state_dtype is None else ends[-1].to(state_dtype),)
    if return_varlen_states:
        result += (torch.cat(ends).to(state_dtype or C.dtype),)
    return result if len(result) > 1 else result[0]


def _bounds(cu_seqlens: Tensor | Sequence[int], x: Tensor) -> list[int]:
    batch, length = x.shape[:2]
    if batch != 1:
        raise ValueError(f"x has batch {batch} with cu_seqlens; accepted: 1, the sequences packed in one row")
    if isinstance(cu_seqlens, Tensor):
        check_shape("cu_seqlens", cu_seqlens, (None,), "(n+1,)")
        check_dtype("cu_seqlens", cu_seqlens, INTEGERS)
        cu_seqlens = cu_seqlens.tolist()
    bounds = [int(bound) for bound in cu_seqlens]
    is_ordered = all(a <= b for a, b in itertools.pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or not is_ordered:
        raise ValueError(f"cu_seqlens is {bounds}; accepted: never falling, from 0 to L = {length}")
    return bounds


def mamba_split_conv1d_scan_combined(
        zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor,
        D: Tensor, chunk_size: int, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf), return_final_states: bool = False,
        activation: str | None = "silu", rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6,
        outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None, headdim: int | None = None,
        ngroups: int = 1, norm_before_gate: bool = True, state_dtype: torch.dtype | None = None, *,
        head_to_group: GroupMap = None, dstate: int | None = None,
        norm_segments: Sequence[tuple[int, float]] | None = None, row_padding: int = 0,
        backend: str | None = None) -> Any:
    """A Mamba-2 mixer after its input projection: convolution, SSD with softplus, gated norm, output projection.

    Args:
        zxbcdt: (B, L, 2 d_nonssm + 2 HP + 2 GN + H + row_padding), columns [z0 | x0 | z | x | B | C | dt | padding];
            z0 and x0 belong to a gated MLP, out = [silu(z0) x0 | y], and are usually absent.
        conv1d_weight: (HP + 2GN, W). conv1d_bias: (HP + 2GN,). dt_bias, A: (H,). D: (H, P), or (H,) with headdim.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (HP,); None gates y by silu(z) without a norm.
        rmsnorm_eps, ngroups: without norm_segments the norm has a segment for each group, all with rmsnorm_eps.
        norm_segments: (channels, eps) of each segment of the norm, in order, of any sizes that add up to HP.
        outproj_weight: (out, d_nonssm + HP). outproj_bias: (out,).
        dstate: N, where it cannot follow from conv1d_weight or should be checked against it.
        chunk_size, initial_states, seq_idx, dt_limit, head_to_group, state_dtype: as mamba_chunk_scan_combined.
            seq_idx holds for the convolution too.
    Returns:
        (B, L, d_nonssm + HP), or (B, L, out) with outproj_weight; with return_final_states also (B, H, P, N).
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    if seq_idx is None and state_dtype is None:
        taken = take_whole("mamba_split_conv1d_scan_combined", zxbcdt, backend, lambda: (
            zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states, *dt_limit,
            return_final_states, check_activation(activation), rmsnorm_weight, rmsnorm_eps, headdim, ngroups,
            norm_before_gate, as_group_map("head_to_group", head_to_group, D.shape[0], ngroups, D.device, "heads"),
            dstate, None if norm_segments is None else [size for size, _ in norm_segments],
            None if norm_segments is None else [eps for _, eps in norm_segments], row_padding))
        if taken is not None:
            out, final_states = taken
            if outproj_weight is not None:
                out = F.linear(out, outproj_weight, outproj_bias)
            return (out, final_states) if return_final_states else out
    check_shape("zxbcdt", zxbcdt, (None, None, None), "(B, L, d_in_proj)")
    if not isinstance(D, Tensor) or D.dim() not in (1, 2):
        raise ValueError(f"D has shape {tuple(getattr(D, 'shape', ()))}; accepted: (H,) with headdim, or (H, P)")
    heads = D.shape[0]
    if D.dim() == 2:
        if headdim is not None and headdim != D.shape[1]:
            raise ValueError(f"headdim is {headdim} but D has shape {tuple(D.shape)}; accepted: None or {D.shape[1]}")
        headdim = D.shape[1]
    elif headdim is None:
        raise ValueError(f"headdim is None and D has shape {tuple(D.shape)}; accepted: headdim, or D of shape (H, P)")
    inner = heads * headdim
    check_size("ngroups", ngroups, 1, 1 << 20)
    check_shape("conv1d_weight", conv1d_weight, (None, None), "(HP + 2GN, W)")
    channels = conv1d_weight.shape[0]
    states = channels - inner                                       # 2GN
    if states <= 0 or states % (2 * ngroups):
        raise ValueError(f"conv1d_weight has {channels} rows; accepted: HP + 2GN with HP = {inner}, G = {ngroups}")
    if dstate is not None and dstate != states // (2 * ngroups):
        raise ValueError(f"dstate is {dstate} but conv1d_weight has {channels} rows, which is N = "
                         f"{states // (2 * ngroups)} for HP = {inner} and G = {ngroups}; accepted: that, or None")
    dstate = states // (2 * ngroups)
    columns = zxbcdt.shape[2]
    d_mlp, odd = divmod(columns - inner - channels - heads - row_padding, 2)
    if row_padding < 0 or d_mlp < 0 or odd:
        raise ValueError(f"zxbcdt has {columns} columns; accepted: 2 d_nonssm + 2HP + 2GN + H + row_padding with "
                         f"HP = {inner}, 2GN = {states}, H = {heads}, row_padding = {row_padding}")
    if rmsnorm_weight is None and norm_segments is not None:
        raise ValueError("norm_segments came with rmsnorm_weight=None; accepted: only with a weight")
    check_activation(activation)

    batch, length = zxbcdt.shape[:2]
    mlp, z, xBC, dt = zxbcdt[..., :columns - row_padding].split([2 * d_mlp, inner, channels, heads], dim=-1)
    if rmsnorm_weight is not None and norm_segments is None:
        if inner % ngroups:
            raise ValueError(f"norm_segments is None, but {inner} channels cannot be shared equally by {ngroups} "
                             "groups; accepted: (channels, eps) of each segment")
        norm_segments = [(inner // ngroups, rmsnorm_eps)] * ngroups

    def convolve(xBC: Tensor, seq_idx: Tensor | None) -> Tensor:
        return causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx=seq_idx,
                                activation=activation, backend=backend).transpose(1, 2)

    def scan(xBC: Tensor, dt: Tensor, z: Tensor, initial_states: Tensor | None, seq_idx: Tensor | None) -> Any:
        x, B, C = xBC.split([inner, states // 2, states // 2], dim=-1)
        return mamba_chunk_scan_combined(
            x.unflatten(-1, (heads, headdim)), dt, A, B.unflatten(-1, (ngroups, dstate)),
            C.unflatten(-1, (ngroups, dstate)), chunk_size, D,
            z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None, dt_bias, initial_states, seq_idx,
            dt_softplus=True, dt_limit=dt_limit, return_final_states=True, state_dtype=state_dtype,
            head_to_group=head_to_group, backend=backend)

    def normalise(y: Tensor, z: Tensor) -> Tensor:
        if rmsnorm_weight is None or norm_segments is None:
            return y
        return rmsnorm_fn(y, rmsnorm_weight, None, z, norm_before_gate=norm_before_gate,
                          segments=[size for size, _ in norm_segments],
                          segment_eps=[eps for _, eps in norm_segments], backend=backend)

    dtypes = tuple(None if t is None else t.dtype for t in (zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D,
                                                            initial_states, seq_idx, rmsnorm_weight))
    if compiles_first(zxbcdt, backend, (dtypes, activation, norm_before_gate, dt_limit)):
        xBC_of_one, dt_of_one, z_of_one = (t[:1] for t in (xBC, dt, z))
        states_of_one, seq_idx_of_one = (None if t is None else t[:1] for t in (initial_states, seq_idx))
        convolved = empty_in_rows(xBC_of_one.transpose(1, 2)).transpose(1, 2)
        run_side_by_side((
            lambda: convolve(xBC_of_one, seq_idx_of_one),
            lambda: scan(convolved, dt_of_one, z_of_one, states_of_one, seq_idx_of_one),
            lambda: normalise(zxbcdt.new_empty(1, length, inner), z_of_one)), zxbcdt.device)
    out, final_states = scan(convolve(xBC, seq_idx), dt, z, initial_states, seq_idx)
    out = normalise(out.reshape(batch, length, inner), z)
    if d_mlp:
        gate, value = mlp.chunk(2, dim=-1)
        out = torch.cat([F.silu(gate) * value, out], dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, final_states) if return_final_states else out
