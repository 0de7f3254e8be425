"""The Triton kernels on a GPU, at odd sizes, in every dtype, against the float64 reference."""

import math

import pytest
import torch
import triton_cases as cases

import shedder.ops as ops
import shedder.ops.ssd as ssd_op
from shedder import reference
from shedder.ops import first_call
from shedder.ops import triton as backend

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
              pytest.mark.skipif(backend.available() is not None, reason=f"triton backend: {backend.available()}")]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def in_each_dtype(first, *others):
    """The first case in three dtypes, the others in two: each takes a compilation."""
    pairs = [(F16, first)] + [(dtype, case) for case in (first, *others) for dtype in (F32, BF16)]
    return pytest.mark.parametrize(("dtype", "case"), pairs)


@in_each_dtype(
    {"length": 1, "groups": [1], "headdim": 64, "dstate": 128, "extras": True},
    {"length": 63, "groups": [41], "headdim": 13, "dstate": 5, "extras": False},
    {"length": 1000, "groups": [3, 0, 5], "headdim": 48, "dstate": 96, "extras": True, "channel_D": True},
    {"length": 1000, "groups": [75], "headdim": 60, "dstate": 100, "extras": True},
    {"length": 2047, "groups": [2, 1], "headdim": 61, "dstate": 101, "extras": True, "packed": True},
    {"length": 130, "groups": [0, 7], "headdim": 256, "dstate": 256, "extras": True, "packed": True},
    {"length": 257, "groups": [1], "headdim": 1, "dstate": 1, "extras": True},
    {"length": 100, "groups": [4], "headdim": 64, "dstate": 12, "extras": False, "packed": True},
)
def test_ssd(dtype, case):
    cases.check_ssd("cuda", dtype, **case)


@in_each_dtype(
    {"length": 1, "channels": 60, "dstate": 16, "extras": True},
    {"length": 63, "channels": 1536, "dstate": 12, "extras": True, "channel_last": True},
    {"length": 1000, "channels": 61, "dstate": 5, "groups": 3, "extras": True, "packed": True},
    {"length": 2047, "channels": 41, "dstate": 16, "extras": False},
    {"length": 130, "channels": 13, "dstate": 101, "groups": 2, "extras": True},
    {"length": 20, "channels": 7, "dstate": 256, "groups": 2, "extras": False},
    {"length": 65, "channels": 75, "dstate": 96, "extras": True, "constant": "BC"},
    {"length": 65, "channels": 75, "dstate": 12, "groups": 4, "extras": True, "constant": "C"},
)
def test_selective_scan(dtype, case):
    cases.check_selective_scan("cuda", dtype, **case)


@pytest.mark.parametrize(("dtype", "state_dtype", "case"), [
    (BF16, BF16, {"groups": [80], "headdim": 64, "dstate": 128, "tied": True, "extras": True, "indexed": True}),
    (BF16, F32, {"groups": [80], "headdim": 64, "dstate": 128, "tied": True, "extras": True, "indexed": True}),
    (F32, F32, {"groups": [3, 0, 5], "headdim": 60, "dstate": 100, "tied": True, "extras": True}),
    (F16, F16, {"groups": [3, 0, 5], "headdim": 60, "dstate": 100, "tied": True, "extras": True}),
    (BF16, F16, {"groups": [41], "headdim": 61, "dstate": 101, "tied": True, "extras": False}),
    (F32, BF16, {"groups": [41], "headdim": 61, "dstate": 101, "tied": True, "extras": False}),
    (BF16, F32, {"groups": [1], "headdim": 1537, "dstate": 12, "tied": False, "extras": True, "channel_groups": 3}),
    (F32, F32, {"groups": [1], "headdim": 75, "dstate": 256, "tied": False, "extras": True, "indexed": True}),
    (F16, F32, {"groups": [75], "headdim": 13, "dstate": 5, "tied": False, "extras": False}),
])
def test_state_update(dtype, state_dtype, case):
    cases.check_state_update("cuda", dtype, state_dtype=state_dtype, **case)


@pytest.mark.parametrize("channel_last", [False, True])
@in_each_dtype(
    {"channels": 1, "length": 1, "width": 4, "extras": True},
    {"channels": 61, "length": 63, "width": 3, "extras": True, "packed": True},
    {"channels": 5120, "length": 100, "width": 4, "extras": True},
    {"channels": 41, "length": 2047, "width": 4, "extras": True, "packed": True},
    {"channels": 75, "length": 1000, "width": 2, "extras": False, "packed": True},
    {"channels": 13, "length": 2, "width": 1, "extras": True},
)
def test_causal_conv1d(dtype, channel_last, case):
    cases.check_causal_conv1d("cuda", dtype, channel_last=channel_last, **case)


@pytest.mark.parametrize("channel_last", [False, True])
@in_each_dtype(
    {"channels": 5121, "tokens": 1, "width": 4, "kept": 4, "ring": False, "indexed": True},
    {"channels": 61, "tokens": 3, "width": 4, "kept": 3, "ring": False, "indexed": False},
    {"channels": 130, "tokens": 7, "width": 3, "kept": 5, "ring": True, "indexed": True},
    {"channels": 130, "tokens": 2, "width": 4, "kept": 6, "ring": True, "indexed": False},
    {"channels": 1, "tokens": 9, "width": 2, "kept": 64, "ring": False, "indexed": False},
)
def test_causal_conv1d_update(dtype, channel_last, case):
    cases.check_causal_conv1d_update("cuda", dtype, channel_last=channel_last, **case)


@in_each_dtype(
    {"rows": (2, 3), "segments": [61, 7, 200], "gated": True, "norm_before_gate": False, "bias": False},
    {"rows": (63,), "segments": [5120], "gated": True, "norm_before_gate": False, "bias": False},
    {"rows": (41,), "segments": [4999, 1], "gated": True, "norm_before_gate": True, "bias": True},
    {"rows": (1,), "segments": [16001], "gated": False, "norm_before_gate": True, "bias": False},
)
def test_gated_rmsnorm(dtype, case):
    cases.check_gated_rmsnorm("cuda", dtype, **case)


def far(values: torch.Tensor, dimension: int) -> torch.Tensor:
    """`values`, of size 2 in `dimension`, with its two halves more than 2^31 elements apart."""
    assert values.shape[dimension] == 2
    inner = torch.empty_like(values.select(dimension, 0).unsqueeze(dimension), memory_format=torch.contiguous_format)
    distance = 2 ** 31 + 64
    buffer = torch.empty(distance + inner.numel(), dtype=values.dtype, device=values.device)
    strides = list(inner.stride())
    strides[dimension] = distance
    return buffer.as_strided(values.shape, strides).copy_(values)


@pytest.fixture
def room_for_far_tensors():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2 ** 30:
        pytest.skip("takes 40 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dimension", ["batch", "time", "row"])
def test_addresses_beyond_32_bits(dimension, room_for_far_tensors):
    """2^31 elements between batches, tokens, or heads or channels, in bf16."""
    random = cases.Random("cuda")
    at = {"batch": 0, "time": 1, "row": 2}[dimension]
    x, z = (far(random.normal(2, 2, 2, 16, dtype=BF16), at) for _ in "xz")
    dt = far(random.normal(2, 2, 2, dtype=BF16), at)
    B, C = (far(random.normal(2, 2, 2, 16, dtype=BF16), at) for _ in "BC")
    A, heads = random.negative(2), cases.group_map([1, 1], "cuda")
    y, final = backend.ssd(x, dt, A, B, C, None, z, None, True, 0.0, math.inf, heads, None, None)
    expected, expected_final = reference.ssd(*(t.double() for t in (x, dt, A, B, C)), None, z.double(), None, True,
                                             head_to_group=heads)
    cases.assert_close("ssd", y, expected, BF16)
    cases.assert_close("final states", final, expected_final, BF16)
    del x, z, B, C
    torch.cuda.empty_cache()

    at = {"batch": 0, "time": 2, "row": 1}[dimension]
    u, gate, delta = (far(random.normal(2, 2, 2, dtype=BF16), at) for _ in range(3))
    B = far(random.normal(2, 2, 16, 2, dtype=BF16), {"batch": 0, "time": 3, "row": 1}[dimension])
    A, groups = random.negative(2, 16), torch.tensor([1, 0], dtype=torch.int32, device="cuda")
    y, _ = backend.selective_scan(u, delta, A, B, B, None, gate, None, True, None, groups, None)
    expected, _ = reference.selective_scan(*(t.double() for t in (u, delta, A, B, B)), None, gate.double(), None, True,
                                           channel_to_group=groups)
    cases.assert_close("selective scan", y, expected, BF16)
    weight = random.normal(2, 4)
    y, _ = backend.causal_conv1d(u, weight, None, True, None, None)
    expected, _ = reference.causal_conv1d(u.double(), weight.double(), None, "silu")
    cases.assert_close("causal conv1d", y, expected, BF16)
    del delta, B, gate
    torch.cuda.empty_cache()

    state = far(random.normal(2, 2, 2, 16, dtype=BF16), {"batch": 0, "time": 2, "row": 1}[dimension])
    before = state.double()
    x, B = random.normal(2, 2, 2), random.normal(2, 1, 16)
    A, heads = random.negative(2, 2, 16), torch.zeros(2, dtype=torch.int32, device="cuda")
    y = backend.state_update(state, x, x, A, B, B, None, None, None, True, heads, None)
    expected, expected_state = reference.state_update(before, *(t.double() for t in (x, x, A, B, B)), dt_softplus=True)
    cases.assert_close("state update", y, expected, F32)
    cases.assert_close("state", state, expected_state, BF16)
    if dimension != "time":
        rows = far(random.normal(2, 64, dtype=BF16), 0)
        y = backend.gated_rmsnorm(rows, weight.new_ones(64), None, rows, [40, 24], [1e-5, 1e-6], False)
        expected = reference.gated_rmsnorm(rows.double(), weight.new_ones(64), None, rows.double(), segments=[40, 24],
                                           eps=[1e-5, 1e-6], norm_before_gate=False)
        cases.assert_close("gated rmsnorm", y, expected, BF16)


class Model:
    """Every op once, on fixed tensors that can be refilled: what a stream or a graph runs."""

    def __init__(self):
        random = cases.Random("cuda", seed=7)
        self.x, self.z = (random.normal(1, 100, 3, 61) for _ in "xz")
        self.dt, self.B, self.C = random.normal(1, 100, 3), random.normal(1, 100, 2, 20), random.normal(1, 100, 2, 20)
        self.A, self.heads = random.negative(3), cases.group_map([1, 2], "cuda")
        self.channels_A, self.weight = random.negative(3, 20), random.normal(3, 4)
        self.seq_idx = random.sequences(1, 100)
        self.state, self.conv_state = random.normal(1, 3, 61, 20), random.normal(1, 3, 4)
        self.inputs = (self.x, self.z, self.dt, self.B, self.C)

    def refill(self, seed):
        random = cases.Random("cuda", seed)
        for tensor in (*self.inputs, self.state, self.conv_state):
            tensor.copy_(random.normal(*tensor.shape))

    def run(self):
        u, B = self.dt.mT, self.B[:, :, :1].permute(0, 2, 3, 1)
        step = (self.x[:, 0], self.dt[:, 0, :, None].expand(-1, -1, 61))
        return [
            *backend.ssd(self.x, self.dt, self.A, self.B, self.C, None, self.z, None, True, 0.0, math.inf, self.heads,
                         None, self.seq_idx),
            *backend.selective_scan(u, u, self.channels_A, B, B, None, None, None, True, None, None, None),
            *backend.causal_conv1d(u, self.weight, None, True, None, self.seq_idx),
            backend.gated_rmsnorm(self.x, self.x[0, 0, 0], None, self.z, [40, 21], [1e-5, 1e-6], True),
            backend.state_update(self.state, *step, self.A[:, None, None].expand(-1, 61, 20), self.B[:, 0],
                                 self.C[:, 0], None, None, None, True, self.heads, None),
            backend.causal_conv1d_update(u[..., :1], self.conv_state, self.weight, None, True, None, None),
            self.state, self.conv_state]


def outputs(model, seed):
    """What the model computes on a fresh fill, in the plain way."""
    model.refill(seed)
    return [t.clone() for t in model.run()]


def test_on_a_side_stream():
    model = Model()
    expected = outputs(model, seed=1)
    model.refill(seed=2)
    staged = [t.clone() for t in (*model.inputs, model.state, model.conv_state)]
    wanted = outputs(model, seed=2)
    model.refill(seed=1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)          # work on another stream would overtake the fill below
        for tensor, value in zip((*model.inputs, model.state, model.conv_state), staged):
            tensor.copy_(value)
        got = [t.clone() for t in model.run()]
    side.synchronize()
    for ours, right, stale in zip(got, wanted, expected):
        assert torch.equal(ours, right)
        assert not torch.equal(right, stale)


def test_in_a_cuda_graph():
    model = Model()
    model.run()                                 # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.run()
    for seed in (3, 4):
        wanted = outputs(model, seed)
        model.refill(seed)
        graph.replay()
        torch.cuda.synchronize()
        for ours, right in zip(captured, wanted):
            assert torch.equal(ours, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    model = Model()
    wanted = outputs(model, seed=5)
    other = torch.device("cuda", 1)
    for name, value in list(vars(model).items()):
        if isinstance(value, torch.Tensor):
            setattr(model, name, value.to(other))
    model.inputs = (model.x, model.z, model.dt, model.B, model.C)
    got = outputs(model, seed=5)
    for ours, right in zip(got, wanted):
        torch.testing.assert_close(ours, right.to(other))


def mixer_arguments(dtype, batch=3):
    """Of a mixer of 5 heads of 24 channels, whose first call of a dtype runs its parts side by side."""
    torch.manual_seed(3)
    inner, conv = 5 * 24, 5 * 24 + 2 * 20

    def rand(*shape):
        return torch.randn(shape, device="cuda").to(dtype)

    return {"zxbcdt": rand(batch, 70, inner + conv + 5), "conv1d_weight": rand(conv, 4), "conv1d_bias": rand(conv),
            "dt_bias": rand(5).float(), "A": -rand(5).float().abs(), "D": rand(5).float(), "chunk_size": 64,
            "rmsnorm_weight": rand(inner), "headdim": 24, "initial_states": rand(batch, 5, 24, 20).float(),
            "return_final_states": True, "backend": "triton"}


def mixer(arguments, **changes):
    return ops.mamba_split_conv1d_scan_combined(**arguments | changes)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_first_call_of_a_mixer_gives_what_others_do(dtype, monkeypatch):
    monkeypatch.setattr(first_call, "_known", set())
    runs = []
    monkeypatch.setattr(ssd_op, "run_side_by_side", lambda *given: runs.append(first_call.run_side_by_side(*given)))
    arguments, tolerance = mixer_arguments(dtype), 0.05 if dtype == BF16 else 1e-3
    first = mixer(arguments)
    assert len(runs) == 1
    for one, other, wanted in zip(first, mixer(arguments), mixer(arguments, backend="reference"), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=tolerance, atol=tolerance)
    assert len(runs) == 1


def test_the_first_call_of_a_mixer_names_what_is_wrong(monkeypatch):
    monkeypatch.setattr(first_call, "_known", set())
    with pytest.raises(ValueError, match=r"initial_states has shape \(2, 5, 24, 20\)"):
        mixer(mixer_arguments(F32), initial_states=torch.zeros(2, 5, 24, 20, device="cuda"))


def test_a_mixer_is_captured_though_it_is_the_first_of_its_kind(monkeypatch):
    arguments = mixer_arguments(F16)
    wanted = mixer(arguments)[0]                # compiles
    monkeypatch.setattr(first_call, "_known", set())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = mixer(arguments)[0]
    graph.replay()
    assert torch.equal(y, wanted)
