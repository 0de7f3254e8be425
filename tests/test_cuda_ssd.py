"""The CUDA SSD against the recurrence: odd sizes, odd views, ragged groups, packed rows, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from shedder import reference
from shedder.ops import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(cuda.available() is not None, reason=f"no CUDA backend: {cuda.available()}"),
    pytest.mark.skipif(cuda.supports("ssd") is not None, reason=f"no CUDA ssd: {cuda.supports('ssd')}"),
]

# RMS error over RMS of the result: operands of the products and the output are rounded to 8 and 11 bits.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 4e-3}
SEGMENTS = [1, 3]                                           # of a sequence, walked along at once; 1: shares of all


def inputs(batch=2, length=130, heads=7, headdim=64, dstate=128, dtype=torch.bfloat16, *, groups=None, odd=False,
           z=False, initial=False, packed=False, channel_D=False, limit=(0.0, float("inf")), seed=0):
    """groups: the group of each head. odd: views that start at an odd element of rows surrounded by NaN."""
    make = torch.Generator("cuda").manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        values = torch.randn(*shape, device="cuda", generator=make).to(dtype)
        if not odd or dtype == torch.float32:
            return values
        view = torch.full((*shape[:-1], shape[-1] + 3), torch.nan, dtype=dtype, device="cuda")[..., 1:1 + shape[-1]]
        return view.copy_(values)

    groups = [0] * heads if groups is None else groups
    seq_idx = None
    if packed:
        seq_idx = (torch.rand(batch, length, device="cuda", generator=make) < 0.02).cumsum(1).int()
        seq_idx[torch.rand(batch, length, device="cuda", generator=make) < 0.1] = -1
    B, C = (random(batch, length, max(groups) + 1, dstate, dtype=dtype) for _ in "BC")
    return {
        "x": random(batch, length, heads, headdim, dtype=dtype), "dt": random(batch, length, heads, dtype=dtype),
        "A": -torch.exp2(torch.rand(heads, device="cuda", generator=make) * 6 - 2), "B": B, "C": C,
        "D": random(heads, headdim) if channel_D else random(heads),
        "z": random(batch, length, heads, headdim, dtype=dtype) if z else None,
        "dt_bias": random(heads) - 2, "dt_softplus": True, "dt_min": limit[0], "dt_max": limit[1],
        "head_to_group": torch.tensor(groups, dtype=torch.int32, device="cuda"),
        "initial_states": random(batch, heads, headdim, dstate) if initial else None, "seq_idx": seq_idx,
    }


def error(got, want):
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def run(case, segments=0):
    return cuda.ssd(*case.values(), segments=segments)


def assert_matches(case, segments=0):
    y, final = run(case, segments)
    double = {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
              for name, value in case.items()}
    limit = double.pop("dt_min"), double.pop("dt_max")
    want_y, want_final = reference.ssd(**double, dt_limit=limit)
    assert y.dtype == case["x"].dtype and y.is_contiguous() and final.dtype == torch.float32
    assert error(y, want_y) < TOLERANCE[y.dtype]
    assert error(final, want_final) < TOLERANCE[y.dtype]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (60, 100), (61, 101), (56, 104), (48, 96), (13, 5),
                                                 (32, 64), (1, 1), (64, 80), (8, 17)])
def test_matches_the_recurrence_at_any_size(headdim, dstate, segments):
    assert_matches(inputs(length=600, headdim=headdim, dstate=dstate), segments)


@pytest.mark.parametrize(("headdim", "dstate"), [(100, 32), (128, 128), (64, 256), (61, 131), (256, 192)])
def test_wide_heads_and_many_states(headdim, dstate):
    assert_matches(inputs(heads=3, headdim=headdim, dstate=dstate, initial=True, channel_D=True))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 2047])
@pytest.mark.parametrize("heads", [1, 41, 75])
def test_matches_the_recurrence_for_any_length_and_number_of_heads(length, heads):
    assert_matches(inputs(1, length, heads, 61, 101))


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (61, 101), (13, 12)])
def test_views_at_odd_elements_and_every_extra(headdim, dstate, dtype, segments):
    assert_matches(inputs(length=333, headdim=headdim, dstate=dstate, dtype=dtype, odd=True, z=True, initial=True,
                          packed=True, channel_D=True, limit=(0.05, 0.4)), segments)


@pytest.mark.parametrize("first", range(8))                          # element of a row: each start of boxes
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (61, 101), (60, 104)])
def test_heads_start_anywhere(headdim, dstate, first):
    case = inputs(2, 140, 5, headdim, dstate)
    columns = {name: case[name][0, 0].numel() for name in ("x", "B", "C")}
    pitch = (sum(columns.values()) + 15) // 8 * 8
    around = torch.full((2, 140, pitch), torch.nan, dtype=torch.bfloat16, device="cuda")
    for name, count in columns.items():                              # side by side, as a convolution leaves them
        view = around[..., first:first + count].unflatten(2, case[name].shape[2:])
        case[name] = view.copy_(case[name])
        first += count
    assert_matches(case)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("heads", "headdim", "apart"), [
    (20, 61, 0), (20, 63, 0), (61, 60, 0), (7, 100, 0),              # tokens a multiple of 8 bytes apart
    (10, 61, 0), (10, 63, 0), (11, 64, 1),                           # of 4
])
def test_a_large_x_whose_tokens_no_box_begins_with(heads, headdim, apart, segments):
    length, pitch = 131, heads * (headdim + apart) - apart
    batch = -(-(8 << 20) // (length * heads * headdim * 2))          # or it is copied
    case = inputs(batch, length, heads, headdim, 24, initial=True, channel_D=True)
    around = torch.full((batch, length, pitch), torch.nan, dtype=torch.bfloat16, device="cuda")
    strides = (length * pitch, pitch, headdim + apart, 1)
    case["x"] = around.as_strided(case["x"].shape, strides).copy_(case["x"])
    assert_matches(case, segments)


@pytest.mark.parametrize("first", [0, 3, 8])                         # element of a row, of z
@pytest.mark.parametrize("headdim", [64, 61, 100])
def test_x_and_z_may_lie_differently(headdim, first):
    case = inputs(2, 140, 5, headdim, 24, z=True)
    around = torch.full((2, 140, (5 * headdim + 15) // 8 * 8), torch.nan, dtype=torch.bfloat16, device="cuda")
    case["z"] = around[..., first:first + 5 * headdim].unflatten(2, (5, headdim)).copy_(case["z"])
    assert_matches(case)


# One consumer takes 64 neighbouring channels, or 32, of two heads: those of whole rows of warps.
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("batch", "length", "heads", "headdim"), [
    (27, 130, 10, 16), (33, 600, 9, 16), (20, 130, 14, 32), (27, 600, 5, 32), (23, 200, 3, 80), (4, 70, 20, 80)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_channels_of_two_heads_side_by_side(batch, length, heads, headdim, dtype, segments):
    assert_matches(inputs(batch, length, heads, headdim, 100, dtype, initial=True, channel_D=True), segments)


def test_channels_of_two_heads_between_others_in_memory():
    case = inputs(30, 200, 5, 32, 40)
    around = torch.full((30, 200, 6 * 32 + 8), torch.nan, dtype=torch.bfloat16, device="cuda")
    case["x"] = around[..., 24:24 + 5 * 32].unflatten(2, (5, 32)).copy_(case["x"])
    assert_matches(case)


def test_x_of_one_token_may_stand_for_all():
    case = inputs(2, 140, 5, 24, 24)
    case["x"] = case["x"][:, :1].expand(2, 140, 5, 24)
    assert_matches(case)


@pytest.mark.parametrize("heads", [70, 75, 80])
@pytest.mark.parametrize("groups", [1, 4])
def test_neighbours_share_what_they_read(heads, groups):             # clusters, where heads start anywhere and are many
    case = inputs(4, 130, heads, 61, 101, groups=[head * groups // heads for head in range(heads)], initial=True)
    assert_matches(case)


@pytest.mark.parametrize("heads", [67, 68])
def test_neighbours_share_what_they_read_with_every_extra(heads):
    case = inputs(4, 450, heads, 61, 101, z=True, packed=True, channel_D=True)
    assert_matches(case)


# Two heads of an odd number of channels share a word of each row of y.
@pytest.mark.parametrize(("headdim", "first"), [(1, 0), (13, 0), (63, 0), (61, 1), (61, 8)])
def test_neighbours_store_into_the_same_words(headdim, first):
    case = inputs(4, 710, 66, headdim, 24)
    pitch = (66 * headdim + 15) // 8 * 8
    around = torch.full((4, 710, pitch), torch.nan, dtype=torch.bfloat16, device="cuda")
    case["x"] = around[..., first:first + 66 * headdim].unflatten(2, (66, headdim)).copy_(case["x"])
    assert_matches(case)


def assert_entries_match_calls_of_their_own(case):
    """The first and the last entry of the batch, where units left over lie; the last one also the recurrence."""
    y, final = run(case)
    batch = len(case["x"])
    for entry in {0, batch - 1}:
        alone = {name: case[name][entry:entry + 1] for name in ("x", "dt", "B", "C", "initial_states")}
        want_y, want_final = run(case | alone, 1)
        assert torch.equal(y[entry:entry + 1], want_y) and torch.equal(final[entry:entry + 1], want_final)
    assert_matches({**case, **alone})


# An H200 holds 264 heads at once, 132 of many states, 396 of few. What is left over is taken in up to 4 parts, a head
# of a whole round interrupted for those between, or, where it is more than half, one by one.
@pytest.mark.parametrize(("batch", "heads"), [(1, 265), (4, 80), (5, 61), (8, 41), (6, 64), (3, 175)])
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (61, 101), (16, 200), (64, 40), (60, 20)])
def test_heads_left_over_are_taken_in_parts(batch, heads, headdim, dstate):
    assert_entries_match_calls_of_their_own(inputs(batch, 650, heads, headdim, dstate, initial=True))


@pytest.mark.parametrize(("batch", "heads"), [(2, 265), (8, 80), (10, 61), (12, 64)])
def test_tiles_of_two_heads_left_over_are_taken_in_parts(batch, heads):
    assert_entries_match_calls_of_their_own(inputs(batch, 650, heads, 32, 96, initial=True))


# Up to half as many again as there are multiprocessors: the last ones are cut in segments, beside the first ones.
@pytest.mark.parametrize(("batch", "length", "tiles"), [(1, 1153, 134), (2, 2000, 80), (3, 2000, 50)])
@pytest.mark.parametrize(("headdim", "dstate", "heads_of_two_tiles"),
                         [(64, 128, 2), (60, 100, 2), (61, 20, 2), (128, 24, 1), (32, 96, 4), (64, 200, 2)])
def test_heads_taken_whole_beside_segments_of_others(batch, length, tiles, headdim, dstate, heads_of_two_tiles):
    heads = tiles // 2 * heads_of_two_tiles
    assert_matches(inputs(batch, length, heads, headdim, dstate, initial=True))


# More than half of them, in chains where the sequence is long enough: of 2 and of 5 heads, or of clusters of heads.
@pytest.mark.parametrize(("batch", "length", "heads"), [(5, 800, 82), (4, 1600, 120)])
@pytest.mark.parametrize(("headdim", "dstate"), [(64, 128), (61, 101)])
def test_heads_left_over_are_taken_in_chains(batch, length, heads, headdim, dstate):
    assert_entries_match_calls_of_their_own(inputs(batch, length, heads, headdim, dstate, initial=True))


@pytest.mark.parametrize(("batch", "heads", "dstate"), [(1, 205, 200), (6, 105, 40), (9, 70, 20)])
def test_chains_of_many_and_of_few_states(batch, heads, dstate):
    assert_entries_match_calls_of_their_own(inputs(batch, 800, heads, 64, dstate, initial=True))


def test_steps_may_be_negative():
    case = inputs(2, 200, 5, 61, 101, limit=(-0.5, 0.5)) | {"dt_softplus": False}
    case["A"] *= 0.02                                                # states grow where steps are negative
    assert_matches(case)
    assert (case["dt"] + case["dt_bias"] < 0).any()


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("groups", [[0, 0, 0, 0, 1, 1, 1, 1], [3, 0, 2, 0, 0, 2, 2, 3, 0, 2, 0], list(range(8)),
                                    [1, 1, 1]])
def test_heads_read_any_group(groups, segments):
    assert_matches(inputs(length=520, heads=len(groups), headdim=56, dstate=104, groups=groups), segments)


def test_a_strong_decay_costs_later_tokens_no_digits():
    case = inputs(length=256)
    case["dt"][:, 5::64] = 60.0
    case["A"] = case["A"] * 8
    assert_matches(case)


def test_optional_arguments_may_be_absent():
    case = inputs() | {"D": None, "dt_bias": None}
    assert_matches(case)


def test_strides_are_arbitrary():
    case = inputs(heads=4, headdim=24, dstate=20)
    case["x"] = case["x"].permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    case["B"] = case["B"].transpose(1, 3).contiguous().transpose(1, 3)
    case["dt"] = case["dt"].float()
    assert_matches(case)


def test_runs_on_the_current_stream_and_in_a_graph():
    case = inputs(length=1500)
    graph = torch.cuda.CUDAGraph()
    want, _ = run(case, 3)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):                           # capture happens on a side stream
        y, _ = run(case, 3)
    for _ in range(3):                                      # each finds what the one before has cleared
        y.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_calls_that_leave_states_on_two_streams_and_in_graphs_at_once():
    """CTAs wait for others of their call, which those of another call must not keep from beginning."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    cases = [inputs(1, 700, heads, headdim, dstate) for heads, headdim, dstate in (
        (processors // 2, 64, 128), (2 * processors + 40, 61, 101), (5, 64, 96), (processors * 2 + 90, 64, 128))]
    wanted = [run(case) for case in cases]
    graphs = []
    for case in cases:
        graphs.append((torch.cuda.CUDAGraph(), case))
        with torch.cuda.graph(graphs[-1][0]):
            graphs[-1] += (run(case),)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    got = []
    for turn in range(60):
        for number, stream in enumerate(streams):
            which = (turn + number) % len(cases)
            with torch.cuda.stream(stream):
                if number == 2:
                    graphs[which][0].replay()
                else:
                    got.append((which, run(cases[which])))
    torch.cuda.synchronize()
    got += [(which, outputs) for which, (_, _, outputs) in enumerate(graphs)]
    for which, outputs in got:
        for one, want in zip(outputs, wanted[which], strict=True):
            assert torch.equal(one, want)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("headdim", [*range(15, 65), 72, 80, 100, 128, 200])
def test_rows_of_y_of_any_width(headdim, extras):
    """The copy engine stores those of whole pieces of 16 bytes."""
    assert_matches(inputs(2, 130, 8, headdim, 40, z=extras, packed=extras))


# The copy engine stores what two neighbouring heads hold of whole pieces of y; the last chunk is none of 64 tokens.
@pytest.mark.parametrize(("batch", "length", "heads"), [(4, 200, 80), (4, 710, 66), (4, 710, 72), (2, 64, 136),
                                                        (1, 1000, 300)])
@pytest.mark.parametrize("headdim", [12, 17, 23, 28, 35, 46, 50, 57, 58, 59, 60, 61, 62, 63])
def test_rows_of_y_of_two_heads_in_a_cluster(batch, length, heads, headdim):
    assert_matches(inputs(batch, length, heads, headdim, 36, initial=True))


def test_rows_of_y_of_many_heads_in_clusters():
    assert_matches(inputs(4, 200, 72, 61, 101))
    assert_matches(inputs(4, 200, 72, 59, 48, torch.float16, z=True))


@pytest.mark.parametrize(("segments", "portable"), [(1, False), (4, False), (1, True)])
def test_states_nobody_asks_for_are_left_out(segments, portable):
    case = inputs(length=520, initial=True)
    y, final = cuda.ssd(*case.values(), return_state=False, segments=segments, portable=portable)
    assert final is None
    assert torch.equal(y, cuda.ssd(*case.values(), segments=segments, portable=portable)[0])


@pytest.mark.parametrize("segments", [2, 7, 33, 160])        # of 160 chunks: more are waited for than a CTA has threads
def test_segments_take_the_states_of_all_before(segments):
    assert_matches(inputs(1, 64 * 160 - 5, 2, 48, 96, initial=True, packed=segments == 7), segments)


def test_concurrent_segments_give_the_same_each_time():
    case = inputs(2, 2000, 80)
    want = run(case, 5)
    for _ in range(3):
        got = run(case, 5)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert error(want[1], run(case, 1)[1].double()) < 1e-4           # states are fp32, only added in another order


@pytest.mark.parametrize("padding", [2, 8])                          # elements before and behind each row
@pytest.mark.parametrize(("headdim", "dstate"), [(61, 101), (60, 104), (64, 96), (40, 20)])
def test_neighbours_in_memory_do_not_matter(headdim, dstate, padding):
    case = inputs(2, 200, 4, headdim, dstate, z=True)
    for name in ("x", "z", "B", "C"):
        values = case[name]
        wider = *values.shape[:-1], values.shape[-1] + 2 * padding
        around = torch.full(wider, torch.nan, dtype=values.dtype, device="cuda")
        case[name] = around[..., padding:-padding].copy_(values)
    assert_matches(case)


@pytest.mark.parametrize("name", ["x", "B", "C"])
def test_a_time_stride_of_zero(name):
    case = inputs(1, 100, 3, 32, 64)
    case[name] = case[name][:, :1].expand_as(case[name])
    assert_matches(case)


def test_a_prefill_in_pieces_matches_one_call():
    case = inputs(2, 1000, 7, 61, 101, z=True)
    pieces, state = [], None
    for first, last in ((0, 250), (250, 251), (251, 700), (700, 1000)):
        part = {name: case[name][:, first:last] for name in ("x", "dt", "B", "C", "z")}
        y, state = run(case | part | {"initial_states": state})
        pieces.append(y)
    whole = run(case)
    apart = 2 * TOLERANCE[torch.bfloat16]                    # each may be as far from exact
    assert error(torch.cat(pieces, 1), whole[0].double()) < apart and error(state, whole[1].double()) < apart


@pytest.mark.parametrize("pitch", [2**25, 2**31 // 60])               # a multiple of 16 bytes, and none
def test_elements_beyond_two_to_the_31_are_reached(pitch):
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    case = inputs(1, 96, 2, 64, 64)
    wide = torch.zeros(96, pitch, dtype=torch.bfloat16, device="cuda")
    wide[:, :128] = case["x"].flatten(0, 1).flatten(1)
    want = run(case)
    got = run(case | {"x": wide[:, :128].unflatten(1, (2, 64))[None]})
    assert error(got[0], want[0].double()) < 2e-3 and error(got[1], want[1].double()) < 2e-3     # sums in another order


def test_what_it_does_not_do_is_refused_by_name():
    case = inputs(1, 8, 2, 8, 8)
    with pytest.raises(ValueError, match="float64"):
        run(case | {"x": case["x"].double()})
