"""The CUDA selective scan against the recurrence, at odd sizes, with poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from shedder import reference
from shedder.ops import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
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


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layout", ["channel-first", "channel-last"])
@pytest.mark.parametrize("channels", [75, 4500, 13000])         # two warps to 8 channels, a warp to 8, to 16
@pytest.mark.parametrize("length", [64, 100, 101])              # rows aligned to 16 bytes, to 8, to 2
def test_matches_the_recurrence_in_every_form_of_access(dtype, layout, channels, length):
    case = inputs(2, channels, length, 11, dtype)
    if layout == "channel-last":
        for name in ("u", "delta", "z", "B", "C"):
            case[name] = case[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_matches(case)


@pytest.mark.parametrize("dstate", range(1, 17))
def test_matches_the_recurrence_for_every_number_of_states_of_many_channels(dstate):
    assert_matches(inputs(2, 13001, 35, dstate, torch.bfloat16))


# An H200 has 528 schedulers. Each gets two warps of 16 channels, or those and one of 8, three of 16, one of each kind,
# two of 32, ...; several batch entries, with which rounds need not end; more than run at once.
@pytest.mark.parametrize(("batch", "channels"), [(1, 16896), (1, 17001), (1, 22333), (1, 26001), (1, 31001), (3, 5633),
                                                 (2, 9001), (8, 2117), (5, 7001), (17, 1001), (1, 60001), (700, 30)])
@pytest.mark.parametrize("length", [72, 263])                    # rows on the grid of 16 bytes and off
def test_many_channels_are_all_dealt_out(batch, channels, length):
    assert_matches(inputs(batch, channels, length, 7, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dstate", range(1, 17))
@pytest.mark.parametrize(("channels", "length"), [(17001, 40), (17001, 277), (20001, 72)])
def test_many_channels_of_any_number_of_states(channels, length, dstate, dtype):
    assert_matches(inputs(2, channels, length, dstate, dtype))


# As many as two warps of 16 take on each scheduler of an H200: tiles are longer where no warp has 32.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dstate", range(11, 17))
@pytest.mark.parametrize(("channels", "length"), [(8001, 8), (8001, 64), (8448, 72), (6411, 520)])
def test_half_warps_of_many_states(channels, length, dstate, dtype):
    assert_matches(inputs(2, channels, length, dstate, dtype))


# Rows on the grid of 16 bytes and off. Nothing comes between the calls: each may begin while the one before ends.
@pytest.mark.parametrize("length", [48, 299])
def test_many_channels_hand_their_state_on(length):
    case = inputs(2, 20001, 4 * length, 13, torch.bfloat16)
    y = torch.full_like(case["u"], torch.nan)
    states = [case["initial_state"], *(torch.full_like(case["initial_state"], torch.nan) for _ in range(4))]
    for index in range(4):
        part = slice(index * length, (index + 1) * length)
        u, delta, B, C, z = (case[name][..., part] for name in ("u", "delta", "B", "C", "z"))
        torch.ops.shedder_cuda.selective_scan(u, delta, case["A"], B, C, case["D"], z, case["delta_bias"], True,
                                              states[index], None, None, y[..., part], states[index + 1])
    want_y, want_state = expected(case)
    assert error(y, want_y) < TOLERANCE[torch.bfloat16]
    assert error(states[-1], want_state) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [8, 24, 64, 104, 520, 1, 33, 257, 259, 286, 287, 289, 319, 321, 323, 519])
def test_many_channels_over_any_number_of_tiles(length):
    assert_matches(inputs(2, 9001, length, 5, torch.bfloat16))


@pytest.mark.parametrize("absent", ["z", "D", "bias", "initial_state"])
def test_optional_arguments_of_many_channels_may_be_absent(absent):
    assert_matches(inputs(3, 5901, 40, 6, torch.float16, **{absent: False}))


def test_many_channels_are_views_amid_others():
    case = inputs(2, 9001, 96, 7, torch.bfloat16)
    for start, name in enumerate(("u", "delta", "z", "B", "C")):
        around = torch.full((*case[name].shape[:-1], 144), torch.nan, dtype=torch.bfloat16, device="cuda")
        case[name] = around[..., 8 * start:8 * start + 96].copy_(case[name])
    case["delta"] = case["delta"][:, :1].expand_as(case["u"])
    assert_writes_nothing_else(case, torch.full((2, 9003, 112), 7.0, dtype=torch.bfloat16, device="cuda"), 8)


@pytest.mark.parametrize("length", [5, 261, 288, 323])
@pytest.mark.parametrize("start", [0, 3, 7])
def test_many_channels_are_views_amid_others_off_the_grid(start, length):
    case = inputs(2, 9001, length, 7, torch.bfloat16)
    for name in ("u", "delta", "z", "B", "C"):
        around = torch.full((*case[name].shape[:-1], 341), torch.nan, dtype=torch.bfloat16, device="cuda")
        case[name] = around[..., start:start + length].copy_(case[name])
    wide = torch.full((2, 9009, 341), 7.0, dtype=torch.bfloat16, device="cuda")
    assert_writes_nothing_else(case, wide[:, 7:], start)         # its row 8 lies as row 0 of u does


# Batch entries a number of rows apart, and not.
@pytest.mark.parametrize("gap", [8 * 101, 8])
@pytest.mark.parametrize("length", [101, 104])
def test_many_channels_of_batch_entries_apart(length, gap):
    case = inputs(3, 5633, length, 7, torch.bfloat16)
    for name in ("u", "delta", "z"):
        around = torch.full((3, 5633 * length + gap), torch.nan, dtype=torch.bfloat16, device="cuda")
        case[name] = around[:, :5633 * length].view(case[name].shape).copy_(case[name])
    assert_matches(case)


# Every second row of y begins within a sector of memory, the only row of u with one: what lies before it is not there.
@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_many_channels_share_a_row(name):
    case = inputs(2, 9001, 264, 7, torch.bfloat16)
    for state_row in ("B", "C"):
        case[state_row] = inputs(2, 1, 265, 7, torch.bfloat16)[state_row][..., 1:]
    assert_matches(case | {name: case[name][:, :1].expand_as(case[name])})


def assert_writes_nothing_else(case, wide, start):
    """y goes to a part of wide, from row 1 and step `start` on."""
    y = wide[:, 1:1 + case["u"].shape[1], start:start + case["u"].shape[2]]
    torch.ops.shedder_cuda.selective_scan(
        *(case[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")), True, case["initial_state"],
        None, None, y, None)
    want, _ = expected(case)
    assert error(y, want) < TOLERANCE[torch.bfloat16]
    y.fill_(7.0)
    assert (wide == 7.0).all()


@pytest.mark.parametrize("length", [136, 391])
def test_what_comes_later_does_not_reach_back_in_many_channels(length):
    case = inputs(2, 9001, length, 6, torch.bfloat16)
    want, _ = run(case)
    for name in ("u", "delta", "z", "B", "C"):
        late = case[name].clone()
        late[..., length - 59:] = torch.nan
        y, _ = run(case | {name: late})
        assert torch.equal(y[..., :length - 59], want[..., :length - 59]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_channels_than_a_grid_has_rows(dtype):
    assert_matches(inputs(1, 600_001, 8, 2, dtype))


@pytest.mark.parametrize("dstate", [3, 8, 11, 16])
@pytest.mark.parametrize("channels", [75, 4501])
def test_matches_the_recurrence_where_lanes_share_channels(dstate, channels):
    assert_matches(inputs(2, channels, 70, dstate, torch.float16))


@pytest.mark.parametrize("channels", [75, 4500, 13000])
def test_a_state_nobody_asks_for_is_left_out(channels):
    case = inputs(2, channels, 40, 11, torch.bfloat16)
    y, final = cuda.selective_scan(*case.values(), return_state=False)
    assert final is None and torch.equal(y, run(case)[0])


def test_rows_may_start_anywhere():
    case = inputs(2, 40, 40, 16, torch.bfloat16)
    for start, name in enumerate(("u", "delta", "z", "B", "C")):
        case[name] = case[name][..., start:start + 33]
    assert_matches(case)


def test_nothing_is_written_beside_the_outputs():
    case = inputs(1, 33, 37, 16, torch.bfloat16)
    wide = torch.full((1, 40, 43), 7.0, dtype=torch.bfloat16, device="cuda")
    torch.ops.shedder_cuda.selective_scan(
        case["u"], case["delta"], case["A"], case["B"], case["C"], case["D"], case["z"], case["delta_bias"], True,
        case["initial_state"], None, None, wide[:, 3:36, 3:40], None)
    want, _ = expected(case)
    assert error(wide[:, 3:36, 3:40], want) < TOLERANCE[torch.bfloat16]
    wide[:, 3:36, 3:40] = 7.0
    assert (wide == 7.0).all()


def test_small_steps_keep_their_value():
    case = inputs(1, 64, 40, 16)                            # softplus(x) is exp(x) far below zero, not zero
    case["delta_bias"] = torch.linspace(-40, 0, 64, device="cuda")
    case |= {"D": None, "z": None, "initial_state": None}
    for dtype in TOLERANCE:
        cast = case | {name: case[name].to(dtype) for name in ("u", "delta", "B", "C")}
        _, state = run(cast)
        _, want = expected(cast)
        assert ((state.double() - want).norm(dim=2) / want.norm(dim=2)).max() < 1e-4


@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")])
@pytest.mark.parametrize("groups", [1, 3])
def test_B_and_C_may_be_constant_in_time(constant, groups):
    case = inputs(2, 45, 33, 12, torch.bfloat16, groups)
    for name in constant:
        case[name] = torch.randn(45, 12, device="cuda")
    if len(constant) == 2:
        case["channel_to_group"] = None
    assert_matches(case)


def test_packed_sequences_start_from_zero_and_padding_passes_the_state_by():
    case = inputs(2, 45, 40, 12)
    seq_idx = torch.arange(40, device="cuda", dtype=torch.int32).div(9, rounding_mode="floor").repeat(2, 1)
    seq_idx[0, :3] = seq_idx[1, 20:25] = -1
    case["seq_idx"] = seq_idx
    assert_matches(case)


def test_two_calls_agree_to_the_last_bit():
    case = inputs(2, 700, 200, 16, torch.bfloat16)
    for first, second in zip(run(case), run(case), strict=True):
        assert torch.equal(first, second)


def test_chunked_prefill_equals_one_call():
    case = inputs(2, 700, 200, 16)
    want, want_state = run(case)
    state, parts = case["initial_state"], []
    for start in range(0, 200, 50):
        piece = case | {name: case[name][..., start:start + 50] for name in ("u", "delta", "B", "C", "z")}
        y, state = run(piece | {"initial_state": state})
        parts.append(y)
    assert error(torch.cat(parts, dim=-1), want.double()) < 1e-6
    assert error(state, want_state.double()) < 1e-6


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_chunked_prefill_of_few_channels_equals_one_call(dtype):
    case = inputs(1, 40, 1200, 16, dtype)                   # long enough for several segments of L
    want, want_state = run(case)
    state, parts = case["initial_state"], []
    for start, stop in ((0, 301), (301, 302), (302, 1200)):
        piece = case | {name: case[name][..., start:stop] for name in ("u", "delta", "B", "C", "z")}
        y, state = run(piece | {"initial_state": state})
        parts.append(y)
    assert error(torch.cat(parts, dim=-1), want.double()) < TOLERANCE[dtype]
    assert error(state, want_state.double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [1, 17, 640])
@pytest.mark.parametrize("length", [500, 1501])
def test_few_channels_and_a_long_sequence(length, channels, dtype):
    assert_matches(inputs(1, channels, length, 16, dtype))


# On an H200 two rounds of CTAs of 16 channels, and 98 of 8; two of 32, and 110 of 16. Rows on the grid of 16 bytes and
# off.
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dstate", [9, 16])
@pytest.mark.parametrize(("batch", "channels"), [(1, 5001), (2, 5101)])
@pytest.mark.parametrize("length", [64, 101])
def test_channels_of_two_rounds_and_a_rest(length, batch, channels, dstate, dtype):
    assert_matches(inputs(batch, channels, length, dstate, dtype))


@pytest.mark.parametrize("dstate", [2, 3, 4, 7, 9, 13, 24, 31, 33, 48, 65, 96, 128, 129, 192, 255])
@pytest.mark.parametrize("channels", [33, 4100])
def test_matches_the_recurrence_for_any_dstate_in_bf16(dstate, channels):
    assert_matches(inputs(1, channels, 71, dstate, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 300, 512, 16), (8, 5120, 64, 16), (1, 100, 256, 128)])
def test_error_is_that_of_rounding_the_result(shape, dtype):
    """The reference kernel's error is that of one rounding of y; contract: at most 1.05 times it."""
    case = inputs(*shape, dtype, initial_state=False)
    y, _ = run(case)
    want, _ = expected(case)
    rounded = want.to(dtype)
    assert error(y, want) < 1.05 * error(rounded, want)
    assert (y.double() - want).abs().max() < 1.05 * (rounded.double() - want).abs().max()


def test_slow_decay_over_a_long_sequence():
    case = inputs(1, 64, 16384, 16, torch.bfloat16, initial_state=False)
    case["A"] = -torch.logspace(-2, 0, 16, device="cuda").repeat(64, 1)
    case["delta_bias"] = torch.full((64,), -4.6, device="cuda")          # steps of about 0.01: dt|A| from 1e-4 to 1e-2
    case["delta"] = case["delta"] * 0.1
    y, state = run(case)
    want, want_state = expected(case)
    assert error(y, want) < 1.05 * error(want.bfloat16(), want)
    assert error(state, want_state) < 10 * TOLERANCE[torch.float32]      # a thousand roundings are remembered


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_what_comes_later_does_not_reach_back(dtype):
    case = inputs(2, 40, 70, 16, dtype)
    want, _ = run(case)
    for name in ("u", "delta", "z", "B", "C"):
        late = case[name].clone()
        late[..., 45:] = torch.nan
        y, _ = run(case | {name: late})
        assert torch.equal(y[..., :45], want[..., :45]), name


@pytest.mark.parametrize("name", ["u", "delta", "z", "B", "C"])
def test_expanded_tensors_are_read_without_a_copy(name):
    case = inputs(2, 40, 33, 16, torch.bfloat16)
    for axis in range(case[name].dim()):
        one = case[name].narrow(axis, 0, 1).expand_as(case[name])
        assert_matches(case | {name: one})


def test_what_it_does_not_do_is_refused_by_name():
    case = inputs(1, 8, 4, 4)
    with pytest.raises(ValueError, match="float64"):
        run(case | {"u": case["u"].double()})
