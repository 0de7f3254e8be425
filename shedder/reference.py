"""The specification of every op: plain PyTorch recurrences.

They compute in float32, or in float64 when any floating argument is float64, are
differentiable, and are meant to be read rather than to be fast. A packed row holds several
sequences: seq_idx (B, L) names the sequence of each token; the state starts from zero
wherever the name changes; a token with a negative name is padding: its output is zero and
the state passes by it unchanged. The initial state belongs to the first sequence of the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulator(*tensors: Tensor | None) -> torch.dtype:
    is_double = any(t is not None and t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if is_double else torch.float32


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact at both ends."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _sequence_starts(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """(starts, padding), both (B, L) bool: where a sequence other than the row's first begins, and padding."""
    padding = seq_idx < 0
    starts = torch.zeros_like(padding)
    for row, (ids, pads) in enumerate(zip(seq_idx.tolist(), padding.tolist(), strict=True)):
        current = None
        for t, (name, pad) in enumerate(zip(ids, pads, strict=True)):
            if pad:
                continue
            starts[row, t] = current is not None and name != current
            current = name
    return starts, padding


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   *, initial_state: Tensor | None = None, channel_to_group: Tensor | None = None,
                   seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selective scan of Mamba (Gu and Dao, 2023, eq. 2).

        delta  = softplus(delta + bias)
        h[t,n] = exp(delta[t] A[n]) h[t-1,n] + delta[t] B[t,n] u[t]
        y[t]   = (sum_n C[t,n] h[t,n] + D u[t]) silu(z[t])         (complex A: 2 Re of the sum)

    Args:
        u, delta, z: (B, D, L). A: (D, N), real or complex.
        B, C: (B, N, L) or (B, G, N, L), for complex A with last dim 2L (real, imaginary interleaved);
            or (D, N) as A when they do not change with time.
        D, delta_bias: (D,). initial_state: (B, D, N). channel_to_group: (D,) integers; the default
            gives each group an equal run of channels. seq_idx: (B, L).
    Returns:
        y (B, D, L) and the final state (B, D, N).
    """
    real = _accumulator(u, delta, A, B, C, D, z, delta_bias, initial_state)
    state_dtype = torch.promote_types(A.dtype if A.is_complex() else real, real)
    batch, channels, length = u.shape
    A = A.to(state_dtype)

    def per_channel(M: Tensor) -> Tensor:
        """(B, D, N, L) from any accepted form of B or C."""
        if M.dim() == 2:
            return M.to(state_dtype)[None, :, :, None].expand(batch, -1, -1, length)
        M = M.to(real)
        if A.is_complex():
            M = torch.view_as_complex(M.unflatten(-1, (length, 2)).contiguous())
        if M.dim() == 3:
            M = M[:, None]
        if channel_to_group is not None:
            return M[:, channel_to_group.long()]
        return M.repeat_interleave(channels // M.shape[1], dim=1)

    B, C = per_channel(B), per_channel(C)
    u, delta = u.to(real), delta.to(real)
    if delta_bias is not None:
        delta = delta + delta_bias.to(real)[:, None]
    if delta_softplus:
        delta = softplus(delta)
    keep = torch.ones(batch, length, dtype=real, device=u.device)
    if seq_idx is not None:
        starts, padding = _sequence_starts(seq_idx)
        keep = (~starts).to(real)
        delta = delta.masked_fill(padding[:, None], 0.0)

    h = (torch.zeros(batch, channels, A.shape[1], dtype=state_dtype, device=u.device)
         if initial_state is None else initial_state.to(state_dtype))
    ys = []
    for t in range(length):
        d = delta[:, :, t, None]
        h = torch.exp(d * A) * (h * keep[:, t, None, None]) + d * B[..., t] * u[:, :, t, None]
        y = (C[..., t] * h).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    y = torch.stack(ys, dim=-1) if ys else u.new_zeros(batch, channels, 0)
    if D is not None:
        y = y + D.to(real)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(real))
    if seq_idx is not None:
        y = y.masked_fill(padding[:, None], 0.0)
    return y, h


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, math.inf),
        *, head_to_group: Tensor | None = None, initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """State-space duality layer of Mamba-2 (Dao and Gu, 2024, eq. 1), as its recurrence.

        dt       = clamp(softplus(dt + bias), *dt_limit)
        h[t,p,n] = exp(dt[t] A) h[t-1,p,n] + dt[t] x[t,p] B[t,n]
        y[t,p]   = (sum_n C[t,n] h[t,p,n] + D x[t,p]) silu(z[t,p])

    Args:
        x, z: (B, L, H, P). dt: (B, L, H). A, dt_bias: (H,). B, C: (B, L, G, N). D: (H,) or (H, P).
        head_to_group: (H,) integers in [0, G); the default gives each group an equal run of heads.
        initial_states: (B, H, P, N). seq_idx: (B, L).
    Returns:
        y (B, L, H, P) and the final states (B, H, P, N).
    """
    real = _accumulator(x, dt, A, B, C, D, z, dt_bias, initial_states)
    batch, length, heads, headdim = x.shape
    if head_to_group is None:
        head_to_group = torch.arange(heads, device=x.device) // (heads // B.shape[2])
    groups = head_to_group.long()
    B, C = B.to(real)[:, :, groups], C.to(real)[:, :, groups]
    x, A = x.to(real), A.to(real)
    dt = discrete_dt(dt, dt_bias, dt_softplus, dt_limit, real)
    keep = torch.ones(batch, length, dtype=real, device=x.device)
    if seq_idx is not None:
        starts, padding = _sequence_starts(seq_idx)
        keep = (~starts).to(real)
        dt = dt.masked_fill(padding[..., None], 0.0)

    h = (torch.zeros(batch, heads, headdim, B.shape[-1], dtype=real, device=x.device)
         if initial_states is None else initial_states.to(real))
    ys = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A) * keep[:, t, None]
        h = decay[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        ys.append((C[:, t, :, None, :] * h).sum(-1))
    y = torch.stack(ys, dim=1) if ys else x
    if D is not None:
        y = y + (D.to(real)[:, None] if D.dim() == 1 else D.to(real)) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    if seq_idx is not None:
        y = y.masked_fill(padding[..., None, None], 0.0)
    return y, h


def discrete_dt(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float],
                dtype: torch.dtype) -> Tensor:
    """clamp(softplus(dt + bias), *dt_limit) in `dtype`; bias broadcasts over the last dimension of dt."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    return dt.clamp(*dt_limit) if tuple(dt_limit) != (0.0, math.inf) else dt


def state_update(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                 z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
                 *, head_to_group: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One decode step of either family.

        h = exp(dt A) h + dt B x        y = (sum_n C h + D x) silu(z)

    Args:
        state: (B, H, P, N). x, dt, z: (B, H, P). A: (H, P, N). B, C: (B, G, N). D, dt_bias: (H, P).
            Mamba-1 is H = 1 with its channels as P and head_to_group by channel, (P,), when G > 1.
        head_to_group: (H,) integers in [0, G), or (P,) when H = 1.
    Returns:
        y (B, H, P) and the new state.
    """
    real = _accumulator(state, x, dt, A, B, C, D, z, dt_bias)
    heads, headdim = x.shape[1:]
    groups = B.shape[1]
    rows = headdim if heads == 1 else heads            # what head_to_group numbers
    if head_to_group is None:
        head_to_group = torch.arange(rows, device=x.device) // (rows // groups)
    B, C = (M.to(real)[:, head_to_group.long()] for M in (B, C))
    B, C = (M[:, None] if heads == 1 else M[:, :, None] for M in (B, C))      # (B, H or 1, P or 1, N)
    x, dt = x.to(real), discrete_dt(dt, dt_bias, dt_softplus, (0.0, math.inf), real)
    h = torch.exp(dt[..., None] * A.to(real)) * state.to(real) + (dt * x)[..., None] * B
    y = (C * h).sum(-1)
    if D is not None:
        y = y + D.to(real) * x
    if z is not None:
        y = y * F.silu(z.to(real))
    return y, h


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
                  *, initial_states: Tensor | None = None, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution along time, with optional SiLU.

        y[c,t] = act(bias[c] + sum_w weight[c,w] x[c, t - (W-1) + w])

    Taps that reach into another sequence of a packed row, or into padding, read zero.

    Args:
        x: (B, D, L). weight: (D, W). bias: (D,). initial_states: (B, D, W-1), the inputs before t = 0.
        activation: None, "silu" or "swish". seq_idx: (B, L).
    Returns:
        y (B, D, L) and the final states (B, D, W-1): the last inputs of initial_states and x.
    """
    real = _accumulator(x, weight, bias, initial_states)
    batch, channels, length = x.shape
    width = weight.shape[1]
    history = (x.new_zeros(batch, channels, width - 1) if initial_states is None else initial_states)
    padded = torch.cat([history.to(real), x.to(real)], dim=-1)
    windows = padded.unfold(-1, width, 1)                                     # (B, D, L, W)
    if seq_idx is not None:
        before = seq_idx[:, :1].expand(-1, width - 1)
        ids = torch.cat([before, seq_idx], dim=-1).unfold(-1, width, 1)       # (B, L, W)
        windows = windows * (ids == seq_idx[..., None])[:, None]
    y = (windows * weight.to(real)[:, None, :]).sum(-1)
    if bias is not None:
        y = y + bias.to(real)[:, None]
    if activation is not None:
        y = F.silu(y)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0.0)
    return y, padded[..., length:]


def causal_conv1d_update(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                         activation: str | None = None, *,
                         cache_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S decode steps of the causal convolution.

    Args:
        x: (B, D, S). conv_state: (B, D, K) with K >= W-1, the last K inputs, oldest first; with
            cache_seqlens (B,), the tokens seen so far, a ring in which token i sits at i mod K.
    Returns:
        y (B, D, S) and the new conv_state.
    """
    length, kept = x.shape[-1], conv_state.shape[-1]
    history_length = weight.shape[1] - 1
    if cache_seqlens is None:
        y, _ = causal_conv1d(x, weight, bias, activation, initial_states=conv_state[..., kept - history_length:])
        return y, torch.cat([conv_state, x.to(conv_state.dtype)], dim=-1)[..., length:]
    seen = cache_seqlens.long()[:, None]
    past = torch.remainder(seen + torch.arange(-history_length, 0, device=x.device), kept)
    history = conv_state.gather(2, past[:, None].expand(-1, x.shape[1], -1))
    y, _ = causal_conv1d(x, weight, bias, activation, initial_states=history)
    stored = min(length, kept)                         # older tokens would be overwritten at once
    slots = torch.remainder(seen + torch.arange(length - stored, length, device=x.device), kept)
    new_state = conv_state.scatter(2, slots[:, None].expand(-1, x.shape[1], -1),
                                   x[..., length - stored:].to(conv_state.dtype))
    return y, new_state


def gated_rmsnorm(x: Tensor, weight: Tensor, bias: Tensor | None = None, z: Tensor | None = None,
                  *, segments: Sequence[int], eps: Sequence[float], norm_before_gate: bool = True) -> Tensor:
    """RMSNorm over each segment of the last dimension, gated by silu(z) before or after the norm.

        norm(v)_c = v_c / sqrt(mean of v^2 over the segment of c + eps of the segment) * weight_c + bias_c

    Args:
        x, z: (..., D). weight, bias: (D,). segments: channels of each segment, in order, with sum D.
        eps: one for each segment.
    """
    real = _accumulator(x, weight, bias, z)
    v = x.to(real)
    gate = None if z is None else F.silu(z.to(real))
    if gate is not None and not norm_before_gate:
        v = v * gate
    parts = [part * torch.rsqrt(part.square().mean(-1, keepdim=True) + e)
             for part, e in zip(v.split(list(segments), dim=-1), eps, strict=True)]
    y = torch.cat(parts, dim=-1) * weight.to(real)
    if bias is not None:
        y = y + bias.to(real)
    return y * gate if gate is not None and norm_before_gate else y


def removed_ssm(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None = None, D: Tensor | None = None,
                norm_weight: Tensor | None = None, *, segments: Sequence[int] = (), eps: Sequence[float] = (),
                norm_before_gate: bool = False, initial_states: Tensor | None = None) -> Tensor:
    """What is left of a Mamba layer without its state-space part.

        u = D silu(conv(x))     norm(u silu(z)), or norm(u) silu(z) with norm_before_gate, or u silu(z) without a norm

    Args:
        x, z: (B, L, C). weight: (C, W). bias, norm_weight: (C,). D: (H, P) with HP = C.
        initial_states: (B, C, W-1), the inputs before the first token. segments, eps: of the norm, see gated_rmsnorm.
    """
    u, _ = causal_conv1d(x.transpose(1, 2), weight, bias, "silu", initial_states=initial_states)
    u = u.transpose(1, 2)
    if D is not None:
        u = u * D.to(u.dtype).reshape(-1)
    if norm_weight is None:
        return u * F.silu(z.to(u.dtype))
    return gated_rmsnorm(u, norm_weight, None, z, segments=segments, eps=eps, norm_before_gate=norm_before_gate)
