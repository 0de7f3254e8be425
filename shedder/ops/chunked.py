"""The SSD of shedder.reference.ssd as matrix products over chunks of time: what its gradient runs through.

Algebraically the recurrence: inside a chunk a masked attention, between chunks the states.

    s[i,j]  = sum over j < t <= i of dt[t] A                (-inf for j > i and across sequences)
    y[i]    = sum_j (C[i].B[j]) exp(s[i,j]) dt[j] x[j]  +  exp(s[i,start]) C[i].h[start]
    h[end]  = exp(s[end,start]) h[start] + sum_j exp(s[end,j]) dt[j] x[j] B[j]

Every exponent is a difference of prefix sums of its own chunk, taken so that a large step early in
the chunk costs no digits later in it. Sums are fp32 (fp64 for fp64 inputs); where x is bf16 the
large products take bf16 operands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shedder.reference import discrete_dt

CHUNK = 64                # Q: decays cost Q per token and head, states P N / Q; 64 balances them at P 64, N 128
BLOCK = 32                # chunks whose states are passed on by one product


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], head_to_group: Tensor,
        initial_states: Tensor | None = None, seq_idx: Tensor | None = None, *,
        chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(y, final states) of shedder.reference.ssd, in its accumulation dtype; arguments as there."""
    batch, length, heads, headdim = x.shape
    groups, dstate = B.shape[2:]
    floats = [t.dtype for t in (x, dt, A, B, C, D, z, dt_bias, initial_states) if t is not None]
    real = torch.float64 if torch.float64 in floats else torch.float32
    product = torch.bfloat16 if x.dtype == torch.bfloat16 and real == torch.float32 else real
    state = (x.new_zeros(batch, heads, headdim, dstate, dtype=real) if initial_states is None
             else initial_states.to(real))
    if length == 0:
        return x.to(real) * 1, state * 1

    step = discrete_dt(dt, dt_bias, dt_softplus, dt_limit, real)                     # (B, L, H)
    runs = None
    if seq_idx is not None:
        runs, padding = _runs(seq_idx)
        step = step.masked_fill(padding[..., None], 0.0)
    chunks = -(-length // chunk)
    missing = chunks * chunk - length

    def split(t: Tensor) -> Tensor:
        """(B, L, ...) as (B, chunks, Q, ...); the tokens added at the end have dt = 0 and change nothing."""
        if missing:
            t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
        return t.unflatten(1, (chunks, chunk))

    step = split(step).permute(0, 3, 1, 2)                                            # (B, H, c, Q)
    total, inner = _decays(step * A.to(real)[:, None, None])
    to_end, from_start = total[..., -1:] - total, total                              # both of what lies in the chunk
    if runs is not None:
        last = runs[:, -1:].expand(-1, missing)
        runs = torch.cat([runs, last], dim=1).unflatten(1, (chunks, chunk))[:, None]  # (B, 1, c, Q)
        end = runs[..., -1:]
        start = torch.cat([torch.zeros_like(end[:, :, :1]), end[:, :, :-1]], dim=2)   # of the state that comes in
        inner = inner.masked_fill(runs[..., :, None] != runs[..., None, :], -torch.inf)
        to_end = to_end.masked_fill(runs != end, -torch.inf)
        from_start = from_start.masked_fill(runs != start, -torch.inf)
    passed = from_start[..., -1]                                                      # (B, H, c)

    # Heads share a product where they share B and C: with one group they are columns of one matrix.
    is_shared = groups == 1
    xs = split(x)
    Bs, Cs = (split(M).to(product).permute(0, 3, 1, 2, 4) for M in (B, C))            # (B, G, c, Q, N)
    scores = Cs @ Bs.transpose(-1, -2)                                                # (B, G, c, Q, Q)
    index = head_to_group.long()
    if not is_shared:
        scores, Bs, Cs = (M[:, index] for M in (scores, Bs, Cs))                      # (B, H, c, ...)
    weights = scores.to(real) * inner.exp() * step[..., None, :]
    values = xs.permute(0, 3, 1, 2, 4)                                                # (B, H, c, Q, P)
    y = (weights.to(product) @ values.to(product)).to(real)

    weighted = values.to(real) * (to_end.exp() * step)[..., None]
    if is_shared:
        columns = weighted.permute(0, 2, 1, 4, 3).flatten(2, 3).to(product)           # (B, c, HP, Q)
        gained = (columns @ Bs[:, 0]).unflatten(2, (heads, headdim)).transpose(1, 2)
    else:
        gained = weighted.to(product).transpose(-1, -2) @ Bs                          # (B, H, c, P, N)
    incoming, state = _pass_states(gained.to(real), passed, state)
    if is_shared:
        rows = incoming.transpose(1, 2).flatten(2, 3).to(product)                     # (B, c, HP, N)
        seen = (Cs[:, 0] @ rows.transpose(-1, -2)).unflatten(3, (heads, headdim)).permute(0, 3, 1, 2, 4)
    else:
        seen = Cs @ incoming.to(product).transpose(-1, -2)                            # (B, H, c, Q, P)
    y = y + seen.to(real) * from_start.exp()[..., None]

    y = y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]                            # (B, L, H, P)
    if D is not None:
        y = y + (D.to(real)[:, None] if D.dim() == 1 else D.to(real)) * x.to(real)
    if z is not None:
        y = y * F.silu(z.to(real))
    if seq_idx is not None:
        y = y.masked_fill(padding[..., None, None], 0.0)
    return y, state


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Of log decays (..., Q): their prefix sums, and the sums over (j, i] as (..., Q, Q), -inf for j > i.

    The prefix sum is kept as a rounded part and the rest, so that a difference is as exact as
    a sum over (j, i] alone would be.
    """
    exact = log_decay.double().cumsum(-1)
    total = exact.to(log_decay.dtype)
    rest = (exact - total.double()).detach().to(log_decay.dtype)
    between = total[..., :, None] - total[..., None, :]
    if log_decay.dtype != torch.float64:
        between = between + (rest[..., :, None] - rest[..., None, :])
    size = log_decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    return total, between.masked_fill(later, -torch.inf)


def _pass_states(gained: Tensor, passed: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state that comes into each chunk, (B, H, c, P, N), and the one after the last.

    gained (B, H, c, P, N) is what a chunk adds by its end; passed (B, H, c) is the log of the
    decay of a state over the chunk, -inf where a sequence ends.
    """
    incoming = []
    for more, decay in zip(gained.split(BLOCK, dim=2), passed.split(BLOCK, dim=2), strict=True):
        size = more.shape[2]
        is_cut = torch.isinf(decay)
        cuts = is_cut.long().cumsum(-1)
        _, between = _decays(F.pad(decay.masked_fill(is_cut, 0.0), (1, 0)))           # (B, H, size + 1, size + 1)
        names = F.pad(cuts, (1, 0))
        between = between.masked_fill(names[..., :, None] != names[..., None, :], -torch.inf)
        terms = torch.cat([state[:, :, None], more], dim=2).flatten(3)
        states = (between.exp() @ terms).unflatten(3, more.shape[3:])                 # before chunk 0, 1, ..., size
        incoming.append(states[:, :, :size])
        state = states[:, :, size]
    return torch.cat(incoming, dim=2), state


def _runs(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """(runs, padding), both (B, L): how many sequences have ended before each token, and which tokens are padding."""
    padding = seq_idx < 0
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    latest = place.masked_fill(padding, -1).cummax(1).values                          # last token that is none
    before = F.pad(latest[:, :-1], (1, 0), value=-1)
    name_before = seq_idx.gather(1, before.clamp(min=0))
    starts = ~padding & (before >= 0) & (seq_idx != name_before)
    return starts.long().cumsum(1), padding
