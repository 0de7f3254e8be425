"""The reference against closed forms and brute force that share no code with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from shedder import reference


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def ssd_inputs(batch=2, length=23, heads=5, headdim=3, groups=2, dstate=4):
    return {"x": rand(batch, length, heads, headdim), "dt": rand(batch, length, heads),
            "A": -torch.rand(heads, dtype=torch.float64) - 0.1, "B": rand(batch, length, groups, dstate),
            "C": rand(batch, length, groups, dstate), "D": rand(heads), "z": rand(batch, length, heads, headdim),
            "dt_bias": rand(heads), "dt_softplus": True, "head_to_group": torch.tensor([1, 0, 1, 1, 0])[:heads]}


def scan_inputs(batch=2, channels=5, length=23, dstate=4, groups=2):
    return {"u": rand(batch, channels, length), "delta": rand(batch, channels, length),
            "A": -torch.rand(channels, dstate, dtype=torch.float64) - 0.1, "B": rand(batch, groups, dstate, length),
            "C": rand(batch, groups, dstate, length), "D": rand(channels), "z": rand(batch, channels, length),
            "delta_bias": rand(channels), "delta_softplus": True,
            "channel_to_group": torch.tensor([1, 0, 1, 1, 0])[:channels]}


def test_softplus_is_exact_at_both_ends():
    x = torch.tensor([-700.0, -30.0, -17.0, 0.0, 3.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(reference.softplus(x), torch.log1p(x.exp()).where(x < 100, x), rtol=1e-14, atol=0)
    assert reference.softplus(torch.tensor(-30.0)).item() == pytest.approx(math.exp(-30), rel=1e-6)


def test_ssd_is_a_masked_attention():
    inputs = ssd_inputs()
    y, _ = reference.ssd(**inputs)
    dt = F.softplus(inputs["dt"] + inputs["dt_bias"])
    total = (dt * inputs["A"]).cumsum(1)                                       # (B, L, H)
    decay = (total[:, :, None] - total[:, None]).exp()
    causal = torch.ones(23, 23, dtype=torch.float64).tril()
    B, C = (inputs[name][:, :, inputs["head_to_group"]] for name in "BC")
    scores = torch.einsum("bihn,bjhn->bijh", C, B) * decay * causal[None, :, :, None] * dt[:, None]
    expected = torch.einsum("bijh,bjhp->bihp", scores, inputs["x"]) + inputs["D"][:, None] * inputs["x"]
    close(y, expected * F.silu(inputs["z"]))


def test_ssd_is_the_selective_scan_with_expanded_heads():
    inputs = ssd_inputs()
    y, state = reference.ssd(**inputs)

    def channels(t):                                                           # (B, L, H[, P]) -> (B, HP, L)
        t = t if t.dim() == 4 else t[..., None].expand(*t.shape, 3)
        return t.flatten(2).transpose(1, 2)

    y_scan, state_scan = reference.selective_scan(
        channels(inputs["x"]), channels(inputs["dt"]), inputs["A"].repeat_interleave(3)[:, None].expand(15, 4),
        inputs["B"].permute(0, 2, 3, 1), inputs["C"].permute(0, 2, 3, 1), inputs["D"].repeat_interleave(3),
        channels(inputs["z"]), inputs["dt_bias"].repeat_interleave(3), True,
        channel_to_group=inputs["head_to_group"].repeat_interleave(3))
    close(channels(y), y_scan)
    close(state.flatten(1, 2), state_scan)


def test_complex_scan_is_the_sum_over_the_past():
    u, delta = rand(1, 2, 9), rand(1, 2, 9).exp()
    A = torch.complex(-rand(2, 3).exp(), rand(2, 3))
    B, C = rand(1, 3, 18), rand(1, 3, 18)
    y, state = reference.selective_scan(u, delta, A, B, C)
    Bc, Cc = (torch.complex(M[..., 0::2], M[..., 1::2]) for M in (B, C))
    for d in range(2):
        for t in range(9):
            total = 0j
            for s in range(t + 1):
                for n in range(3):
                    past = delta[0, d, s + 1:t + 1].sum()
                    total += (Cc[0, n, t] * torch.exp(A[d, n] * past) * delta[0, d, s] * Bc[0, n, s]
                              * u[0, d, s]).item()
            assert y[0, d, t].item() == pytest.approx(2 * total.real, rel=1e-9, abs=1e-9)
    assert state.dtype == torch.complex128


def test_constant_B_and_C_are_varying_ones_that_do_not_vary():
    inputs = scan_inputs()
    B, C = rand(5, 4), rand(5, 4)
    one_group_each = torch.arange(5)
    y, state = reference.selective_scan(**inputs | {"B": B, "C": C})
    y_var, state_var = reference.selective_scan(
        **inputs | {"B": B[None, :, :, None].expand(2, 5, 4, 23), "C": C[None, :, :, None].expand(2, 5, 4, 23),
                    "channel_to_group": one_group_each})
    close(y, y_var)
    close(state, state_var)


@pytest.mark.parametrize("cut", [1, 9, 22])
def test_two_calls_joined_by_the_state_are_one(cut):
    first, second = slice(None, cut), slice(cut, None)
    inputs = ssd_inputs()
    y, state = reference.ssd(**inputs)
    halves = [{k: v[:, part] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
              for part in (first, second)]
    y1, middle = reference.ssd(**halves[0])
    y2, end = reference.ssd(**halves[1], initial_states=middle)
    close(torch.cat([y1, y2], 1), y)
    close(end, state)

    inputs = scan_inputs()
    y, state = reference.selective_scan(**inputs)
    halves = [{k: v[..., part] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
              for part in (first, second)]
    y1, middle = reference.selective_scan(**halves[0])
    y2, end = reference.selective_scan(**halves[1], initial_state=middle)
    close(torch.cat([y1, y2], 2), y)
    close(end, state)

    x, weight, bias = rand(2, 5, 23), rand(5, 4), rand(5)
    y, state = reference.causal_conv1d(x, weight, bias, "silu")
    y1, middle = reference.causal_conv1d(x[..., first], weight, bias, "silu")
    y2, end = reference.causal_conv1d(x[..., second], weight, bias, "silu", initial_states=middle)
    close(torch.cat([y1, y2], 2), y)
    close(end, state)


NAMES = [3] * 6 + [1] * 1 + [7] * 9 + [-1] * 2 + [4] * 5                         # four sequences, then padding inside
PARTS = [(0, 6), (6, 7), (7, 16), (18, 23)]


def test_packed_sequences_are_separate_ones():
    seq_idx = torch.tensor([NAMES, NAMES])
    inputs, start = ssd_inputs(), rand(2, 5, 3, 4)
    y, state = reference.ssd(**inputs, initial_states=start, seq_idx=seq_idx)
    for i, (a, b) in enumerate(PARTS):
        part = {k: v[:, a:b] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        y_i, state_i = reference.ssd(**part, initial_states=start if i == 0 else None)
        close(y[:, a:b], y_i)
    close(state, state_i)
    assert not y[:, 16:18].any()

    inputs, start = scan_inputs(), rand(2, 5, 4)
    y, state = reference.selective_scan(**inputs, initial_state=start, seq_idx=seq_idx)
    for i, (a, b) in enumerate(PARTS):
        part = {k: v[..., a:b] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
        y_i, state_i = reference.selective_scan(**part, initial_state=start if i == 0 else None)
        close(y[..., a:b], y_i)
    close(state, state_i)
    assert not y[..., 16:18].any()

    x, weight, bias, start = rand(2, 5, 23), rand(5, 4), rand(5), rand(2, 5, 3)
    y, _ = reference.causal_conv1d(x, weight, bias, "silu", initial_states=start, seq_idx=seq_idx)
    for i, (a, b) in enumerate(PARTS):
        close(y[..., a:b], reference.causal_conv1d(x[..., a:b], weight, bias, "silu",
                                                   initial_states=start if i == 0 else None)[0])
    assert not y[..., 16:18].any()


def test_a_state_passes_by_padding_at_the_end():
    inputs = ssd_inputs()
    seq_idx = torch.tensor([[0] * 20 + [-1] * 3] * 2)
    _, state = reference.ssd(**inputs, seq_idx=seq_idx)
    short = {k: v[:, :20] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    close(state, reference.ssd(**short)[1])


def test_steps_are_the_scan():
    inputs = ssd_inputs(headdim=3)
    y, end = reference.ssd(**inputs)
    state = torch.zeros_like(end)
    for t in range(23):
        y_t, state = reference.state_update(
            state, inputs["x"][:, t], inputs["dt"][:, t, :, None].expand(-1, -1, 3),
            inputs["A"][:, None, None].expand(5, 3, 4), inputs["B"][:, t], inputs["C"][:, t],
            inputs["D"][:, None].expand(5, 3), inputs["z"][:, t], inputs["dt_bias"][:, None].expand(5, 3), True,
            head_to_group=inputs["head_to_group"])
        close(y_t, y[:, t])
    close(state, end)

    inputs = scan_inputs()
    y, end = reference.selective_scan(**inputs)
    state = torch.zeros(2, 1, 5, 4, dtype=torch.float64)
    for t in range(23):
        y_t, state = reference.state_update(
            state, inputs["u"][:, None, :, t], inputs["delta"][:, None, :, t], inputs["A"][None],
            inputs["B"][..., t], inputs["C"][..., t], inputs["D"][None], inputs["z"][:, None, :, t],
            inputs["delta_bias"][None], True, head_to_group=inputs["channel_to_group"])
        close(y_t[:, 0], y[..., t])
    close(state[:, 0], end)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_conv_is_torch_conv(width):
    x, weight, bias = rand(2, 5, 11), rand(5, width), rand(5)
    y, final = reference.causal_conv1d(x, weight, bias, "silu")
    padded = F.pad(x, (width - 1, 0))
    close(y, F.silu(F.conv1d(padded, weight[:, None], bias, groups=5)))
    close(final, padded[..., 11:])


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_conv_steps_are_the_conv(tokens):
    x, weight, bias = rand(2, 5, 12), rand(5, 4), rand(5)
    y, _ = reference.causal_conv1d(x, weight, bias, "silu")
    shifted, ring = rand(2, 5, 5) * 0, rand(2, 5, 5) * 0
    seen = torch.tensor([0, 0])
    for t in range(0, 12, tokens):
        part = x[..., t:t + tokens]
        y_t, shifted = reference.causal_conv1d_update(part, shifted, weight, bias, "silu")
        y_r, ring = reference.causal_conv1d_update(part, ring, weight, bias, "silu", cache_seqlens=seen)
        seen = seen + tokens
        close(y_t, y[..., t:t + tokens])
        close(y_r, y_t)
    close(shifted, x[..., -5:])
    for i in range(7, 12):
        close(ring[..., i % 5], x[..., i])


def test_norm_is_rms_norm_in_each_segment():
    x, z, weight, bias = rand(2, 3, 10), rand(2, 3, 10), rand(10), rand(10)
    segments, eps = [1, 6, 3], [1e-2, 1e-5, 0.1]

    def norm(v):
        parts = [F.rms_norm(part, (size,), None, e) for part, size, e in zip(v.split(segments, -1), segments, eps)]
        return torch.cat(parts, -1) * weight + bias

    def run(z, first):
        return reference.gated_rmsnorm(x, weight, bias, z, segments=segments, eps=eps, norm_before_gate=first)

    close(run(None, True), norm(x))
    close(run(z, True), norm(x) * F.silu(z))
    close(run(z, False), norm(x * F.silu(z)))


def test_dt_is_clamped_after_softplus():
    dt = reference.discrete_dt(torch.tensor([-9.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 1.0]), True, (0.5, 2.0),
                               torch.float64)
    close(dt, torch.tensor([0.5, math.log1p(math.e), 2.0], dtype=torch.float64))


def test_gradients_of_the_reference():
    def leaves(inputs):
        floats = {k: v.requires_grad_() for k, v in inputs.items()
                  if isinstance(v, torch.Tensor) and v.is_floating_point()}
        rest = {k: v for k, v in inputs.items() if k not in floats}
        return list(floats), tuple(floats.values()), rest

    for op, inputs in ((reference.ssd, ssd_inputs(1, 3, 2, 2, 2, 2)),
                       (reference.selective_scan, scan_inputs(1, 2, 3, 2, 2))):
        names, values, rest = leaves(inputs)
        assert torch.autograd.gradcheck(lambda *v, op=op, names=names, rest=rest: op(**dict(zip(names, v)), **rest),
                                        values)
