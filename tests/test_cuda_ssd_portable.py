"""The CUDA SSD for any GPU, and for fp32, against the recurrence: odd sizes, odd views, ragged groups, packed rows."""

from __future__ import annotations

import pytest
import test_cuda_ssd as hopper
import torch
from test_cuda_ssd import error, inputs

from shedder import reference
from shedder.ops import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(cuda.available() is not None, reason=f"no CUDA backend: {cuda.available()}"),
]

# RMS error over RMS of the result. fp32: operands of the products keep 17 bits.
TOLERANCE = hopper.TOLERANCE | {torch.float32: 1e-5}
F32 = torch.float32


def run(case):
    return cuda.ssd(*case.values(), portable=True)


def expected(case):
    double = {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
              for name, value in case.items()}
    limit = double.pop("dt_min"), double.pop("dt_max")
    return reference.ssd(**double, dt_limit=limit)


def assert_matches(case):
    y, final = run(case)
    want_y, want_final = expected(case)
    assert y.dtype == case["x"].dtype and y.is_contiguous() and final.dtype == torch.float32
    assert error(y, want_y) < TOLERANCE[y.dtype]
    assert error(final, want_final) < TOLERANCE[y.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (60, 100), (61, 101), (13, 5), (32, 64), (1, 1), (48, 33),
                                                 (100, 32), (128, 128), (64, 256), (61, 131), (256, 192)])
def test_matches_the_recurrence_at_any_size(headdim, dstate, dtype):
    assert_matches(inputs(1, 200, 3, headdim, dstate, dtype, initial=True, channel_D=True))


@pytest.mark.parametrize("length", [1, 31, 32, 63, 64, 65, 1000, 2047])
@pytest.mark.parametrize("heads", [1, 41])
@pytest.mark.parametrize("dstate", [101, 200])              # chunks of 64 tokens, of 32
def test_matches_the_recurrence_for_any_length_and_number_of_heads(length, heads, dstate):
    assert_matches(inputs(1, length, heads, 61, dstate, F32))


def odd_views(case):
    """fp32 operands at odd elements of rows surrounded by NaN, as `inputs` makes those of 16 bits."""
    for name in ("x", "B", "C", "z"):
        t = case[name]
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, device="cuda")
        case[name] = wide[..., 1:1 + t.shape[-1]].copy_(t)
    return case


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (61, 101), (13, 12)])
def test_views_at_odd_elements_and_every_extra(headdim, dstate, dtype):
    case = inputs(length=333, headdim=headdim, dstate=dstate, dtype=dtype, odd=True, z=True, initial=True, packed=True,
                  channel_D=True, limit=(0.05, 0.4))
    assert_matches(odd_views(case) if dtype == F32 else case)


@pytest.mark.parametrize("pitch", [2, 4, 8])                # rows at multiples of 4, 8 and 16 bytes
def test_rows_of_16_bits_at_any_pitch(pitch):
    case = inputs(length=100, headdim=24, dstate=20, z=True)
    for name in ("x", "B", "C"):
        t = case[name]
        wide = torch.full((*t.shape[:2], t.shape[2] * t.shape[3] + pitch), torch.nan, dtype=t.dtype, device="cuda")
        rows = wide[..., :t.shape[2] * t.shape[3]].unflatten(-1, t.shape[2:])
        case[name] = rows.copy_(t)
    assert_matches(case)


@pytest.mark.parametrize("groups", [[3, 0, 2, 0, 0, 2, 2, 3, 0, 2, 0], list(range(8)), [1, 1, 1]])
def test_heads_read_any_group(groups):
    assert_matches(inputs(length=130, heads=len(groups), headdim=56, dstate=104, groups=groups, dtype=F32))


def test_a_strong_decay_costs_later_tokens_no_digits():
    case = inputs(length=256, dtype=F32)
    case["dt"][:, 5::16] = 60.0
    case["A"] = case["A"] * 8
    assert_matches(case)


def test_slow_decay_over_a_long_sequence():
    case = inputs(1, 16384, 2, 16, 64, F32)
    case["A"] = torch.tensor([-0.01, -1.0], device="cuda")
    case["dt_bias"] = torch.full((2,), -4.6, device="cuda")              # steps of about 0.01: dt|A| from 1e-4 to 1e-2
    case["dt"] = case["dt"] * 0.1
    for got, want in zip(run(case), expected(case), strict=True):
        assert error(got, want) < 1e-4                      # sums of mma are cut off: 150 chunks of that are remembered


def test_optional_arguments_may_be_absent():
    assert_matches(inputs(dtype=F32) | {"D": None, "dt_bias": None})


def test_strides_are_arbitrary():
    case = inputs(heads=4, headdim=24, dstate=20, dtype=F32)
    case["x"] = case["x"].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    case["B"] = case["B"][:, :1].expand(-1, 130, -1, -1)                # stride 0 along time
    case["dt"] = case["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    assert_matches(case)


def test_large_and_small_values_keep_their_digits():
    """The halves of an fp32 have its exponents: nothing overflows or vanishes at 1e-20 or 1e20."""
    for scale in (1e-20, 1e20):
        case = inputs(1, 100, 2, 32, 64, F32)
        case["x"] = case["x"] * scale
        assert_matches(case)


def test_elements_beyond_two_to_the_31_are_reached():
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    case = inputs(2, 70, 2, 64, 128, torch.bfloat16)
    wide = torch.empty(2, 2**31 + 70 * 128, dtype=torch.bfloat16, device="cuda")
    x = wide[:, -70 * 128:].view(2, 70, 2, 64).copy_(case["x"])         # batch stride above 2^31
    want, got = run(case), run(case | {"x": x})
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_runs_in_a_graph_and_gives_the_same_each_time():
    case = inputs(length=300, dtype=F32)
    want, _ = run(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):                           # capture happens on a side stream
        y, _ = run(case)
    y.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_chunked_prefill_equals_one_call():
    case = inputs(1, 300, 3, 61, 101, F32, z=True)
    want, want_state = run(case)
    state, parts = None, []
    for start, stop in ((0, 101), (101, 102), (102, 300)):
        piece = case | {name: case[name][:, start:stop] for name in ("x", "dt", "B", "C", "z")}
        y, state = run(piece | {"initial_states": state})
        parts.append(y)
    assert error(torch.cat(parts, dim=1), want.double()) < TOLERANCE[F32]
    assert error(state, want_state.double()) < TOLERANCE[F32]


def test_fp32_takes_this_kernel():
    case = inputs(dtype=F32)
    for got, want in zip(cuda.ssd(*case.values()), run(case), strict=True):
        assert torch.equal(got, want)
