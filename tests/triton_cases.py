"""What each Triton kernel must compute, on any device: inputs, the float64 reference, the comparison.

Used by test_triton_gpu.py on a GPU and by triton_interpreter_cases.py on the CPU. Every tensor of a
case is a view into a wider buffer of NaN, so that a wrong stride or a missing mask shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shedder import reference
from shedder.ops import triton as backend
from shedder.triton_kernels.rows import empty_in_rows

# RMS error over RMS of the reference, and the largest error over that RMS plus the value itself. fp32: exp
# is good to 2e-7 and a state remembers hundreds of them; TF32 in three products keeps 22 bits. bf16 and
# fp16: the output is rounded to 8 and 11 bits, as are the operands of products; where the N terms of one output
# cancel, that output alone loses more, so the largest error has a wider limit than the RMS.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (1.5e-3, 1e-2), torch.bfloat16: (5e-3, 1e-1)}


def assert_close(name: str, got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    scale = expected.double().square().mean().sqrt().item() or 1.0
    error = got.double() - expected.double()
    rms, largest = error.square().mean().sqrt().item() / scale, (error.abs() / (scale + expected.abs())).max().item()
    rms_limit, largest_limit = TOLERANCE[dtype]
    assert rms <= rms_limit and largest <= largest_limit, f"{name}: rms error {rms:.2e}, largest {largest:.2e}"


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Random:
    """Random tensors of one device, each inside a wider buffer of NaN."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def inside(self, values: Tensor, dtype: torch.dtype, order: Sequence[int] | None = None) -> Tensor:
        """`values` as a view into a buffer of NaN (of -7 for integers); order: dimensions, outermost first."""
        order = list(order or range(values.dim()))
        shape = [values.shape[d] for d in order]
        fill = math.nan if dtype.is_floating_point else -7
        buffer = torch.full([*shape[:-1], shape[-1] + 3], fill, dtype=dtype, device=self.device)
        view = buffer[..., 1:1 + shape[-1]].permute([order.index(d) for d in range(values.dim())])
        return view.copy_(values.to(dtype))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, shift: float = 0.0,
               order: Sequence[int] | None = None) -> Tensor:
        return self.inside(torch.randn(shape, generator=self.generator) * scale + shift, dtype, order)

    def negative(self, *shape: int) -> Tensor:
        """A: from -1/4 to -16, log-uniform and unstructured."""
        return self.inside(-torch.exp2(torch.rand(shape, generator=self.generator) * 6 - 2), torch.float32)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return self.inside(torch.randint(low, high, shape, generator=self.generator), torch.int32)

    def sequences(self, batch: int, length: int) -> Tensor:
        """seq_idx with names that come back, and padding in front, inside, between and at the end."""
        names = torch.randint(0, 3, (batch, length), generator=self.generator)
        change = torch.rand(batch, length, generator=self.generator) < 4 / max(length, 4)
        rows = []
        for row_names, row_change in zip(names.tolist(), change.tolist()):
            row, name = [], 0
            for candidate, new in zip(row_names, row_change):
                name = candidate if new else name
                row.append(name)
            rows.append(row)
        seq_idx = torch.tensor(rows).view(batch, length)
        padding = torch.rand(batch, length, generator=self.generator) < 0.1
        return self.inside(seq_idx.masked_fill(padding, -1), torch.int32)


def group_map(sizes: Sequence[int], device: str) -> Tensor:
    """sizes[g] heads read group g; the heads of a group are not neighbours."""
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))
    return torch.tensor(groups, dtype=torch.int32)[order].to(device)


def _double(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def check_ssd(device: str, dtype: torch.dtype, *, batch: int = 2, length: int, groups: Sequence[int], headdim: int,
              dstate: int, extras: bool, packed: bool = False, channel_D: bool = False, seed: int = 0) -> None:
    """extras: D, z, bias, softplus, dt limits and initial states. groups: the heads of each group."""
    random, heads = Random(device, seed), sum(groups)
    x = random.normal(batch, length, heads, headdim, dtype=dtype)
    dt = random.normal(batch, length, heads, dtype=dtype, shift=-2.0)
    dt = dt if extras else random.inside(torch.nn.functional.softplus(dt).cpu(), dtype)
    A = random.negative(heads)
    B, C = (random.normal(batch, length, len(groups), dstate, dtype=dtype) for _ in "BC")
    D = z = bias = initial = None
    limit = (0.0, math.inf)
    if extras:
        D = random.normal(heads, headdim) if channel_D else random.normal(heads)
        z, bias = random.normal(batch, length, heads, headdim, dtype=dtype), random.normal(heads)
        initial, limit = random.normal(batch, heads, headdim, dstate), (0.05, 0.4)
    seq_idx = random.sequences(batch, length) if packed else None
    heads_map = group_map(groups, device)
    with poisoned():
        y, final = backend.ssd(x, dt, A, B, C, D, z, bias, extras, *limit, heads_map, initial, seq_idx)
    expected, expected_final = reference.ssd(
        x.double(), *map(_double, (dt, A, B, C, D, z, bias)), extras, limit, head_to_group=heads_map,
        initial_states=_double(initial), seq_idx=seq_idx)
    assert y.dtype == dtype and y.is_contiguous() and final.dtype == torch.float32
    assert_close("y", y, expected, dtype)
    assert_close("final states", final, expected_final, dtype)


def check_selective_scan(device: str, dtype: torch.dtype, *, batch: int = 2, length: int, channels: int, dstate: int,
                         groups: int = 1, extras: bool, packed: bool = False, constant: str = "",
                         channel_last: bool = False, seed: int = 0) -> None:
    """constant: which of "B", "C", "BC" do not change with time."""
    random, order = Random(device, seed), (0, 2, 1) if channel_last else None
    u = random.normal(batch, channels, length, dtype=dtype, order=order)
    delta = random.normal(batch, channels, length, dtype=dtype, shift=-2.0, order=order)
    delta = delta if extras else random.inside(torch.nn.functional.softplus(delta).cpu(), dtype, order)
    A = random.negative(channels, dstate)
    B, C = (random.normal(channels, dstate) if name in constant
            else random.normal(batch, groups, dstate, length, dtype=dtype) for name in "BC")
    D = z = bias = initial = None
    if extras:
        D, bias = random.normal(channels), random.normal(channels)
        z = random.normal(batch, channels, length, dtype=dtype, order=order)
        initial = random.normal(batch, channels, dstate)
    seq_idx = random.sequences(batch, length) if packed else None
    channel_map = random.integers(0, groups, channels) if groups > 1 else None
    with poisoned():
        y, final = backend.selective_scan(u, delta, A, B, C, D, z, bias, extras, initial, channel_map, seq_idx)
    expected, expected_final = reference.selective_scan(
        u.double(), *map(_double, (delta, A, B, C, D, z, bias)), extras, initial_state=_double(initial),
        channel_to_group=channel_map, seq_idx=seq_idx)
    assert y.dtype == dtype and y.stride() == torch.empty_like(u).stride() and final.dtype == torch.float32
    assert_close("y", y, expected, dtype)
    assert_close("final state", final, expected_final, torch.float32 if dtype == torch.float32 else dtype)


def check_state_update(device: str, dtype: torch.dtype, *, state_dtype: torch.dtype, batch: int = 3,
                       groups: Sequence[int], headdim: int, dstate: int, tied: bool, extras: bool,
                       indexed: bool = False, channel_groups: int = 0, seed: int = 0) -> None:
    """Two steps. channel_groups: Mamba-1, one head whose channels have a map of their own to so many groups."""
    random, heads = Random(device, seed), sum(groups)
    ngroups = channel_groups or len(groups)
    group = random.integers(0, channel_groups, headdim) if channel_groups else group_map(groups, device)
    slots = batch + 4
    state = random.normal(slots, heads, headdim, dstate, dtype=state_dtype)
    if tied:
        A = random.negative(heads)[:, None, None].expand(-1, headdim, dstate)
        bias, D = (random.normal(heads)[:, None].expand(-1, headdim) for _ in range(2))
    else:
        A = random.negative(heads, headdim, dstate)
        bias, D = (random.normal(heads, headdim) for _ in range(2))
    where = None
    if indexed:                                            # a padding row in the middle
        where = torch.randperm(slots, generator=random.generator)[:batch].to(torch.int32)
        where[1] = -1
        where = where.to(device)
    for _ in range(2):
        x, z = (random.normal(batch, heads, headdim, dtype=dtype) for _ in "xz")
        dt = random.normal(batch, heads, dtype=dtype)[..., None].expand(-1, -1, headdim) if tied else \
            random.normal(batch, heads, headdim, dtype=dtype)
        B, C = (random.normal(batch, ngroups, dstate, dtype=dtype) for _ in "BC")
        optional = (D, z, bias) if extras else (None, None, None)
        before = state.clone()
        with poisoned():
            y = backend.state_update(state, x, dt, A, B, C, *optional, True, group, where)
        rows = list(range(batch)) if where is None else where.tolist()
        live = [row for row, slot in enumerate(rows) if slot >= 0]
        places = [rows[row] for row in live]
        pick = [None if t is None else t.double() for t in optional]
        pick[1] = None if pick[1] is None else pick[1][live]
        expected, expected_state = reference.state_update(
            *(t.double() for t in (before[places], x[live], dt[live], A, B[live], C[live])), *pick, True,
            head_to_group=group)
        assert y.dtype == dtype and y.is_contiguous()
        assert_close("y", y[live], expected, dtype)
        assert_close("state", state[places], expected_state, state_dtype)
        padding = [row for row in range(batch) if row not in live]
        assert not y[padding].any()
        others = [slot for slot in range(slots) if slot not in places]
        assert torch.equal(state[others], before[others])


def check_causal_conv1d(device: str, dtype: torch.dtype, *, batch: int = 2, channels: int, length: int, width: int,
                        channel_last: bool, extras: bool, packed: bool = False, seed: int = 0) -> None:
    random, order = Random(device, seed), (0, 2, 1) if channel_last else None
    x = random.normal(batch, channels, length, dtype=dtype, order=order)
    weight = random.normal(channels, width)
    bias = random.normal(channels) if extras else None
    initial = random.normal(batch, channels, width - 1, dtype=dtype, order=order) if extras else None
    seq_idx = random.sequences(batch, length) if packed else None
    with poisoned():
        y, final = backend.causal_conv1d(x, weight, bias, extras, initial, seq_idx)
    expected, expected_final = reference.causal_conv1d(
        *map(_double, (x, weight, bias)), "silu" if extras else None, initial_states=_double(initial), seq_idx=seq_idx)
    assert y.dtype == dtype and y.stride() == empty_in_rows(x).stride()
    assert_close("y", y, expected, dtype)
    assert final.dtype == dtype and torch.equal(final.double(), expected_final)


def check_causal_conv1d_update(device: str, dtype: torch.dtype, *, batch: int = 3, channels: int, tokens: int,
                               width: int, kept: int, ring: bool, indexed: bool, channel_last: bool = False,
                               seed: int = 0) -> None:
    """Three calls, so that a ring goes round."""
    random, order = Random(device, seed), (0, 2, 1) if channel_last else None
    slots = batch + 2
    state = random.normal(slots, channels, kept, dtype=dtype, order=order)
    weight, bias = random.normal(channels, width), random.normal(channels)
    seen = torch.tensor([0, 2, 9][:batch], dtype=torch.int32, device=device) if ring else None
    where = torch.tensor([4, -1, 0][:batch], dtype=torch.int32, device=device) if indexed else None
    rows = where.tolist() if indexed else list(range(batch))
    live = [row for row, slot in enumerate(rows) if slot >= 0]
    places = [rows[row] for row in live]
    for _ in range(3):
        x = random.normal(batch, channels, tokens, dtype=dtype, order=order)
        before = state.clone()
        with poisoned():
            y = backend.causal_conv1d_update(x, state, weight, bias, True, seen, where)
        expected, expected_state = reference.causal_conv1d_update(
            x[live].double(), before[places].double(), weight.double(), bias.double(), "silu",
            cache_seqlens=None if seen is None else seen[live])
        assert_close("y", y[live], expected, dtype)
        assert torch.equal(state[places].double(), expected_state)
        others = [slot for slot in range(slots) if slot not in places]
        assert torch.equal(state[others], before[others])
        assert not y[[row for row in range(batch) if row not in live]].any()
        if seen is not None:
            seen += tokens


def check_gated_rmsnorm(device: str, dtype: torch.dtype, *, rows: tuple[int, ...], segments: Sequence[int], gated: bool,
                        norm_before_gate: bool, bias: bool, seed: int = 0) -> None:
    random, width = Random(device, seed), sum(segments)
    x = random.normal(*rows, width, dtype=dtype)
    z = random.normal(*rows, width, dtype=dtype) if gated else None
    weight, shift = random.normal(width), random.normal(width) if bias else None
    eps = [1e-5 * 3 ** i for i in range(len(segments))]
    with poisoned():
        y = backend.gated_rmsnorm(x, weight, shift, z, list(segments), eps, norm_before_gate)
    expected = reference.gated_rmsnorm(*map(_double, (x, weight, shift, z)), segments=segments, eps=eps,
                                       norm_before_gate=norm_before_gate)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close("y", y, expected, dtype)
