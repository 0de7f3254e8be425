"""One decode step of a Mamba-2 mixer between its projections: convolution, state if there is one, gate and norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    check_norm_segments,
    check_parameter,
    check_same_device,
    check_shape,
    check_size,
)
from shedder.ops.conv1d import causal_conv1d_update, check_slots
from shedder.ops.gated_norm import rmsnorm_fn
from shedder.ops.group_map import GroupMap, as_group_map, check_group_map
from shedder.ops.register import record, register
from shedder.ops.state_update import selective_state_update
from shedder.ops.tracing import is_traced
from shedder.ops.whole import take_whole
from shedder.reference import discrete_dt

PARTS = "causal_conv1d_update, state_update, gated_rmsnorm"


def _inner(ssm_state: Tensor | None, conv_weight: Tensor, ngroups: int) -> int:
    return conv_weight.shape[0] - (0 if ssm_state is None else 2 * ngroups * ssm_state.shape[3])


def _facts(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
           conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor, norm_weight: Tensor | None,
           ngroups: int, head_to_group: Tensor, segments: Sequence[int], eps: Sequence[float], norm_before_gate: bool,
           dt_min: float, dt_max: float, cache_seqlens: Tensor | None, state_batch_indices: Tensor | None) -> Facts:
    heads = D.shape[0]
    return (("device", zxbcdt.device.type), ("dtype", zxbcdt.dtype), ("batch", zxbcdt.shape[0]), ("length", 1),
            ("heads", heads), ("headdim", _inner(ssm_state, conv_weight, ngroups) // heads),
            ("dstate", 0 if ssm_state is None else ssm_state.shape[3]), ("groups", ngroups),
            ("width", conv_weight.shape[1]), ("weight_dtype", conv_weight.dtype),
            ("state_dtype", None if ssm_state is None else ssm_state.dtype),
            ("norm_dtype", None if norm_weight is None else norm_weight.dtype), ("segments", tuple(segments)))


def _fake(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
          dt_bias: Tensor | None, A: Tensor | None, D: Tensor, norm_weight: Tensor | None, ngroups: int,
          *_: object) -> Tensor:
    return zxbcdt.new_empty(zxbcdt.shape[0], _inner(ssm_state, conv_weight, ngroups))


def _check_values(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
                  conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor,
                  norm_weight: Tensor | None, ngroups: int, head_to_group: Tensor, segments: Sequence[int],
                  eps: Sequence[float], norm_before_gate: bool, dt_min: float, dt_max: float,
                  cache_seqlens: Tensor | None, state_batch_indices: Tensor | None) -> None:
    check_group_map("head_to_group", head_to_group, ngroups)
    check_slots("state_batch_indices", state_batch_indices, "conv_state", conv_state.shape[0])


_step_mixer = register(
    "step_mixer",
    "Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!)? ssm_state, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor? dt_bias, Tensor? A, Tensor D, Tensor? norm_weight, int ngroups, Tensor head_to_group, int[] segments, "
    "float[] eps, bool norm_before_gate, float dt_min, float dt_max, Tensor? cache_seqlens, "
    "Tensor? state_batch_indices", "Tensor",
    facts=_facts, fake=_fake, check_values=_check_values)


def step_mixer(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
               conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor,
               norm_weight: Tensor | None = None, *, headdim: int, ngroups: int = 1, dstate: int,
               head_to_group: GroupMap = None,
               norm_segments: Sequence[tuple[int, float]] | None = None, norm_before_gate: bool = True,
               dt_limit: tuple[float, float] = (0.0, math.inf), row_padding: int = 0,
               cache_seqlens: Tensor | None = None, state_batch_indices: Tensor | None = None,
               backend: str | None = None) -> Tensor:
    """One decode step of a Mamba-2 mixer after its input projection; both states move on in place. No gradient.

        [z | x | B | C | dt | padding] = zxbcdt         x, B, C = silu(convolution step of x, B, C)
        dt = clamp(softplus(dt + dt_bias), *dt_limit)   h = exp(dt A) h + dt B x        y = sum_n C h + D x
        norm(y silu(z)), or norm(y) silu(z) with norm_before_gate, or y silu(z) without a norm

    A removed SSM has dstate 0 and None for ssm_state, dt_bias and A: [z | x | padding] = zxbcdt, and y = D x.

    One call where a backend has it in one kernel. Elsewhere (explain tells where, and why) causal_conv1d_update,
    selective_state_update and rmsnorm_fn run one after another, each on the backend that it would take by itself.

    Args:
        zxbcdt: (B, 2HP + 2GN + H + row_padding), columns [z | x | B | C | dt | padding], rows at any distance.
        conv_state: (B or slots, HP + 2GN, K) with K >= W-1 as zxbcdt, the last K inputs, oldest first, any strides.
        ssm_state: (B or slots, H, P, N), fp32, bf16, fp16; None if dstate is 0.
        conv_weight: (HP + 2GN, W) with W from 1 to 4. conv_bias: (HP + 2GN,) as conv_weight.
        dt_bias, A: (H,); None if dstate is 0. D: (H,) or (H, P). norm_weight: (HP,); None gates y without a norm.
        headdim, ngroups, dstate: P, G and N.
        head_to_group: (H,) integers, the group that each head reads: a tuple, a list or a tensor.
            None gives each group an equal run.
        norm_segments: (channels, eps) of each segment of the norm, in order, of any sizes that add up to HP.
        cache_seqlens: (B,) integers, tokens seen so far: conv_state is then a ring with token i at i mod K.
        state_batch_indices: (B,) integers, the slot of each row in both states; negative: output 0, no state touched.
    Returns:
        (B, HP), the dtype of zxbcdt.
    Raises:
        ValueError: naming the argument, what came, and what is accepted.
    """
    segments = () if norm_segments is None else tuple([(size, eps) for size, eps in norm_segments])
    parameters = (conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    taken = take_whole(
        "step_mixer", zxbcdt, backend,
        lambda: (zxbcdt, conv_state, ssm_state, *parameters, headdim, ngroups, dstate,
                 head_to_group if isinstance(head_to_group, Tensor) or (head_to_group is None and ngroups == 1) else
                 as_group_map("head_to_group", head_to_group, D.shape[0], ngroups, zxbcdt.device, "heads"),
                 [size for size, _ in segments], [eps for _, eps in segments], norm_before_gate, *dt_limit,
                 row_padding, cache_seqlens, state_batch_indices),
        lambda: (("batch", zxbcdt.shape[0]), ("heads", D.shape[0]), ("headdim", headdim), ("dstate", dstate),
                 ("groups", ngroups), ("segments", segments and tuple([size for size, _ in segments]))))
    if taken is not None:
        return taken[0]
    tensors = (zxbcdt, conv_state, ssm_state, *parameters, cache_seqlens, state_batch_indices)
    decision = _check_and_decide(tensors, headdim, ngroups, dstate, segments, row_padding, tuple(dt_limit), backend)
    cache_seqlens, state_batch_indices = (None if indices is None else indices.to(torch.int32)
                                          for indices in (cache_seqlens, state_batch_indices))
    group_map = as_group_map("head_to_group", head_to_group, D.shape[0], ngroups, zxbcdt.device, "heads")
    if decision.backend == "composed":
        record(decision)
        return _composed(zxbcdt, conv_state, ssm_state, *parameters, headdim, ngroups, dstate, group_map, segments,
                         norm_before_gate, dt_limit, cache_seqlens, state_batch_indices, backend)
    return _step_mixer(zxbcdt, conv_state, ssm_state, *parameters, ngroups, group_map, [size for size, _ in segments],
                       [eps for _, eps in segments], norm_before_gate, *dt_limit, cache_seqlens, state_batch_indices,
                       backend or "auto")


@OncePerLook
def _check_and_decide(tensors: tuple[Any, ...], headdim: int, ngroups: int, dstate: int, segments: tuple,
                      row_padding: int, dt_limit: tuple[float, float], backend: str | None) -> Explanation:
    (zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, cache_seqlens,
     state_batch_indices) = tensors
    check_shape("zxbcdt", zxbcdt, (None, None), "(B, columns)")
    check_size("headdim", headdim, 1, 256)
    check_size("ngroups", ngroups, 1, 1 << 20)
    check_size("dstate", dstate, 0, MAX_STATES)
    check_size("row_padding", row_padding, 0, 1 << 20)
    if dstate:
        check_shape("A", A, (None,), "(H,)")
    heads = A.shape[0] if dstate else getattr(D, "shape", (0,))[0]
    if not isinstance(D, Tensor) or tuple(D.shape) not in ((heads,), (heads, headdim)):
        raise ValueError(f"D has shape {tuple(getattr(D, 'shape', ()))}; accepted: (H,) or (H, P) = "
                         f"({heads},) or ({heads}, {headdim})")
    batch = zxbcdt.shape[0]
    for name, indices in (("cache_seqlens", cache_seqlens), ("state_batch_indices", state_batch_indices)):
        if indices is not None:
            check_shape(name, indices, (batch,), "(B,)")
            check_dtype(name, indices, INTEGERS)
    slots, letter = (batch, "B") if state_batch_indices is None else (None, "slots")
    inner = heads * headdim
    channels = inner + 2 * ngroups * dstate
    if dstate:
        check_shape("zxbcdt", zxbcdt, (batch, inner + channels + heads + row_padding),
                    "(B, 2HP + 2GN + H + row_padding)")
        check_shape("ssm_state", ssm_state, (slots, heads, headdim, dstate), f"({letter}, H, P, N)")
        check_shape("dt_bias", dt_bias, (heads,), "(H,)")
        check_dtype("ssm_state", ssm_state, FLOATS)
    else:
        check_shape("zxbcdt", zxbcdt, (batch, 2 * inner + row_padding), "(B, 2HP + row_padding)")
        for name, value in (("ssm_state", ssm_state), ("A", A), ("dt_bias", dt_bias)):
            if value is not None:
                raise ValueError(f"{name} is given, but dstate is 0; accepted: None")
    check_shape("conv_weight", conv_weight, (channels, None), "(HP + 2GN, W)")
    width = conv_weight.shape[1]
    check_size("W (conv_weight.shape[1])", width, 1, 4)
    if slots is None and ssm_state is not None:
        slots = ssm_state.shape[0]
    check_conv_state(conv_state, slots, channels, width, cache_seqlens is not None, f"({letter}, HP + 2GN, K)")
    if conv_bias is not None:
        check_shape("conv_bias", conv_bias, (channels,), "(HP + 2GN,)")
        check_dtype("conv_bias", conv_bias, (conv_weight.dtype,), ", the dtype of conv_weight")
    check_norm_segments(norm_weight, segments, inner, "HP")
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ValueError(f"dt_limit is {dt_limit}; accepted: two numbers, 0 <= low <= high")
    check_dtype("zxbcdt", zxbcdt, FLOATS)
    check_dtype("conv_state", conv_state, (zxbcdt.dtype,), ", the dtype of zxbcdt")
    check_parameter("zxbcdt", zxbcdt, conv_weight=conv_weight, dt_bias=dt_bias, A=A, D=D, norm_weight=norm_weight)
    check_same_device("zxbcdt", zxbcdt, conv_state=conv_state, ssm_state=ssm_state, conv_weight=conv_weight,
                      conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D, norm_weight=norm_weight,
                      cache_seqlens=cache_seqlens, state_batch_indices=state_batch_indices)
    facts = _facts(zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, D,
                   [size for size, _ in segments], [], True, low, high, None, None)
    if is_traced():                                     # which may keep the batch open
        facts = tuple(("batch", 1) if name == "batch" else (name, value) for name, value in facts)
    return decide_or_compose("step_mixer", PARTS, backend or "auto", facts)


def _composed(zxbcdt: Tensor, conv_state: Tensor, ssm_state: Tensor | None, conv_weight: Tensor,
              conv_bias: Tensor | None, dt_bias: Tensor | None, A: Tensor | None, D: Tensor,
              norm_weight: Tensor | None, headdim: int, ngroups: int, dstate: int, head_to_group: Tensor,
              segments: tuple[tuple[int, float], ...], norm_before_gate: bool, dt_limit: tuple[float, float],
              cache_seqlens: Tensor | None, state_batch_indices: Tensor | None, backend: str | None) -> Tensor:
    batch, heads = zxbcdt.shape[0], D.shape[0]
    inner, states = heads * headdim, ngroups * dstate
    z, xBC = zxbcdt[:, :2 * (inner + states)].split([inner, inner + 2 * states], dim=-1)
    xBC = causal_conv1d_update(xBC, conv_state, conv_weight, conv_bias, "silu", cache_seqlens, state_batch_indices,
                               backend=backend)
    x, B, C = xBC.split([inner, states, states], dim=-1)
    per_head = (heads, headdim)
    D = D[:, None].expand(per_head) if D.dim() == 1 else D
    if ssm_state is None or A is None or dt_bias is None:
        y = (x.view(batch, *per_head) * D).to(x.dtype).view(batch, inner)
        if norm_weight is None:
            return y * F.silu(z)
    else:
        dt = zxbcdt[:, 2 * (inner + states):][:, :heads]
        bias: Tensor | None = dt_bias[:, None].expand(per_head)
        is_limited = tuple(dt_limit) != (0.0, math.inf)
        if is_limited:                                  # the state update knows no limit
            dt, bias = discrete_dt(dt, dt_bias, True, dt_limit, torch.promote_types(A.dtype, torch.float32)), None
        y = selective_state_update(
            ssm_state, x.view(batch, *per_head), dt[..., None].expand(batch, *per_head),
            A[:, None, None].expand(*per_head, dstate), B.view(batch, ngroups, dstate),
            C.view(batch, ngroups, dstate), D, z=z.view(batch, *per_head) if norm_weight is None else None,
            dt_bias=bias, dt_softplus=not is_limited, state_batch_indices=state_batch_indices,
            head_to_group=head_to_group, backend=backend).view(batch, inner)
        if norm_weight is None:
            return y
    return rmsnorm_fn(y, norm_weight, None, z=z, norm_before_gate=norm_before_gate,
                      segments=[size for size, _ in segments], segment_eps=[eps for _, eps in segments],
                      backend=backend)
