"""The CUDA selective scan with complex A against the recurrence: odd sizes, any layout, poisoned outputs."""

from __future__ import annotations

import math

import pytest
import torch

from shedder import reference
from shedder.ops import cuda, selective_scan_fn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(cuda.available() is not None, reason=f"no CUDA backend: {cuda.available()}"),
]

# RMS error over RMS of the result: rounding of y; the state is fp32 whatever the inputs are. Angles of up to 75 radians
# in fp32 are off by 9e-6 at most, and so is what they turn.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}
STATE = 1e-5


def inputs(batch=2, channels=45, length=63, dstate=16, dtype=torch.float32, groups=1, seed=0):
    make = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=make)

    turns = (torch.arange(dstate, device="cuda") % 16 + 1) * math.pi    # of the size of S4D-Lin's
    A = torch.complex(-torch.exp(random(channels, dstate)), turns * (1 + 0.1 * random(channels, dstate)))
    return {
        "u": random(batch, channels, length).to(dtype), "delta": random(batch, channels, length).to(dtype),
        "A": A, "B": random(batch, groups, dstate, 2 * length).to(dtype),
        "C": random(batch, groups, dstate, 2 * length).to(dtype),
        "D": random(channels), "z": random(batch, channels, length).to(dtype), "delta_bias": random(channels) - 2,
        "delta_softplus": True, "initial_state": torch.complex(random(batch, channels, dstate),
                                                               random(batch, channels, dstate)),
        "channel_to_group": torch.randint(groups, (channels,), device="cuda", generator=make, dtype=torch.int32)
        if groups > 1 else None,
        "seq_idx": None,
    }


def run(case):
    return cuda.selective_scan(*case.values())


def expected(case):
    def double(value):
        if not torch.is_tensor(value) or not (value.is_complex() or value.is_floating_point()):
            return value
        return value.to(torch.complex128 if value.is_complex() else torch.float64)

    wide = {name: double(value) for name, value in case.items()}
    positional = [wide.pop(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")]
    return reference.selective_scan(*positional, **wide)


def error(got, want):
    difference = got.to(want.dtype) - want
    return (difference.abs().square().mean().sqrt() / want.abs().square().mean().sqrt()).item()


def assert_matches(case):
    y, state = run(case)
    want_y, want_state = expected(case)
    assert y.dtype == case["u"].dtype and y.stride() == torch.empty_like(case["u"]).stride()
    assert state.dtype == torch.complex64
    assert error(y, want_y) < TOLERANCE[y.dtype]
    assert error(state, want_state) < STATE


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dstate", [1, 4, 5, 8, 12, 16, 17, 32, 33, 64, 101, 128, 256])
def test_matches_the_recurrence_for_any_dstate(dstate, dtype):
    assert_matches(inputs(2, 45, 63, dstate, dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dstate", [1, 4, 7, 16, 30])               # many channels: other lanes than few
def test_matches_the_recurrence_for_many_channels(dstate, dtype):
    assert_matches(inputs(1, 131 * 1024 // dstate + 3, 19, dstate, dtype))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 32, 33, 1000, 2047])
@pytest.mark.parametrize("dstate", [12, 64])
def test_matches_the_recurrence_for_any_length(length, dstate):
    assert_matches(inputs(1, 37, length, dstate))


@pytest.mark.parametrize("channels", [1, 3, 127, 1000])
def test_matches_the_recurrence_for_any_number_of_channels(channels):
    assert_matches(inputs(3, channels, 21, 16))


@pytest.mark.parametrize("dstate", [5, 16, 40])
def test_channels_read_any_group(dstate):
    assert_matches(inputs(2, 75, 33, dstate, groups=4))


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dstate", [6, 101, 256])
def test_B_and_C_may_be_constant_in_time(constant, groups, dstate):
    case = inputs(2, 45, 33, dstate, torch.bfloat16, groups)
    for name in constant:
        case[name] = torch.randn(45, dstate, dtype=torch.complex64, device="cuda")
    if len(constant) == 2:
        case["channel_to_group"] = None
    assert_matches(case)


@pytest.mark.parametrize("absent", ["z", "D", "delta_bias", "initial_state"])
def test_optional_arguments_may_be_absent(absent):
    assert_matches(inputs() | {absent: None})


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_channel_last_and_other_strides(dtype):
    case = inputs(2, 40, 33, 16, dtype)
    for name in ("u", "z", "B"):                            # channel-last, and states fastest
        case[name] = case[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    case["delta"] = case["delta"][:, :1].expand(-1, 40, -1)
    case["C"] = case["C"].repeat_interleave(2, dim=-1)[..., ::2]
    case["A"] = case["A"].t().contiguous().t().conj()
    case["initial_state"] = case["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches(case)


def test_packed_sequences_start_from_zero_and_padding_passes_the_state_by():
    case = inputs(2, 45, 40, 12)
    seq_idx = torch.arange(40, device="cuda", dtype=torch.int32).div(9, rounding_mode="floor").repeat(2, 1)
    seq_idx[0, :3] = seq_idx[1, 20:25] = -1
    assert_matches(case | {"seq_idx": seq_idx})


def test_slow_decay_over_a_long_sequence():
    case = inputs(1, 16, 16384, 16) | {"initial_state": None}
    case["A"] = torch.complex(-torch.logspace(-2, 0, 16, device="cuda").repeat(16, 1), case["A"].imag.contiguous())
    case["delta_bias"] = torch.full((16,), -4.6, device="cuda")          # steps of about 0.01: dt|A| from 1e-4 to 1e-2
    case["delta"] = case["delta"] * 0.1
    y, state = run(case)
    want, want_state = expected(case)
    assert error(y, want) < 5 * TOLERANCE[torch.float32]                 # a thousand roundings are remembered
    assert error(state, want_state) < 5 * STATE


def test_an_empty_sequence_keeps_the_state():
    case = inputs(2, 40, 0, 16)
    y, state = run(case)
    assert y.shape == (2, 40, 0) and torch.equal(state, case["initial_state"])


def test_two_calls_and_a_graph_agree_to_the_last_bit():
    case = inputs(2, 70, 50, 16)
    want = run(case)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = run(case)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_the_public_function_takes_it_with_its_gradient():
    case = inputs(1, 8, 20, 4) | {"initial_state": None}
    A = case["A"].clone().requires_grad_()
    arguments = (case["u"], case["delta"], A, case["B"][:, 0], case["C"][:, 0], case["D"], case["z"],
                 case["delta_bias"], True, True)
    y, state = selective_scan_fn(*arguments, backend="cuda")
    want, want_state = expected(case)
    assert error(y.detach(), want) < TOLERANCE[torch.float32] and error(state.detach(), want_state) < STATE
    (gradient,) = torch.autograd.grad(y.sum(), A)
    same, _ = selective_scan_fn(*arguments, backend="reference")
    (wanted,) = torch.autograd.grad(same.sum(), A)
    assert error(gradient, wanted) < 1e-5
