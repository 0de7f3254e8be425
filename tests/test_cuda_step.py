"""The CUDA decode step against the recurrence: either family, every state dtype, rows of states on and off the grid."""

from __future__ import annotations

import pytest
import torch
import triton_cases as cases
from cuda_cases import BF16, F16, F32, memory, needs_gpu  # noqa: F401

from shedder import reference
from shedder.ops import cuda

pytestmark = needs_gpu


@pytest.mark.parametrize("state_dtype", [F32, F16, BF16])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("case", [
    {"groups": [80], "headdim": 64, "dstate": 128, "tied": True, "extras": True, "indexed": True},
    {"groups": [3, 0, 5], "headdim": 60, "dstate": 100, "tied": True, "extras": True},
    {"groups": [41], "headdim": 61, "dstate": 101, "tied": True, "extras": False},
    {"groups": [1], "headdim": 1537, "dstate": 12, "tied": False, "extras": True, "channel_groups": 3},
    {"groups": [1], "headdim": 5120, "dstate": 16, "tied": False, "extras": True, "batch": 7},
    {"groups": [1], "headdim": 75, "dstate": 256, "tied": False, "extras": True, "indexed": True},
    {"groups": [2, 1], "headdim": 7, "dstate": 256, "tied": True, "extras": True, "batch": 1},
    {"groups": [30], "headdim": 41, "dstate": 25, "tied": True, "extras": True, "batch": 1},
    {"groups": [80], "headdim": 61, "dstate": 25, "tied": True, "extras": True, "batch": 9},
    {"groups": [75], "headdim": 13, "dstate": 5, "tied": False, "extras": False},
    {"groups": [1], "headdim": 3, "dstate": 1, "tied": False, "extras": True, "batch": 5},
    {"groups": [1], "headdim": 5120, "dstate": 16, "tied": False, "extras": True, "indexed": True, "batch": 100},
    {"groups": [1], "headdim": 5117, "dstate": 8, "tied": False, "extras": False, "batch": 90},
    {"groups": [1], "headdim": 5117, "dstate": 11, "tied": False, "extras": True, "indexed": True, "batch": 130},
], ids=str)
def test_matches_the_recurrence(dtype, state_dtype, case):
    cases.check_state_update("cuda", dtype, state_dtype=state_dtype, **case)


def test_states_that_are_not_adjacent():
    state = torch.randn(2, 3, 16, 5, device="cuda").transpose(2, 3)
    x, B = torch.randn(2, 3, 5, device="cuda"), torch.randn(2, 1, 16, device="cuda")
    A = -torch.rand(3, 5, 16, device="cuda")
    before = state.double()
    y = cuda.state_update(state, x, x, A, B, B, None, None, None, True,
                          torch.zeros(3, dtype=torch.int32, device="cuda"), None)
    expected, moved = reference.state_update(before, *(t.double() for t in (x, x, A, B, B)), dt_softplus=True)
    cases.assert_close("y", y, expected, F32)
    cases.assert_close("state", state, moved, F32)


def test_in_a_cuda_graph_and_again_the_same():
    make = torch.Generator("cuda").manual_seed(0)
    state = torch.randn(4, 1, 512, 16, device="cuda", generator=make, dtype=BF16)
    x = torch.randn(4, 1, 512, device="cuda", generator=make, dtype=BF16)
    B = torch.randn(4, 1, 16, device="cuda", generator=make, dtype=BF16)
    A = -torch.rand(1, 512, 16, device="cuda", generator=make)
    heads = torch.zeros(512, dtype=torch.int32, device="cuda")

    def step():
        return cuda.state_update(state, x, x, A, B, B, None, x, None, True, heads, None)

    start = state.clone()
    want = step()
    moved = state.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    state.copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, want)
    assert torch.equal(state, moved)


@pytest.mark.parametrize("tied", [False, True])
def test_slots_more_than_2_31_elements_apart(tied):
    """What a slot holds does not depend on where it lies."""
    heads, headdim, dstate = (4, 64, 128) if tied else (1, 256, 16)
    shape, size = (2, heads, headdim, dstate), heads * headdim * dstate
    far = torch.empty(2 ** 31 + 8 + size, device="cuda", dtype=BF16).as_strided(
        shape, (2 ** 31 + 8, headdim * dstate, dstate, 1))
    near = torch.randn(shape, device="cuda", dtype=BF16)
    far.copy_(near)
    x = torch.randn(2, heads, headdim, device="cuda", dtype=BF16)
    B = torch.randn(2, 1, dstate, device="cuda", dtype=BF16)
    A = -torch.rand(heads, 1, 1, device="cuda").expand(shape[1:])
    dt = torch.randn(2, heads, 1, device="cuda", dtype=BF16).expand(-1, -1, headdim)
    if not tied:
        A, dt = A.contiguous(), dt.contiguous()
    group = torch.zeros(heads, dtype=torch.int32, device="cuda")
    ys = [cuda.state_update(state, x, dt, A, B, B, None, None, None, True, group, None) for state in (far, near)]
    assert torch.equal(*ys)
    assert torch.equal(far, near)
