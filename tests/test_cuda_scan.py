"""The CUDA selective scan against the recurrence, at odd sizes, with poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from shedder import reference
from shedder.ops import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.available() is not None, reason=f"no CUDA backend: {cuda.available()}"),
]

# RMS error over RMS of the result: half an ulp of the output dtype and the fp32 recurrence (ex2 and 2047 roundings).
TOLERANCE = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def inputs(batch, channels, length, dstate, dtype=torch.float32, groups=1, *, seed=0, z=True, D=True, bias=True,
           initial_state=True):
    make = torch.Generator("cuda").manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=make)

    channel_to_group = None
    if groups > 1:
        channel_to_group = torch.randint(groups, (channels,), device="cuda", generator=make, dtype=torch.int32)
    return {
        "u": random(batch, channels, length).to(dtype), "delta": random(batch, channels, length).to(dtype),
        "A": -torch.exp(random(channels, dstate)),
        "B": random(batch, groups, dstate, length).to(dtype), "C": random(batch, groups, dstate, length).to(dtype),
        "D": random(channels) if D else None, "z": random(batch, channels, length).to(dtype) if z else None,
        "delta_bias": random(channels) - 1 if bias else None, "delta_softplus": True,
        "initial_state": random(batch, channels, dstate) if initial_state else None,
        "channel_to_group": channel_to_group, "seq_idx": None,
    }


def expected(case):
    double = {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
              for name, value in case.items()}
    positional = [double.pop(name) for name in
                  ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")]
    return reference.selective_scan(*positional, **double)


def error(got, want):
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def run(case):
    return cuda.selective_scan(*case.values())


def assert_matches(case):
    y, final_state = run(case)
    want_y, want_state = expected(case)
    assert y.dtype == case["u"].dtype
    assert error(y, want_y) < TOLERANCE[y.dtype]
    assert error(final_state, want_state) < TOLERANCE[torch.float32]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every float tensor that the backend allocates starts as NaN, so that an element nobody writes shows."""
    def poisoned(allocate):
        def poison(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor
        return poison

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dstate", [1, 5, 8, 12, 16, 17, 64, 100, 101, 256])
def test_matches_the_recurrence_for_any_dstate(dstate, dtype):
    assert_matches(inputs(2, 45, 63, dstate, dtype))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, 2047])
def test_matches_the_recurrence_for_any_length(length):
    assert_matches(inputs(1, 131, length, 12))


@pytest.mark.parametrize("channels", [1, 127, 128, 129, 1000])
def test_matches_the_recurrence_for_any_number_of_channels(channels):
    assert_matches(inputs(3, channels, 20, 16))


@pytest.mark.parametrize("dstate", [5, 16, 40])
def test_channels_read_any_group(dstate):
    assert_matches(inputs(2, 75, 33, dstate, groups=4))


@pytest.mark.parametrize("absent", ["z", "D", "bias", "initial_state"])
def test_optional_arguments_may_be_absent(absent):
    assert_matches(inputs(2, 40, 33, 16, **{absent: False}))


def test_strides_are_arbitrary():
    case = inputs(2, 40, 33, 16)
    for name in ("u", "z", "B"):                            # channel-last, and states fastest
        case[name] = case[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    case["delta"] = case["delta"][:, :1].expand(-1, 40, -1)  # stride 0
    case["C"] = case["C"].repeat_interleave(2, dim=-1)[..., ::2]
    case["A"] = case["A"].t().contiguous().t()
    case["initial_state"] = case["initial_state"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches(case)


def test_an_empty_sequence_keeps_the_state():
    case = inputs(2, 40, 0, 16)
    y, final_state = run(case)
    assert y.shape == (2, 40, 0)
    assert torch.equal(final_state, case["initial_state"])


def test_runs_on_the_current_stream_and_in_a_graph():
    case = inputs(2, 40, 63, 16)
    want, _ = run(case)
    graph = torch.cuda.CUDAGraph()
    run(case)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):                           # capture happens on a side stream
        y, _ = run(case)
    case["u"].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(y, want)
    assert torch.equal(y, run(case)[0])


def test_elements_beyond_two_to_the_31_are_reached():
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    u = torch.zeros(2, 1, 2**31 + 64, dtype=torch.bfloat16, device="cuda")[:, :, -48:]   # batch stride above 2^31
    u.normal_()
    case = inputs(2, 1, 48, 16, torch.bfloat16) | {"u": u}
    want = run(case | {"u": u.contiguous()})
    got = run(case)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_what_it_does_not_do_is_refused_by_name():
    case = inputs(1, 8, 4, 4)
    with pytest.raises(ValueError, match="complex A"):
        run(case | {"A": case["A"].to(torch.complex64)})
    with pytest.raises(ValueError, match="seq_idx"):
        run(case | {"seq_idx": torch.zeros(1, 4, dtype=torch.int32, device="cuda")})
