"""Every public op on every backend that is here, against the float64 reference: odd sizes, strides, each gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_reference import FORWARD, GRADIENT, assert_close, backends, channel_last, spread
from torch import Tensor

from shedder import ops, reference
from shedder.ops import chunked

DTYPES = [torch.float32, torch.bfloat16]


def run_both(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: dict[str, Tensor | None], dtype: torch.dtype,
             gradients: bool = True, layouts: dict[str, Callable[[Tensor], Tensor]] | None = None) -> None:
    """Outputs and gradients of `ours` on `inputs` against `theirs` on the same values in float64."""
    kept = {name: t for name, t in inputs.items() if t is not None}
    mine = {name: t.detach().requires_grad_(gradients) for name, t in kept.items()}
    wide = {name: t.detach().to(torch.complex128 if t.is_complex() else torch.float64).cpu().requires_grad_(gradients)
            for name, t in kept.items()}
    absent = {name: None for name, t in inputs.items() if t is None}
    laid_out = {name: _as_laid_out(t, (layouts or {}).get(name, spread)) for name, t in mine.items()}
    outputs = ours(**laid_out, **absent)
    expected = theirs(**wide, **absent)
    outputs, expected = (o if isinstance(o, tuple) else (o,) for o in (outputs, expected))
    for i, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {i}", got, want, FORWARD[dtype])
    if not gradients:
        return
    weights = [torch.randn_like(want) for want in expected]
    got_grads = torch.autograd.grad(outputs, list(mine.values()), [
        w.to(o.dtype).to(o.device) for w, o in zip(weights, outputs, strict=True)])
    weights = [w.to(o.dtype).to(w.dtype) for w, o in zip(weights, outputs, strict=True)]
    want_grads = torch.autograd.grad(expected, list(wide.values()), weights)
    for name, got, want in zip(kept, got_grads, want_grads, strict=True):
        assert got.dtype == kept[name].dtype
        assert_close(f"gradient of {name}", got, want, GRADIENT[dtype])


class _Relaid(torch.autograd.Function):
    """The same values in another place; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
        return layout(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:      # type: ignore[override]
        return grad, None


def _as_laid_out(t: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    return _Relaid.apply(t, layout)


def packed(batch: int, length: int, device: str) -> Tensor:
    """Sequences of uneven lengths, names that repeat, padding inside and at the end; rows differ."""
    names = torch.tensor([3, 3, 3, -1, 1] + [7] * 20 + [3] * 70 + [-1, -1])
    rows = [names.roll(5 * row).repeat(-(-length // len(names)))[:length] for row in range(batch)]
    return torch.stack(rows).to(device=device, dtype=torch.int32)


def skip_if_unsupported(op, backend, **facts):
    try:
        ops.explain(op, backend=backend, **facts)
    except ValueError as error:
        pytest.skip(str(error))


# --- SSD ------------------------------------------------------------------------------------------------------------

SSD = [  # batch, length, heads, headdim, groups, dstate, map
    pytest.param(2, 1, 1, 13, 1, 5, None, id="one_token"),
    pytest.param(1, 63, 3, 16, 1, 16, None, id="one_group"),
    pytest.param(2, 130, 5, 13, 3, 12, (2, 0, 0, 2, 0), id="ragged_one_group_empty"),
    pytest.param(1, 257, 4, 8, 2, 9, None, id="two_groups"),
]


def ssd_inputs(batch, length, heads, headdim, groups, dstate, dtype, device, full):
    def rand(*shape):
        return torch.randn(*shape, device=device)
    inputs = {"x": rand(batch, length, heads, headdim).to(dtype), "dt": (rand(batch, length, heads) - 1).to(dtype),
              "A": -rand(heads).exp(), "B": rand(batch, length, groups, dstate).to(dtype),
              "C": rand(batch, length, groups, dstate).to(dtype), "D": None, "z": None, "dt_bias": None,
              "initial_states": None}
    if full:
        inputs |= {"D": rand(heads, headdim) if heads % 2 else rand(heads),
                   "z": rand(batch, length, heads, headdim).to(dtype), "dt_bias": rand(heads),
                   "initial_states": rand(batch, heads, headdim, dstate)}
    return inputs


@pytest.mark.parametrize(("backend", "device"), backends("ssd"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize(("batch", "length", "heads", "headdim", "groups", "dstate", "head_to_group"), SSD)
def test_ssd_is_the_recurrence(batch, length, heads, headdim, groups, dstate, head_to_group, full, dtype, backend,
                               device, poisoned_allocator):
    skip_if_unsupported("ssd", backend, device=device, dtype=dtype, dstate=dstate, headdim=headdim)
    inputs = ssd_inputs(batch, length, heads, headdim, groups, dstate, dtype, device, full)
    limit = (0.05, 2.0) if full else (0.0, math.inf)
    seq_idx = packed(batch, length, device) if full and length > 64 else None

    def ours(x, dt, A, B, C, **rest):
        return ops.mamba_chunk_scan_combined(x, dt, A, B, C, 64, **rest, seq_idx=seq_idx, dt_softplus=True,
                                             dt_limit=limit, return_final_states=True, head_to_group=head_to_group,
                                             backend=backend)

    def theirs(**tensors):
        groups_of = None if head_to_group is None else torch.tensor(head_to_group)
        return reference.ssd(**tensors, dt_softplus=True, dt_limit=limit, head_to_group=groups_of,
                             seq_idx=None if seq_idx is None else seq_idx.cpu())

    run_both(ours, theirs, inputs, dtype)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_chunked_form_is_the_recurrence(chunk, groups, is_packed):
    inputs = ssd_inputs(2, 101, 4, 3, groups, 5, torch.float64, "cpu", True)
    inputs = {name: t.double() for name, t in inputs.items()}
    head_to_group = torch.tensor([2, 0, 0, 2]) % groups
    seq_idx = packed(2, 101, "cpu") if is_packed else None
    start = inputs.pop("initial_states")
    got = chunked.ssd(*inputs.values(), True, (0.1, 1.5), head_to_group, start, seq_idx, chunk=chunk)
    want = reference.ssd(*inputs.values(), True, (0.1, 1.5), head_to_group=head_to_group, initial_states=start,
                         seq_idx=seq_idx)
    for name, g, w in zip(("y", "final states"), got, want, strict=True):
        assert_close(name, g, w, 1e-13)


def test_the_chunked_form_keeps_its_digits_behind_a_large_step():
    inputs = ssd_inputs(1, 64, 1, 4, 1, 4, torch.float32, "cpu", False)
    dt = torch.full((1, 64, 1), 1e-3)
    dt[0, 1] = 1e6                                   # plain prefix sums in fp32 would lose all of what follows
    inputs |= {"dt": dt, "A": -torch.ones(1)}
    head_to_group = torch.zeros(1, dtype=torch.int32)
    got, _ = chunked.ssd(*list(inputs.values())[:-1], False, (0.0, math.inf), head_to_group)
    wide = [None if t is None else t.double() for t in list(inputs.values())[:-1]]
    want, _ = reference.ssd(*wide, False, head_to_group=head_to_group)
    assert_close("y behind the step", got[:, 2:], want[:, 2:], 1e-6)


def test_many_chunks_pass_their_states_on():
    inputs = ssd_inputs(1, 80, 2, 3, 1, 4, torch.float64, "cpu", False)
    head_to_group = torch.zeros(2, dtype=torch.int32)
    tensors = [None if t is None else t.double() for t in list(inputs.values())[:-1]]
    got = chunked.ssd(*tensors, True, (0.0, math.inf), head_to_group, chunk=1)      # more chunks than a block holds
    want = reference.ssd(*tensors, True, head_to_group=head_to_group)
    assert_close("y", got[0], want[0], 1e-12)
    assert_close("final states", got[1], want[1], 1e-12)


def test_cu_seqlens_are_separate_sequences():
    bounds = [0, 5, 5, 12, 40]
    inputs = ssd_inputs(1, 40, 3, 4, 1, 5, torch.float32, "cpu", True)
    start = inputs.pop("initial_states").expand(4, -1, -1, -1) * torch.arange(4)[:, None, None, None]
    x, dt, A, B, C, D, z, dt_bias = inputs.values()

    def run(part, **rest):
        return ops.mamba_chunk_scan_combined(x[:, part], dt[:, part], A, B[:, part], C[:, part], 64, D, z[:, part],
                                             dt_bias, dt_softplus=True, **rest)

    everything = slice(None)
    for cu_seqlens in (bounds, torch.tensor(bounds, dtype=torch.int32)):
        out, final, varlen = run(everything, initial_states=start, cu_seqlens=cu_seqlens, return_final_states=True,
                                 return_varlen_states=True)
        for i in range(4):
            part = slice(bounds[i], bounds[i + 1])
            out_i, state_i = run(part, initial_states=start[i:i + 1], return_final_states=True)
            assert_close("out", out[:, part], out_i, 1e-6)
            assert_close("varlen state", varlen[i:i + 1], state_i, 1e-6)
        assert_close("final state", final, state_i, 1e-6)
    seq_idx = torch.tensor([[0] * 5 + [2] * 7 + [3] * 28], dtype=torch.int32)
    assert_close("out", run(everything, cu_seqlens=bounds), run(everything, seq_idx=seq_idx), 1e-6)


# --- selective scan -------------------------------------------------------------------------------------------------

SCAN = [  # batch, channels, length, dstate, groups (0: constant B and C), map
    pytest.param(2, 3, 1, 5, 1, None, id="one_token"),
    pytest.param(2, 41, 63, 16, 1, None, id="one_group"),
    pytest.param(1, 7, 130, 12, 3, (2, 0, 0, 2, 0, 0, 2), id="ragged_one_group_empty"),
    pytest.param(2, 6, 37, 3, 0, None, id="constant"),
]


def scan_inputs(batch, channels, length, dstate, groups, dtype, device, full):
    def rand(*shape):
        return torch.randn(*shape, device=device)

    def varying():
        return rand(batch, groups, dstate, length).to(dtype) if groups else rand(channels, dstate)

    inputs = {"u": rand(batch, channels, length).to(dtype), "delta": (rand(batch, channels, length) - 1).to(dtype),
              "A": -rand(channels, dstate).exp(), "B": varying(), "C": varying(), "D": None, "z": None,
              "delta_bias": None, "initial_state": None}
    if full:
        inputs |= {"D": rand(channels), "z": rand(batch, channels, length).to(dtype), "delta_bias": rand(channels),
                   "initial_state": rand(batch, channels, dstate)}
    return inputs


@pytest.mark.parametrize(("backend", "device"), backends("selective_scan"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize(("batch", "channels", "length", "dstate", "groups", "channel_to_group"), SCAN)
@pytest.mark.parametrize("layout", [spread, channel_last])
def test_selective_scan_is_the_recurrence(batch, channels, length, dstate, groups, channel_to_group, full, layout,
                                          dtype, backend, device, poisoned_allocator):
    inputs = scan_inputs(batch, channels, length, dstate, groups, dtype, device, full)
    seq_idx = packed(batch, length, device) if full and length > 64 else None
    skip_if_unsupported("selective_scan", backend, device=device, dtype=dtype, constant_B=not groups,
                        constant_C=not groups, seq_idx=seq_idx is not None)

    def ours(u, delta, A, B, C, **rest):
        return ops.selective_scan_fn(u, delta, A, B, C, **rest, delta_softplus=True, return_last_state=True,
                                     channel_to_group=channel_to_group, seq_idx=seq_idx, backend=backend)

    def theirs(**tensors):
        groups_of = None if channel_to_group is None else torch.tensor(channel_to_group)
        return reference.selective_scan(**tensors, delta_softplus=True, channel_to_group=groups_of,
                                        seq_idx=None if seq_idx is None else seq_idx.cpu())

    run_both(ours, theirs, inputs, dtype, layouts=dict.fromkeys(("u", "delta", "z"), layout))


@pytest.mark.parametrize("constant", [False, True])
def test_complex_scan_is_the_recurrence(constant):
    inputs = scan_inputs(2, 4, 9, 3, 1, torch.float32, "cpu", True)
    inputs["A"] = torch.complex(inputs["A"], torch.randn(4, 3))
    for name in ("B", "C"):
        inputs[name] = torch.randn(4, 3, dtype=torch.complex64) if constant else torch.randn(2, 3, 18)

    def ours(u, delta, A, B, C, **rest):
        return ops.selective_scan_fn(u, delta, A, B, C, **rest, delta_softplus=True, return_last_state=True)

    run_both(ours, lambda **t: reference.selective_scan(**t, delta_softplus=True), inputs, torch.float32)


def test_mamba_inner_is_its_parts():
    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)
    batch, channels, length, dstate, rank = 2, 6, 9, 3, 2
    xz, A = rand(batch, 2 * channels, length), -rand(channels, dstate).exp()
    conv, conv_bias, D, delta_bias = rand(channels, 1, 4), rand(channels), rand(channels), rand(channels)
    x_proj, dt_proj = rand(rank + 4 * dstate, channels), rand(channels, rank)
    out_proj, out_bias = rand(5, channels), rand(5)
    B_bias, b_rms, dt_rms = rand(2 * dstate), rand(2 * dstate), rand(rank)
    channel_to_group = (0, 1, 1, 0, 1, 1)
    got = ops.mamba_inner_fn(xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, None, None, D, delta_bias,
                             B_bias, None, b_rms_weight=b_rms, dt_rms_weight=dt_rms, channel_to_group=channel_to_group)
    x, z = xz.chunk(2, 1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), conv, conv_bias, groups=channels))
    dt, B, C = (x.transpose(1, 2) @ x_proj.T).split([rank, 2 * dstate, 2 * dstate], -1)
    dt = F.rms_norm(dt, (rank,), dt_rms, 1e-6)
    B = F.rms_norm(B + B_bias, (2 * dstate,), b_rms, 1e-6)
    B, C = (M.unflatten(-1, (2, dstate)).permute(0, 2, 3, 1) for M in (B, C))
    y, _ = reference.selective_scan(x, (dt @ dt_proj.T).transpose(1, 2), A, B, C, D, z, delta_bias, True,
                                    channel_to_group=torch.tensor(channel_to_group))
    assert_close("out", got, y.transpose(1, 2) @ out_proj.T + out_bias, 1e-12)


def test_mamba_inner_takes_complex_A():
    batch, channels, length, dstate = 1, 4, 6, 3
    A = torch.complex(-torch.rand(channels, dstate), torch.randn(channels, dstate))
    xz, conv, x_proj = torch.randn(batch, 8, length), torch.randn(channels, 4), torch.randn(2 + 4 * dstate, channels)
    dt_proj, out_proj = torch.randn(channels, 2), torch.eye(channels)
    got = ops.mamba_inner_fn(xz, conv, None, x_proj, dt_proj, out_proj, None, A)
    x, z = xz.chunk(2, 1)
    x = F.silu(F.conv1d(F.pad(x, (3, 0)), conv[:, None], groups=channels))
    dt, B, C = (x.transpose(1, 2) @ x_proj.T).split([2, 2 * dstate, 2 * dstate], -1)
    B, C = (torch.view_as_real(torch.view_as_complex(M.unflatten(-1, (dstate, 2)).contiguous()).transpose(1, 2)
                               .contiguous()).flatten(2) for M in (B, C))                 # (B, N, 2L)
    y, _ = reference.selective_scan(x, (dt @ dt_proj.T).transpose(1, 2), A, B, C, None, z, None, True)
    assert_close("out", got, y.transpose(1, 2), 1e-5)


# --- decode steps ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("backend", "device"), backends("state_update"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize(("heads", "headdim", "groups", "dstate", "head_to_group"), [
    (5, 13, 3, 12, (2, 0, 0, 2, 0)), (4, 8, 2, 101, None), (1, 60, 1, 5, None), (1, 6, 2, 5, (1,))])
def test_state_update_is_a_step(heads, headdim, groups, dstate, head_to_group, full, tied, state_dtype, dtype, backend,
                                device, poisoned_allocator):
    def rand(*shape):
        return torch.randn(*shape, device=device)
    batch, slots = 3, 5
    indices = torch.tensor([4, -1, 2], dtype=torch.int32, device=device) if full else None
    state = spread(rand(slots if full else batch, heads, headdim, dstate).to(state_dtype))
    x, z, B, C = (spread(rand(*shape).to(dtype)) for shape in
                  [(batch, heads, headdim)] * 2 + [(batch, groups, dstate)] * 2)
    if tied:
        dt = rand(batch, heads).to(dtype)[..., None].expand(-1, -1, headdim)
        A, D, dt_bias = -rand(heads).exp()[:, None, None].expand(-1, headdim, dstate), rand(heads), rand(heads)
        D, dt_bias = (t[:, None].expand(-1, headdim) for t in (D, dt_bias))
    else:
        dt, A = rand(batch, heads, headdim).to(dtype), -rand(heads, headdim, dstate).exp()
        D, dt_bias = rand(heads, headdim), rand(heads, headdim)
    if not full:
        D = z = dt_bias = None
    before = state.clone()
    y = ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True, indices, head_to_group=head_to_group,
                                   backend=backend)

    def wide(t):
        return None if t is None else t.double().cpu()
    groups_of = torch.tensor(head_to_group if head_to_group else [h * groups // heads for h in range(heads)])
    if heads == 1:
        groups_of = groups_of.expand(headdim)
    picked = before if indices is None else before[indices.long().clamp(min=0)]
    want_y, want_state = reference.state_update(wide(picked), wide(x), wide(dt), wide(A), wide(B), wide(C), wide(D),
                                                wide(z), wide(dt_bias), True, head_to_group=groups_of)
    limit = FORWARD[dtype]
    if full:
        assert not y[1].any()
        y, want_y = y[[0, 2]], want_y[[0, 2]]
        assert_close("new state", state[[4, 2]], want_state[[0, 2]], FORWARD[state_dtype])
        assert torch.equal(state[[0, 1, 3]], before[[0, 1, 3]])
    else:
        assert_close("new state", state, want_state, FORWARD[state_dtype])
    assert_close("y", y, want_y, limit)


@pytest.mark.parametrize(("backend", "device"), backends("state_update"))
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_state_update_of_mamba1(groups, backend, device, poisoned_allocator):
    def rand(*shape):
        return torch.randn(*shape, device=device)
    state, x, dt, z, A = rand(2, 7, 5), rand(2, 7), rand(2, 7), rand(2, 7), -rand(7, 5).exp()
    B, C = (rand(2, 5) if groups is None else rand(2, groups, 5) for _ in range(2))
    D, dt_bias, group_map = rand(7), rand(7), (0, 2, 2, 0, 0, 2, 0) if groups == 3 else None
    before = state.double().cpu()
    y = ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True, head_to_group=group_map, backend=backend)

    def wide(t, dim):
        return t.double().cpu().unsqueeze(dim)
    want_y, want_state = reference.state_update(
        before.unsqueeze(1), wide(x, 1), wide(dt, 1), wide(A, 0), *(wide(M, 1) if groups is None else M.double().cpu()
                                                                   for M in (B, C)),
        wide(D, 0), wide(z, 1), wide(dt_bias, 0), True,
        head_to_group=None if group_map is None else torch.tensor(group_map))
    assert_close("y", y, want_y[:, 0], 1e-5)
    assert_close("new state", state, want_state[:, 0], 1e-5)


# --- convolution ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("backend", "device"), backends("causal_conv1d"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
@pytest.mark.parametrize("layout", [spread, channel_last])
@pytest.mark.parametrize(("batch", "channels", "length", "width"), [(2, 3, 1, 4), (1, 61, 2, 3), (2, 13, 130, 4),
                                                                   (1, 5, 7, 2), (1, 5, 7, 1)])
def test_conv_is_the_reference(batch, channels, length, width, layout, full, dtype, backend, device,
                               poisoned_allocator):
    skip_if_unsupported("causal_conv1d", backend, device=device, dtype=dtype, channels=channels, width=width,
                        channel_last=layout is channel_last)

    def rand(*shape):
        return torch.randn(*shape, device=device)
    inputs = {"x": rand(batch, channels, length).to(dtype), "weight": rand(channels, width), "bias": None,
              "initial_states": None}
    if full:
        inputs |= {"bias": rand(channels), "initial_states": rand(batch, channels, width - 1).to(dtype)}
    if width == 1:
        inputs["initial_states"] = None
    activation = "silu" if full else None
    seq_idx = packed(batch, length, device) if full else None

    def ours(x, weight, bias, initial_states):
        y, final = ops.causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, True, None, activation,
                                        backend=backend)
        if channels > 1 and length > 1:
            assert y.stride(1 if layout is channel_last else 2) == 1
        return y, final

    def theirs(x, weight, bias, initial_states):
        return reference.causal_conv1d(x, weight, bias, activation, initial_states=initial_states,
                                       seq_idx=None if seq_idx is None else seq_idx.cpu())

    run_both(ours, theirs, inputs, dtype, layouts={"x": layout})


@pytest.mark.parametrize(("backend", "device"), backends("causal_conv1d_update"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [None, 1, 3])
@pytest.mark.parametrize(("width", "kept"), [(4, 3), (4, 4), (3, 7), (2, 1)])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_conv_update_is_the_reference(width, kept, tokens, ring, indexed, dtype, backend, device, poisoned_allocator):
    def rand(*shape):
        return torch.randn(*shape, device=device)
    batch, channels = 3, 13
    x = rand(batch, channels, *([] if tokens is None else [tokens])).to(dtype)
    state = spread(rand(5 if indexed else batch, channels, kept).to(dtype))
    weight, bias = rand(channels, width), rand(channels)
    seen = torch.tensor([0, 5, 11], dtype=torch.int32, device=device) if ring else None
    indices = torch.tensor([4, -1, 2], dtype=torch.int32, device=device) if indexed else None
    before = state.clone()
    y = ops.causal_conv1d_update(x, state, weight, bias, "silu", seen, indices, backend=backend)
    assert y.shape == x.shape
    picked = before if indices is None else before[indices.long().clamp(min=0)]
    want_y, want_state = reference.causal_conv1d_update(
        (x[..., None] if tokens is None else x).double().cpu(), picked.double().cpu(), weight.double().cpu(),
        bias.double().cpu(), "silu", cache_seqlens=None if seen is None else seen.cpu())
    y = y[..., None] if tokens is None else y
    if indexed:
        assert not y[1].any()
        assert torch.equal(state[[0, 1, 3]], before[[0, 1, 3]])
        y, want_y, state, want_state = y[[0, 2]], want_y[[0, 2]], state[[4, 2]], want_state[[0, 2]]
    assert_close("y", y, want_y, FORWARD[dtype])
    assert_close("new state", state, want_state, 1e-12)


# --- norm -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("backend", "device"), backends("gated_rmsnorm"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 13), (2, 5, 100), (1, 1, 3)])
@pytest.mark.parametrize("gate", ["none", "before", "after"])
@pytest.mark.parametrize("ragged", [False, True])
def test_norm_is_the_reference(shape, gate, ragged, dtype, backend, device, poisoned_allocator):
    skip_if_unsupported("gated_rmsnorm", backend, device=device, dtype=dtype, width=shape[-1])

    def rand(*sizes):
        return torch.randn(*sizes, device=device)
    width = shape[-1]
    segments = [1, width - 4, 3] if ragged and width > 4 else [width]
    eps = [1e-2, 1e-5, 0.1][:len(segments)]
    inputs = {"x": rand(*shape).to(dtype), "weight": rand(width), "bias": rand(width) if ragged else None,
              "z": None if gate == "none" else rand(*shape).to(dtype)}

    def ours(x, weight, bias, z):
        return ops.rmsnorm_fn(x, weight, bias, z, segments=segments, segment_eps=eps, norm_before_gate=gate != "before",
                              backend=backend)

    def theirs(**tensors):
        return reference.gated_rmsnorm(**tensors, segments=segments, eps=eps, norm_before_gate=gate != "before")

    run_both(ours, theirs, inputs, dtype)


def test_norm_groups_are_equal_segments():
    x, weight = torch.randn(2, 12), torch.randn(12)
    assert torch.equal(ops.rmsnorm_fn(x, weight, None, eps=0.1, group_size=4),
                       ops.rmsnorm_fn(x, weight, None, segments=[4, 4, 4], segment_eps=[0.1] * 3))


# --- the whole Mamba-2 mixer ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", [None, "before", "after", "ragged"])
@pytest.mark.parametrize("d_mlp", [0, 4])
@pytest.mark.parametrize("row_padding", [0, 3])
@pytest.mark.parametrize("is_packed", [False, True])
def test_split_conv_scan_is_its_parts(norm, d_mlp, row_padding, is_packed):
    def rand(*shape):
        return torch.randn(*shape, dtype=torch.float64)
    batch, length, heads, headdim, groups, dstate = 2, 70, 4, 3, 2, 5
    inner, states = heads * headdim, groups * dstate
    tensors = {"zxbcdt": rand(batch, length, 2 * d_mlp + 2 * inner + 2 * states + heads + row_padding),
               "conv_weight": rand(inner + 2 * states, 4), "conv_bias": rand(inner + 2 * states),
               "dt_bias": rand(heads), "A": -rand(heads).exp(), "D": rand(heads),
               "norm_weight": None if norm is None else rand(inner), "start": rand(batch, heads, headdim, dstate),
               "out_weight": rand(7, d_mlp + inner), "out_bias": rand(7)}
    head_to_group = (0, 1, 1, 1)
    segments = [(5, 1e-2), (inner - 5, 1e-5)]
    seq_idx = packed(batch, length, "cpu") if is_packed else None

    def ours(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, start, out_weight, out_bias):
        return ops.mamba_split_conv1d_scan_combined(
            zxbcdt, conv_weight, conv_bias, dt_bias, A, D, 64, start, seq_idx, (0.1, 2.0), True, "silu", norm_weight,
            1e-3, out_weight, out_bias, headdim, groups, norm != "after", head_to_group=head_to_group,
            norm_segments=segments if norm == "ragged" else None, row_padding=row_padding)

    def theirs(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, start, out_weight, out_bias):
        mlp_z, mlp_x, z, xBC, dt, _ = zxbcdt.split([d_mlp, d_mlp, inner, inner + 2 * states, heads, row_padding], -1)
        xBC, _ = reference.causal_conv1d(xBC.transpose(1, 2), conv_weight, conv_bias, "silu", seq_idx=seq_idx)
        x, B, C = xBC.transpose(1, 2).split([inner, states, states], -1)
        y, state = reference.ssd(x.unflatten(-1, (heads, headdim)), dt, A, B.unflatten(-1, (groups, dstate)),
                                 C.unflatten(-1, (groups, dstate)), D, None, dt_bias, True, (0.1, 2.0),
                                 head_to_group=torch.tensor(head_to_group), initial_states=start, seq_idx=seq_idx)
        y = y.flatten(2)
        if norm is None:
            y = y * F.silu(z)
        else:
            parts = segments if norm == "ragged" else [(inner // 2, 1e-3)] * 2
            y = reference.gated_rmsnorm(y, norm_weight, None, z, segments=[s for s, _ in parts],
                                        eps=[e for _, e in parts], norm_before_gate=norm != "after")
        return torch.cat([F.silu(mlp_z) * mlp_x, y], -1) @ out_weight.T + out_bias, state

    run_both(ours, theirs, tensors, torch.float64)


# --- nothing to compute, and other places ---------------------------------------------------------------------------

@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_empty_sequence_hands_its_state_back(backend, poisoned_allocator):
    start = torch.randn(2, 3, 4, 5)
    for initial in (None, start):
        out, final = ops.mamba_chunk_scan_combined(
            torch.empty(2, 0, 3, 4), torch.empty(2, 0, 3), torch.ones(3), torch.empty(2, 0, 1, 5),
            torch.empty(2, 0, 1, 5), 64, initial_states=initial, return_final_states=True, backend=backend)
        assert out.shape == (2, 0, 3, 4)
        assert torch.equal(final, torch.zeros(2, 3, 4, 5) if initial is None else start)
        y, last = ops.selective_scan_fn(torch.empty(2, 3, 0), torch.empty(2, 3, 0), torch.ones(3, 5),
                                        torch.empty(2, 5, 0), torch.empty(2, 5, 0), return_last_state=True,
                                        initial_state=None if initial is None else start[:, :, 0], backend=backend)
        assert y.shape == (2, 3, 0)
        assert torch.equal(last, torch.zeros(2, 3, 5) if initial is None else start[:, :, 0])
        y, last = ops.causal_conv1d_fn(torch.empty(2, 3, 0), torch.randn(3, 4), None, None,
                                       None if initial is None else start[:, :, 0, :3], True, backend=backend)
        assert y.shape == (2, 3, 0)
        assert torch.equal(last, torch.zeros(2, 3, 3) if initial is None else start[:, :, 0, :3])
    assert ops.rmsnorm_fn(torch.empty(0, 7), torch.ones(7), None, backend=backend).shape == (0, 7)
    state = torch.empty(0, 3, 4, 5)
    y = ops.selective_state_update(state, torch.empty(0, 3, 4), torch.empty(0, 3, 4), torch.ones(3, 4, 5),
                                   torch.empty(0, 1, 5), torch.empty(0, 1, 5), backend=backend)
    assert y.shape == (0, 3, 4)


def test_the_gradient_of_an_empty_sequence_is_that_of_its_state():
    start = torch.randn(1, 3, 4, 5, requires_grad=True)
    _, final = ops.mamba_chunk_scan_combined(
        torch.empty(1, 0, 3, 4), torch.empty(1, 0, 3), torch.ones(3), torch.empty(1, 0, 1, 5),
        torch.empty(1, 0, 1, 5), 64, initial_states=start, return_final_states=True)
    final.sum().backward()
    assert torch.equal(start.grad, torch.ones_like(start))


@pytest.mark.gpu
def test_ssd_runs_on_a_side_stream():
    inputs = ssd_inputs(1, 130, 3, 16, 1, 16, torch.float32, "cuda", True)
    stream = torch.cuda.Stream()
    x, dt, A, B, C, *rest = inputs.values()
    names = ("D", "z", "dt_bias", "initial_states")
    want = ops.mamba_chunk_scan_combined(x, dt, A, B, C, 64, **dict(zip(names, rest, strict=True)), dt_softplus=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        got = ops.mamba_chunk_scan_combined(x, dt, A, B, C, 64, **dict(zip(names, rest, strict=True)), dt_softplus=True)
    stream.synchronize()
    assert torch.equal(got, want)
